/**
 * A profile in the Trace Event Format, for ui.perfetto.dev and chrome://tracing: a track for each queue, counters of bytes.
 * https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
 */
import type { Queue } from "../plan/types.js";
import { MEMORY_KINDS, type ProfileDocument } from "./document.js";

/** Microseconds. X: a span. C: a counter. M: a name. */
export interface TraceEvent {
  ph: "X" | "C" | "M";
  pid: number;
  tid?: number;
  name: string;
  cat?: string;
  ts?: number;
  dur?: number;
  args: Record<string, unknown>;
}

export const QUEUE_TITLES: Readonly<Record<Queue, string>> = {
  compute: "compute",
  in: "in: host to device",
  out: "out: device to host",
  load: "load: disk to host",
  save: "save: host to disk",
  send: "send: to other ranks",
  receive: "receive: from other ranks",
};

export function traceOf(document: ProfileDocument): { displayTimeUnit: "ms"; traceEvents: TraceEvent[] } {
  const queues = Object.keys(QUEUE_TITLES) as Queue[];
  const pid = 1;
  const events: TraceEvent[] = [
    { ph: "M", pid, name: "process_name", args: { name: `${document.model}, one optimizer step` } },
  ];
  for (const [tid, queue] of queues.entries()) {
    if (!document.instructions.some((i) => i.queue === queue)) continue;
    events.push({ ph: "M", pid, tid, name: "thread_name", args: { name: QUEUE_TITLES[queue] } });
    events.push({ ph: "M", pid, tid, name: "thread_sort_index", args: { sort_index: tid } });
  }
  for (const [index, i] of document.instructions.entries()) {
    const { op, operand, block, microBatch, queue, startMs, endMs, predictedStartMs, predictedEndMs, bytes } = i;
    const what = operand === null ? op : `copy ${operand}`;
    events.push({
      ph: "X",
      pid,
      tid: queues.indexOf(queue),
      name: block === null ? what : `${what} ${block}${microBatch === null ? "" : ` #${microBatch}`}`,
      cat: what,
      ts: startMs * 1e3,
      dur: Math.max(0, endMs - startMs) * 1e3,
      args: {
        instruction: index,
        ...(bytes > 0 ? { bytes } : {}),
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
      ts: t * 1e3,
      args: Object.fromEntries(MEMORY_KINDS.map((kind) => [kind, bytes[kind][k]!])),
    });
  for (const i of document.instructions)
    if (i.queue !== "compute")
      events.push({
        ph: "C",
        pid,
        name: "host bytes",
        ts: i.startMs * 1e3,
        args: { host: i.hostBytes, disk: i.diskBytes },
      });
  return { displayTimeUnit: "ms", traceEvents: events };
}
