/**
 * Proves the tapes of all ranks together, each of which the checker has proved by itself: the k-th send from one rank to
 * another is what the other's k-th receive says, all have the same blocks and rules, and no order in which queues may run
 * leaves them waiting for each other.
 *
 * For the last it plays one order: whatever can complete completes. A send and its receive complete together, when both
 * are first on their queues and have what they wait for; an agreement when all ranks have reported; a coefficient when all
 * are there. Completing something never hinders anything else, so if this order reaches the end every order does.
 */
import { StromaError } from "../errors.js";
import type { Graph } from "../graph/types.js";
import { nameOf, type Op, refuse, title } from "./check-facts.js";
import { queueOf } from "./check-form.js";
import { checkTape } from "./checker.js";
import type { Tape } from "./types.js";

type Exchange = Op<"send" | "receive">;

/** `tapes`: by rank. Throws TAPE as checkTape does. `flushes`: by rank, where the tapes update on forward. */
export function checkRanks(graph: Graph, tapes: readonly Tape[], flushes?: readonly Tape[]): void {
  for (const [rank, tape] of tapes.entries()) {
    checkTape(graph, tape);
    const flush = flushes?.[rank];
    if (flush !== undefined) checkTape(graph, flush, { after: tape });
    const first = tapes[0]!;
    if (tape.stages?.rank !== rank || tape.stages.ranks !== tapes.length)
      refuse(tape, -1, `expected the tape of rank ${rank} of ${tapes.length}`);
    for (const field of ["schedule", "update", "clip", "state", "microBatches", "dims"] as const)
      if (JSON.stringify(tape[field]) !== JSON.stringify(first[field]))
        refuse(tape, -1, `rank ${rank} has another ${field} than rank 0`);
    if (JSON.stringify(tape.stages.of) !== JSON.stringify(first.stages!.of))
      refuse(tape, -1, `rank ${rank} has other stages than rank 0`);
  }
  for (const from of tapes.keys()) for (const to of tapes.keys()) if (from !== to) checkPair(tapes, from, to);
  checkProgress(tapes);
}

const exchanges = (tape: Tape, op: Exchange["op"], peer: number): [at: number, i: Exchange][] =>
  [...tape.instructions.entries()].filter(
    (entry): entry is [number, Exchange] => entry[1].op === op && entry[1].peer === peer,
  );

function checkPair(tapes: readonly Tape[], from: number, to: number): void {
  const sent = exchanges(tapes[from]!, "send", to);
  const received = exchanges(tapes[to]!, "receive", from);
  const say = ({ operand, count, bytes }: Exchange) => `${nameOf(operand)}, count ${count}, ${bytes} bytes`;
  for (let k = 0; k < Math.max(sent.length, received.length); k++) {
    const [s, r] = [sent[k], received[k]];
    if (s === undefined) refuse(tapes[to]!, r![0], `rank ${from} never sends it`);
    if (r === undefined) refuse(tapes[from]!, s[0], `rank ${to} never receives it`);
    if (say(s[1]) !== say(r[1])) refuse(tapes[to]!, r[0], `expected ${say(r[1])}; rank ${from} sends ${say(s[1])}`);
  }
}

/** Positions by queue, in order. */
interface Lines {
  tape: Tape;
  lines: Map<string, number[]>;
  next: Map<string, number>;
  done: Uint8Array;
}

function checkProgress(tapes: readonly Tape[]): void {
  const ranks = tapes.map((tape): Lines => {
    const lines = new Map<string, number[]>();
    for (const [at, i] of tape.instructions.entries()) {
      const queue = queueOf(i);
      const line = lines.get(queue);
      if (line === undefined) lines.set(queue, [at]);
      else line.push(at);
    }
    const next = new Map([...lines.keys()].map((q) => [q, 0]));
    return { tape, lines, next, done: new Uint8Array(tape.instructions.length) };
  });
  /** The first of a queue, where it has what it waits for. */
  const ready = (rank: number, queue: string): number | null => {
    const { tape, lines, next, done } = ranks[rank]!;
    const at = lines.get(queue)?.[next.get(queue)!];
    if (at === undefined) return null;
    return tape.instructions[at]!.waits.every((w) => done[w] === 1) ? at : null;
  };
  const complete = (rank: number, queue: string, at: number) => {
    ranks[rank]!.done[at] = 1;
    ranks[rank]!.next.set(queue, ranks[rank]!.next.get(queue)! + 1);
  };
  const reported = new Set<number>();
  for (;;) {
    let moved = false;
    const agreeing: number[] = [];
    for (const [rank, { tape, lines }] of ranks.entries()) {
      for (const queue of lines.keys()) {
        for (let at = ready(rank, queue); at !== null; at = ready(rank, queue)) {
          const i = tape.instructions[at]!;
          if (i.op === "receive") break;
          if (i.op === "coefficient") {
            agreeing.push(at);
            break;
          }
          if (i.op === "report") reported.add(rank);
          if (i.op === "agree" && reported.size < ranks.length) break;
          if (i.op === "send") {
            const there = ready(i.peer, `receive ${rank}`);
            if (there === null) break;
            complete(i.peer, `receive ${rank}`, there);
          }
          complete(rank, queue, at);
          moved = true;
        }
      }
    }
    if (moved) continue;
    if (ranks.every(({ done }) => done.every((d) => d === 1))) return;
    if (agreeing.length < ranks.length) break;
    for (const [rank, at] of agreeing.entries()) complete(rank, "compute", at);
  }
  const stuck = ranks.map(({ tape, lines, next }, rank) => {
    const heads = [...lines].flatMap(([queue, line]) => {
      const at = line[next.get(queue)!];
      return at === undefined ? [] : [`${queue}: ${at} (${title(tape.instructions[at]!)})`];
    });
    return `rank ${rank} at ${heads.join("; ")}`;
  });
  throw new StromaError("TAPE", `[tape] the ranks wait for each other for ever: ${stuck.join(" | ")}`);
}
