/** Parameters that several stages use: what crosses for them, what the checker refuses, and what they cost. */
import fc from "fast-check";
import { describe, expect, it } from "vitest";
import { checkRanks } from "../../../src/plan/check-ranks.js";
import type { Policy } from "../../../src/plan/policy.js";
import { isContiguous } from "../../../src/plan/stages.js";
import type { Stages } from "../../../src/plan/types.js";
import { writeTape } from "../../../src/plan/write-tape.js";
import { graphs, policies } from "./random-policies.js";

const runs = Number(process.env.STROMA_CASES ?? 60);

/** Stages wherever they fall, tied blocks apart or not; null where one would have no block. */
function stagesOf(graph: { blocks: unknown[] }, draws: number[], mesh: Omit<Stages, "rank" | "of">): Stages | null {
  const stages = mesh.ranks / ((mesh.shards ?? 1) * (mesh.replicas ?? 1));
  const of = graph.blocks.map((_, b) => draws[b % draws.length]! % stages);
  return new Set(of).size === stages ? { ...mesh, rank: 0, of } : null;
}

function prove(graph: Parameters<typeof writeTape>[0], policy: Policy, stages: Stages): void {
  const plans = Array.from({ length: stages.ranks }, (_, rank) =>
    writeTape(graph, { ...policy, stages: { ...stages, rank } }),
  );
  const flushes = plans.flatMap((p) => (p.flush === null ? [] : [p.flush]));
  checkRanks(
    graph,
    plans.map((p) => p.step),
    flushes.length > 0 ? flushes : undefined,
  );
}

describe("tapes of stages that share parameters", () => {
  it(`are accepted over ${runs} random graphs, policies and stages`, { timeout: runs * 2_000 + 20_000 }, () => {
    let tied = 0;
    fc.assert(
      fc.property(
        graphs,
        policies,
        fc.array(fc.nat(11), { minLength: 3, maxLength: 9 }),
        fc.constantFrom(
          { ranks: 2 },
          { ranks: 3 },
          { ranks: 4 },
          { ranks: 4, shards: 2 },
          { ranks: 4, replicas: 2 },
          { ranks: 8, shards: 2, replicas: 2 },
        ),
        fc.integer({ min: 1, max: 24 }),
        (graph, policy, draws, mesh, M) => {
          const stages = stagesOf(graph, draws, mesh);
          if (stages === null) return;
          const members = (stages.shards ?? 1) * (stages.replicas ?? 1);
          const boundary = policy.boundary === "slot" ? "device" : policy.boundary;
          const microBatches = M < members ? members : M - (M % members);
          const whole: Policy = { ...policy, boundary, microBatches };
          if (M % 2 === 0 && isContiguous(graph, stages)) whole.schedule = "oneForwardOneBackward";
          prove(graph, whole, stages);
          tied++;
        },
      ),
      { numRuns: runs, ...(process.env.STROMA_SEED ? { seed: Number(process.env.STROMA_SEED) } : { seed: 5 }) },
    );
    expect(tied).toBeGreaterThan(runs / 4);
  });
});
