/**
 * A model that does not fit into a part of a card's memory, trained there by the plan that the planner finds, and with
 * everything resident on the whole card (unclipped, each block updated after its backward); one step to warm up each. ratio =
 * tokens a second within the cap / resident.
 *
 * --layers-torch N: so many of its layers by PyTorch's FSDP2 with CPU offload and its own AdamW, all in bfloat16, beside ours
 * within the same cap. All layers of astro-13b would take it more than twice the host memory that ours takes.
 *
 * --profile-folder: profiles of each side's last step.
 *
 * --plan-only: what is expected, by the profile of the card, or by --profile where there is none.
 *
 *   npm run bench -- card [--device cuda:0] [--model astro-13b] [--layers N] [--device-memory 24GB] [--host-memory 64GB]
 *                         [--micro-batches 32] [--tokens 512] [--clip global|block|none] [--steps 2] [--layers-torch 0]
 *                         [--profile-folder DIR] [--plan-only] [--profile h100] [--json]
 */
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";
import { type CardDevice, machineFacts, visibleCards } from "../src/device.js";
import { traceModel } from "../src/graph/index.js";
import { type DecoderConfig, decoderConfig } from "../src/models/decoder/config.js";
import { decoder } from "../src/models/decoder/model.js";
import { findModel } from "../src/models/registry.js";
import { planAuto } from "../src/plan/auto.js";
import { parseSize } from "../src/plan/budget.js";
import { readMeasured } from "../src/plan/measured.js";
import { residentPolicy } from "../src/plan/planner.js";
import type { Policy } from "../src/plan/policy.js";
import { cardProfile, findProfile } from "../src/plan/profiles.js";
import { simulate, tapePeaks } from "../src/plan/simulate.js";
import type { Clip } from "../src/plan/types.js";
import { writeTape } from "../src/plan/write-tape.js";
import { predictStep, writeProfile } from "../src/profile/index.js";
import { runPython, withTemporaryFolder } from "../tests/support/python.js";
import { decoderBatch, eightBitState, median, openRun } from "./support/steps.js";

const { values } = parseArgs({
  options: {
    device: { type: "string", default: "cuda:0" },
    model: { type: "string", default: "astro-13b" },
    layers: { type: "string" },
    "device-memory": { type: "string", default: "24GB" },
    "host-memory": { type: "string", default: "64GB" },
    "micro-batches": { type: "string", default: "32" },
    tokens: { type: "string", default: "512" },
    steps: { type: "string", default: "2" },
    clip: { type: "string", default: "global" },
    "profile-folder": { type: "string" },
    "layers-torch": { type: "string", default: "0" },
    profile: { type: "string", default: "h100" },
    "plan-only": { type: "boolean", default: false },
    json: { type: "boolean", default: false },
  },
});
const [T, microBatches, steps] = [values.tokens, values["micro-batches"], values.steps].map(Number) as [
  number,
  number,
  number,
];
const device = values.device as CardDevice;
const card = visibleCards(machineFacts()).find((c) => c.device === device);
const say = (text: string) => console.error(`${new Date().toISOString().slice(11, 19)}  ${text}`);
const gb = (bytes: number) => `${(bytes / 1e9).toFixed(2)} GB`;
const [cap, host] = [
  parseSize(values["device-memory"], "device-memory"),
  parseSize(values["host-memory"], "host-memory"),
];
const profile = card
  ? (card.name && readMeasured(card.name)) || cardProfile(card.name).profile
  : findProfile(values.profile);
const preset = findModel(values.model).config as DecoderConfig;
const configOf = (layers: string | undefined): DecoderConfig =>
  decoderConfig({ ...preset, layers: layers === undefined ? preset.layers : Number(layers) });

/** The fastest plan within that memory, as the planner sees it. */
function planned(name: string, config: DecoderConfig, clip: Clip) {
  const graph = traceModel(decoder, config, { mode: "train", dtype: "bfloat16" });
  const began = performance.now();
  const plan = planAuto(graph, {
    dims: { B: 1, T },
    gradientAccumulationSteps: microBatches,
    state: eightBitState,
    clip,
    profile,
    budget: { deviceBytes: cap, hostBytes: host, diskBytes: 0 },
  });
  const { report, policy } = plan;
  const { order, update, microBatch, placements, boundBy } = report;
  say(
    `${name}: ${order}, update ${update}, ${microBatch.rows} rows at once, planned in ${((performance.now() - began) / 1e3).toFixed(1)} s`,
  );
  for (const [kind, { device, host }] of Object.entries(placements))
    say(`${name}: ${kind}: card ${gb(device)}, host ${gb(host)}`);
  if (!report.fits) throw new Error(`${name}: nothing fits ${gb(cap)} beside ${gb(host)}`);
  return { name, config, graph: plan.graph, policy, deviceMemory: cap, boundBy };
}

/** Everything on the card, in the order and with the rows at once that the plan within the cap has. */
function resident({ config, policy: { microBatches, dims } }: ReturnType<typeof planned>) {
  const graph = traceModel(decoder, config, { mode: "train", dtype: "bfloat16" });
  const options = { recompute: "all", update: "backward", clip: "none", state: eightBitState } as const;
  const policy = residentPolicy(graph, { schedule: "breadthFirst", microBatches, ...options });
  const places: Policy = { ...policy, dims, boundary: "device" };
  return { name: "resident", config, graph, policy: places, deviceMemory: undefined, boundBy: "compute" };
}

type Side = ReturnType<typeof planned> | ReturnType<typeof resident>;

