/**
 * Runs of other systems on many cards that were published with what is needed to predict them. Each source's own words stand
 * beside what had to be assumed. Speeds are tokens a second a card.
 */

import { model, traceModel } from "../../src/graph/index.js";
import * as ops from "../../src/graph/ops.js";
import type { Graph } from "../../src/graph/types.js";
import { type DecoderOptions, decoderConfig } from "../../src/models/decoder/config.js";
import * as nn from "../../src/nn/index.js";
import { type ClusterProfile, findCluster } from "../../src/plan/cluster.js";
import type { ScaleRequest } from "../../src/plan/scale.js";
import { plainLlama } from "./plain-llama.js";

export interface PublishedRow {
  source: string;
  what: string;
  request: ScaleRequest;
  graph: Graph;
  tokensPerSecond: number;
  /** GiB a card, where it was told. */
  memory?: number;
  /** Whose rate of products is fitted, on the first of its rows; null: nothing is fitted, the profile's stands. */
  fitted: Kind | null;
}

/** Cards whose rate of products is fitted. */
export type Kind = "H100, 500 W" | "H100, 80 GB" | "H200";

const trained = (options: DecoderOptions): Graph =>
  traceModel(plainLlama, decoderConfig({ lossChunk: 65_536, ...options }), { mode: "train", dtype: "bfloat16" });

/** Sizes from the papers' tables: arXiv 2307.09288 (Llama 2), 2308.12950 (34B), 2407.21783 (Llama 3). */
export const llama = {
  "2-7b": trained({ vocabSize: 32_000, dim: 4096, layers: 32, heads: 32, ffn: 11_008 }),
  "2-13b": trained({ vocabSize: 32_000, dim: 5120, layers: 40, heads: 40, ffn: 13_824 }),
  "2-34b": trained({ vocabSize: 32_000, dim: 8192, layers: 48, heads: 64, kvHeads: 8, ffn: 22_016 }),
  "2-70b": trained({ vocabSize: 32_000, dim: 8192, layers: 80, heads: 64, kvHeads: 8, ffn: 28_672 }),
  "3-8b": trained({ vocabSize: 128_256, dim: 4096, layers: 32, heads: 32, kvHeads: 8, ffn: 14_336 }),
  "3-13b": trained({ vocabSize: 128_256, dim: 5120, layers: 40, heads: 40, kvHeads: 8, ffn: 17_920 }),
  "3-70b": trained({ vocabSize: 128_256, dim: 8192, layers: 80, heads: 64, kvHeads: 8, ffn: 28_672 }),
};

/** MosaicML's MPT: layer norms without biases, GELU over 4 D, learned positions, the head tied (mosaicml/llm-foundry). */
const mpt = model<{ dim: number; layers: number; heads: number }>("mpt", (m, { dim, layers, heads }) => {
  const [vocabSize, positions] = [50_368, 2048];
  const tokens = m.input("input_ids", "int64", ["B", "T"]);
  const labels = m.input("labels", "int64", ["B", "T"]);
  const at = m.input("position_ids", "int64", ["B", "T"]);
  let x = m.block("wte", (p) =>
    ops.add(nn.embedding(p, tokens, vocabSize, dim), nn.embedding(p.sub("wpe"), at, positions, dim)),
  );
  const layer = (p: Parameters<typeof nn.layerNorm>[0], h: typeof x) => {
    const options = { heads, kvHeads: heads, headDim: dim / heads, rotation: null };
    const y = ops.add(h, nn.selfAttention(p.sub("attn"), nn.layerNorm(p.sub("norm_1"), h, 1e-5), options));
    const up = ops.gelu(nn.linear(p.sub("up_proj"), nn.layerNorm(p.sub("norm_2"), y, 1e-5), 4 * dim));
    return ops.add(y, nn.linear(p.sub("down_proj"), up, dim));
  };
  x = m.repeat("blocks", layers, x, layer);
  return m.block("head", (p) =>
    nn.crossEntropyHead(p, nn.layerNorm(p.sub("norm_f"), x, 1e-5), labels, {
      vocabSize,
      tied: { path: "wte", name: "weight" },
      chunk: 65_536,
    }),
  );
});
const mosaic = (dim: number, layers: number, heads: number): Graph =>
  traceModel(mpt, { dim, layers, heads }, { mode: "train", dtype: "bfloat16" });
