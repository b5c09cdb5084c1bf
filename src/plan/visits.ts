/**
 * The order of work. A visit is a stretch of passes through one block, for which its parameters are on the device:
 * all micro-batches breadth-first, one of them depth-first.
 */
import type { Flow } from "./flow.js";
import { batchesOf, stageCount, stageOf } from "./mesh.js";
import type { Policy } from "./policy.js";

export interface Pass {
  op: "forward" | "turn" | "backward";
  block: number;
  microBatch: number;
  /** Of its visit, and of the pass among all. */
  visit: number;
  index: number;
}

export interface Visit {
  passes: Pass[];
  /** Blocks updated before the passes, by the gradients that the last step retained. */
  pending: number[];
  /** Blocks whose gradient sums the passes complete. */
  complete: number[];
  /** Blocks updated in a visit of their own, after the coefficient. */
  end: number[];
}

export function visitsOf(flow: Flow, policy: Pick<Policy, "schedule" | "update" | "microBatches" | "stages">): Visit[] {
  const { schedule, update, microBatches } = policy;
  const visits: Visit[] = [];
  const all = batchesOf(flow.stages, microBatches);
  let index = 0;
  const visit = (way: "forward" | "backward", block: number, batches: number[]) => {
    const op: Pass["op"] = way === "backward" && flow.isTurn(block) ? "turn" : way;
    const passes = batches.map((microBatch) => ({ op, block, microBatch, visit: visits.length, index: index++ }));
    visits.push({ passes, pending: [], complete: [], end: [] });
  };
  const forward = (batches: number[]) => {
    for (const b of flow.forwards) visit("forward", b, batches);
  };
  const backward = (batches: number[]) => {
    for (const b of flow.backwards) visit("backward", b, batches);
  };
  if (schedule === "breadthFirst") {
    forward(all);
    backward(all);
  } else {
    const ahead = schedule === "depthFirst" ? 0 : Math.min(all.length - 1, stagesAfter(flow));
    for (let i = 0; i < all.length + ahead; i++) {
      if (i < all.length) forward([all[i]!]);
      if (i >= ahead) backward([all[i - ahead]!]);
    }
  }
  for (const b of flow.trained) {
    const last = visits.findLastIndex(
      ({ passes: [pass] }) => pass!.op !== "forward" && flow.users[b]!.includes(pass!.block),
    );
    // A parameter that no gradient reaches is complete at once; the end is as good as any place.
    (visits[last] ?? visits.at(-1)!).complete.push(b);
    if (update === "forward")
      visits.find(({ passes: [pass] }) => flow.owners[pass!.block]!.includes(b))!.pending.push(b);
  }
  if (update === "end") for (const b of flow.trained) visits.push({ passes: [], pending: [], complete: [], end: [b] });
  return visits;
}

/** Stages whose first block comes behind that of the flow's own. */
function stagesAfter({ stages }: Flow): number {
  if (stages === undefined) return 0;
  const { of } = stages;
  const own = of.indexOf(stageOf(stages));
  return [...Array(stageCount(stages)).keys()].filter((stage) => of.indexOf(stage) > own).length;
}

/** Visits that only carry out what the last step retained. */
export const flushVisits = (flow: Flow): Visit[] =>
  flow.trained.map((b) => ({ passes: [], pending: [b], complete: [], end: [] }));
