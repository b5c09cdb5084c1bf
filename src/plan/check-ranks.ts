/**
 * Proves the tapes of all ranks together, each of which the checker has proved by itself: the k-th send from one rank to
 * another is what the other's k-th receive says, all have the same blocks and rules, and no order in which queues may run
 * leaves them waiting for each other (play-ranks.ts), and none writes shared host memory that another reads (check-shared.ts).
 */
import type { Graph } from "../graph/types.js";
import { nameOf, type Op, refuse } from "./check-facts.js";
import { checkSharedHost } from "./check-shared.js";
import { checkTape } from "./checker.js";
import { playRanks } from "./play-ranks.js";
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
    if (JSON.stringify({ ...tape.stages, rank: 0 }) !== JSON.stringify({ ...first.stages!, rank: 0 }))
      refuse(tape, -1, `rank ${rank} has other stages than rank 0`);
  }
  for (const from of tapes.keys()) for (const to of tapes.keys()) if (from !== to) checkPair(tapes, from, to);
  playRanks(tapes);
  checkSharedHost(tapes);
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
