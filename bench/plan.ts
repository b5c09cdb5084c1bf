/**
 * Whether the planner's figures hold on this processor: the machine is measured, and step times and device peaks of ten
 * shapes and plans are measured and predicted, and of seven others that were held out while the model of time was made.
 * ratio = predicted seconds / measured seconds, the median of the ten.
 *
 *   npm run bench -- plan [--steps 2] [--json]
 */
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { parseArgs } from "node:util";
import { traceModel } from "../src/graph/index.js";
import { type DecoderOptions, decoderConfig } from "../src/models/decoder/config.js";
import { decoder } from "../src/models/decoder/model.js";
import { loadAddon } from "../src/native.js";
import { measureMachine } from "../src/plan/measure.js";
import { measureOnce, middleRates } from "../src/plan/measure-rates.js";
import type { Policy } from "../src/plan/policy.js";
import type { MachineProfile } from "../src/plan/profiles.js";
import type { MeasuredRates } from "../src/plan/rates.js";
import { simulate, tapePeaks } from "../src/plan/simulate.js";
import type { StateFormat } from "../src/plan/types.js";
import {
  decoderBatch,
  eightBitState,
  float32State,
  interleave,
  median,
  openRun,
  unthrottled,
} from "./support/steps.js";

const { values } = parseArgs({
  options: { steps: { type: "string", default: "2" }, json: { type: "boolean", default: false } },
});

interface Shape {
  dim: number;
  layers: number;
  vocab: number;
  B: number;
  T: number;
  microBatches: number;
  home: "device" | "host";
  state: StateFormat;
  policy?: Partial<Policy>;
  config?: Partial<DecoderOptions>;
}
const shape = (
  [dim, layers, vocab]: [number, number, number],
  [B, T, microBatches]: [number, number, number],
  home: "device" | "host",
  state: StateFormat,
  policy: Partial<Policy> = {},
  config: Partial<DecoderOptions> = {},
): Shape => ({ dim, layers, vocab, B, T, microBatches, home, state, policy, config });
const kept: Partial<Policy> = { schedule: "depthFirst", recompute: "none", update: "end" };
const masters: StateFormat = { storage: "bfloat16", masterWeight: "float32", optimizer: "adamw" };
const split: StateFormat = { storage: "bfloat16", masterWeight: "split16", optimizer: "adamw" };
const shapes: Shape[] = [
  shape([256, 4, 300], [1, 128, 4], "device", float32State),
  shape([384, 6, 300], [1, 256, 4], "device", float32State, kept),
  shape([384, 6, 300], [2, 256, 2], "host", float32State),
  shape([512, 4, 4096], [1, 256, 4], "device", float32State),
  shape([512, 4, 4096], [1, 256, 4], "host", eightBitState),
  shape([512, 8, 8192], [2, 128, 2], "device", eightBitState),
  shape([768, 4, 8192], [1, 128, 4], "host", float32State),
  shape([768, 4, 300], [1, 512, 2], "device", float32State),
  shape([1024, 3, 4096], [1, 128, 4], "device", float32State),
  shape([1024, 3, 4096], [1, 256, 2], "host", eightBitState),
];
/** None of these was looked at while the model of time was made. */
const heldOut: Shape[] = [
  shape([128, 4, 260], [8, 256, 2], "device", float32State),
  shape([320, 5, 1000], [3, 192, 3], "device", float32State, { ...kept, recompute: "all" }, { tiedEmbeddings: true }),
  shape([640, 4, 2048], [1, 384, 3], "device", masters, kept),
  shape([512, 4, 16_384], [1, 64, 8], "device", float32State),
  shape([896, 3, 300], [1, 1024, 1], "host", float32State),
  shape([256, 8, 512], [2, 512, 2], "device", eightBitState, {}, { documentMask: true, qkNorm: true }),
  shape([448, 5, 2000], [4, 96, 3], "host", split, { schedule: "depthFirst", update: "end" }),
];

