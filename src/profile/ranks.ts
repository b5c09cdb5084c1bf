/** The profiles of one step by all of its ranks, put side by side on one axis of time. */
import { StromaError } from "../errors.js";
import type { ProfileDocument } from "./document.js";
import { computingOf, hiddenMs, peersOf, type Span } from "./lanes.js";

/** From an instruction of one rank to one of another, both by position; times on the common axis. */
export interface Message {
  from: { rank: number; instruction: number };
  to: { rank: number; instruction: number };
  /** Both ends were there. */
  bothMs: number;
  /** It had arrived. */
  endMs: number;
}

/** The k-th send of A to B is the k-th receive of B from A. */
export function messagesOf(documents: readonly ProfileDocument[]): Message[] {
  const ends = (rank: number, queue: "send" | "receive", peer: number) =>
    documents[rank]!.instructions.flatMap((i, k) => (i.queue === queue && i.peer === peer ? [k] : []));
  return documents.flatMap(({ instructions, rank }, from) =>
    peersOf(instructions, "send").flatMap((to) => {
      const [sends, receives] = [ends(from, "send", to), ends(to, "receive", from)];
      if (sends.length !== receives.length)
        throw new StromaError(
          "INVALID_ARGUMENT",
          `[profile] rank ${from} sent ${sends.length} messages to rank ${to}, which received ${receives.length}. Expected the profiles of one step by all of its ranks`,
        );
      return sends.map((send, k): Message => {
        const receive = receives[k]!;
        const [there, here] = [rank!.beganMs, documents[to]!.rank!.beganMs];
        const received = documents[to]!.instructions[receive]!;
        const bothMs = Math.max(instructions[send]!.startMs + there, received.startMs + here);
        return {
          from: { rank: from, instruction: send },
          to: { rank: to, instruction: receive },
          bothMs,
          // Clocks that differ by a little may not make it arrive before it went.
          endMs: Math.max(bothMs, received.endMs + here),
        };
      });
    }),
  );
}

/**
 * When each rank's step began at the latest: the end of a step may be heard late, where the event loop is busy, and never
 * early; and nothing arrives before it went.
 */
function latestBegins(documents: readonly ProfileDocument[]): number[] {
  const began = documents.map(({ rank }) => rank!.beganMs);
  const messages = messagesOf(documents);
  // What one rank learns another may need: as often as there are ranks.
  for (const _ of documents)
    for (const { from, to } of messages) {
      const sent = documents[from.rank]!.instructions[from.instruction]!;
      const received = documents[to.rank]!.instructions[to.instruction]!;
      began[from.rank] = Math.min(began[from.rank]!, began[to.rank]! + received.endMs - sent.startMs);
    }
  return began;
}

/**
 * The documents of all ranks, by rank, with what one alone does not know: how long messages waited for the other end.
 * `beganMs` of each: on one clock, not too early; in what is returned from the first rank's begin.
 * @throws INVALID_ARGUMENT where they are not of one step's ranks
 */
export function sideBySide(documents: readonly ProfileDocument[]): ProfileDocument[] {
  if (documents.some(({ rank }, r) => rank?.rank !== r || rank.ranks !== documents.length))
    throw new StromaError(
      "INVALID_ARGUMENT",
      `[profile] expected the documents of ranks 0 to ${documents.length - 1} in order, got those of ${documents.map(({ rank }) => (rank === null ? "one alone" : `${rank.rank} of ${rank.ranks}`)).join(", ")}`,
    );
  const began = latestBegins(documents);
  const first = Math.min(...began);
  const shifted = documents.map((d, r) => ({ ...d, rank: { ...d.rank!, beganMs: round(began[r]! - first) } }));
  const both = shifted.map(() => new Map<number, number>());
  for (const { from, to, bothMs } of messagesOf(shifted))
    for (const { rank, instruction } of [from, to]) both[rank]!.set(instruction, bothMs - shifted[rank]!.rank.beganMs);
  return shifted.map((document, r): ProfileDocument => {
    const instructions = document.instructions.map((i, k) => {
      const bothMs = both[r]!.get(k);
      // A small message has left before the other end asks for it.
      return bothMs === undefined ? i : { ...i, bothMs: round(Math.min(bothMs, i.endMs)) };
    });
    const computing = computingOf(document);
    const messages = { waitMs: 0, movingMs: 0, hiddenMs: 0 };
    for (const queue of ["send", "receive"] as const)
      for (const peer of peersOf(instructions, queue)) {
        const line = instructions.filter((i) => i.queue === queue && i.peer === peer);
        const moving = line.map((i): Span => [i.bothMs!, i.endMs]);
        for (const i of line) messages.waitMs += i.bothMs! - i.startMs;
        for (const [start, end] of moving) messages.movingMs += end - start;
        messages.hiddenMs += hiddenMs(moving, computing);
      }
    return { ...document, instructions, summary: { ...document.summary, messages } };
  });
}

const round = (ms: number): number => Math.round(ms * 1e3) / 1e3;
