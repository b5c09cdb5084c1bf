/** What defines a decoder: plain JSON, stored in its graph and checkpoints. */
import { invalidArgument, StromaError } from "../../errors.js";
import type { Llama3RopeScaling } from "../../graph/ops.js";

export interface DecoderConfig {
  /** V */
  vocabSize: number;
  /** D */
  dim: number;
  /** L */
  layers: number;
  /** N */
  heads: number;
  /** K; a divisor of `heads`. */
  kvHeads: number;
  /** H, even. */
  headDim: number;
  /** F */
  ffn: number;
  ropeTheta: number;
  ropeScaling: Llama3RopeScaling | null;
  normEps: number;
  /** The head shares the embedding's weight. */
  tiedEmbeddings: boolean;
  /** Biases on q, k, v and o projections. */
  attentionBias: boolean;
  mlpBias: boolean;
  /** RMS norm on each query and key head (Qwen3). */
  qkNorm: boolean;
  /** Probability of dropout on the embedding and on what each sublayer adds to the residual stream. */
  dropout: number;
  /** Packed documents do not see each other: the batch then needs segment_ids. */
  documentMask: boolean;
  /** Longest sequence that the model is meant for; positions beyond it work but were never trained. */
  maxPositions: number;
  /** Standard deviation of the initial weights; outputs into the residual stream get std / sqrt(2 L) (GPT-2). */
  initStd: number;
  /** Rows of logits that the loss holds at once; part of the definition (order of sums). */
  lossChunk: number;
}

export const decoderDefaults = {
  ropeTheta: 10_000,
  ropeScaling: null,
  normEps: 1e-5,
  tiedEmbeddings: false,
  attentionBias: false,
  mlpBias: false,
  qkNorm: false,
  dropout: 0,
  documentMask: false,
  maxPositions: 4096,
  initStd: 0.02,
  lossChunk: 1024,
} as const satisfies Partial<DecoderConfig>;

type Required_ = "vocabSize" | "dim" | "layers" | "heads" | "ffn";
export type DecoderOptions = Pick<DecoderConfig, Required_> & Partial<Omit<DecoderConfig, Required_>>;

/**
 * Fills defaults (kvHeads = heads, headDim = dim / heads) and checks every field. Throws INVALID_ARGUMENT naming the
 * field, and CONFIG for fields that contradict each other or are not known.
 */
export function decoderConfig(options: DecoderOptions): DecoderConfig {
  const config: DecoderConfig = {
    ...decoderDefaults,
    kvHeads: options.heads,
    headDim: options.dim / options.heads,
    ...options,
  };
  const at = (name: string) => `config.${name}`;
  for (const name of [
    "vocabSize",
    "dim",
    "layers",
    "heads",
    "kvHeads",
    "headDim",
    "ffn",
    "maxPositions",
    "lossChunk",
  ] as const) {
    const v = config[name];
    if (!Number.isSafeInteger(v) || v < 1)
      throw invalidArgument("decoder", "a whole number of at least 1", v, at(name));
  }
  if (config.layers > MAX_LAYERS)
    throw invalidArgument("decoder", `at most ${MAX_LAYERS} layers`, config.layers, at("layers"));
  for (const name of ["ropeTheta", "normEps", "initStd"] as const) {
    const v = config[name];
    if (!(Number.isFinite(v) && v > 0)) throw invalidArgument("decoder", "a number above 0", v, at(name));
  }
  for (const name of ["tiedEmbeddings", "attentionBias", "mlpBias", "qkNorm", "documentMask"] as const) {
    if (typeof config[name] !== "boolean") throw invalidArgument("decoder", "true or false", config[name], at(name));
  }
  if (typeof config.dropout !== "number" || !(config.dropout >= 0 && config.dropout < 1)) {
    throw invalidArgument("decoder", "a probability in [0, 1)", config.dropout, at("dropout"));
  }
  if (config.headDim % 2 !== 0) {
    throw invalidArgument("decoder", "an even head dim (rotary halves pair up)", config.headDim, at("headDim"));
  }
  if (config.heads % config.kvHeads !== 0) {
    throw new StromaError("CONFIG", `[decoder] heads ${config.heads} is not a multiple of kvHeads ${config.kvHeads}`);
  }
  if (config.ropeScaling !== null) {
    const s = config.ropeScaling;
    if (s.type !== "llama3") throw invalidArgument("decoder", 'type "llama3"', s.type, at("ropeScaling"));
    for (const name of ["factor", "lowFreqFactor", "highFreqFactor", "originalMaxPositions"] as const) {
      if (!(Number.isFinite(s[name]) && s[name] > 0))
        throw invalidArgument("decoder", "a number above 0", s[name], at(`ropeScaling.${name}`));
    }
    if (s.highFreqFactor <= s.lowFreqFactor) {
      throw new StromaError("CONFIG", "[decoder] ropeScaling.highFreqFactor must be above lowFreqFactor");
    }
  }
  const unknown = Object.keys(options).find((name) => !KNOWN.has(name));
  if (unknown !== undefined) throw new StromaError("CONFIG", `[decoder] config has no field ${unknown}`);
  return config;
}

/** Far above any model trained so far; planning takes minutes there, and a slip of the keyboard would take days. */
const MAX_LAYERS = 4096;

const KNOWN = new Set<string>([
  ...Object.keys(decoderDefaults),
  "vocabSize",
  "dim",
  "layers",
  "heads",
  "kvHeads",
  "headDim",
  "ffn",
] satisfies string[]);
