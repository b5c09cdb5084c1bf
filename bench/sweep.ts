/**
 * Step time and peak against device memory: one model, planned for ever less of it, every plan carried out on a SimDevice
 * that ends at exactly that much. Measured stands beside predicted.
 *
 *   npm run bench -- sweep [--layers 6] [--dim 384] [--tokens 64] [--micro-batches 4] [--rows 6] [--steps 2]
 *                          [--link 250MB] [--svg FILE] [--profile FOLDER] [--json]
 *
 * --link: bytes a second of the simulated link, each way. --profile: writes the profile of the smallest plan's last step.
 * Times are those of this machine's processors, whatever else runs on them: predictions use what `stroma doctor --measure`
 * stored, else the named profile "cpu".
 */
import { writeFileSync } from "node:fs";
import { parseArgs } from "node:util";
import { traceModel } from "../src/graph/index.js";
import { decoderConfig } from "../src/models/decoder/config.js";
import { decoder } from "../src/models/decoder/model.js";
import { currentBuild, loadAddon } from "../src/native.js";
import { type AutoPlan, planAuto } from "../src/plan/auto.js";
import { parseSize, showSize } from "../src/plan/budget.js";
import { checkTape } from "../src/plan/checker.js";
import { readMeasured } from "../src/plan/measured.js";
import { findProfile } from "../src/plan/profiles.js";
import { predictStep, writeProfile } from "../src/profile/index.js";
import type { Batch } from "../src/train/native-session.js";

const { values } = parseArgs({
  options: {
    layers: { type: "string", default: "6" },
    dim: { type: "string", default: "384" },
    tokens: { type: "string", default: "64" },
    "micro-batches": { type: "string", default: "4" },
    rows: { type: "string", default: "6" },
    steps: { type: "string", default: "2" },
    link: { type: "string", default: "250MB" },
    svg: { type: "string" },
    profile: { type: "string" },
    json: { type: "boolean", default: false },
  },
});
const say = (text: string) => values.json || console.log(text);
const dim = Number(values.dim);
const T = Number(values.tokens);
const accumulation = Number(values["micro-batches"]);
const link = parseSize(values.link, "link");
const config = decoderConfig({
  vocabSize: 260,
  dim,
  layers: Number(values.layers),
  heads: dim / 64,
  kvHeads: dim / 128,
  ffn: Math.round((dim * 2.75) / 64) * 64,
});
const graph = traceModel(decoder, config, { mode: "train", dtype: "float32" });
const parameters = graph.parameters.reduce((sum, p) => sum + p.shape.reduce((a, b) => a * b, 1), 0);
const measured = readMeasured();
// The device is simulated: its kernels are this machine's, and there is a link to it.
const machine = {
  ...(measured ?? findProfile("cpu")),
  device: "cuda",
  hostToDevice: link,
  deviceToHost: link,
} as const;
const state = { storage: "float32", masterWeight: "none", optimizer: "adamw" } as const;

const planFor = (cap: number): AutoPlan =>
  planAuto(graph, {
    dims: { B: 1, T },
    gradientAccumulationSteps: accumulation,
    state,
    clip: "block",
    profile: machine,
    budget: { deviceBytes: cap, hostBytes: 4e9, diskBytes: 0 },
  });

/** Nothing is missing from `most`; the least that fits is found by halving, to a hundredth. */
const most = Math.ceil(planFor(64e9).report.peakDeviceBytes / 0.95);
function least(): number {
  let [low, high] = [0, most];
  while (high - low > most / 200) {
    const middle = (low + high) / 2;
    if (planFor(middle).report.fits) high = middle;
    else low = middle;
  }
  return Math.ceil(high);
}
const bottom = least();
const count = Number(values.rows);
// Even steps of ratio: what changes lies at the small end.
const caps = Array.from({ length: count }, (_, i) => Math.ceil(most * (bottom / most) ** (i / (count - 1))));
caps[count - 1] = bottom;

const batchesOf = (rows: number, microBatches: number): Batch[] =>
  Array.from({ length: microBatches }, (_, m) => {
    const tokens = BigInt64Array.from({ length: rows * (T + 1) }, (_, t) =>
      BigInt((t * 7919 + m * 104_729 + 17) % 256),
    );
    const shape = [rows, T];
    const each = (of: (row: number, t: number) => bigint) =>
      BigInt64Array.from({ length: rows * T }, (_, k) => of(Math.floor(k / T), k % T));
    const columns: Record<string, BigInt64Array> = {
      input_ids: each((r, t) => tokens[r * (T + 1) + t]!),
      labels: each((r, t) => tokens[r * (T + 1) + t + 1]!),
      position_ids: each((_, t) => BigInt(t)),
      segment_ids: new BigInt64Array(rows * T),
    };
    return Object.fromEntries(
      graph.inputs.map(({ name }) => [name, { dtype: "int64" as const, shape, data: columns[name]! }]),
    );
  });

