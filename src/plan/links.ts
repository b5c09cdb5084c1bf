/**
 * Which boundaries cross between ranks, and when. A boundary x goes from the rank that makes it to every other rank that
 * reads it. Its gradient collects one contribution of each consumer, last block first (TAPE.md, section 2, rules 1 and
 * 9), so the partial sum itself travels from consumer to consumer and ends at the rank that made x.
 *
 * Two ranks meet in the sender's order: the k-th send meets the k-th receive.
 */
import { Flow } from "./flow.js";
import { groupsOf, rankAt, sharersOf } from "./mesh.js";
import type { Policy } from "./policy.js";
import type { Boundary } from "./types.js";
import { visitsOf } from "./visits.js";

export interface Link {
  operand: Boundary;
  /** Contributions that a gradient holds on the way. */
  count: number;
  peer: number;
  /** Index of the pass that it follows (what is sent) or that needs it (what is received). */
  pass: number;
  /** The same at the peer, in its own numbering. */
  peerPass: number;
}
export interface Links {
  /** In the order of passes. */
  sends: Link[];
  /** By peer, in the order in which the peer sends. */
  receives: Link[][];
}

/** One crossing: from the pass of one block to that of another, of one micro-batch. */
interface Crossing {
  operand: Boundary;
  count: number;
  from: { rank: number; key: string };
  to: { rank: number; key: string };
}

type Ordered = Pick<Policy, "schedule" | "update" | "microBatches" | "stages">;

/** Of the rank that `flow` is for; null where there is one rank. */
export function links(flow: Flow, policy: Ordered): Links | null {
  const { stages } = policy;
  if (stages === undefined) return null;
  const all = crossings(flow, policy);
  const indices = new Map<number, Map<string, number>>();
  const indexOf = (rank: number): Map<string, number> => {
    const known = indices.get(rank);
    if (known !== undefined) return known;
    const visits = visitsOf(new Flow(flow.graph, { ...stages, rank }), policy);
    const passes = visits.flatMap((v) => v.passes);
    const index = new Map(passes.map((p) => [keyOf(p.op === "forward", p.block, p.microBatch), p.index]));
    indices.set(rank, index);
    return index;
  };
  const mine = indexOf(stages.rank);
  const linksOf = (end: "from" | "to", index: Map<string, number>, list: readonly Crossing[]) =>
    list.map((c) => ({
      operand: c.operand,
      count: c.count,
      peer: c[other(end)].rank,
      pass: index.get(c[end].key)!,
      peerPass: indexOf(c[other(end)].rank).get(c[other(end)].key)!,
    }));
  const bySender = (index: Map<string, number>, list: Crossing[]) =>
    list
      .map((crossing, k) => ({ crossing, k, pass: index.get(crossing.from.key)! }))
      .sort((a, b) => a.pass - b.pass || a.k - b.k)
      .map(({ crossing }) => crossing);
  const sends = linksOf(
    "from",
    mine,
    bySender(
      mine,
      all.filter((c) => c.from.rank === stages.rank),
    ),
  );
  const receives = [...Array(stages.ranks).keys()].map((peer) => {
    const incoming = all.filter((c) => c.from.rank === peer && c.to.rank === stages.rank);
    return incoming.length === 0 ? [] : linksOf("to", mine, bySender(indexOf(peer), incoming));
  });
  return { sends, receives };
}

const other = (end: "from" | "to") => (end === "from" ? "to" : "from");

/** A turn is a backward here: its block has no other pass. */
const keyOf = (forward: boolean, block: number, microBatch: number): string =>
  `${forward ? "f" : "b"} ${block} ${microBatch}`;

/** All crossings, in one order that every rank derives alike. */
function crossings(flow: Flow, { microBatches, stages, schedule, update }: Ordered): Crossing[] {
  const whole = new Flow(flow.graph);
  // Every rank of a context crosses with its own counterpart, which has the same share of the rows.
  const places = sharersOf(stages);
  const rankOf = (b: number, m: number, place: number) =>
    rankAt(stages!, stages!.of[b]!, (m % groupsOf(stages)) * places + place);
  const result: Crossing[] = [];
  const firstRead = firstReads(flow.graph, { microBatches, stages: stages!, schedule, update });
  for (const b of flow.graph.blocks.keys()) {
    for (const output of whole.programs[b]!.outputs.keys()) {
      const stops = contributors(whole, b, output);
      if (stops.length > 0 && whole.hasBackward(b)) stops.push({ block: b, adds: 0 });
      for (let turn = 0; turn < microBatches * places; turn++) {
        const [m, place] = [Math.floor(turn / places), turn % places];
        const at = { block: b, output, microBatch: m };
        for (let r = 0; r < stages!.ranks; r++) {
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
  return result;
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
function firstReads(
  graph: Flow["graph"],
  policy: Ordered & { stages: NonNullable<Policy["stages"]> },
): Map<string, string> {
  const first = new Map<string, string>();
  for (let rank = 0; rank < policy.stages.ranks; rank++) {
    const flow = new Flow(graph, { ...policy.stages, rank });
    for (const { passes } of visitsOf(flow, policy))
      for (const pass of passes)
        for (const source of flow.sources(pass.block)) {
          if (!("block" in source)) continue;
          const key = `${rank} ${source.block}:${source.output} ${pass.microBatch}`;
          if (!first.has(key)) first.set(key, keyOf(pass.op === "forward", pass.block, pass.microBatch));
        }
  }
  return first;
}
