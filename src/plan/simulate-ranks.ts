/**
 * Runs the tapes of all ranks in time together: as `simulate`, and a send and its receive run at once, from when both
 * ranks are ready for it; an agreement begins when all have reported, a coefficient when all are there.
 */
import type { Graph } from "../graph/types.js";
import { CostModel } from "./cost.js";
import { playRanks } from "./play-ranks.js";
import type { MachineProfile } from "./profiles.js";
import { type Simulation, Tally } from "./simulate.js";
import type { Tape } from "./types.js";

export interface RankSimulation extends Simulation {
  /** Share of the step in which this rank computes nothing. */
  bubble: number;
}

export interface RanksSimulation {
  /** Until the last rank is done. */
  seconds: number;
  /** Seconds of each are its own end. */
  ranks: RankSimulation[];
}

/** `tapes`: by rank, all with dims; one profile for every rank. Throws TAPE where the ranks wait for each other for ever. */
export function simulateRanks(graph: Graph, tapes: readonly Tape[], profile: MachineProfile): RanksSimulation {
  const ranks = tapes.map((tape) => ({
    tape,
    costs: new CostModel(graph, tape, tape.dims ?? {}, profile),
    tally: new Tally(tape),
    free: new Map<string, number>(),
  }));
  let reported = 0;
  playRanks(tapes, (together) => {
    let [from, seconds] = [0, 0];
    const costs = together.map(({ rank, queue, at }) => {
      const { tape, costs, tally, free } = ranks[rank]!;
      const i = tape.instructions[at]!;
      from = Math.max(from, free.get(queue) ?? 0, i.op === "agree" ? reported : 0);
      for (const w of i.waits) from = Math.max(from, tally.end[w]!);
      const cost = costs.of(i);
      seconds = Math.max(seconds, cost.seconds);
      if (i.op === "report") reported = Math.max(reported, from + seconds);
      return cost;
    });
    for (const [k, { rank, queue, at }] of together.entries())
      ranks[rank]!.free.set(queue, ranks[rank]!.tally.add(at, from, from + seconds, { ...costs[k]!, seconds }));
  });
  const results = ranks.map(({ tally }) => tally.result());
  const seconds = Math.max(...results.map((r) => r.seconds));
  return { seconds, ranks: results.map((r) => ({ ...r, bubble: 1 - r.busySeconds.compute / seconds })) };
}

/** The share of all ranks' time in which nothing is computed. */
export const meanBubble = ({ ranks }: RanksSimulation): number =>
  ranks.reduce((sum, { bubble }) => sum + bubble, 0) / ranks.length;
