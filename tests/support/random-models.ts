/** Random small models and batches for the laws: decoders of every option, and a graph with encoders, skips and ties. */
import { model, ops, traceModel } from "../../src/graph/index.js";
import type { DType, Graph } from "../../src/graph/types.js";
import { decoderConfig } from "../../src/models/decoder/config.js";
import { decoder } from "../../src/models/decoder/model.js";
import * as nn from "../../src/nn/index.js";
import type { Batch } from "../../src/train/native-session.js";

/** mulberry32: a small generator that a case's number seeds. */
export function random(seed: number): () => number {
  let a = seed >>> 0;
  return () => {
    a = (a + 0x6d2b79f5) >>> 0;
    let t = Math.imul(a ^ (a >>> 15), 1 | a);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
  };
}
const pick = <T>(next: () => number, choices: readonly T[]): T => choices[Math.floor(next() * choices.length)]!;

/**
 * Two encoders into a trunk; one encoder's output also skips ahead to the second trunk block, which uses it twice, and
 * to the head's block; the trunk's matrix is used by two blocks (tied); two loss terms of unequal weight; one parameter
 * is frozen.
 */
export const branched = model<{ dim: number; vocab: number }>("branched", (m, cfg) => {
  const tokens = m.input("input_ids", "int64", ["B", "T"]);
  const labels = m.input("labels", "int64", ["B", "T"]);
  const other = m.input("other_labels", "int64", ["B", "T"]);
  const D = cfg.dim;
  const a = m.block("left", (p) => ops.tanh(nn.embedding(p, tokens, cfg.vocab, D)));
  const b = m.block("right", (p) => {
    const frozen = p.param("frozen", [D], { trainable: false, init: { kind: "uniform", low: 0.5, high: 1.5 } });
    return ops.mul(nn.embedding(p, tokens, cfg.vocab, D), frozen);
  });
  const joined = m.block("join", (p) => {
    const w = p.param("weight", [D, D]);
    return ops.add(ops.linear(a, w), ops.mul(b, a));
  });
  const twice = m.block("twice", (p) => {
    const w = p.at("join").param("weight", [D, D]);
    const normed = nn.rmsNorm(p.sub("norm"), joined, 1e-5);
    return ops.add(ops.linear(ops.siluMul(normed, a), w), ops.mul(ops.sigmoid(a), ops.add(a, joined)));
  });
  m.block("first_head", (p) =>
    nn.crossEntropyHead(p, ops.add(twice, a), labels, { vocabSize: cfg.vocab, chunk: 7, name: "first", bias: true }),
  );
  return m.block("second_head", (p) =>
    nn.crossEntropyHead(p, ops.mul(twice, b), other, {
      vocabSize: cfg.vocab,
      chunk: 5,
      name: "second",
      lossWeight: 0.25,
    }),
  );
});

export interface RandomCase {
  graph: Graph;
  vocab: number;
  label: string;
  dtype: DType;
}

export function randomModel(seed: number, dtype: "float32" | "float64" = "float32"): RandomCase {
  const next = random(seed);
  const vocab = pick(next, [11, 37, 64]);
  if (next() < 0.3) {
    const dim = pick(next, [8, 12, 20]);
    const graph = traceModel(branched, { dim, vocab }, { mode: "train", dtype });
    return { graph, vocab, label: `branched dim ${dim} vocab ${vocab}`, dtype };
  }
  const headDim = pick(next, [4, 8, 16]);
  const kvHeads = pick(next, [1, 2]);
  const heads = kvHeads * pick(next, [1, 2, 3]);
  const options = {
    vocabSize: vocab,
    dim: pick(next, [16, 24, 32]),
    layers: pick(next, [1, 2, 3]),
    heads,
    kvHeads,
    headDim,
    ffn: pick(next, [24, 40]),
    tiedEmbeddings: next() < 0.5,
    attentionBias: next() < 0.3,
    mlpBias: next() < 0.3,
    qkNorm: next() < 0.4,
    dropout: next() < 0.4 ? 0.2 : 0,
    documentMask: next() < 0.4,
    lossChunk: pick(next, [5, 16, 1024]),
    initStd: 0.2,
    ropeScaling:
      next() < 0.3
        ? ({ type: "llama3", factor: 8, lowFreqFactor: 1, highFreqFactor: 4, originalMaxPositions: 16 } as const)
        : null,
  };
  const graph = traceModel(decoder, decoderConfig(options), { mode: "train", dtype });
  return { graph, vocab, label: JSON.stringify(options), dtype };
}

/** int64 batches that the graph's inputs ask for; about a fifth of the labels are absent. */
export function randomBatch(graph: Graph, vocab: number, B: number, T: number, seed: number): Batch {
  const next = random(seed);
  const batch: Batch = {};
  const segments = new BigInt64Array(B * T);
  const positions = new BigInt64Array(B * T);
  for (let row = 0; row < B; row++) {
    let segment = 0n;
    let position = 0n;
    for (let t = 0; t < T; t++) {
      if (t > 0 && next() < 0.2) {
        segment++;
        position = 0n;
      }
      segments[row * T + t] = segment;
      positions[row * T + t] = position++;
    }
  }
  for (const input of graph.inputs) {
    const data = new BigInt64Array(B * T);
    if (input.name === "segment_ids") data.set(segments);
    else if (input.name === "position_ids") data.set(positions);
    else {
      const labels = input.name.includes("labels");
      for (let i = 0; i < data.length; i++) {
        data[i] = labels && next() < 0.2 ? -100n : BigInt(Math.floor(next() * vocab));
      }
      if (labels) data[0] = 1n;
    }
    batch[input.name] = { dtype: "int64", shape: [B, T], data };
  }
  return batch;
}
