/**
 * Published runs of other systems that train on one card what it does not hold. Their plans are not ours: what is predicted is
 * how fast our planner's plan would be on their card, with as many tokens a step.
 */
import { traceModel } from "../../src/graph/index.js";
import type { Graph } from "../../src/graph/types.js";
import { type DecoderOptions, decoderConfig } from "../../src/models/decoder/config.js";
import { decoder } from "../../src/models/decoder/model.js";
import type { PlanRequest } from "../../src/plan/auto.js";
import { findProfile } from "../../src/plan/profiles.js";
import type { StateFormat } from "../../src/plan/types.js";

export interface OffloadRow {
  source: string;
  what: string;
  graph: Graph;
  request: PlanRequest;
  /** Of all cards. */
  tokensPerSecond: number;
  /** A pipeline over so many cards (planRanksAuto). */
  devices?: number;
  /** Whose rate of products is fitted, on the first of its rows; null: the profile's stands. */
  fitted: string | null;
}

const trained = (options: DecoderOptions): Graph =>
  traceModel(decoder, decoderConfig(options), { mode: "train", dtype: "bfloat16" });

/** Sizes of config.json of Qwen/Qwen2.5-* (arXiv 2412.15115). */
const qwen25 = {
  "0.5B": { vocabSize: 151_936, dim: 896, layers: 24, heads: 14, kvHeads: 2, ffn: 4864, tiedEmbeddings: true },
  "1.5B": { vocabSize: 151_936, dim: 1536, layers: 28, heads: 12, kvHeads: 2, ffn: 8960, tiedEmbeddings: true },
  "3B": { vocabSize: 151_936, dim: 2048, layers: 36, heads: 16, kvHeads: 2, ffn: 11_008, tiedEmbeddings: true },
  "7B": { vocabSize: 152_064, dim: 3584, layers: 28, heads: 28, kvHeads: 4, ffn: 18_944 },
  "14B": { vocabSize: 152_064, dim: 5120, layers: 48, heads: 40, kvHeads: 8, ffn: 13_824 },
} as const satisfies Record<string, DecoderOptions>;
/** Of Qwen/Qwen3-* (arXiv 2505.09388) and Llama 3.1 8B. */
const finetuned = {
  "Llama 3.1 8B": { vocabSize: 128_256, dim: 4096, layers: 32, heads: 32, kvHeads: 8, ffn: 14_336 },
  "Qwen3 1.7B": {
    vocabSize: 151_936,
    dim: 2048,
    layers: 28,
    heads: 16,
    kvHeads: 8,
    headDim: 128,
    ffn: 6144,
    tiedEmbeddings: true,
    qkNorm: true,
  },
  "Qwen3 32B": {
    vocabSize: 151_936,
    dim: 5120,
    layers: 64,
    heads: 64,
    kvHeads: 8,
    headDim: 128,
    ffn: 25_600,
    qkNorm: true,
  },
} as const satisfies Record<string, DecoderOptions>;

const rtx4090 = findProfile("rtx4090");

export function offloadRows(): OffloadRow[] {
  // LLMQ computes elementwise work in fused kernels of its own; its moments are bfloat16, ours float32. 500 GB of host memory
  // (its own words). 512 rows of 1,024 tokens a step; the 14B needs smaller micro-batches here than its 32 rows.
  const llmq = (name: keyof typeof qwen25, rows: number, tokensPerSecond: number): OffloadRow => ({
    source: "IST-DASLab/llmq benchmarks/4090x1.md (arXiv 2512.15306)",
    what: `Qwen2.5 ${name}, bf16, 1 RTX 4090`,
    graph: trained(qwen25[name]),
    request: {
      dims: { B: rows, T: 1024 },
      gradientAccumulationSteps: 512 / rows,
      state: { storage: "bfloat16", masterWeight: "none", optimizer: "adamw" },
      clip: "global",
      profile: { ...rtx4090, compiled: true },
      budget: { deviceBytes: 24e9, hostBytes: 500e9, diskBytes: 0 },
    },
    tokensPerSecond,
    fitted: null,
  });
  // RoundPipe computes in fp16 with fp16 sums, twice the rate of fp32 sums on this card: what it reaches is fitted. 800 GB of
  // host memory, float32 optimizer state.
  const state: StateFormat = { storage: "bfloat16", masterWeight: "float32", optimizer: "adamw" };
  const roundPipe = (
    name: keyof typeof finetuned,
    [B, count]: [number, number],
    tokensPerSecond: number,
  ): OffloadRow => ({
    source: "ITcarrot/RoundPipe-artifact exp/raw-data.csv (arXiv 2604.27085)",
    what: `${name}, fp16, 1 RTX 4090`,
    graph: trained(finetuned[name]),
    request: {
      dims: { B, T: 2048 },
      gradientAccumulationSteps: count,
      state,
      clip: "none",
      profile: rtx4090,
      budget: { deviceBytes: 24e9, hostBytes: 800e9, diskBytes: 0 },
    },
    tokensPerSecond,
    fitted: "RTX 4090, fp16 sums",
  });
  /**
   * The same over cards. Theirs shard or deal out; ours is a pipeline over blocks with 8 micro-batches a step, fewer than theirs:
   * where there are more, the tapes of alternating stages that the planner tries wait for each other for ever, and it ends.
   */
  const over = (
    devices: number,
    row: OffloadRow,
    B: number,
    tokensPerSecond: number,
    source = row.source,
  ): OffloadRow => ({
    ...row,
    source,
    what: row.what.replace("1 RTX 4090", `${devices} RTX 4090`),
    request: { ...row.request, dims: { ...row.request.dims, B }, gradientAccumulationSteps: 8 },
    tokensPerSecond,
    devices,
  });
  const four = "IST-DASLab/llmq benchmarks/4090x4.md (arXiv 2512.15306)";
  const llama = roundPipe("Llama 3.1 8B", [8, 32], 3142);
  return [
    llmq("0.5B", 16, 39_842),
    llmq("1.5B", 16, 14_072),
    llmq("3B", 16, 7004),
    llmq("7B", 16, 2777),
    llmq("14B", 16, 1348),
    over(4, llmq("7B", 16, 0), 16, 10_897, four),
    over(4, llmq("14B", 16, 0), 16, 5261, four),
    llama,
    roundPipe("Qwen3 1.7B", [8, 64], 8881),
    roundPipe("Qwen3 32B", [4, 32], 740),
    over(2, llama, 8, 6259),
    over(4, llama, 8, 12_278),
  ];
}
