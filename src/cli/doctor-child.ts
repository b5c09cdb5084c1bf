/** The half of `stroma doctor` that may crash: one JSON line when a link begins and one when it ends. */
import { readFileSync, writeSync } from "node:fs";
import { currentBuild, loadAddon } from "../native.js";
import type { Batch } from "../train/native-session.js";
import type { Check, ChildLine, ChildLink } from "./doctor.js";

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
  const { probeMachine } = await import("../native.js");
  const machine = probeMachine();
  const cards = machine?.gpus.length ?? 0;
  if (cuda === null) {
    const cure = cards > 0 ? `${SETUP} --cuda` : null;
    return { ok: true, detail: cards > 0 ? `${cards} GPU, but this is a CPU build` : "CPU build, no GPU", cure };
  }
  const { tensor } = await import("../tensor/index.js");
  let works = 0;
  let why = "";
  for (let index = 0; index < Math.max(1, cards); index++) {
    try {
      const x = tensor([1, 2], { device: `cuda:${index}` });
      if (JSON.stringify((x as unknown as { toArray(): unknown }).toArray()) === "[1,2]") works++;
    } catch (error) {
      why = (error as Error).message.split("\n")[0] ?? "";
      break;
    }
  }
  if (works > 0) {
    return {
      ok: true,
      detail: `CUDA ${cuda} runs on ${works} GPU, driver ${machine?.driver?.version}`,
      cure: null,
      cudaDevices: works,
    };
  }
  const none = machine === null || machine.driver === null;
  return {
    ok: true,
    detail: `CUDA build, ${none ? "no driver" : `driver ${machine.driver?.version}, but no GPU runs`}: ${why}`,
    cure: `training runs on the CPU; for a GPU install an NVIDIA driver that runs CUDA ${cuda}`,
  };
}

/** Which NCCL ranks on cards would exchange over; without it they train all the same, over Gloo. */
function nccl(): Result {
  const version = loadAddon().ncclVersion();
  if (version !== null) return { ok: true, detail: `NCCL ${version}, for ranks with a card each`, cure: null };
  const cure = `for NCCL, let setup fetch libtorch: ${SETUP} --cuda with STROMA_LIBTORCH unset`;
  return { ok: true, detail: "none in this build: ranks on cards exchange over Gloo, through the host", cure };
}

async function trainingStep(): Promise<Result> {
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
    device: "cpu",
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
    const [first = Number.NaN, second = Number.NaN] = losses;
    const ok = second < first;
    return {
      ok,
      detail: `two steps of the tiny model: loss ${first.toFixed(4)}, ${second.toFixed(4)}`,
      cure: ok ? null : `${SETUP} --force`,
    };
  } finally {
    session.dispose();
  }
}

await link("addon", addon);
await link("operator", operator);
await link("openmp", openmp);
await link("gpu", gpu);
if (currentBuild().libtorch.cuda !== null) await link("nccl", nccl);
await link("training step", trainingStep);
process.exit(0);