async function open({ dim, layers, vocab, B, T, microBatches, home, state, policy: more, config: other }: Shape) {
  const heads = dim / 64;
  const config = decoderConfig({
    vocabSize: vocab,
    dim,
    layers,
    heads,
    kvHeads: heads % 2 === 0 ? heads / 2 : heads,
    ffn: dim * 3,
    ...other,
  });
  const graph = traceModel(decoder, config, { mode: "train", dtype: "float32" });
  const policy: Policy = {
    schedule: "breadthFirst",
    recompute: "all",
    update: "backward",
    clip: "block",
    state,
    microBatches,
    dims: { B, T },
    param: home,
    optimizer: home,
    boundary: home,
    retained: "device",
    retainedDType: "float32",
    prefetch: 1,
    parts: 4,
    ...more,
  };
  const batches = Array.from({ length: microBatches }, (_, m) => decoderBatch(graph, vocab, B, T, m));
  const device = home === "host" ? ({ device: "sim", sim: unthrottled } as const) : ({ device: "cpu" } as const);
  const name =
    `${dim} x ${layers}, ${vocab}; ${microBatches} of ${B} x ${T}; ${policy.schedule}, recompute ${policy.recompute}, ` +
    `${home}, ${state.storage} ${state.masterWeight} ${state.optimizer}`;
  return { name, graph, run: await openRun(graph, policy, batches, device) };
}
type Opened = Awaited<ReturnType<typeof open>>;

function row({ name, graph, run }: Opened, profile: MachineProfile) {
  const seconds = median(run.seconds);
  const { peakDeviceBytes } = run.results.at(-1)!;
  const predicted = simulate(graph, run.tape, profile);
  const peak = tapePeaks(graph, run.tape, "cpu").deviceBytes;
  const [timeError, peakError] = [predicted.seconds / seconds - 1, peak / peakDeviceBytes - 1].map((e) => e * 100);
  return {
    shape: name,
    predictedSeconds: predicted.seconds,
    seconds,
    timeErrorPercent: timeError!,
    predictedPeakBytes: peak,
    peakDeviceBytes,
    peakErrorPercent: peakError!,
  };
}
type Row = ReturnType<typeof row>;

loadAddon();
// The speed of a shared machine changes within minutes: three rounds of both, and of all figures the middle ones.
const opened: Opened[] = [];
for (const shape of [...shapes, ...heldOut]) opened.push(await open(shape));
const rates: MeasuredRates[] = [];
const measuring: number[] = [];
for (let round = 0; round < 3; round++) {
  const begin = performance.now();
  rates.push(measureOnce());
  measuring.push((performance.now() - begin) / 1e3);
  for (const { name, run } of opened) {
    // Steps of milliseconds differ more than those of seconds, and there is time for more of them.
    const steps = Math.max(Number(values.steps), Math.ceil(1.5 / (run.seconds.at(-1) ?? 1)));
    await interleave([run], steps);
    const last = run.seconds.slice(-steps);
    console.error(`${round + 1} of 3, ${name}: ${(median(last) * 1e3).toFixed(0)} ms`);
  }
}
const profile = measured(middleRates(rates[0]!, rates[1]!, rates[2]!));
const all = opened.map((it) => row(it, profile));
const [rows, heldOutRows] = [all.slice(0, shapes.length), all.slice(shapes.length)];
const worst = (of: readonly Row[], key: "timeErrorPercent" | "peakErrorPercent") =>
  Math.max(...of.map((r) => Math.abs(r[key])));
const result = {
  name: "plan",
  ratio: median(rows.map((r) => r.predictedSeconds / r.seconds)),
  unit: "predicted seconds / measured seconds",
  worstTimeErrorPercent: worst(rows, "timeErrorPercent"),
  worstPeakErrorPercent: worst([...rows, ...heldOutRows], "peakErrorPercent"),
  heldOutRatio: median(heldOutRows.map((r) => r.predictedSeconds / r.seconds)),
  heldOutWorstTimeErrorPercent: worst(heldOutRows, "timeErrorPercent"),
  measureSeconds: measuring.reduce((n, s) => n + s, 0),
  rows,
  heldOutRows,
};
if (values.json) console.log(JSON.stringify({ ...result, profile }));
else {
  console.table(rows);
  console.table(heldOutRows);
  console.log({ ...result, rows: undefined, heldOutRows: undefined });
}
process.exit(0);

/** Without leaving the profile where plans would find it: that is for `stroma doctor --measure` to do. */
function measured(rates: MeasuredRates): MachineProfile {
  const folder = mkdtempSync(join(tmpdir(), "stroma-bench-"));
  const before = process.env.STROMA_CACHE;
  process.env.STROMA_CACHE = folder;
  try {
    return measureMachine(rates);
  } finally {
    if (before === undefined) delete process.env.STROMA_CACHE;
    else process.env.STROMA_CACHE = before;
    rmSync(folder, { recursive: true });
  }
}
