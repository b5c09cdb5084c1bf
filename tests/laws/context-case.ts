/** A random small decoder whose rows are shared out to ranks of one process, beside one rank that has them whole. */

import { type SplitBatch, splitBatch } from "../../src/distributed/split-batch.js";
import { contextOf } from "../../src/graph/context.js";
import { traceModel } from "../../src/graph/trace.js";
import type { Graph } from "../../src/graph/types.js";
import { decoderConfig } from "../../src/models/decoder/config.js";
import { decoder } from "../../src/models/decoder/model.js";
import type { NativeAddon } from "../../src/native.js";
import { checkTape } from "../../src/plan/checker.js";
import { type PlanOptions, planResident } from "../../src/plan/planner.js";
import type {
  Batch,
  HostTensor,
  NativeRanks,
  NativeSession,
  SessionOptions,
  StepResult,
} from "../../src/train/native-session.js";
import { random, randomBatch } from "../support/random-models.js";
import { pick } from "./offload-case.js";

export type CaseDType = "float32" | "float64" | "bfloat16";

export interface ContextCase {
  label: string;
  dtype: CaseDType;
  ranks: number;
  whole: Graph;
  /** The same model, for `ranks`. */
  shared: Graph;
  evaluate: Graph;
  microBatches: Batch[];
  plan: Omit<PlanOptions, "microBatches">;
}

export function contextCase(seed: number, ranks: number, dtype: CaseDType): ContextCase {
  const next = random(seed * 7907 + ranks);
  const vocab = pick(next, [11, 37]);
  const kvHeads = pick(next, [1, 2, 3]);
  const allToAll = next() < 0.4;
  const heads = kvHeads * (allToAll ? ranks : pick(next, [1, 2, 3]));
  const kind = allToAll ? "allToAll" : "ring";
  const options = {
    vocabSize: vocab,
    dim: pick(next, [16, 24, 32]),
    layers: pick(next, [1, 2, 3]),
    heads,
    kvHeads,
    headDim: pick(next, [4, 8, 16]),
    ffn: pick(next, [24, 40]),
    tiedEmbeddings: next() < 0.5,
    attentionBias: next() < 0.3,
    qkNorm: next() < 0.4,
    documentMask: next() < 0.5,
    lossChunk: pick(next, [5, 16, 1024]),
    initStd: 0.2,
  } as const;
  const config = decoderConfig(options);
  const context = { ranks, kind } as const;
  const whole = traceModel(decoder, config, { dtype });
  const micro = 1 + Math.floor(next() * 3);
  const microBatches = Array.from({ length: micro }, (_, m) =>
    randomBatch(whole, vocab, 1 + Math.floor(next() * 3), 2 * ranks * (1 + Math.floor(next() * 5)), seed * 100 + m),
  );
  const plan = {
    schedule: pick(next, ["depthFirst", "breadthFirst"]),
    recompute: pick(next, ["none", "all", "selective"]),
    clip: "none",
  } as const;
  return {
    label: `seed ${seed}, ${dtype}, ${ranks} ranks, ${kind}, ${JSON.stringify({ ...options, ...plan, micro })}`,
    dtype,
    ranks,
    whole,
    shared: traceModel(decoder, config, { dtype, context }),
    evaluate: traceModel(decoder, config, { dtype, context, mode: "eval" }),
    microBatches,
    plan,
  };
}

export interface Step {
  result: StepResult;
  /** By parameter. */
  gradients: Map<string, Float64Array>;
}

const OPTIMIZER = { kind: "adamw", beta1: 0.9, beta2: 0.95, epsilon: 1e-8, weightDecay: 0 } as const;

export const sessionOptions = (dtype: CaseDType): SessionOptions => ({
  device: "cpu",
  dtype,
  threads: 1,
  optimizer: OPTIMIZER,
});

export const requestOf = (graph: Graph, plan: ContextCase["plan"], microBatches: Batch[]) => {
  const tape = planResident(graph, { ...plan, microBatches: microBatches.length });
  checkTape(graph, tape);
  return { tape, microBatches, step: 0, seed: 3, learningRate: 0, maxGradNorm: null };
};

