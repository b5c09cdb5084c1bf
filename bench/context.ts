/**
 * What a rank holds of a step when rows are shared out: highest bytes on the device (the processors' memory, as the engine
 * counts it) by ranks and kind of attention, of the fullest rank. State is the same on every rank, so `passesBytes` is beside
 * it: sums, boundaries and what passes compute with. `predicted`: the plan's peak over the measured one. Ranks are sessions of one process that talk over Gloo and loopback.
 *
 *   npm run bench -- context [--dim 256] [--layers 4] [--tokens 4096] [--recompute all] [--documents] [--json]
 */
import { createServer } from "node:net";
import { parseArgs } from "node:util";
import { splitBatch } from "../src/distributed/split-batch.js";
import { type ContextOptions, traceModel } from "../src/graph/index.js";
import { decoderConfig } from "../src/models/decoder/config.js";
import { decoder } from "../src/models/decoder/model.js";
import { loadAddon } from "../src/native.js";
import { planResident } from "../src/plan/planner.js";
import { tapePeaks } from "../src/plan/simulate.js";
import type { Recompute } from "../src/plan/types.js";
import { decoderBatch } from "./support/steps.js";

const { values } = parseArgs({
  options: {
    dim: { type: "string", default: "256" },
    layers: { type: "string", default: "4" },
    tokens: { type: "string", default: "4096" },
    recompute: { type: "string", default: "all" },
    documents: { type: "boolean", default: false },
    json: { type: "boolean", default: false },
  },
});
const [dim, layers, T] = [values.dim, values.layers, values.tokens].map(Number) as [number, number, number];
const recompute = values.recompute as Recompute;
const vocabSize = 1024;
const config = decoderConfig({
  vocabSize,
  dim,
  layers,
  heads: dim / 32,
  kvHeads: dim / 64,
  ffn: 3 * dim,
  lossChunk: 256,
  documentMask: values.documents,
});

const freePort = () =>
  new Promise<number>((done) => {
    const server = createServer().listen(0, "127.0.0.1", () => {
      const { port } = server.address() as { port: number };
      server.close(() => done(port));
    });
  });

async function measure(context: ContextOptions) {
  const { ranks: R } = context;
  const graph = traceModel(decoder, config, { context });
  const tape = planResident(graph, { microBatches: 1, recompute, clip: "none" });
  const whole = decoderBatch(graph, vocabSize, 1, T, 0);
  const spec = { size: R, address: "127.0.0.1", port: await freePort(), serve: true, prefix: "" };
  const one = async (rank: number) => {
    const ranks = await loadAddon().joinRanks({ ...spec, rank, joinSeconds: 30, silenceSeconds: 60 });
    const session = loadAddon().createSession({
      device: "cpu",
      dtype: "float32",
      threads: 1,
      optimizer: { kind: "adamw", beta1: 0.9, beta2: 0.95, epsilon: 1e-8, weightDecay: 0 },
      ...(R === 1 ? {} : { ranks, context: [...Array(R).keys()] }),
    });
    try {
      await session.load(graph);
      await session.initialize(1);
      const { batch, counts } = splitBatch(graph, whole, { rank, ranks: R });
      // Nothing is updated: ranks' gradients are not reduced here.
      const request = { tape, microBatches: [batch], counts, step: 0, seed: 1, learningRate: 0, maxGradNorm: null };
      const { peakDeviceBytes, seconds } = await session.step(request);
      const passes = peakDeviceBytes - session.stats().stateBytes;
      return { rank, peakDeviceBytes, passesBytes: passes, seconds };
    } finally {
      await session.dispose();
      await ranks.leave();
    }
  };
  const all = await Promise.all([...Array(R).keys()].map(one));
  const fullest = all.reduce((a, b) => (b.peakDeviceBytes > a.peakDeviceBytes ? b : a));
  const predicted = tapePeaks(graph, tape, "cpu", { B: 1, T: T / R }).deviceBytes;
  return { ...context, ...fullest, predicted: predicted / fullest.peakDeviceBytes };
}

const rows = [];
for (const context of [
  { ranks: 1, kind: "ring" },
  { ranks: 2, kind: "ring" },
  { ranks: 4, kind: "ring" },
  { ranks: 2, kind: "allToAll" },
  { ranks: 4, kind: "allToAll" },
] as const) {
  const row = await measure(context);
  rows.push(row);
  if (!values.json)
    console.log(
      `${context.ranks} ranks, ${context.ranks === 1 ? "whole rows" : context.kind}: peak ${(row.peakDeviceBytes / 1e6).toFixed(1)} MB, beside state ${(row.passesBytes / 1e6).toFixed(1)} MB, predicted ${row.predicted.toFixed(3)} of it`,
    );
}
console.log(JSON.stringify({ name: "context", dim, layers, T, recompute, documents: values.documents, rows }));