export interface SweepRow {
  capBytes: number;
  plan: string;
  predictedPeakBytes: number;
  measuredPeakBytes: number;
  predictedSeconds: number;
  measuredSeconds: number;
  /** Of this process in that step, all threads: what is left to compare on a machine that others use too. */
  processorSeconds: number;
  bytesToDevice: number;
  bytesFromDevice: number;
  loss: number;
}

async function row(cap: number, last: boolean): Promise<SweepRow> {
  const plan = planFor(cap);
  const { report, tapes, graph: planned } = plan;
  checkTape(planned, tapes.step);
  const predicted = predictStep(planned, tapes.step, machine, "cpu");
  const session = loadAddon().createSession({
    device: "sim",
    dtype: "float32",
    threads: 0,
    optimizer: { kind: "adamw", beta1: 0.9, beta2: 0.95, epsilon: 1e-8, weightDecay: 0.01 },
    sim: { memoryBytes: cap, hostToDevice: link, deviceToHost: link, adversary: null },
  });
  try {
    await session.load(planned, tapes.step.placement);
    await session.initialize(1);
    const { rows, count: microBatches } = report.microBatch;
    const step = async (n: number, profile = false) => {
      const began = process.cpuUsage();
      const result = await session.step({
        tape: tapes.step,
        ...(tapes.flush === null ? {} : { flush: tapes.flush }),
        microBatches: batchesOf(rows, microBatches),
        step: n,
        seed: 1,
        learningRate: 1e-3,
        maxGradNorm: 1,
        profile,
      });
      const { user, system } = process.cpuUsage(began);
      return { ...result, processorSeconds: (user + system) / 1e6 };
    };
    // The first step faults its pages in. Of the others the fastest: the machine may be shared.
    await step(0);
    let best = await step(1);
    let peak = best.peakDeviceBytes;
    for (let n = 2; n <= Number(values.steps); n++) {
      const next = await step(n);
      peak = Math.max(peak, next.peakDeviceBytes);
      if (next.seconds < best.seconds) best = next;
    }
    if (last && values.profile !== undefined) {
      const result = await step(Number(values.steps) + 1, true);
      const input = { graph: planned, tape: tapes.step, profile: result.profile!, result, predicted };
      await writeProfile(values.profile, { ...input, capBytes: cap, device: "sim", machine: machine.name });
    }
    return {
      capBytes: cap,
      plan: `${report.order}, ${report.microBatch.fused} fused, update ${report.update}, ${where(plan)}`,
      predictedPeakBytes: predicted.peaks.deviceBytes,
      measuredPeakBytes: peak,
      predictedSeconds: report.predictedStepSeconds,
      measuredSeconds: best.seconds,
      processorSeconds: best.processorSeconds,
      bytesToDevice: best.bytesToDevice,
      bytesFromDevice: best.bytesFromDevice,
      loss: best.loss,
    };
  } finally {
    await session.dispose();
  }
}

/** The share of parameters and of optimizer state that stays on the device. */
function where({ report: { placements } }: AutoPlan): string {
  const share = ({ device, host }: { device: number; host: number }) =>
    `${Math.round((device / (device + host)) * 100)} %`;
  return `on device: ${share(placements.parameters)} of parameters, ${share(placements.optimizer)} of state`;
}