/** A step of one rank that has the rows whole; `parameters`: those of another session, default drawn from a seed. */
export async function stepWhole(
  native: NativeAddon,
  c: ContextCase,
  dtype: CaseDType = c.dtype,
  parameters: Map<string, HostTensor> | null = null,
): Promise<Step & { parameters: Map<string, HostTensor> }> {
  const graph = dtype === c.dtype ? c.whole : retraced(c, dtype);
  return withSession(native.createSession(sessionOptions(dtype)), graph, async (session) => {
    for (const [name, tensor] of parameters ?? []) await session.write("param", name, tensor);
    const drawn = new Map<string, HostTensor>();
    for (const p of graph.parameters) drawn.set(p.name, await session.read("param", p.name));
    return { ...(await stepOf(session, graph, requestOf(graph, c.plan, c.microBatches))), parameters: drawn };
  });
}

const retraced = (c: ContextCase, dtype: CaseDType): Graph =>
  traceModel(decoder, c.whole.config as Parameters<typeof decoder.build>[1], { dtype });

/** What a rank's share of a micro-batch is; a planted fault gives another. */
export type Splitter = (graph: Graph, batch: Batch, rank: number, ranks: number) => SplitBatch;
export const split: Splitter = (graph, batch, rank, ranks) => splitBatch(graph, batch, { rank, ranks });

/** The share of one rank: its micro-batches, and counts over the whole rows. */
export function shareOf(c: Pick<ContextCase, "shared" | "ranks" | "microBatches">, rank: number, splitter = split) {
  const shares = c.microBatches.map((batch) => splitter(c.shared, batch, rank, c.ranks));
  const counts: Record<string, number> = {};
  for (const s of shares) for (const [name, n] of Object.entries(s.counts)) counts[name] = (counts[name] ?? 0) + n;
  return { microBatches: shares.map((s) => s.batch), counts };
}

/** A step of every rank, each with its share. */
export function stepShared(
  native: NativeAddon,
  ranks: readonly NativeRanks[],
  c: ContextCase,
  splitter: Splitter = split,
  counted = true,
): Promise<Step[]> {
  return Promise.all(
    ranks.map((r) =>
      withSession(openShared(native, r, c), c.shared, (session) => {
        const { microBatches, counts } = shareOf(c, r.rank, splitter);
        return stepOf(session, c.shared, {
          ...requestOf(c.shared, c.plan, microBatches),
          ...(counted ? { counts } : {}),
        });
      }),
    ),
  );
}

export const openShared = (native: NativeAddon, ranks: NativeRanks, c: Pick<ContextCase, "dtype" | "ranks">) =>
  native.createSession({ ...sessionOptions(c.dtype), ranks, context: [...Array(c.ranks).keys()] });

export async function withSession<T>(
  session: NativeSession,
  graph: Graph,
  work: (session: NativeSession) => Promise<T>,
): Promise<T> {
  try {
    await session.load(graph);
    await session.initialize(7);
    return await work(session);
  } finally {
    await session.dispose();
  }
}

async function stepOf(
  session: NativeSession,
  graph: Graph,
  request: Parameters<NativeSession["step"]>[0],
): Promise<Step> {
  const result = await session.step(request);
  const gradients = new Map<string, Float64Array>();
  for (const p of graph.parameters) gradients.set(p.name, numbers(await session.gradient(p.name)));
  return { result, gradients };
}

export function numbers({ dtype, data }: HostTensor): Float64Array {
  const bytes = data.buffer.slice(data.byteOffset, data.byteOffset + data.byteLength) as ArrayBuffer;
  return dtype === "float64" ? new Float64Array(bytes) : Float64Array.from(new Float32Array(bytes));
}

/** Gradients of all ranks' shares, added up. */
export function summed(steps: readonly Step[]): Map<string, Float64Array> {
  const sum = new Map([...steps[0]!.gradients].map(([name, g]) => [name, g.slice()]));
  for (const { gradients } of steps.slice(1))
    for (const [name, g] of gradients) for (const [i, x] of g.entries()) sum.get(name)![i]! += x;
  return sum;
}

/** Largest difference of any gradient, in units of its tensor's largest element. */
export function distance(a: Map<string, Float64Array>, b: Map<string, Float64Array>): number {
  let worst = 0;
  for (const [name, expected] of b) {
    const got = a.get(name)!;
    let largest = 0;
    let difference = 0;
    for (const [i, x] of expected.entries()) {
      largest = Math.max(largest, Math.abs(x));
      difference = Math.max(difference, Math.abs(got[i]! - x));
    }
    worst = Math.max(worst, Number.isFinite(difference) ? difference / largest : Number.POSITIVE_INFINITY);
  }
  return worst;
}

/** Whether the case's graphs say what they are for. */
export const isFor = (c: ContextCase): boolean =>
  contextOf(c.whole) === null && contextOf(c.shared)?.ranks === c.ranks && c.ranks > 1;
