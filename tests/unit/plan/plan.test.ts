import fc from "fast-check";
import { describe, expect, it } from "vitest";
import { findModel } from "../../../src/models/registry.js";
import { checkTape } from "../../../src/plan/checker.js";
import { planResident } from "../../../src/plan/planner.js";
import type { Recompute, Schedule, Tape } from "../../../src/plan/types.js";
import { randomGraph } from "../../support/random-graph.js";
import { replay } from "./replay.js";

const schedules: Schedule[] = ["depthFirst", "breadthFirst"];
const planned = fc.record({
  graph: randomGraph,
  microBatches: fc.integer({ min: 1, max: 4 }),
  schedule: fc.constantFrom(...schedules),
  recompute: fc.constantFrom<Recompute>("all", "none", "selective"),
});
const tiny = findModel("tiny").graph();

/** What each instruction says, without its slots. */
const outline = (t: Tape): string[] =>
  t.instructions.map((i) => {
    const where = "block" in i ? ` ${i.block}` : "";
    return `${i.op}${where}${"microBatch" in i ? ` m${i.microBatch}` : ""}`;
  });

describe("the resident planner", () => {
  it("writes tapes that the checker accepts, for random graphs", () => {
    fc.assert(
      fc.property(planned, ({ graph, ...options }) => checkTape(graph, planResident(graph, options))),
      { numRuns: 300 },
    );
  });

  it("computes the same sums in the same order depth-first and breadth-first", () => {
    fc.assert(
      fc.property(randomGraph, fc.integer({ min: 1, max: 4 }), (graph, microBatches) => {
        for (const recompute of ["all", "none", "selective"] as const) {
          const [deep, broad] = schedules.map((schedule) =>
            replay(graph, planResident(graph, { microBatches, schedule, recompute })),
          );
          expect(deep).toEqual(broad);
        }
      }),
      { numRuns: 200 },
    );
  });

  it("runs depth-first each micro-batch through all blocks, breadth-first all through each", () => {
    const outlineOf = (schedule: Schedule) =>
      outline(planResident(findModel("tiny").graph(), { microBatches: 2, schedule }));
    const forward = (m: number) => [0, 1, 2, 3, 4].map((b) => `forward ${b} m${m}`);
    const backward = (m: number) => [`turn 5 m${m}`, ...[4, 3, 2, 1, 0].map((b) => `backward ${b} m${m}`)];
    // tiny's head shares the embedding's weight: its own norm stands where its sums are whole, the embedding's at the end.
    const ends = ["coefficient", ...[0, 1, 2, 3, 4, 5].map((b) => `update ${b}`)];
    const lastBackward = backward(1).flatMap((pass, i) => [pass, `norm ${5 - i}`]);
    expect(outlineOf("depthFirst")).toEqual([...forward(0), ...backward(0), ...forward(1), ...lastBackward, ...ends]);
    const both = (what: string, b: number) => [`${what} ${b} m0`, `${what} ${b} m1`];
    expect(outlineOf("breadthFirst")).toEqual([
      ...[0, 1, 2, 3, 4].flatMap((b) => both("forward", b)),
      ...both("turn", 5),
      "norm 5",
      ...[4, 3, 2, 1, 0].flatMap((b) => [...both("backward", b), `norm ${b}`]),
      ...ends,
    ]);
  });

  it("needs one slot more than the blocks of a chain depth-first, and one more than the batch's boundaries breadth-first", () => {
    for (const microBatches of [1, 3, 32]) {
      const slots = (schedule: Schedule) => planResident(tiny, { microBatches, schedule }).slots;
      expect(slots("depthFirst")).toBe(5 + 1);
      expect(slots("breadthFirst")).toBe(5 * microBatches + 1);
    }
  });

  it("keeps graphs or dear results unless all is recomputed", () => {
    const keeps = (recompute: Recompute) =>
      new Set(
        planResident(tiny, { microBatches: 2, recompute }).instructions.flatMap((i) =>
          i.op === "forward" ? [i.keep] : [],
        ),
      );
    expect(keeps("none")).toEqual(new Set([true]));
    expect(keeps("selective")).toEqual(new Set([true]));
    expect(keeps("all")).toEqual(new Set([false]));
  });

  it("plans astro-13b with 32 micro-batches breadth-first, and the checker agrees", () => {
    const graph = findModel("astro-13b").graph();
    const tape = planResident(graph, { microBatches: 32, schedule: "breadthFirst" });
    checkTape(graph, tape);
    expect(tape.slots).toBe(57 * 32 + 1);
  });

  it("refuses graphs that do not train and counts below 1", () => {
    expect(() => planResident(findModel("tiny").graph({ mode: "eval" }), { microBatches: 1 })).toThrow(
      /train mode, got eval/,
    );
    expect(() => planResident(tiny, { microBatches: 0 })).toThrow(/at least 1 micro-batch/);
    expect(() => planResident({ ...tiny, losses: [] }, { microBatches: 1 })).toThrow(/has no loss/);
    const frozen = { ...tiny, parameters: tiny.parameters.map((p) => ({ ...p, trainable: false })) };
    expect(() => planResident(frozen, { microBatches: 1 })).toThrow(/no trainable parameter/);
  });
});
