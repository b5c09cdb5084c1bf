/**
 * What it costs to keep everything on the host: breadth-first steps with parameters, moments and boundaries offloaded (a
 * SimDevice) against the same steps with everything resident (device cpu), in turn in one run. ratio = resident seconds /
 * offloaded seconds of a model of 100 M with copies as fast as memory is; 1 is free.
 *
 * `linked` is the same over a link as slow, beside this processor's products, as an RTX 4090's is beside its own, in the
 * setting that offloading is for: bfloat16 parameters without masters, 8-bit moments, 32 micro-batches of 512 tokens. A
 * parameter then crosses in 2 bytes forward and 4.03 backward against 2 and 6 operations a token, so a 4090's link (24 GB/s
 * at 155 TFLOP/s) is hidden from 6,500 tokens a step on; these are 16,384. The model is small for the time that takes here, and
 * mostly layers, as large ones are. Boundaries stay on the device: a boundary's bytes over a layer's operations fall as 1 / dim,
 * and at 256 float32 values a token their way alone takes four times as long as the layer's forward (at astro-13b's 5,120 bfloat16
 * ones a seventh of it; --linked-boundary host shows it). Depth-first beside it: its weights cross the link for every micro-batch.
 * `card`: what the planner expects of astro-13b on a 4090 in the same setting, its boundaries on the host.
 *
 * A SimDevice's copies take processor time from the passes, which a card's do not.
 *
 *   npm run bench -- offload [--model 100m] [--tokens 64] [--accumulation 16] [--steps 3]
 *                            [--linked-tokens 512] [--linked-accumulation 32] [--linked-steps 2]
 *                            [--linked-boundary device|host] [--json]
 */
import { parseArgs } from "node:util";
import { traceModel } from "../src/graph/index.js";
import type { Graph } from "../src/graph/types.js";
import { type DecoderConfig, decoderConfig } from "../src/models/decoder/config.js";
import { decoder } from "../src/models/decoder/model.js";
import { findModel } from "../src/models/registry.js";
import type { Policy } from "../src/plan/policy.js";
import { findProfile } from "../src/plan/profiles.js";
import { simulate } from "../src/plan/simulate.js";
import type { Schedule, StateFormat } from "../src/plan/types.js";
import { writeTape } from "../src/plan/write-tape.js";
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
    accumulation: { type: "string", default: "16" },
    steps: { type: "string", default: "3" },
    "linked-tokens": { type: "string", default: "512" },
    "linked-accumulation": { type: "string", default: "32" },
    "linked-steps": { type: "string", default: "2" },
    "linked-boundary": { type: "string", default: "device" },
    json: { type: "boolean", default: false },
  },
});
const CARD = findProfile("rtx4090");

interface Setting {
  graph: Graph;
  vocabSize: number;
  state: StateFormat;
  T: number;
  microBatches: number;
  rounds: number;
  /** Of boundaries, where parameters are on the host. */
  boundary: "device" | "host";
}

const policy = (
  schedule: Schedule,
  home: "device" | "host",
  { state, T, microBatches, boundary }: Setting,
): Policy => ({
  schedule,
  recompute: "all",
  update: schedule === "depthFirst" ? "end" : "backward",
  clip: "block",
  state,
  microBatches,
  dims: { B: 1, T },
  param: home,
  optimizer: home,
  boundary: home === "host" ? boundary : home,
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

async function compare(setting: Setting, sim: SimDeviceOptions, depthFirst: boolean) {
  const { graph, vocabSize, T, microBatches, rounds } = setting;
  const batches = Array.from({ length: microBatches }, (_, m) => decoderBatch(graph, vocabSize, 1, T, m));
  const resident = await openRun(graph, policy("breadthFirst", "device", setting), batches, { device: "cpu" });
  const offloaded = await openRun(graph, policy("breadthFirst", "host", setting), batches, { device: "sim", sim });
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
  const deep = await openRun(graph, policy("depthFirst", "host", setting), batches, { device: "sim", sim });
  const { seconds, bytesToDevice } = await deep.step();
  await deep.session.dispose();
  return { ...figures, depthFirst: { seconds, ratio: a / seconds, bytesToDevice } };
}

/** Resident seconds / offloaded seconds of astro-13b on the card, as the planner expects them. */
function expectedOfCard({
  state,
  T,
  microBatches,
}: Setting): Pick<Record<Schedule, number>, "breadthFirst" | "depthFirst"> {
  const graph = findModel("astro-13b").graph({ mode: "train", dtype: "bfloat16" });
  const setting = { graph, vocabSize: 0, state, T, microBatches, rounds: 0, boundary: "host" } as const;
  const seconds = (schedule: Schedule, home: "device" | "host"): number =>
    simulate(graph, writeTape(graph, policy(schedule, home, setting)).step, CARD).seconds;
  const resident = seconds("breadthFirst", "device");
  return {
    breadthFirst: resident / seconds("breadthFirst", "host"),
    depthFirst: resident / seconds("depthFirst", "host"),
  };
}

const large = findModel(values.model);
const plainSetting: Setting = {
  graph: large.graph({ mode: "train", dtype: "float32" }),
  vocabSize: (large.config as DecoderConfig).vocabSize,
  state: float32State,
  T: Number(values.tokens),
  microBatches: Number(values.accumulation),
  rounds: Number(values.steps),
  boundary: "host",
};
const config = decoderConfig({ vocabSize: 512, dim: 256, layers: 6, heads: 4, kvHeads: 2, ffn: 768 });
const linkedSetting: Setting = {
  graph: traceModel(decoder, config, { mode: "train", dtype: "float32" }),
  vocabSize: config.vocabSize,
  state: eightBitState,
  T: Number(values["linked-tokens"]),
  microBatches: Number(values["linked-accumulation"]),
  rounds: Number(values["linked-steps"]),
  boundary: values["linked-boundary"] === "host" ? "host" : "device",
};
const card = expectedOfCard(linkedSetting);
const plain = await compare(plainSetting, unthrottled, false);
const flops = processorFlops();
const link = (CARD.hostToDevice * flops) / CARD.gemm.bfloat16.flops;
const linked = await compare(linkedSetting, { ...unthrottled, hostToDevice: link, deviceToHost: link }, true);
const { T, microBatches } = linkedSetting;
const result = {
  name: "offload",
  unit: "resident seconds / offloaded seconds",
  model: values.model,
  tokens: plainSetting.T,
  accumulation: plainSetting.microBatches,
  ...plain,
  linked: {
    model: "decoder 256 x 6",
    tokens: T,
    accumulation: microBatches,
    state: eightBitState,
    boundary: linkedSetting.boundary,
    flops,
    link,
    ...linked,
    card,
  },
};
if (values.json) console.log(JSON.stringify(result));
else console.dir(result, { depth: null });
process.exit(0);
