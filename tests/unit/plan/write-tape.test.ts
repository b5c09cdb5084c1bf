import fc from "fast-check";
import { describe, expect, it } from "vitest";
import { type BlockScope, model } from "../../../src/graph/model.js";
import * as ops from "../../../src/graph/ops.js";
import { traceModel } from "../../../src/graph/trace.js";
import type { Graph } from "../../../src/graph/types.js";
import type { Value } from "../../../src/graph/value.js";
import { checkTape } from "../../../src/plan/checker.js";
import { PAGE } from "../../../src/plan/layout.js";
import { residentPolicy } from "../../../src/plan/planner.js";
import type { Place, Tape } from "../../../src/plan/types.js";
import { queueOf } from "../../../src/plan/waits.js";
import { type Policy, writeTape } from "../../../src/plan/write-tape.js";
import { random } from "../../support/random-models.js";
import { graphs, policies } from "./random-policies.js";
import { Machine, type Outcome } from "./replay.js";

/** The auxiliary loss, whose passes all stand in the backward, is the first to use a matrix of the trunk. */
const lossOwns = model<null>("loss-owns", (m) => {
  const labels = m.input("labels", "int64", ["B"]);
  const x = m.input("x", "float32", ["B", 4]);
  const first = m.block("first", (p) => ops.linear(x, p.param("weight", [4, 4])));
  const loss = (p: BlockScope, name: string, v: Value) => {
    const scaled = ops.mul(ops.sum(ops.mul(v, v), []), p.lossScale(name));
    p.loss(name, scaled, { count: labels, ignore: -100 });
    return scaled;
  };
  m.block("aux", (p) => loss(p, "aux", ops.linear(first, p.param("weight", [4, 4]))));
  const second = m.block("second", (p) => ops.linear(ops.tanh(first), p.at("aux").param("weight", [4, 4])));
  m.block("loss", (p) => loss(p, "loss", second));
  return undefined;
});

/** Several steps of unequal size, and what a last flush leaves. */
function play(graph: Graph, policy: Policy, sizes: readonly number[], order?: (t: Tape) => number[]): Outcome {
  const tapes = sizes.map((microBatches) => writeTape(graph, { ...policy, microBatches }));
  const machine = new Machine(graph, tapes[0]!.step);
  const run = (tape: Tape, step: number) => machine.run(tape, step, order?.(tape));
  for (const [step, tape] of tapes.entries()) run(tape.step, step);
  const { flush } = tapes.at(-1)!;
  if (flush !== null) run(flush, sizes.length);
  return machine.outcome();
}

describe("the planner of tapes", () => {
  it("computes what the resident depth-first tape computes, for random graphs and policies", () => {
    fc.assert(
      fc.property(graphs, policies, fc.integer({ min: 1, max: 3 }), (graph, policy, second) => {
        const { state, clip, microBatches } = policy;
        const sizes = [microBatches, second, microBatches];
        const plain = residentPolicy(graph, { microBatches, state, clip });
        expect(play(graph, policy, sizes)).toEqual(play(graph, plain, sizes));
      }),
      { numRuns: 300 },
    );
  }, 120_000);

  it("computes the same in any order that queues and waits allow", () => {
    fc.assert(
      fc.property(graphs, policies, fc.nat(), (graph, policy, seed) => {
        const next = random(seed);
        const sizes = [policy.microBatches, policy.microBatches];
        expect(play(graph, policy, sizes, (t) => anyOrder(t, next))).toEqual(play(graph, policy, sizes));
      }),
      { numRuns: 300 },
    );
  }, 120_000);

  it("updates a block before any user of its parameters, also where a loss owns them", () => {
    const graph = traceModel(lossOwns, null);
    expect(graph.parameters.find((p) => p.name === "aux.weight")!.owner).toBe(1);
    for (const schedule of ["depthFirst", "breadthFirst"] as const) {
      const plain = residentPolicy(graph, { microBatches: 3, schedule, recompute: "all" });
      const forward: Policy = { ...plain, update: "forward", param: "host", optimizer: "host", prefetch: 1 };
      expect(play(graph, forward, [3, 3, 3])).toEqual(play(graph, plain, [3, 3, 3]));
      const { step } = writeTape(graph, forward);
      checkTape(graph, step);
    }
  });

  it("satisfies the checker, which knows nothing of it", () => {
    fc.assert(
      fc.property(graphs, policies, (graph, policy) => {
        const { step, flush } = writeTape(graph, policy);
        checkTape(graph, step);
        if (flush !== null) checkTape(graph, flush, { after: step });
      }),
      { numRuns: 150 },
    );
  }, 60_000);

  it("gives homes the same places whatever the batch, and every place its alignment and bounds", () => {
    fc.assert(
      fc.property(graphs, policies, (graph, policy) => {
        const { step, flush } = writeTape(graph, policy);
        const other = writeTape(graph, { ...policy, microBatches: policy.microBatches + 3 });
        expect(other.step.placement.homes).toEqual(step.placement.homes);
        expect(flush?.placement ?? step.placement).toEqual(step.placement);
        for (const tape of [step, flush]) for (const p of tape?.places ?? []) checkPlace(p, tape!);
      }),
      { numRuns: 100 },
    );
  }, 60_000);
});

function checkPlace({ space, offset, bytes }: Place, { placement: { arenas }, slots }: Tape): void {
  if (space === "slot") {
    expect(bytes).toBe(0);
    expect(offset).toBeLessThan(slots);
    return;
  }
  expect(offset % PAGE).toBe(0);
  expect(bytes % PAGE).toBe(0);
  expect(bytes).toBeGreaterThan(0);
  expect(offset + bytes).toBeLessThanOrEqual(arenas[`${space}Bytes`] ?? 0);
}

/** Instructions in an order that respects queues and waits, and nothing else. */
function anyOrder(tape: Tape, next: () => number): number[] {
  const queues = new Map<string, number[]>();
  for (const [i, instruction] of tape.instructions.entries()) {
    const queue = queueOf(instruction);
    if (!queues.has(queue)) queues.set(queue, []);
    queues.get(queue)!.push(i);
  }
  const order: number[] = [];
  const done = new Set<number>();
  // A favourite for a while, so that one queue may run far ahead of the others.
  let favourite = 0;
  while (order.length < tape.instructions.length) {
    const ready = [...queues.values()].filter(
      (q) => q.length > 0 && tape.instructions[q[0]!]!.waits.every((w) => done.has(w)),
    );
    if (next() < 0.1) favourite = Math.floor(next() * 8);
    const i = ready[favourite % ready.length]!.shift()!;
    done.add(i);
    order.push(i);
  }
  return order;
}