/** Step time over device memory, both from zero; filled: measured, hollow: predicted. */
function plot(points: SweepRow[]): string {
  const [width, height, left, right, top, bottom] = [800, 420, 64, 24, 64, 56];
  const mostBytes = Math.max(...points.map((r) => r.capBytes)) * 1.03;
  const mostSeconds = Math.max(...points.flatMap((r) => [r.measuredSeconds, r.predictedSeconds])) * 1.1;
  const x = (bytes: number) => (left + (bytes / mostBytes) * (width - left - right)).toFixed(1);
  const y = (s: number) => (height - bottom - (s / mostSeconds) * (height - top - bottom)).toFixed(1);
  const ticks = (most: number, wanted: number) => {
    const unit = 10 ** Math.floor(Math.log10(most / wanted));
    const step = [1, 2, 5, 10].map((m) => m * unit).find((s) => s >= most / wanted)!;
    return Array.from({ length: Math.floor(most / step) + 1 }, (_, k) => k * step);
  };
  const series = (name: string, of: (r: SweepRow) => number, hollow: boolean) =>
    `<polyline class="${name}" fill="none" points="${points.map((r) => `${x(r.capBytes)},${y(of(r))}`).join(" ")}"/>` +
    points
      .map((r) => `<circle class="${name}${hollow ? " hollow" : ""}" cx="${x(r.capBytes)}" cy="${y(of(r))}" r="4"/>`)
      .join("");
  const title = `A step of ${(parameters / 1e6).toFixed(1)} M parameters over device memory`;
  const setting = `float32 AdamW, ${accumulation} micro-batches of 1 x ${T}; simulated device on two shared CPU cores, link ${showSize(link)}/s each way`;
  return `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${width} ${height}" font-family="system-ui, DejaVu Sans, sans-serif" font-size="12">
<style>.bg{fill:#fff}text{fill:#444}.t{fill:#111;font-size:15px;font-weight:600}line{stroke:#e4e6e8}.m{stroke:#2f6db5;stroke-width:2}circle.m{fill:#2f6db5}.p{stroke:#d9822b;stroke-width:2;stroke-dasharray:5 4}circle.p{stroke-dasharray:none}.hollow{fill:#fff}
@media (prefers-color-scheme: dark){.bg,.hollow{fill:#16181b}text{fill:#aeb6be}.t{fill:#f0f2f4}line{stroke:#2c3137}.m{stroke:#5f9be0}circle.m{fill:#5f9be0}}</style>
<rect class="bg" width="${width}" height="${height}"/>
<text class="t" x="${left}" y="24">${title}</text><text x="${left}" y="42">${setting}</text>
${ticks(mostSeconds, 6)
  .map(
    (s) =>
      `<line x1="${left}" x2="${width - right}" y1="${y(s)}" y2="${y(s)}"/><text x="${left - 8}" y="${y(s)}" dy="4" text-anchor="end">${Number(s.toFixed(2))} s</text>`,
  )
  .join("\n")}
${ticks(mostBytes, 8)
  .map((b) => `<text x="${x(b)}" y="${height - bottom + 18}" text-anchor="middle">${showSize(b)}</text>`)
  .join("\n")}
<text x="${(left + width - right) / 2}" y="${height - 14}" text-anchor="middle">device memory there is</text>
${series("p", (r) => r.predictedSeconds, true)}
${series("m", (r) => r.measuredSeconds, false)}
<g transform="translate(${width - right - 200}, ${top - 6})"><circle class="m" cx="6" cy="0" r="4"/><text x="16" dy="4">measured</text><circle class="p hollow" cx="96" cy="0" r="4"/><text x="106" dy="4">predicted</text></g>
</svg>
`;
}

say(
  `${parameters.toLocaleString("en")} parameters, float32, AdamW; ${accumulation} micro-batches of 1 x ${T}; link ${showSize(link)}/s each way`,
);
say(`rates: ${measured === null ? 'the named profile "cpu"' : "measured on this machine"}`);
say(
  `${"cap".padStart(9)} ${"peak: plan".padStart(11)} ${"measured".padStart(9)} ${"ratio".padStart(6)} ${"time: plan".padStart(11)} ${"measured".padStart(9)} ${"processor".padStart(10)}  plan`,
);
const rows: SweepRow[] = [];
for (const [i, cap] of caps.entries()) {
  const r = await row(cap, i === caps.length - 1);
  rows.push(r);
  const seconds = (s: number) => `${s.toFixed(2)} s`;
  say(
    `${showSize(r.capBytes).padStart(9)} ${showSize(r.predictedPeakBytes).padStart(11)} ${showSize(r.measuredPeakBytes).padStart(9)} ` +
      `${(r.measuredPeakBytes / r.predictedPeakBytes).toFixed(3).padStart(6)} ${seconds(r.predictedSeconds).padStart(11)} ${seconds(r.measuredSeconds).padStart(9)} ${seconds(r.processorSeconds).padStart(10)}  ${r.plan}`,
  );
}
if (values.svg !== undefined) writeFileSync(values.svg, plot(rows));
const worst = Math.max(...rows.map((r) => Math.abs(r.measuredPeakBytes / r.predictedPeakBytes - 1)));
console.log(
  JSON.stringify({
    name: "sweep",
    ratio: 1 + worst,
    unit: "worst measured / predicted device peak",
    parameters,
    libtorch: currentBuild().libtorch.version,
    rates: measured === null ? "cpu" : "measured",
    link,
    rows,
  }),
);
process.exit(0);
