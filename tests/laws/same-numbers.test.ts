/**
 * Law 1, same numbers: every schedule and recompute gives the parameters, moments and losses of the plain depth-first
 * run to the bit, and that one those of stock PyTorch. Models are random; each case takes three micro-batches or more,
 * because two commute.
 */
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { describe, expect, it } from "vitest";
import type { DType, Graph } from "../../src/graph/types.js";
import { packageRoot, readBuildRecord } from "../../src/native.js";
import { planResident } from "../../src/plan/planner.js";
import type { Recompute, Schedule } from "../../src/plan/types.js";
import type { Batch, HostTensor, NativeSession } from "../../src/train/native-session.js";
import { nativeOrSkip } from "../support/native.js";
import { oraclePython, runPython } from "../support/python.js";
import { random, randomBatch, randomModel } from "../support/random-models.js";

const native = nativeOrSkip();
const python = oraclePython();
const optimizer = { kind: "adamw", beta1: 0.9, beta2: 0.95, epsilon: 1e-8, weightDecay: 0.1 } as const;
const threads = Number(process.env.T ?? 2);

interface Case {
  graph: Graph;
  label: string;
  dtype: "float32" | "float64";
  steps: { microBatches: Batch[]; step: number; seed: number; learningRate: number; maxGradNorm: number | null }[];
}

function makeCase(seed: number, dtype: "float32" | "float64" = "float32"): Case {
  const { graph, vocab, label } = randomModel(seed, dtype);
  const next = random(seed + 1_000_003);
  const microBatches = 3 + Math.floor(next() * 3);
  const clip = next() < 0.7 ? 0.1 + next() * 3 : null;
  return {
    graph,
    label,
    dtype,
    steps: [0, 1, 2].map((step) => ({
      // Micro-batches of unequal size: each has its own B and T.
      microBatches: Array.from({ length: microBatches }, (_, m) =>
        randomBatch(graph, vocab, 1 + Math.floor(next() * 3), 4 + Math.floor(next() * 9), seed * 1000 + step * 10 + m),
      ),
      step,
      seed,
      learningRate: 1e-2 / (1 + step),
      maxGradNorm: clip,
    })),
  };
}

const bytes = (t: HostTensor) => Buffer.from(t.data.buffer, t.data.byteOffset, t.data.byteLength);
const encode = (t: HostTensor) => ({ dtype: t.dtype, shape: t.shape, data: bytes(t).toString("base64") });

async function open(dtype: DType, graph: Graph, seed: number): Promise<NativeSession> {
  const session = native!.createSession({ device: "cpu", dtype: dtype as "float32", threads, optimizer });
  await session.load(graph);
  await session.initialize(seed);
  return session;
}

interface Outcome {
  losses: number[];
  norms: number[];
  /** "kind name" -> base64 */
  state: Map<string, string>;
}

async function train(
  c: Case,
  schedule: Schedule,
  recompute: Recompute,
): Promise<Outcome & { initial: Record<string, unknown> }> {
  const session = await open(c.dtype, c.graph, 7);
  const initial: Record<string, unknown> = {};
  for (const p of c.graph.parameters) initial[p.name] = encode(await session.read("param", p.name));
  const outcome: Outcome = { losses: [], norms: [], state: new Map() };
  const tape = planResident(c.graph, { microBatches: c.steps[0]!.microBatches.length, schedule, recompute });
  for (const step of c.steps) {
    const result = await session.step({ tape, ...step });
    outcome.losses.push(result.loss);
    outcome.norms.push(result.gradNorm);
  }
  for (const { kind, name, dtype } of await session.state()) {
    if (kind === "step") continue;
    expect(dtype).toBe(c.dtype);
    outcome.state.set(`${kind} ${name}`, bytes(await session.read(kind, name)).toString("base64"));
  }
  await session.dispose();
  return { ...outcome, initial };
}

describe.skipIf(!native)("law 1: the same numbers, to the bit", () => {
  it("holds across orders and recompute on 24 random models", async () => {
    for (let seed = 1; seed <= 24; seed++) {
      const c = makeCase(seed);
      const plain = await train(c, "depthFirst", "none");
      for (const [schedule, recompute] of [
        ["breadthFirst", "none"],
        ["depthFirst", "all"],
        ["breadthFirst", "all"],
        ["depthFirst", "selective"],
        ["breadthFirst", "selective"],
      ] as const) {
        const other = await train(c, schedule, recompute);
        const where = `case ${seed}, ${schedule}, recompute ${recompute}: ${c.label}`;
        expect(other.state, where).toEqual(plain.state);
        expect(other.norms, where).toEqual(plain.norms);
        // Losses of several terms add in the order of the passes, so the reported sum may round elsewhere.
        for (const [i, loss] of other.losses.entries()) expect(loss, where).toBeCloseTo(plain.losses[i]!, 5);
      }
    }
  }, 300_000);

  it.skipIf(!python).each(["float32", "float64"] as const)(
    "equals stock PyTorch (backward, clip_grad_norm_, AdamW foreach=False) in %s",
    async (dtype) => {
      const cases = Array.from({ length: dtype === "float32" ? 40 : 15 }, (_, i) => makeCase(500 + i, dtype));
      const ours: Awaited<ReturnType<typeof train>>[] = [];
      for (const [i, c] of cases.entries())
        ours.push(await train(c, "breadthFirst", i % 2 === 0 ? "all" : "selective"));
      const theirs = await runPython<
        { losses: number[]; norms: number[]; state: Record<string, Record<string, { data: string }>> }[]
      >(fileURLToPath(new URL("../oracle/stock.py", import.meta.url)), [], {
        kernels: join(packageRoot, readBuildRecord().kernels!),
        cases: cases.map((c, i) => ({
          graph: c.graph,
          dtype: c.dtype,
          threads,
          optimizer,
          parameters: ours[i]!.initial,
          steps: c.steps.map((s) => ({
            ...s,
            microBatches: s.microBatches.map((b) =>
              Object.fromEntries(Object.entries(b).map(([k, t]) => [k, encode(t)])),
            ),
          })),
        })),
      });
      const differing: string[] = [];
      for (const [i, c] of cases.entries()) {
        const mine = ours[i]!;
        const stock = theirs[i]!;
        const rows = Object.entries(stock.state).flatMap(([kind, tensors]) =>
          Object.entries(tensors).map(([name, t]) => [`${kind} ${name}`, t.data] as const),
        );
        const unequal = rows.filter(([key, data]) => mine.state.get(key) !== data).map(([key]) => key);
        if (unequal.length > 0 || `${mine.norms}` !== `${stock.norms}`) {
          const facts = `${unequal.length} of ${rows.length} tensors (${unequal[0]}), norms ${mine.norms} / ${stock.norms}`;
          differing.push(`case ${i}: ${facts}, clip ${c.steps[0]!.maxGradNorm}: ${c.label}`);
        }
        for (const [s, loss] of stock.losses.entries()) expect(mine.losses[s]).toBeCloseTo(loss, 5);
      }
      expect(differing).toEqual([]);
    },
    300_000,
  );
});
