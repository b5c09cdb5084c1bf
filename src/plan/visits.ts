/**
 * The order of work. A visit is a stretch of passes through one block, for which its parameters are on the device:
 * all micro-batches breadth-first, one of them depth-first.
 */
import type { Flow } from "./flow.js";
import { batchesOf, stageCount, stageOf } from "./mesh.js";
import type { Policy } from "./policy.js";
import { stretchesOf } from "./stages.js";
import type { Stages } from "./types.js";

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
  /** Blocks whose gradient sums the passes complete; with ranks and update on backward, after all losses are known. */
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
  const stretches = schedule === "oneForwardOneBackward" && flow.stages !== undefined ? stretchesOf(flow.stages) : null;
  if (schedule === "breadthFirst") {
    forward(all);
    backward(all);
  } else if (stretches !== null) {
    for (const { way, stretch, batch } of interleaved(flow.stages!, Math.max(...stretches) + 1, all))
      for (const b of way === "forward" ? flow.forwards : flow.backwards)
        if (stretches[b] === stretch) visit(way, b, [batch]);
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
  if (update === "backward" && flow.stages !== undefined) holdUpdates(flow, visits);
  if (update === "end") for (const b of flow.trained) visits.push({ passes: [], pending: [], complete: [], end: [b] });
  return visits;
}

/**
 * One forward, one backward over stages of `count` stretches each: R micro-batches through a stretch, then through the next
 * one. The forwards that run ahead: as in Megatron-LM, two for each stage behind, and R for every stretch but the last.
 */
function interleaved(
  stages: Stages,
  count: number,
  batches: readonly number[],
): { way: "forward" | "backward"; stretch: number; batch: number }[] {
  const R = stageCount(stages);
  const all = batches.length * count;
  const step = (way: "forward" | "backward", k: number) => {
    const turn = Math.floor((k % (R * count)) / R);
    const stretch = way === "forward" ? turn : count - 1 - turn;
    return { way, stretch, batch: batches[Math.floor(k / (R * count)) * R + (k % R)]! };
  };
  const ahead = Math.min(all - 1, 2 * (R - stageOf(stages) - 1) + (count - 1) * R);
  const steps = [];
  for (let k = 0; k < all + ahead; k++) {
    if (k < all) steps.push(step("forward", k));
    if (k >= ahead) steps.push(step("backward", k - ahead));
  }
  return steps;
}

/**
 * No update stands before the last pass that may give a loss which is not finite: with several losses, some would. Where a
 * loss waits for the backward of a later block, perhaps of a rank that waits to hear of the loss, all updates stand at the
 * end.
 */
function holdUpdates(flow: Flow, visits: Visit[]): void {
  const last = lossesWait(flow)
    ? visits.length - 1
    : visits.findLastIndex(({ passes: [pass] }) => pass!.op !== "backward");
  const held = visits.slice(0, Math.max(0, last)).flatMap((v) => v.complete.splice(0));
  visits[last]?.complete.unshift(...held);
}

/** Whether a loss stands behind the backward of another block, in the order in which every rank runs its own. */
function lossesWait(flow: Flow): boolean {
  const first = flow.programs.findIndex((_, b) => flow.isTurn(b));
  return flow.programs.some((_, b) => b > first && !flow.isTurn(b) && flow.hasBackward(b));
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
