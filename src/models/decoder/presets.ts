/** Named sizes. The counts in the comments are what `stroma inspect` prints. */
import { type DecoderConfig, type DecoderOptions, decoderConfig } from "./config.js";

/** The byte tokenizer's 256 bytes and special tokens, rounded up to a multiple of 4. */
const BYTES = 260;

const presets = {
  /** 0.77 M: learns the embedded data in minutes on two CPU cores. */
  tiny: { vocabSize: BYTES, dim: 128, layers: 4, heads: 4, kvHeads: 2, ffn: 352, tiedEmbeddings: true },
  /** 9.98 M, bytes. */
  "10m": { vocabSize: BYTES, dim: 384, layers: 6, heads: 6, kvHeads: 2, ffn: 1088, tiedEmbeddings: true },
  /** 100.1 M. */
  "100m": { vocabSize: 32_000, dim: 768, layers: 12, heads: 12, kvHeads: 4, ffn: 2048, tiedEmbeddings: true },
  /** 1.04 B: Llama 3.2 1B's layers with a vocabulary of 32,000. */
  "1b": {
    vocabSize: 32_000,
    dim: 2048,
    layers: 16,
    heads: 32,
    kvHeads: 8,
    ffn: 8192,
    ropeTheta: 500_000,
    tiedEmbeddings: true,
  },
  /** 7.24 B: the sizes of Mistral 7B (arXiv 2310.06825), full attention. */
  "7b": { vocabSize: 32_000, dim: 4096, layers: 32, heads: 32, kvHeads: 8, ffn: 14_336 },
  /** 8.03 B: the sizes of Llama 3 8B (arXiv 2407.21783). */
  "8b": {
    vocabSize: 128_256,
    dim: 4096,
    layers: 32,
    heads: 32,
    kvHeads: 8,
    ffn: 14_336,
    ropeTheta: 500_000,
    maxPositions: 8192,
  },
  /** 13.15 B: the astrobiology platform's width of 4,352 with heads of 128, which flash kernels take. */
  "astro-13b": { vocabSize: 32_000, dim: 4352, layers: 56, heads: 34, kvHeads: 2, headDim: 128, ffn: 14_528 },
} as const satisfies Record<string, DecoderOptions>;

export type DecoderPreset = keyof typeof presets;

/** Each gives a fresh config. */
export const decoderPresets = Object.fromEntries(
  Object.entries(presets).map(([name, options]) => [name, () => decoderConfig(options)]),
) as Record<DecoderPreset, () => DecoderConfig>;