export const mpts = {
  "3b": mosaic(2560, 32, 20),
  "7b": mosaic(4096, 32, 32),
  "13b": mosaic(5120, 40, 40),
  "30b": mosaic(7168, 48, 64),
  "70b": mosaic(8192, 80, 64),
};

/** Bytes a second of a card's share of a node's network in Gbit/s, 94 % of the line rate as in cluster.ts. */
const share = (gigabits: number, cards: number): number => (gigabits / 8 / cards) * 0.94e9;

const [h100, h200, a100] = ["h100", "h200", "a100"].map(findCluster) as [
  ClusterProfile,
  ClusterProfile,
  ClusterProfile,
];
/** H100s of 96 GB HBM2e at 2.4 TB/s, 500 W, 400 Gb/s a card (torchtitan's own words). */
const grandTeton: ClusterProfile = {
  ...h100,
  cardBytes: 96 * 2 ** 30,
  card: { ...h100.card, deviceMemory: 0.9 * 2.4e12 },
};
/** A100s of 40 GB: 1,555 GB/s (NVIDIA's data sheet). */
const a100of40: ClusterProfile = { ...a100, cardBytes: 40e9, card: { ...a100.card, deviceMemory: 0.9 * 1.555e12 } };
const ofFour: ClusterProfile = { ...h200, perNode: 4 };

const common = {
  microBatches: 1,
  order: "depthFirst",
  compiled: false,
  state: { storage: "float32", masterWeight: "none", optimizer: "adamw" },
  reduceDType: "float32",
} as const;

