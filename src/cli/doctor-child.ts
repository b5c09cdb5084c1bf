/** The half of `stroma doctor` that may crash: one JSON line when a link begins and one when it ends. */
import { readFileSync, writeSync } from "node:fs";
import { type Device, machineFacts, visibleCards, whyNoCard } from "../device.js";
import { currentBuild, loadAddon, type MemoryNodes } from "../native.js";
import type { Batch } from "../train/native-session.js";
import type { Check, ChildLine, ChildLink } from "./doctor.js";
import { besideCards } from "./doctor-nodes.js";

type Result = Omit<Check, "name"> & { cudaDevices?: number };
const SETUP = "npx stroma setup";

/** Written at once: a crash in the next statement must not lose it. */
const say = (line: ChildLine) => writeSync(1, `${JSON.stringify(line)}\n`);

async function link(name: ChildLink, work: () => Result | Promise<Result>): Promise<void> {
  say({ begin: name });
  let result: Result;
  try {
    result = await work();
  } catch (error) {
    result = { ok: false, detail: (error as Error).message.split("\n")[0] ?? "", cure: SETUP };
  }
  say({ end: name, ...result });
  if (!result.ok) process.exit(0); // the links after it would fail by the same cause
}

function addon(): Result {
  const loaded = loadAddon();
  return { ok: true, detail: `loads; ${loaded.operatorNames().length} operators`, cure: null };
}

async function operator(): Promise<Result> {
  const { callOp, tensor } = await import("../tensor/index.js");
  const x = tensor([
    [1, 2],
    [3, 4],
  ]);
  const y = callOp("aten::mm", [x, x]) as { toArray(): unknown };
  const got = JSON.stringify(y.toArray());
  const ok = got === "[[7,10],[15,22]]";
  return { ok, detail: `aten::mm of 2x2 gives ${got}`, cure: ok ? null : `${SETUP} --force` };
}

/** Two OpenMP runtimes in one process deadlock or compute wrongly; libtorch brings its own. */
function openmp(): Result {
  const files = new Set(
    readFileSync("/proc/self/maps", "utf8")
      .split("\n")
      .map((line) => /\s(\/\S*lib(?:g|i)?omp[\w.-]*\.so\S*)$/.exec(line)?.[1])
      .filter((path) => path !== undefined),
  );
  const ok = files.size <= 1;
  return {
    ok,
    detail: files.size === 0 ? "none" : [...files].join(", "),
    cure: ok ? null : "start without LD_PRELOAD and LD_LIBRARY_PATH; one OpenMP runtime is one too many here",
  };
}

/** No GPU never fails: training runs on the CPU. It is said what stands between this build and a GPU. */
async function gpu(): Promise<Result> {
  const { cuda } = currentBuild().libtorch;
  const facts = machineFacts();
  const cards = visibleCards(facts);
  const none = whyNoCard(facts, cards);
  if (cuda === null) {
    const here = cards.length;
    return {
      ok: true,
      detail: here > 0 ? `${here} GPU, but this is a CPU build` : "CPU build, no GPU",
      cure: here > 0 ? `${SETUP} --cuda` : null,
    };
  }
  const { tensor } = await import("../tensor/index.js");
  let works = 0;
  let why = none === null ? "" : String(none.details.why);
  for (const { device } of cards.length > 0 ? cards : [{ device: "cuda:0" as const }]) {
    try {
      const x = tensor([1, 2], { device });
      if (JSON.stringify((x as unknown as { toArray(): unknown }).toArray()) === "[1,2]") works++;
    } catch (error) {
      why ||= (error as Error).message.split("\n")[0] ?? "";
      break;
    }
  }
  const driver = facts.probe?.driver ?? null;
  if (works > 0) {
    const out = cards.filter((c) => c.unusable !== null).map((c) => `${c.device} is left out: ${c.unusable}`);
    const beside = besideCards(
      cards.filter((c) => c.unusable === null).map(({ device }) => ({ device, ...nodesOf(device) })),
    );
    return {
      ok: true,
      detail: [`CUDA ${cuda} runs on ${works} GPU, driver ${driver?.version}`, ...beside.detail, ...out].join("; "),
      cure: beside.cure,
      cudaDevices: works,
    };
  }
  return {
    ok: true,
    detail: `CUDA build, ${driver === null ? "no driver" : `driver ${driver.version}, but no GPU runs`}: ${why}`,
    cure: `training runs on the CPU; ${none === null ? `for a GPU install an NVIDIA driver that runs CUDA ${cuda}` : `for a GPU: ${String(none.details.cure)}`}`,
  };
}

