/**
 * Races between ranks over host memory that they share. In a step a part is written by its own rank's copies `out` and read
 * by those `in` of all ranks of its replica; between steps all wait for each other, so what is asked is only that of a
 * write and a read of one step one has happened before the other, and which: with update "forward" the write, since reads
 * are of the version that it brings; else the read.
 *
 * What happened before an instruction: the one before it on its queue, what it waits for, and for a receive the send that
 * it meets. Agreements of ranks order more, and are not needed.
 */
import { type Op, refuse, title } from "./check-facts.js";
import { replicaOf, sharesHost, stageOf } from "./mesh.js";
import { playRanks } from "./play-ranks.js";
import type { Tape } from "./types.js";

/** Copies of one rank to or from one place, in the order of their queue. */
interface Use {
  rank: number;
  at: number;
  /** Where the part that it is of begins. */
  part: number;
  start: number;
  end: number;
  /** Which of its queue's instructions it is, from 1. */
  place: number;
}

/**
 * Each of the tapes is proved by itself. Throws TAPE where ranks look for parts in different places, and for the later one
 * of two copies that race.
 */
export function checkSharedHost(tapes: readonly Tape[]): void {
  const stages = tapes[0]!.stages;
  if (!sharesHost(stages)) return;
  const group = (rank: number) => stageOf(stages!, rank) * tapes.length + replicaOf(stages!, rank);
  const shared = ({ placement }: Tape) =>
    JSON.stringify([placement.arenas.sharedBytes ?? 0, placement.homes.map((home) => home.shared ?? null)]);
  for (const [rank, tape] of tapes.entries()) {
    const first = tapes.findIndex((_, other) => group(other) === group(rank));
    if (shared(tape) !== shared(tapes[first]!))
      refuse(tape, -1, `rank ${rank} has parts elsewhere in shared memory than rank ${first}, with which it shares it`);
  }
  const known = happenedBefore(tapes);
  const writes = tapes.map((tape, rank) => usesOf(tape, rank, "out"));
  // What is copied lies where its part begins: each tape has been proved to.
  const reads = tapes.map((tape, rank) => byPart(usesOf(tape, rank, "in")));
  const updatesFirst = tapes[0]!.update === "forward";
  for (const write of writes.flat())
    for (const [rank, parts] of reads.entries()) {
      if (rank === write.rank || group(rank) !== group(write.rank)) continue;
      for (const read of parts.get(write.part) ?? []) {
        if (read.start >= write.end || write.start >= read.end) continue;
        const [first, second] = updatesFirst ? [write, read] : [read, write];
        const seen = known(second.rank, second.at, first.rank, updatesFirst ? "out" : "in");
        if (seen >= first.place) continue;
        const other = `instruction ${first.at} (${title(tapes[first.rank]!.instructions[first.at]!)}) of rank ${first.rank}`;
        const [does, did] = updatesFirst ? ["reads", "write"] : ["writes", "read"];
        const bytes = `shared ${Math.max(read.start, write.start)}..${Math.min(read.end, write.end)}`;
        refuse(
          tapes[second.rank]!,
          second.at,
          `rank ${second.rank} ${does} ${bytes}, and ${other} may not have ${did} it yet`,
        );
      }
    }
}

function byPart(uses: readonly Use[]): Map<number, Use[]> {
  const parts = new Map<number, Use[]>();
  for (const use of uses) {
    const list = parts.get(use.part);
    if (list === undefined) parts.set(use.part, [use]);
    else list.push(use);
  }
  return parts;
}

function usesOf(tape: Tape, rank: number, queue: "in" | "out"): Use[] {
  const copies = [...tape.instructions.entries()].filter(
    (entry): entry is [number, Op<"copy">] => entry[1].op === "copy" && entry[1].queue === queue,
  );
  return copies.flatMap(([at, i], k) => {
    const { space, offset } = tape.places[queue === "in" ? i.from : i.to]!;
    const start = offset + i.at;
    return space === "shared" ? [{ rank, at, part: offset, start, end: start + i.bytes, place: k + 1 }] : [];
  });
}

/** How many copies of a rank's queue have surely completed when an instruction begins. */
function happenedBefore(tapes: readonly Tape[]): (rank: number, at: number, of: number, queue: "in" | "out") => number {
  const width = 2 * tapes.length;
  const clocks = tapes.map((tape) => new Int32Array(tape.instructions.length * width));
  const last = tapes.map(() => new Map<string, number>());
  const learn = (rank: number, at: number, from: number, before: number) => {
    const [to, of] = [clocks[rank]!, clocks[from]!];
    for (let k = 0; k < width; k++) to[at * width + k] = Math.max(to[at * width + k]!, of[before * width + k]!);
  };
  playRanks(tapes, (together) => {
    for (const { rank, queue, at } of together) {
      const i = tapes[rank]!.instructions[at]!;
      const previous = last[rank]!.get(queue);
      if (previous !== undefined) learn(rank, at, rank, previous);
      for (const before of i.waits) learn(rank, at, rank, before);
      last[rank]!.set(queue, at);
      if (i.op === "copy" && (queue === "in" || queue === "out"))
        clocks[rank]![at * width + 2 * rank + (queue === "in" ? 0 : 1)]!++;
    }
    const [sent, received] = together;
    if (received !== undefined && tapes[sent!.rank]!.instructions[sent!.at]!.op === "send")
      learn(received.rank, received.at, sent!.rank, sent!.at);
  });
  return (rank, at, of, queue) => clocks[rank]![at * width + 2 * of + (queue === "in" ? 0 : 1)]!;
}
