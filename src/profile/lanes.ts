/** Where a profile draws an instruction: on the lane of its queue, or with what waits for all ranks. */
import type { Queue } from "../plan/types.js";
import { QUEUES } from "../plan/waits.js";
import type { ProfileDocument, ProfiledInstruction } from "./document.js";

/** collective: what several ranks do together, on the compute queue; while it waits for the others nothing is computed. */
export type Lane = Queue | "collective";
export const LANES: readonly Lane[] = [...QUEUES, "collective"];

export const LANE_WORDS: Readonly<Record<Lane, string>> = {
  compute: "compute",
  in: "host to device",
  out: "device to host",
  load: "disk to host",
  save: "host to disk",
  send: "to other ranks",
  receive: "from other ranks",
  collective: "with all ranks",
};

const TOGETHER: ReadonlySet<string> = new Set(["report", "agree", "coefficient"]);

export const laneOf = (at: { op: string; queue: Queue }, ranks: number): Lane =>
  ranks > 1 && TOGETHER.has(at.op) ? "collective" : at.queue;

/** Milliseconds. */
export type Span = readonly [start: number, end: number];

/** Of the time of `spans` what passed while one of `computing` ran; each list in order, none over another of its own. */
export function hiddenMs(spans: readonly Span[], computing: readonly Span[]): number {
  let hidden = 0;
  let first = 0;
  for (const [start, end] of spans) {
    while (first < computing.length && computing[first]![1] <= start) first++;
    for (let k = first; k < computing.length && computing[k]![0] < end; k++)
      hidden += Math.min(computing[k]![1], end) - Math.max(computing[k]![0], start);
  }
  return hidden;
}

/** What ran on a rank's compute queue, and waited for nobody. */
export const computingOf = ({ instructions, rank }: Pick<ProfileDocument, "instructions" | "rank">): Span[] =>
  instructions.filter((i) => laneOf(i, rank?.ranks ?? 1) === "compute").map((i) => [i.startMs, i.endMs]);

/** Peers that a rank sends to or hears from, in order: a lane of messages has a row for each. */
export const peersOf = (instructions: readonly ProfiledInstruction[], lane: Lane): number[] =>
  [...new Set(instructions.flatMap((i) => (i.queue === lane && i.peer !== null ? [i.peer] : [])))].sort(
    (a, b) => a - b,
  );

/** Milliseconds in which a rank did what all do together: nearly all of it waiting. */
export const collectiveMs = ({ instructions, rank }: Pick<ProfileDocument, "instructions" | "rank">): number =>
  instructions.reduce((sum, i) => sum + (laneOf(i, rank?.ranks ?? 1) === "collective" ? i.endMs - i.startMs : 0), 0);

/** Milliseconds in which messages of a lane were on their way, on the average of the peers. */
export function movingMs({ instructions }: Pick<ProfileDocument, "instructions">, lane: "send" | "receive"): number {
  const peers = Math.max(1, peersOf(instructions, lane).length);
  return instructions.reduce((sum, i) => sum + (i.queue === lane ? i.endMs - (i.bothMs ?? i.startMs) : 0), 0) / peers;
}
