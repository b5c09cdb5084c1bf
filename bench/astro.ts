/**
 * Takes real optimizer steps of a large model on a small machine: parameters and optimizer state on disk, a simulated
 * device with a cap, a repeated small batch. Measured bytes, peaks and times stand beside the plan's.
 *
 *   npm run bench -- astro [--model astro-13b] [--layers N] [--device-memory 8GB] [--steps 4] [--tokens 32]
 *                          [--micro-batches 2] [--learning-rate 3e-5] [--disk-folder DIR] [--json]
 */
import { tmpdir } from "node:os";
import { parseArgs } from "node:util";
import { traceModel } from "../src/graph/index.js";
import { decoderConfig } from "../src/models/decoder/config.js";
import { decoder } from "../src/models/decoder/model.js";
import { decoderPresets } from "../src/models/decoder/presets.js";
import { currentBuild, loadAddon } from "../src/native.js";
import { parseSize } from "../src/plan/budget.js";
import { checkTape } from "../src/plan/checker.js";
import { passWorkspace } from "../src/plan/memory.js";
import { writeTape } from "../src/plan/write-tape.js";
import type { Batch } from "../src/train/native-session.js";

const { values } = parseArgs({
  options: {
    model: { type: "string", default: "astro-13b" },
    layers: { type: "string" },
    "device-memory": { type: "string", default: "8GB" },
    steps: { type: "string", default: "4" },
    tokens: { type: "string", default: "32" },
    "micro-batches": { type: "string", default: "2" },
    "learning-rate": { type: "string", default: "3e-5" },
    "disk-folder": { type: "string", default: tmpdir() },
    json: { type: "boolean", default: false },
  },
});
const say = (text: string) => values.json || console.log(`${new Date().toISOString().slice(11, 19)}  ${text}`);
const gb = (bytes: number) => `${(bytes / 1e9).toFixed(2)} GB`;

const preset = decoderPresets[values.model as keyof typeof decoderPresets]();
const config = decoderConfig({
  ...preset,
  layers: values.layers === undefined ? preset.layers : Number(values.layers),
});
const graph = traceModel(decoder, config, { mode: "train", dtype: "float32" });
const T = Number(values.tokens);
const microBatches = Number(values["micro-batches"]);
const cap = parseSize(values["device-memory"], "device-memory");
const dims = { B: 1, T };
const began = performance.now();
const { step: tape } = writeTape(graph, {
  schedule: "breadthFirst",
  recompute: "all",
  update: "backward",
  clip: "block",
  state: { storage: "bfloat16", masterWeight: "none", optimizer: "adamw8bit" },
  microBatches,
  dims,
  param: "disk",
  optimizer: "disk",
  boundary: "host",
  retained: "disk",
  retainedDType: "bfloat16",
  prefetch: 1,
  parts: 4,
});
checkTape(graph, tape);
const planSeconds = (performance.now() - began) / 1000;
const parameters = graph.parameters.reduce((sum, p) => sum + p.shape.reduce((a, b) => a * b, 1), 0);
const { arenas } = tape.placement;
const workspace = Math.max(
  ...graph.blocks.map((_, b) => {
    const pass = passWorkspace(graph, b, dims, { device: "cpu" });
    return Math.max(pass.forward, pass.backward);
  }),
);
const planned = (queue: string) =>
  tape.instructions.reduce((sum, i) => sum + (i.op === "copy" && i.queue === queue ? i.bytes : 0), 0);
const plan = {
  peakDeviceBytes: arenas.deviceBytes + workspace,
  peakHostBytes: arenas.hostBytes,
  peakDiskBytes: arenas.diskBytes,
  bytesToDevice: planned("in"),
  bytesFromDevice: planned("out"),
  bytesLoaded: planned("load"),
  bytesSaved: planned("save"),
};
say(`${values.model}, ${config.layers} layers: ${parameters.toLocaleString("en")} parameters, all trained`);
say(`bfloat16 with stochastic rounding, 8-bit AdamW, float32 arithmetic, ${microBatches} micro-batches of 1 x ${T}`);
say(`tape: ${tape.instructions.length} instructions, planned and proved in ${planSeconds.toFixed(1)} s`);
say(
  `plan: device ${gb(plan.peakDeviceBytes)} of ${gb(cap)} (arena ${gb(arenas.deviceBytes)}), host ${gb(plan.peakHostBytes)}, disk ${gb(plan.peakDiskBytes)}`,
);

