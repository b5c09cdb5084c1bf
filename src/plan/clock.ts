/**
 * A clock that all ranks share while a tape is written: when each of their passes comes, if all last as long and nothing
 * stands in a pass's way but the passes that it needs, those of other ranks too. What is sent keeps its place until the
 * peer's clock has come to asking for it: a wait for the peer is then always one for an earlier pass, so that no circle of
 * such waits can close.
 */
import type { Crossing, Way } from "./links.js";
import { pushAt } from "./lists.js";
import type { UpdateOrder } from "./types.js";

/** A crossing whose passes are known by their indices. */
export type Meeting = Omit<Crossing, "from" | "to"> & {
  from: { rank: number; pass: number };
  to: { rank: number; pass: number };
};

/** By rank and pass. Where ranks would wait for each other for ever times end early: the checker says so. */
export function clockOf(ways: readonly Way[], meetings: readonly Meeting[], update: UpdateOrder): number[][] {
  const needs = ways.map(() => [] as Meeting["from"][][]);
  const need = (to: Meeting["to"], from: Meeting["from"]) => pushAt(needs[to.rank]!, to.pass, from);
  for (const { from, to } of meetings) need(to, from);
  if (update === "backward") {
    // Behind its first update a rank knows how all losses are.
    const losses = ways.map(({ visits }, rank) => {
      const last = visits.flatMap(({ passes }) => passes).findLast(({ op }) => op !== "backward");
      return { rank, pass: last?.index ?? 0 };
    });
    for (const [rank, { visits }] of ways.entries()) {
      const first = visits.find(({ complete }) => complete.length > 0);
      if (first === undefined) continue;
      const pass = first.passes.at(-1)!.index + 1;
      for (const loss of losses) if (loss.rank !== rank) need({ rank, pass }, loss);
    }
  }
  const times: number[][] = ways.map(() => []);
  for (let moved = true; moved; ) {
    moved = false;
    for (const [rank, { passes }] of ways.entries()) {
      const own = times[rank]!;
      while (own.length < passes) {
        let time = (own.at(-1) ?? -1) + 1;
        for (const { rank: r, pass } of needs[rank]![own.length] ?? [])
          time = Math.max(time, (times[r]![pass] ?? Number.POSITIVE_INFINITY) + 1);
        if (time === Number.POSITIVE_INFINITY) break;
        own.push(time);
        moved = true;
      }
    }
  }
  return times;
}
