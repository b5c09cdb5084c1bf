/**
 * Plays the tapes of all ranks together, in one of the orders in which their queues may run: whatever can complete
 * completes. Every queue has all that is its own from the beginning, as in the engine. A send and its receive complete
 * together, when both are first on their queues and have what they wait for; an agreement when all ranks have reported; a
 * coefficient when all ranks are there. Completing something never hinders anything else, so if this order reaches the end
 * every order does, and what an instruction waited for is the same in all of them.
 */
import { StromaError } from "../errors.js";
import { title } from "./check-facts.js";
import { queueOf } from "./check-form.js";
import type { Tape } from "./types.js";

/** An instruction: the position `at` of the tape of `rank`, which is on `queue`. */
export interface Played {
  rank: number;
  queue: string;
  at: number;
}

/** Positions by queue, in order, and how many of each have completed. */
interface Lines {
  tape: Tape;
  lines: Map<string, number[]>;
  next: Map<string, number>;
  done: Uint8Array;
}

/**
 * `complete` is told what completes, in order: a send with its receive, the coefficients of all ranks, else one alone.
 * Throws TAPE where the ranks wait for each other for ever, saying at what.
 */
export function playRanks(tapes: readonly Tape[], complete: (together: readonly Played[]) => void = () => {}): void {
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
  const ready = (rank: number, queue: string): Played | null => {
    const { tape, lines, next, done } = ranks[rank]!;
    const at = lines.get(queue)?.[next.get(queue)!];
    if (at === undefined) return null;
    return tape.instructions[at]!.waits.every((w) => done[w] === 1) ? { rank, queue, at } : null;
  };
  const end = (together: readonly Played[]) => {
    complete(together);
    for (const { rank, queue, at } of together) {
      const { next, done } = ranks[rank]!;
      done[at] = 1;
      next.set(queue, next.get(queue)! + 1);
    }
  };
  const reported = new Set<number>();
  for (;;) {
    let moved = false;
    const agreeing: Played[] = [];
    for (const [rank, { tape, lines }] of ranks.entries()) {
      for (const queue of lines.keys()) {
        for (let first = ready(rank, queue); first !== null; first = ready(rank, queue)) {
          const i = tape.instructions[first.at]!;
          if (i.op === "receive") break;
          if (i.op === "coefficient") {
            agreeing.push(first);
            break;
          }
          if (i.op === "report") reported.add(rank);
          if (i.op === "agree" && reported.size < ranks.length) break;
          const there = i.op === "send" ? ready(i.peer, `receive ${rank}`) : undefined;
          if (there === null) break;
          end(there === undefined ? [first] : [first, there]);
          moved = true;
        }
      }
    }
    if (moved) continue;
    if (ranks.every(({ done }) => done.every((d) => d === 1))) return;
    if (agreeing.length < ranks.length) break;
    end(agreeing);
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