const session = loadAddon().createSession({
  device: "sim",
  dtype: "float32",
  storage: "bfloat16",
  masterWeight: "none",
  threads: 0,
  optimizer: { kind: "adamw8bit", beta1: 0.9, beta2: 0.95, epsilon: 1e-8, weightDecay: 0.01 },
  sim: { memoryBytes: cap, hostToDevice: null, deviceToHost: null, adversary: null },
  diskFolder: values["disk-folder"],
});
const rows: Record<string, number>[] = [];
let seconds = performance.now();
await session.load(graph, tape.placement);
await session.initialize(1);
const initSeconds = (performance.now() - seconds) / 1000;
say(`parameters drawn and on disk after ${initSeconds.toFixed(0)} s`);

/** The same rows every step. */
const batches: Batch[] = Array.from({ length: microBatches }, (_, m) => {
  const tokens = BigInt64Array.from({ length: T + 1 }, (_, t) =>
    BigInt((t * 7919 + m * 104_729 + 17) % config.vocabSize),
  );
  const input = (data: BigInt64Array) => ({ dtype: "int64" as const, shape: [1, T], data });
  const zeros = new BigInt64Array(T);
  return {
    input_ids: input(tokens.slice(0, T)),
    labels: input(tokens.slice(1)),
    position_ids: input(BigInt64Array.from({ length: T }, (_, t) => BigInt(t))),
    segment_ids: input(zeros),
  };
}).map((batch) => Object.fromEntries(graph.inputs.map(({ name }) => [name, batch[name as keyof typeof batch]!])));

const names = ["param"] as const;
const probe = graph.parameters.filter((p) => p.shape.length === 2).map((p) => p.name);
const sample = async () => {
  const some = [probe[0]!, probe[Math.floor(probe.length / 2)]!, probe.at(-1)!];
  return Promise.all(
    some.map(async (name) => new Uint16Array((await session.read(names[0], name)).data.buffer.slice(0))),
  );
};
const before = await sample();
for (let step = 0; step < Number(values.steps); step++) {
  seconds = performance.now();
  const r = await session.step({
    tape,
    microBatches: batches,
    step,
    seed: 1,
    learningRate: Number(values["learning-rate"]),
    maxGradNorm: 1,
  });
  rows.push({
    step: step + 1,
    loss: r.loss,
    gradNorm: r.gradNorm,
    seconds: r.seconds,
    peakDeviceBytes: r.peakDeviceBytes,
    peakHostBytes: r.peakHostBytes - r.peakDeviceBytes,
    bytesToDevice: r.bytesToDevice,
    bytesFromDevice: r.bytesFromDevice,
    bytesLoaded: r.bytesLoaded,
    bytesSaved: r.bytesSaved,
    skippedBlocks: r.skippedBlocks.length,
    residentBytes: process.memoryUsage().rss,
  });
  say(
    `step ${step + 1}: loss ${r.loss.toFixed(4)}, norm ${r.gradNorm.toPrecision(4)}, ${r.seconds.toFixed(0)} s, device peak ${gb(r.peakDeviceBytes)}, ` +
      `host beside it ${gb(r.peakHostBytes - r.peakDeviceBytes)}, loaded ${gb(r.bytesLoaded)}, saved ${gb(r.bytesSaved)}, process ${gb(process.memoryUsage().rss)}`,
  );
  if (!Number.isFinite(r.loss)) break;
}
const after = await sample();
const changed = after.map((now, i) => now.reduce((n, x, j) => n + (x === before[i]![j] ? 0 : 1), 0) / now.length);
say(`share of changed weights in three matrices: ${changed.map((c) => c.toFixed(3)).join(", ")}`);
await session.dispose();
const last = rows.at(-1)!;
const ratio = last.peakDeviceBytes! / plan.peakDeviceBytes;
say(`device peak: measured ${gb(last.peakDeviceBytes!)}, plan ${gb(plan.peakDeviceBytes)}, ratio ${ratio.toFixed(3)}`);
for (const key of ["bytesToDevice", "bytesFromDevice", "bytesLoaded", "bytesSaved"] as const)
  say(`${key}: measured ${last[key]}, plan ${plan[key]}`);
console.log(
  JSON.stringify({
    name: "astro",
    ratio,
    unit: "measured / planned device peak",
    model: values.model,
    parameters,
    libtorch: currentBuild().libtorch.version,
    plan,
    initSeconds,
    changed,
    steps: rows,
  }),
);
process.exit(0);