/** Source by source. A row that is fitted on stands before the others of its kind. */
export function publishedRows(): PublishedRow[] {
  const titan = "torchtitan benchmarks/llama3_h100_202412_torchtitan.md";
  const hopper = (ranks: number, compiled: boolean, tokensPerSecond: number, memory: number): PublishedRow => ({
    source: titan,
    what: `Llama 3.1 8B, ${ranks} H100, 2 x 8,192, selective op, ${compiled ? "compiled" : "eager"}`,
    graph: llama["3-8b"],
    request: {
      ...common,
      ranks,
      compiled,
      dims: { B: 2, T: 8192 },
      recompute: "everySecondProduct",
      cluster: grandTeton,
    },
    tokensPerSecond,
    memory,
    fitted: "H100, 500 W",
  });
  const ampere = (
    name: keyof typeof llama,
    [B, T]: [number, number],
    recompute: ScaleRequest["recompute"],
    tokensPerSecond: number,
  ): PublishedRow => ({
    source: "torchtitan docs/performance.md (2024)",
    what: `Llama ${name}, 64 A100, ${B} x ${T}, ${recompute}`,
    graph: llama[name],
    request: { ...common, ranks: 64, dims: { B, T }, recompute, cluster: a100 },
    tokensPerSecond,
    fitted: null,
  });
  const ibm = (
    name: keyof typeof llama,
    cards: "A100" | "H100",
    recompute: ScaleRequest["recompute"],
    tokensPerSecond: number,
    shardGroup?: number,
  ): PublishedRow => ({
    source: "foundation-model-stack/fms-fsdp README.md",
    what: `Llama ${name}, ${cards === "A100" ? 128 : 96} ${cards}, 2 x 4,096, ${recompute}${shardGroup === undefined ? "" : ", hybrid"}`,
    graph: llama[name],
    request: {
      ...common,
      ranks: cards === "A100" ? 128 : 96,
      shardGroup,
      dims: { B: 2, T: 4096 },
      recompute,
      reduceDType: "bfloat16",
      cluster: cards === "A100" ? { ...a100, network: share(400, 8) } : { ...h100, network: share(800, 8) },
    },
    tokensPerSecond,
    fitted: cards === "A100" ? null : "H100, 80 GB",
  });
  const foundry = (
    name: keyof typeof mpts,
    cards: "A100 40GB" | "H100 80GB",
    ranks: number,
    [B, microBatches]: [number, number],
    recompute: ScaleRequest["recompute"],
    tokensPerSecond: number,
  ): PublishedRow => ({
    source: "mosaicml/llm-foundry scripts/train/benchmarking/README.md",
    what: `MPT ${name}, ${ranks} ${cards}, ${microBatches} x ${B} x 2,048, ${recompute}`,
    graph: mpts[name],
    request: {
      ...common,
      ranks,
      microBatches,
      dims: { B, T: 2048 },
      recompute,
      // "PURE" scatters bfloat16, "DEFAULT" float32.
      reduceDType: cards === "A100 40GB" ? "bfloat16" : "float32",
      cluster: cards === "A100 40GB" ? a100of40 : h100,
    },
    tokensPerSecond,
    fitted: cards === "A100 40GB" ? null : "H100, 80 GB",
  });
  const kempner = (
    name: keyof typeof llama,
    ranks: number,
    [B, microBatches]: [number, number],
    compiled: boolean,
    all: number,
  ): PublishedRow => ({
    source: "KempnerForge docs/reference/benchmarks.md",
    what: `Llama ${name}, ${ranks} H200, ${microBatches} x ${B} x 4,096, all, ${compiled ? "compiled" : "eager"}`,
    graph: llama[name],
    request: {
      ...common,
      ranks,
      microBatches,
      compiled,
      dims: { B, T: 4096 },
      recompute: "all",
      cluster: ofFour,
    },
    tokensPerSecond: all / ranks,
    fitted: "H200",
  });
  return [
    hopper(8, false, 5762, 82.4),
    hopper(8, true, 6667, 77.0),
    hopper(128, false, 5605, 67.0),
    hopper(128, true, 6514, 62.0),
    // Interconnect and compile are not told; 200 Gb/s a card and eager are assumed.
    ampere("3-8b", [1, 8192], "everySecondProduct", 2973),
    ampere("3-8b", [1, 8192], "everySecondLayer", 2904),
    ampere("3-70b", [1, 8192], "all", 331),
    ampere("2-13b", [2, 4096], "none", 2162),
    ampere("2-13b", [2, 4096], "everySecondLayer", 1914),
    ampere("2-13b", [2, 4096], "everySecondProduct", 1904),
    ampere("2-70b", [1, 4096], "everySecondProduct", 355),
    ampere("2-70b", [2, 4096], "all", 353),
    // 1,600 Gb/s a node of A100s (its own words); the H100s' network is not told.
    foundry("7b", "A100 40GB", 8, [12, 4], "all", 3679),
    foundry("7b", "A100 40GB", 32, [18, 1], "all", 3725),
    foundry("7b", "A100 40GB", 128, [18, 1], "all", 3623),
    foundry("13b", "A100 40GB", 16, [10, 1], "all", 1993),
    foundry("13b", "A100 40GB", 128, [16, 1], "all", 1972),
    foundry("30b", "A100 40GB", 32, [4, 1], "all", 857),
    foundry("30b", "A100 40GB", 128, [6, 1], "all", 865),
    foundry("70b", "A100 40GB", 64, [2, 1], "all", 276),
    foundry("70b", "A100 40GB", 128, [4, 1], "all", 376),
    foundry("13b", "H100 80GB", 8, [2, 1], "none", 4792),
    foundry("3b", "H100 80GB", 16, [10, 3], "none", 24_142),
    foundry("3b", "H100 80GB", 64, [6, 3], "none", 22_525),
    foundry("13b", "H100 80GB", 16, [2, 1], "none", 4767),
    foundry("13b", "H100 80GB", 32, [2, 1], "none", 4811),
    foundry("13b", "H100 80GB", 64, [2, 1], "none", 4800),
    foundry("30b", "H100 80GB", 32, [14, 3], "all", 2308),
    foundry("70b", "H100 80GB", 64, [8, 4], "all", 1039),
    // 400 and 800 Gb/s are taken for a node of 8; bfloat16 gradients are that repository's default policy. 13b is left out:
    // which blocks its "selective" computes again is not told.
    ibm("2-7b", "A100", "none", 3700, 8),
    ibm("2-34b", "A100", "all", 700),
    ibm("2-70b", "A100", "all", 370),
    ibm("2-7b", "H100", "none", 7500, 8),
    ibm("2-34b", "H100", "all", 1550),
    ibm("2-70b", "H100", "all", 800),
    // Four cards a node; the network is not told, 400 Gb/s a card are assumed.
    kempner("3-8b", 1, [2, 4], true, 10_471),
    kempner("3-8b", 2, [2, 4], true, 18_728),
    kempner("3-8b", 4, [4, 2], true, 38_983),
    kempner("3-13b", 8, [4, 4], false, 35_405),
  ];
}