function nodesOf(device: Device): MemoryNodes {
  const addon = loadAddon();
  return addon.memoryNodes(addon.busAddress(Number(device.split(":")[1])));
}

/** Which NCCL ranks on cards would exchange over; without it they train all the same, over Gloo. */
function nccl(): Result {
  const version = loadAddon().ncclVersion();
  if (version !== null) return { ok: true, detail: `NCCL ${version}, for ranks with a card each`, cure: null };
  const cure = `for NCCL, let setup fetch libtorch: ${SETUP} --cuda with STROMA_LIBTORCH unset`;
  return { ok: true, detail: "none in this build: ranks on cards exchange over Gloo, through the host", cure };
}

/** Two steps of the tiny model, on the processors and on every card that can be used. */
async function trainingStep(): Promise<Result> {
  const cards =
    currentBuild().libtorch.cuda === null || whyNoCard(machineFacts()) !== null ? [] : visibleCards(machineFacts());
  const devices: Device[] = ["cpu", ...cards.filter((c) => c.unusable === null).map((c) => c.device)];
  const said: string[] = [];
  for (const device of devices) {
    const [first = Number.NaN, second = Number.NaN] = await twoSteps(device);
    const on = devices.length === 1 ? "" : ` on ${device}`;
    said.push(`loss ${first.toFixed(4)}, ${second.toFixed(4)}${on}`);
    if (!(second < first)) return { ok: false, detail: `${STEPS}: ${said.join("; ")}`, cure: `${SETUP} --force` };
  }
  return { ok: true, detail: `${STEPS}: ${said.join("; ")}`, cure: null };
}
const STEPS = "two steps of the tiny model";

async function twoSteps(device: Device): Promise<number[]> {
  const { findModel } = await import("../models/registry.js");
  const { planResident } = await import("../plan/planner.js");
  const graph = findModel("tiny").graph({ mode: "train" });
  const sizes: Record<string, number> = { B: 1, T: 16 };
  const batch: Batch = {};
  for (const { name, dtype, shape } of graph.inputs) {
    if (dtype !== "int64") throw new Error(`input ${name}: ${dtype} is not known here`);
    const dims = shape.map((dim) => (typeof dim === "number" ? dim : (sizes[dim] ?? 1)));
    const elements = dims.reduce((product, dim) => product * dim, 1);
    batch[name] = { dtype, shape: dims, data: BigInt64Array.from({ length: elements }, (_, i) => BigInt(i % 7)) };
  }
  const session = loadAddon().createSession({
    device,
    dtype: "float32",
    threads: 0,
    optimizer: { kind: "adamw", beta1: 0.9, beta2: 0.95, epsilon: 1e-8, weightDecay: 0.1 },
  });
  try {
    await session.load(graph);
    await session.initialize(1);
    const tape = planResident(graph, { microBatches: 1 });
    const losses: number[] = [];
    for (let step = 0; step < 2; step++) {
      const result = await session.step({
        tape,
        microBatches: [batch],
        step,
        seed: 1,
        learningRate: 1e-3,
        maxGradNorm: 1,
      });
      losses.push(result.loss);
    }
    return losses;
  } finally {
    await session.dispose();
  }
}

await link("addon", addon);
await link("operator", operator);
await link("openmp", openmp);
await link("gpu", gpu);
if (currentBuild().libtorch.cuda !== null) await link("nccl", nccl);
await link("training step", trainingStep);
process.exit(0);
