/**
 * What crosses between ranks of different stages, and when. A boundary x goes from the rank that makes it to every other
 * rank that reads it. Its gradient collects one contribution of each consumer, last block first (TAPE.md, section 2, rules
 * 1 and 9), so the partial sum itself travels from consumer to consumer and ends at the rank that made x. What stages share
 * (tied parameters) crosses once each way: ties.ts.
 *
 * Two ranks meet in the sender's order: the k-th send meets the k-th receive.
 */
import { clockOf, type Meeting } from "./clock.js";
import { Flow } from "./flow.js";
import type { BlockLayout } from "./layout.js";
import { groupsOf, rankAt, sharersOf } from "./mesh.js";
import type { Policy } from "./policy.js";
import { asksForSums, ties } from "./ties.js";
import type { Boundary, Stages, Tied } from "./types.js";
import { type Visit, visitsOf } from "./visits.js";

export interface Link<O = Boundary | Tied> {
  operand: O;
  /** Contributions that a gradient holds on the way. */
  count: number;
  peer: number;
  /**
   * Of what is sent: index of the pass that it follows (a tied parameter goes before it). Of what is received: of the pass
   * that needs it, or at which it is asked for if that is sooner.
   */
  pass: number;
  /** Of what is sent: the pass, in this rank's numbering, by which the peer has come to asking for it. */
  taken: number;
}
export interface Links {
  /** In the order of passes. */
  sends: Link[];
  /** By peer, in the order in which the peer sends. */
  receives: Link[][];
}

/** A pass of a rank, by its name or its index. */
type End = { rank: number; key: string } | { rank: number; pass: number };
/** From a pass of one rank to the one of another that needs it. */
export interface Crossing<O = Boundary | Tied> {
  operand: O;
  count: number;
  from: End;
  to: End;
}

/** What a rank does, in order. */
export interface Way {
  flow: Flow;
  visits: Visit[];
  /** Number of passes, and the index of each. */
  passes: number;
  index: Map<string, number>;
}

export type Ordered = Pick<Policy, "schedule" | "update" | "microBatches"> & { stages: Stages };

export const isTied = (o: Boundary | Tied): o is Tied => !("output" in o);

/** Of the rank that `flow` is for; null where there is one rank. */
export function links(
  flow: Flow,
  { stages, ...policy }: Pick<Policy, "schedule" | "update" | "microBatches" | "stages">,
  layouts: readonly BlockLayout[],
): Links | null {
  if (stages === undefined) return null;
  const ordered = { ...policy, stages };
  const { rank } = stages;
  const way = ways(flow, ordered);
  const all = crossings(flow.graph, ordered, way, layouts).map((c): Meeting => {
    const passOf = (end: End) => ("key" in end ? way(end.rank).index.get(end.key)! : end.pass);
    return { ...c, from: { ...c.from, pass: passOf(c.from) }, to: { ...c.to, pass: passOf(c.to) } };
  });
  const peers = [...Array(stages.ranks).keys()];
  const clock = clockOf(peers.map(way), all, policy.update);
  const between = new Map<string, Meeting[]>();
  for (const m of all) {
    if (m.from.rank !== rank && m.to.rank !== rank) continue;
    const key = `${m.from.rank} ${m.to.rank}`;
    const list = between.get(key);
    if (list === undefined) between.set(key, [m]);
    else list.push(m);
  }
  const met = (from: number, to: number) => inOrder(between.get(`${from} ${to}`) ?? [], way(to));
  const sends = peers.flatMap((to) =>
    met(rank, to).map(({ operand, count, from, asked }) => {
      const when = clock[to]![asked] ?? Number.POSITIVE_INFINITY;
      return { operand, count, peer: to, pass: from.pass, taken: firstAfter(clock[rank]!, when) };
    }),
  );
  const receives = peers.map((from) =>
    met(from, rank).map(({ operand, count, asked }) => ({ operand, count, peer: from, pass: asked, taken: asked })),
  );
  return { sends: sends.toSorted((a, b) => a.pass - b.pass), receives };
}

/** From one rank to another, in the sender's order, with the pass at which the other asks for it. */
function inOrder(list: readonly Meeting[], to: Way): (Meeting & { asked: number })[] {
  // A parameter is asked for as soon as all is that comes before it, so that nobody keeps it for the other.
  let latest = 0;
  return list
    .toSorted((a, b) => a.from.pass - b.from.pass)
    .map((m) => {
      const lent = isTied(m.operand) && m.operand.kind !== "sums";
      const asked = lent ? Math.min(m.to.pass, latest) : isTied(m.operand) ? asksForSums(to, m.to.pass) : m.to.pass;
      if (!lent) latest = Math.max(latest, asked);
      return { ...m, asked };
    });
}

