/** What the benchmarks of plans share: a decoder under several plans, one step of each in turn. */
import type { Graph } from "../../src/graph/types.js";
import { loadAddon } from "../../src/native.js";
import type { Policy } from "../../src/plan/policy.js";
import type { StateFormat, Tape } from "../../src/plan/types.js";
import { writeTape } from "../../src/plan/write-tape.js";
import { callOp, noGrad, scope, type Tensor } from "../../src/tensor/index.js";
import type { Batch, NativeSession, SessionOptions, StepResult } from "../../src/train/native-session.js";

export const median = (x: readonly number[]): number => {
  const sorted = x.toSorted((a, b) => a - b);
  return (sorted[(sorted.length - 1) >> 1]! + sorted[sorted.length >> 1]!) / 2;
};

/** Rows [B, T] of tokens below vocab, the same for the same m. */
export function decoderBatch(graph: Graph, vocab: number, B: number, T: number, m: number): Batch {
  const tokens = BigInt64Array.from({ length: B * T + 1 }, (_, i) => BigInt((i * 7919 + m * 104_729 + 17) % vocab));
  const data: Record<string, BigInt64Array> = {
    input_ids: tokens.slice(0, B * T),
    labels: tokens.slice(1),
    position_ids: BigInt64Array.from({ length: B * T }, (_, i) => BigInt(i % T)),
    segment_ids: new BigInt64Array(B * T),
  };
  return Object.fromEntries(
    graph.inputs.map(({ name }) => [name, { dtype: "int64", shape: [B, T], data: data[name]! }]),
  );
}

export interface Run {
  tape: Tape;
  session: NativeSession;
  /** What it took to make room for its state, before it was drawn. */
  loadSeconds: number;
  /** Of measured steps. */
  seconds: number[];
  /** Of this process, all threads: what is left to compare on a machine that others use too. */
  processorSeconds: number[];
  results: StepResult[];
  step(profile?: boolean): Promise<StepResult>;
}

/** A session of float32 arithmetic with the plan's tape, initialized. */
export async function openRun(
  graph: Graph,
  policy: Policy,
  batches: Batch[],
  options: Pick<SessionOptions, "device"> & Partial<SessionOptions>,
): Promise<Run> {
  const { storage, masterWeight, optimizer: kind } = policy.state;
  const { step: tape, flush } = writeTape(graph, policy);
  const session = loadAddon().createSession({
    dtype: "float32",
    storage,
    masterWeight,
    threads: 0,
    optimizer: { kind, beta1: 0.9, beta2: 0.95, epsilon: 1e-8, weightDecay: 0.1 },
    ...options,
  });
  const began = performance.now();
  await session.load(graph, tape.placement);
  const loadSeconds = (performance.now() - began) / 1e3;
  await session.initialize(1);
  let step = 0;
  return {
    tape,
    session,
    loadSeconds,
    seconds: [],
    processorSeconds: [],
    results: [],
    step: (profile = false) =>
      session.step({
        tape,
        profile,
        ...(flush === null ? {} : { flush }),
        microBatches: batches,
        step: step++,
        seed: 1,
        learningRate: 1e-4,
        maxGradNorm: policy.clip === "none" ? null : 1,
      }),
  };
}

/** A warm-up of each run, then `rounds` steps of each in turn. */
export async function interleave(runs: readonly Run[], rounds: number): Promise<void> {
  for (let round = -1; round < rounds; round++)
    for (const run of runs) {
      const began = process.cpuUsage();
      const result = await run.step();
      if (round < 0) continue;
      const { user, system } = process.cpuUsage(began);
      run.processorSeconds.push((user + system) / 1e6);
      run.seconds.push(result.seconds);
      run.results.push(result);
    }
}

export const unthrottled = { memoryBytes: null, hostToDevice: null, deviceToHost: null, adversary: null };
export const float32State: StateFormat = { storage: "float32", masterWeight: "none", optimizer: "adamw" };
export const eightBitState: StateFormat = { storage: "bfloat16", masterWeight: "none", optimizer: "adamw8bit" };

/** Floating-point operations a second of a float32 product [512, 1024] x [1024, 1024]: the median of 15. */
export function processorFlops(): number {
  const ones = (rows: number) => callOp("aten::ones", [[rows, 1024]], { dtype: "float32" }) as Tensor;
  return noGrad(() =>
    scope(() => {
      const [x, w] = [ones(512), ones(1024)];
      const seconds = Array.from({ length: 18 }, () => {
        const begin = performance.now();
        scope(() => void callOp("aten::mm", [x, w]));
        return (performance.now() - begin) / 1e3;
      });
      return (2 * 512 * 1024 * 1024) / median(seconds.slice(3));
    }),
  );
}