/** One step to warm up, then those that count. */
async function measured({ name, config, graph, policy, deviceMemory, boundBy }: Side) {
  const { step: tape } = writeTape(graph, policy);
  const predicted = simulate(graph, tape, profile);
  const peaks = tapePeaks(graph, tape, "cuda", policy.dims!);
  say(
    `${name}: ${predicted.seconds.toFixed(3)} s a step, card ${gb(peaks.deviceBytes)}, host ${gb(peaks.hostBytes)} predicted`,
  );
  if (values["plan-only"]) return { name, seconds: predicted.seconds };
  const batches = Array.from({ length: policy.microBatches }, (_, m) =>
    decoderBatch(graph, config.vocabSize, policy.dims!.B!, T, m),
  );
  let since = performance.now();
  const run = await openRun(graph, policy, batches, {
    device,
    dtype: "bfloat16",
    ...(deviceMemory === undefined ? {} : { deviceMemory }),
  });
  const openSeconds = (performance.now() - since) / 1e3;
  const { loadSeconds } = run;
  say(
    `${name}: memory taken in ${loadSeconds.toFixed(1)} s, parameters drawn in ${(openSeconds - loadSeconds).toFixed(1)} s`,
  );
  const results = [];
  for (let step = 0; step <= steps; step++) {
    const r = await run.step(values["profile-folder"] !== undefined && step === steps);
    results.push(r);
    say(
      `${name}: step ${step + 1}: loss ${r.loss.toFixed(4)}, norm ${r.gradNorm.toPrecision(4)}, ${r.seconds.toFixed(3)} s, peak ${gb(r.peakDeviceBytes)}`,
    );
  }
  const last = results.at(-1)!;
  if (last.profile !== undefined) {
    const folder = join(values["profile-folder"]!, name.replace(/\W+/g, "-"));
    const prediction = predictStep(graph, tape, profile, "cuda", policy.dims!);
    const input = {
      graph,
      tape,
      profile: last.profile,
      result: last,
      predicted: prediction,
      dims: policy.dims!,
      device,
    };
    await writeProfile(folder, { ...input, machine: profile.name });
  }
  since = performance.now();
  await run.session.dispose();
  say(`${name}: all given back in ${((performance.now() - since) / 1e3).toFixed(1)} s`);
  const seconds = median(results.slice(1).map((r) => r.seconds));
  return {
    name,
    tokensPerSecond: (microBatches * T) / seconds,
    seconds,
    predictedSeconds: predicted.seconds,
    openSeconds,
    loadSeconds,
    losses: results.map((r) => r.loss),
    norms: results.map((r) => r.gradNorm),
    peakDeviceBytes: last.peakDeviceBytes,
    predictedPeakDeviceBytes: peaks.deviceBytes,
    peakHostBytes: last.peakHostBytes - last.peakDeviceBytes,
    bytesToDevice: last.bytesToDevice,
    bytesFromDevice: last.bytesFromDevice,
    newDeviceSegments: results.map((r) => r.newDeviceSegments),
    boundBy,
  };
}

/** PyTorch's own way: one process, a unit a layer, parameters, gradients and AdamW's state on the host in bfloat16. */
async function torch(config: DecoderConfig, deviceBytes: number) {
  return withTemporaryFolder(async (folder) => {
    const file = join(folder, "setup.json");
    const setup = {
      config,
      rowTokens: T,
      batch: microBatches,
      microBatches,
      steps: 1,
      warmUp: 1,
      threads: 16,
      seed: 1,
    };
    const place = { device, offload: true, storage: "bfloat16", dtype: "bfloat16", deviceBytes, learningRate: 1e-4 };
    writeFileSync(file, JSON.stringify({ ...setup, ...place }));
    const script = fileURLToPath(new URL("fsdp2.py", import.meta.url));
    const loopback = { GLOO_SOCKET_IFNAME: "lo", NCCL_SOCKET_IFNAME: "lo" };
    const env = {
      ...loopback,
      RANK: "0",
      WORLD_SIZE: "1",
      LOCAL_RANK: "0",
      MASTER_ADDR: "127.0.0.1",
      MASTER_PORT: "29533",
    };
    const r = await runPython<{ secondsPerStep: number; losses: number[]; norms: number[]; peakDeviceBytes: number }>(
      script,
      ["--setup", file],
      null,
      { env },
    );
    return { ...r, tokensPerSecond: (microBatches * T) / r.secondsPerStep };
  });
}

const config = configOf(values.layers);
const plan = planned("capped", config, values.clip as Clip);
// The card's side first: it takes little of the host's memory, whose first touch may be slow.
const all = await measured(resident(plan));
const capped = await measured(plan);
const result: Record<string, unknown> = {
  name: "card",
  ratio: all.seconds / capped.seconds,
  unit: "tokens a second within the cap / resident on the whole card",
  card: card?.name ?? null,
  profile: profile.name,
  model: values.model,
  layers: config.layers,
  tokens: T,
  microBatches,
  clip: values.clip,
  ...{ capped, resident: all },
};
const layersTorch = Number(values["layers-torch"]);
if (layersTorch > 0 && !values["plan-only"]) {
  const some = configOf(values["layers-torch"]);
  const ours = await measured(planned(`capped, ${some.layers} layers`, some, values.clip as Clip));
  const theirs = await torch(some, cap);
  say(`FSDP2, ${some.layers} layers: ${theirs.secondsPerStep.toFixed(3)} s a step`);
  Object.assign(result, {
    torchRatio: theirs.secondsPerStep / ours.seconds,
    torch: { layers: layersTorch, ...theirs },
    besideTorch: ours,
  });
}
if (values.json) console.log(JSON.stringify(result));
else console.dir(result, { depth: null });
process.exit(0);
