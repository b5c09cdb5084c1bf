/**
 * What it costs to keep everything on the host: breadth-first steps with parameters, moments and boundaries offloaded (a
 * SimDevice) against the same steps with everything resident (device cpu), in turn in one run. ratio = resident seconds /
 * offloaded seconds of a model of 100 M with copies as fast as memory is; 1 is free. `linked` is the same of a smaller
 * model with more tokens and copies as slow, beside this processor's products, as an RTX 4090's link is beside its own;
 * and depth-first over that link, whose weights cross it for every micro-batch.
 *
 * A SimDevice's copies take processor time from the passes, which a card's do not.
 *
 *   npm run bench -- offload [--model 100m] [--tokens 64] [--linked-model 10m] [--linked-tokens 512] [--steps 3]
 *                            [--accumulation 16] [--json]
 */
import { parseArgs } from "node:util";
import type { DecoderConfig } from "../src/models/decoder/config.js";
import { findModel } from "../src/models/registry.js";
import type { Policy } from "../src/plan/policy.js";
import type { Schedule, StateFormat } from "../src/plan/types.js";
import type { SimDeviceOptions } from "../src/train/native-session.js";
import {
  decoderBatch,
  eightBitState,
  float32State,
  interleave,
  median,
  openRun,
  processorFlops,
  unthrottled,
} from "./support/steps.js";

const { values } = parseArgs({
  options: {
    model: { type: "string", default: "100m" },
    tokens: { type: "string", default: "64" },
    "linked-model": { type: "string", default: "10m" },
    "linked-tokens": { type: "string", default: "512" },
    steps: { type: "string", default: "3" },
    accumulation: { type: "string", default: "16" },
    json: { type: "boolean", default: false },
  },
});
const rounds = Number(values.steps);
const microBatches = Number(values.accumulation);
/** What long bfloat16 products of a 4090 reach, and its link each way (plan/profiles.ts). */
const CARD = { flops: 150e12, link: 24e9 };

const policy = (schedule: Schedule, home: "device" | "host", state: StateFormat, T: number): Policy => ({
  schedule,
  recompute: "all",
  update: schedule === "depthFirst" ? "end" : "backward",
  clip: "block",
  state,
  microBatches,
  dims: { B: 1, T },
  param: home,
  optimizer: home,
  boundary: home,
  retained: "device",
  retainedDType: "float32",
  prefetch: home === "host" ? 1 : 0,
  parts: home === "host" ? 4 : 1,
});

interface Figures {
  residentSeconds: number;
  offloadedSeconds: number;
  ratio: number;
  /** The same of processor seconds: what is left to compare on a machine that others use too. */
  processorRatio: number;
  bytesToDevice: number;
  bytesFromDevice: number;
  deviceBytes: { resident: number; offloaded: number };
}

async function compare(model: string, T: number, state: StateFormat, sim: SimDeviceOptions, depthFirst: boolean) {
  const found = findModel(model);
  const graph = found.graph({ mode: "train", dtype: "float32" });
  const { vocabSize } = found.config as DecoderConfig;
  const batches = Array.from({ length: microBatches }, (_, m) => decoderBatch(graph, vocabSize, 1, T, m));
  const resident = await openRun(graph, policy("breadthFirst", "device", state, T), batches, { device: "cpu" });
  const offloaded = await openRun(graph, policy("breadthFirst", "host", state, T), batches, { device: "sim", sim });
  await interleave([resident, offloaded], rounds);
  if (resident.results.some((r, i) => r.gradNorm !== offloaded.results[i]!.gradNorm))
    throw new Error("the two sides do not compute the same: their norms differ");
  const [a, b] = [median(resident.seconds), median(offloaded.seconds)];
  const last = offloaded.results.at(-1)!;
  const figures: Figures = {
    residentSeconds: a,
    offloadedSeconds: b,
    ratio: a / b,
    processorRatio: median(resident.processorSeconds) / median(offloaded.processorSeconds),
    bytesToDevice: last.bytesToDevice,
    bytesFromDevice: last.bytesFromDevice,
    deviceBytes: { resident: resident.results.at(-1)!.peakDeviceBytes, offloaded: last.peakDeviceBytes },
  };
  await resident.session.dispose();
  await offloaded.session.dispose();
  if (!depthFirst) return figures;
  const deep = await openRun(graph, policy("depthFirst", "host", state, T), batches, { device: "sim", sim });
  const { seconds, bytesToDevice } = await deep.step();
  await deep.session.dispose();
  return { ...figures, depthFirst: { seconds, ratio: a / seconds, bytesToDevice } };
}

const plain = await compare(values.model, Number(values.tokens), float32State, unthrottled, false);
const flops = processorFlops();
const link = (CARD.link * flops) / CARD.flops;
const sim = { ...unthrottled, hostToDevice: link, deviceToHost: link };
const linked = await compare(values["linked-model"], Number(values["linked-tokens"]), eightBitState, sim, true);
const result = {
  name: "offload",
  unit: "resident seconds / offloaded seconds",
  model: values.model,
  tokens: Number(values.tokens),
  accumulation: microBatches,
  ...plain,
  linked: { model: values["linked-model"], tokens: Number(values["linked-tokens"]), flops, link, ...linked },
};
if (values.json) console.log(JSON.stringify(result));
else console.dir(result, { depth: null });
process.exit(0);
