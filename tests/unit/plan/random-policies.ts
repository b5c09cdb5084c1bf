/** Graphs and policies of every kind. */
import fc from "fast-check";
import type { Graph } from "../../../src/graph/types.js";
import type { Policy, Space3 } from "../../../src/plan/write-tape.js";
import { randomGraph } from "../../support/random-graph.js";
import { randomModel } from "../../support/random-models.js";

export const graphs: fc.Arbitrary<Graph> = fc.oneof(
  { weight: 2, arbitrary: randomGraph },
  { weight: 1, arbitrary: fc.nat(1000).map((seed) => randomModel(seed).graph) },
);
const dims = { B: 2, T: 3 };

/** A home for each block, the same whenever asked. */
const homes: fc.Arbitrary<Policy["param"]> = fc.oneof(
  fc.constantFrom<Space3>("device", "host", "disk"),
  fc
    .array(fc.constantFrom<Space3>("device", "host", "disk"), { minLength: 1, maxLength: 5 })
    .map((list) => (b: number) => list[b % list.length]!),
);

/** Policies that make sense, of every kind. */
export const policies: fc.Arbitrary<Policy> = fc
  .record<Policy>({
    schedule: fc.constantFrom("depthFirst", "breadthFirst", "breadthFirst"),
    recompute: fc.constantFrom("all", "selective", "none"),
    update: fc.constantFrom("end", "backward", "forward"),
    clip: fc.constantFrom("none", "block", "global"),
    state: fc.constantFrom<Policy["state"]>(
      { storage: "float32", masterWeight: "none", optimizer: "adamw" },
      { storage: "bfloat16", masterWeight: "split16", optimizer: "adamw8bit" },
    ),
    microBatches: fc.integer({ min: 1, max: 5 }),
    dims: fc.constant(dims),
    param: homes,
    optimizer: homes,
    boundary: fc.constantFrom("slot", "device", "host", "disk"),
    retained: homes,
    retainedDType: fc.constantFrom("float32", "bfloat16", "dynamic8"),
    prefetch: fc.integer({ min: 0, max: 2 }),
    parts: fc.integer({ min: 1, max: 4 }),
  })
  .map((p) => ({
    ...p,
    clip: p.update === "backward" && p.clip === "global" ? "block" : p.clip,
    param: p.recompute === "none" ? "device" : p.param,
    boundary: p.recompute === "none" && p.boundary !== "slot" ? "device" : p.boundary,
  }));
