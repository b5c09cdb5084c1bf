/**
 * A parameter that blocks of several stages use (an embedding that is also the head's matrix). The stage of its owner keeps
 * masters and moments and updates it. Once a step, before the first pass that reads it, each member lends what passes read
 * of it to the same member of every other stage that uses it; that one sends back the gradient sums of its own block, over
 * all micro-batches that both run, and the owner's adds them where it would add those of a block of its own: each use by
 * itself in the order of micro-batches, then the uses in the order of blocks. So the numbers are those of one rank, to
 * the bit.
 */
import type { Flow } from "./flow.js";
import type { BlockLayout } from "./layout.js";
import type { Crossing, Way } from "./links.js";
import { memberOf, rankAt, stageCount, stageOf } from "./mesh.js";
import type { Stages, Tied } from "./types.js";

/** What this rank lends and borrows; what it is owed and owes. `flow`: of the whole graph. */
export function ties(
  flow: Flow,
  stages: Stages,
  way: (rank: number) => Way,
  layouts: readonly BlockLayout[],
): { lent: Crossing<Tied>[]; owed: Crossing<Tied>[] } {
  const lent: Crossing<Tied>[] = [];
  const owed: Crossing<Tied>[] = [];
  const { of } = stages;
  const member = memberOf(stages);
  const concerns = (a: number, b: number) => a !== b && [a, b].includes(stageOf(stages));
  for (const owner of of.keys())
    for (let stage = 0; stage < stageCount(stages); stage++) {
      const uses = flow.owners.some((owners, b) => of[b] === stage && owners.includes(owner));
      if (!uses || !concerns(of[owner]!, stage)) continue;
      const [from, to] = [rankAt(stages, of[owner]!, member), rankAt(stages, stage, member)];
      const kind = layouts[owner]!.computeBytes > 0 ? "compute" : "param";
      const first = (r: number) => ({ rank: r, pass: firstUse(way(r), owner) });
      lent.push({ operand: { kind, block: owner }, count: 0, from: first(from), to: first(to) });
    }
  for (const user of of.keys())
    for (let stage = 0; stage < stageCount(stages); stage++) {
      const owners = flow.owners[user]!.filter((o) => of[o] === stage && flow.users[o]!.includes(user));
      if (owners.length === 0 || !concerns(of[user]!, stage)) continue;
      const [from, to] = [rankAt(stages, of[user]!, member), rankAt(stages, stage, member)];
      const wanted = Math.min(...owners.map((o) => lastPass(way(to), completion(way(to), o))));
      owed.push({
        operand: { kind: "sums", block: user },
        count: 0,
        from: { rank: from, pass: lastPass(way(from), settled(way(from), user)) },
        to: { rank: to, pass: wanted + 1 },
      });
    }
  return { lent, owed };
}

/** The first pass that reads what the block owns. */
function firstUse({ flow, visits }: Way, owner: number): number {
  return visits.find(({ passes: [pass] }) => flow.owners[pass!.block]!.includes(owner))!.passes[0]!.index;
}

/** The visit behind which the gradients of what a block owns are added up. */
const completion = ({ visits }: Way, owner: number): number =>
  visits.findIndex(({ complete }) => complete.includes(owner));

/**
 * The visit behind which nothing writes the block's sums any more: a norm adds up in those of the first user. What is sent
 * waits for the peer, and who writes there then would wait for the peer too.
 */
function settled(way: Way, user: number): number {
  const { flow, visits } = way;
  const last = visits.findLastIndex(({ passes: [pass] }) => pass?.op !== "forward" && pass?.block === user);
  const adding = flow.trained.filter((b) => flow.users[b]!.length > 1 && flow.users[b]!.includes(user));
  return Math.max(last, ...adding.map((b) => completion(way, b)));
}

const lastPass = ({ visits }: Way, visit: number): number => visits[visit]!.passes.at(-1)!.index;

/**
 * When the owner's rank asks for sums that must be there before a pass: a visit ahead of the last one that adds to its own,
 * or one micro-batch's way back.
 */
export function asksForSums({ flow, visits }: Way, before: number): number {
  const { length } = visits[0]!.passes;
  return Math.max(0, before - 1 - (length > 1 ? length : flow.backwards.length));
}
