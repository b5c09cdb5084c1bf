/**
 * A profile in the Trace Event Format, for ui.perfetto.dev and chrome://tracing: a process for each rank, in it a track for
 * each queue (of messages: for each other rank), counters of bytes; arrows for what goes from rank to rank.
 * https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
 */
import { MEMORY_KINDS, type ProfileDocument, type ProfiledInstruction } from "./document.js";
import { LANE_WORDS, LANES, type Lane, laneOf, peersOf } from "./lanes.js";
import { messagesOf } from "./ranks.js";

/** Microseconds. X: a span. C: a counter. M: a name. s, f: an arrow from a span to another. */
export interface TraceEvent {
  ph: "X" | "C" | "M" | "s" | "f";
  pid: number;
  tid?: number;
  name: string;
  cat?: string;
  ts?: number;
  dur?: number;
  id?: number;
  /** Of an arrow's end: it is in the span around it, not in the next. */
  bp?: "e";
  args: Record<string, unknown>;
}

/** Several documents: those of all ranks, side by side. Processes count from 1. */
export function traceOf(...documents: ProfileDocument[]): { displayTimeUnit: "ms"; traceEvents: TraceEvent[] } {
  const events = documents.flatMap((document, n) => ofRank(document, n + 1));
  for (const [id, { from, to }] of (documents.length > 1 ? messagesOf(documents) : []).entries())
    for (const [ph, { rank, instruction }] of [["s", from] as const, ["f", to] as const]) {
      const { instructions, rank: whose } = documents[rank]!;
      const { startMs, endMs } = instructions[instruction]!;
      // Inside the span, and the arrow never points back in time.
      const at = whose!.beganMs + (ph === "s" ? startMs : Math.max(startMs, endMs - 1e-3));
      events.push({
        ...{ ph, id, pid: rank + 1, tid: tracksOf(documents[rank]!).of(instructions[instruction]!) },
        ...{ name: "message", cat: "message", ts: at * 1e3, ...(ph === "f" ? { bp: "e" } : {}), args: {} },
      });
    }
  return { displayTimeUnit: "ms", traceEvents: events };
}

/** Messages of two peers may be on their way at once, and spans of a track may not. */
function tracksOf({ instructions, rank }: ProfileDocument) {
  const ranks = rank?.ranks ?? 1;
  const names: string[] = [];
  const first = new Map<Lane, number>();
  for (const lane of LANES) {
    const peers = peersOf(instructions, lane);
    first.set(lane, names.length);
    if (peers.length > 0)
      names.push(...peers.map((peer) => `${lane}: ${lane === "send" ? "to" : "from"} rank ${peer}`));
    else if (instructions.some((i) => laneOf(i, ranks) === lane))
      names.push(lane === "compute" ? lane : `${lane}: ${LANE_WORDS[lane]}`);
  }
  const peers = { send: peersOf(instructions, "send"), receive: peersOf(instructions, "receive") };
  const of = (i: ProfiledInstruction): number => {
    const lane = laneOf(i, ranks);
    return first.get(lane)! + (lane === "send" || lane === "receive" ? peers[lane].indexOf(i.peer!) : 0);
  };
  return { names, of };
}

function ofRank(document: ProfileDocument, pid: number): TraceEvent[] {
  const { model, rank, instructions } = document;
  const began = (rank?.beganMs ?? 0) * 1e3;
  const whose = rank === null ? "" : `rank ${rank.rank}: `;
  const events: TraceEvent[] = [
    { ph: "M", pid, name: "process_name", args: { name: `${whose}${model}, one optimizer step` } },
    { ph: "M", pid, name: "process_sort_index", args: { sort_index: pid } },
  ];
  const tracks = tracksOf(document);
  for (const [tid, name] of tracks.names.entries()) {
    events.push({ ph: "M", pid, tid, name: "thread_name", args: { name } });
    events.push({ ph: "M", pid, tid, name: "thread_sort_index", args: { sort_index: tid } });
  }
  for (const [index, i] of instructions.entries()) {
    const { op, operand, block, microBatch, startMs, endMs, bothMs, predictedStartMs, predictedEndMs, bytes } = i;
    const what = operand === null ? op : `${op} ${operand}`;
    events.push({
      ph: "X",
      pid,
      tid: tracks.of(i),
      name: block === null ? what : `${what} ${block}${microBatch === null ? "" : ` #${microBatch}`}`,
      cat: what,
      ts: began + startMs * 1e3,
      dur: Math.max(0, endMs - startMs) * 1e3,
      args: {
        instruction: index,
        ...(bytes > 0 ? { bytes } : {}),
        ...(bothMs === null ? {} : { waitedMs: bothMs - startMs }),
        ...(i.workspaceBytes === null ? {} : { workspaceBytes: i.workspaceBytes }),
        predictedMs: predictedEndMs - predictedStartMs,
      },
    });
  }
  const { timeMs, bytes } = document.memory;
  for (const [k, t] of timeMs.entries())
    events.push({
      ph: "C",
      pid,
      name: "device bytes",
      ts: began + t * 1e3,
      args: Object.fromEntries(MEMORY_KINDS.map((kind) => [kind, bytes[kind][k]!])),
    });
  for (const i of instructions)
    if (i.queue !== "compute")
      events.push({
        ph: "C",
        pid,
        name: "host bytes",
        ts: began + i.startMs * 1e3,
        args: { host: i.hostBytes, disk: i.diskBytes },
      });
  return events;
}