/** Of ascending times: the first that is later than `when`. */
function firstAfter(times: readonly number[], when: number): number {
  let [low, high] = [0, times.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (times[middle]! > when) high = middle;
    else low = middle + 1;
  }
  return low;
}

/** By rank, made when it is first asked for. */
function ways(flow: Flow, policy: Ordered): (rank: number) => Way {
  const known = new Map<number, Way>();
  return (rank) => {
    let way = known.get(rank);
    if (way === undefined) {
      const theirs = rank === policy.stages.rank ? flow : new Flow(flow.graph, { ...policy.stages, rank });
      const visits = visitsOf(theirs, policy);
      const passes = visits.flatMap((v) => v.passes);
      const index = new Map(passes.map((p) => [keyOf(p.op === "forward", p.block, p.microBatch), p.index]));
      way = { flow: theirs, visits, passes: passes.length, index };
      known.set(rank, way);
    }
    return way;
  };
}

/** A turn is a backward here: its block has no other pass. */
const keyOf = (forward: boolean, block: number, microBatch: number): string =>
  `${forward ? "f" : "b"} ${block} ${microBatch}`;

/** In one order that every two ranks derive alike. */
function crossings(
  graph: Flow["graph"],
  { microBatches, stages }: Ordered,
  way: (rank: number) => Way,
  layouts: readonly BlockLayout[],
): Crossing[] {
  const whole = new Flow(graph);
  // Every rank of a context crosses with its own counterpart, which has the same share of the rows.
  const places = sharersOf(stages);
  const rankOf = (b: number, m: number, place: number) =>
    rankAt(stages, stages.of[b]!, (m % groupsOf(stages)) * places + place);
  const { lent, owed } = ties(whole, stages, way, layouts);
  const result: Crossing[] = [...lent];
  const firstRead = firstReads(stages.ranks, way);
  for (const b of graph.blocks.keys()) {
    for (const output of whole.programs[b]!.outputs.keys()) {
      const stops = contributors(whole, b, output);
      if (stops.length > 0 && whole.hasBackward(b)) stops.push({ block: b, adds: 0 });
      for (let turn = 0; turn < microBatches * places; turn++) {
        const [m, place] = [Math.floor(turn / places), turn % places];
        const at = { block: b, output, microBatch: m };
        for (let r = 0; r < stages.ranks; r++) {
          const reader = firstRead.get(`${r} ${b}:${output} ${m}`);
          if (r % places !== place || r === rankOf(b, m, place) || reader === undefined) continue;
          result.push({
            operand: { kind: "x", ...at },
            count: 0,
            from: { rank: rankOf(b, m, place), key: keyOf(true, b, m) },
            to: { rank: r, key: reader },
          });
        }
        let count = 0;
        for (const [k, stop] of stops.entries()) {
          const next = stops[k + 1];
          count += stop.adds;
          if (next === undefined || rankOf(next.block, m, place) === rankOf(stop.block, m, place)) continue;
          result.push({
            operand: { kind: "dx", ...at },
            count,
            from: { rank: rankOf(stop.block, m, place), key: keyOf(false, stop.block, m) },
            to: { rank: rankOf(next.block, m, place), key: keyOf(false, next.block, m) },
          });
        }
      }
    }
  }
  return [...result, ...owed];
}

/** Blocks that contribute to a boundary's gradient, in order, and how many of their inputs it is. */
function contributors(flow: Flow, block: number, output: number): { block: number; adds: number }[] {
  const stops: { block: number; adds: number }[] = [];
  for (const b of flow.backwards) {
    const adds = flow.sources(b).filter((_, i) => {
      const source = flow.gradientSource(b, i);
      return source !== null && source.block === block && source.output === output;
    }).length;
    if (adds > 0) stops.push({ block: b, adds });
  }
  return stops;
}

/** By rank, boundary and micro-batch: the first pass of the rank that reads it. */
function firstReads(ranks: number, way: (rank: number) => Way): Map<string, string> {
  const first = new Map<string, string>();
  for (let rank = 0; rank < ranks; rank++) {
    const { flow, visits } = way(rank);
    for (const { passes } of visits)
      for (const pass of passes)
        for (const source of flow.sources(pass.block)) {
          if (!("block" in source)) continue;
          const key = `${rank} ${source.block}:${source.output} ${pass.microBatch}`;
          if (!first.has(key)) first.set(key, keyOf(pass.op === "forward", pass.block, pass.microBatch));
        }
  }
  return first;
}
