/** A random model with its batches, and a run of it under any plan: what the laws compare. */
import type { Graph } from "../../src/graph/types.js";
import type { NativeAddon } from "../../src/native.js";
import type { Clip, StateFormat, Tape } from "../../src/plan/types.js";
import type { Batch, HostTensor, SessionOptions, StepResult } from "../../src/train/native-session.js";
import { random, randomBatch, randomModel } from "../support/random-models.js";

export interface LawCase {
  graph: Graph;
  label: string;
  dtype: "float32" | "float64";
  state: StateFormat;
  clip: Clip;
  maxGradNorm: number | null;
  microBatches: number;
  dims: Record<string, number>;
  steps: { microBatches: Batch[]; step: number; seed: number; learningRate: number; maxGradNorm: number | null }[];
}

export const pick = <const T>(next: () => number, choices: readonly T[]): T =>
  choices[Math.floor(next() * choices.length)]!;

/** At least three micro-batches (two commute), of unequal size. */
export function lawCase(seed: number, steps = 3): LawCase {
  const next = random(seed + 500_009);
  const dtype = next() < 0.25 ? "float64" : "float32";
  const { graph, vocab, label } = randomModel(seed, dtype);
  const microBatches = 3 + Math.floor(next() * 3);
  const clip = pick<Clip>(next, ["none", "global", "block"]);
  const maxGradNorm = clip === "none" ? null : 0.1 + next() * 2;
  const storage = dtype === "float64" ? "float64" : pick(next, ["float32", "float32", "bfloat16"] as const);
  const masterWeight = storage === "bfloat16" ? pick(next, ["none", "split16", "float32"] as const) : "none";
  const optimizer = dtype === "float32" && next() < 0.4 ? "adamw8bit" : "adamw";
  return {
    graph,
    label: `${label} ${storage} ${masterWeight} ${optimizer}`,
    dtype,
    state: { storage, masterWeight, optimizer },
    clip,
    maxGradNorm,
    microBatches,
    dims: { B: 3, T: 12 },
    steps: Array.from({ length: steps }, (_, step) => ({
      microBatches: Array.from({ length: microBatches }, (_, m) =>
        randomBatch(graph, vocab, 1 + Math.floor(next() * 3), 4 + Math.floor(next() * 9), seed * 1000 + step * 10 + m),
      ),
      step,
      seed,
      learningRate: 1e-2 / (1 + step),
      maxGradNorm,
    })),
  };
}

export interface Outcome {
  results: StepResult[];
  /** "kind name" -> base64 */
  state: Map<string, string>;
}

/** A tensor's bytes, without a copy. */
export const bytesOf = (t: HostTensor): Buffer => Buffer.from(t.data.buffer, t.data.byteOffset, t.data.byteLength);

export async function trainCase(
  native: NativeAddon,
  options: SessionOptions,
  c: LawCase,
  plan: { step: Tape; flush: Tape | null },
): Promise<Outcome> {
  const session = native.createSession(options);
  try {
    await session.load(c.graph, plan.step.placement);
    await session.initialize(7);
    const results: StepResult[] = [];
    for (const step of c.steps)
      results.push(
        await session.step({ tape: plan.step, ...(plan.flush === null ? {} : { flush: plan.flush }), ...step }),
      );
    const state = new Map<string, string>();
    for (const { kind, name } of await session.state())
      state.set(`${kind} ${name}`, bytesOf(await session.read(kind, name)).toString("base64"));
    return { results, state };
  } finally {
    await session.dispose();
  }
}
