/**
 * Derives what an instruction waits for from what it reads and writes. Two instructions on different queues are in
 * hazard where their bytes overlap and one of them writes (read after write, write after read, write after write);
 * slots are in hazard by number. A wait that the queues' order or another wait already implies is left out: with vector
 * clocks, so the waits are minimal.
 */
import type { Instruction, P, Place, Queue, Space } from "./types.js";

export const QUEUES: readonly Queue[] = ["compute", "in", "out", "load", "save", "send", "receive"];
export const queueOf = (i: Instruction): Queue =>
  i.op === "copy" ? i.queue : i.op === "send" || i.op === "receive" ? i.op : "compute";

/** Which of the queues that run beside each other: `compute` is 0. Each peer has two, or one would hold up another. */
export const lineOf = (i: Instruction): number =>
  i.op === "send" || i.op === "receive"
    ? COPIES.length + 2 * i.peer + (i.op === "send" ? 0 : 1)
    : i.op === "copy"
      ? COPIES.indexOf(i.queue)
      : 0;
const COPIES: readonly Queue[] = ["compute", "in", "out", "load", "save"];

type See = (p: P, writes: boolean, at: number, bytes: number) => void;

function each(list: readonly P[], writes: boolean, places: readonly Place[], see: See): void {
  for (const p of list) whole(p, writes, places, see);
}

function whole(p: P, writes: boolean, places: readonly Place[], see: See): void {
  if (p >= 0) see(p, writes, 0, places[p]!.bytes);
}

/** Calls `see` for every place that an instruction touches, with the bytes of it; what it adds to counts as written. */
export function accesses(i: Instruction, places: readonly Place[], see: See): void {
  switch (i.op) {
    case "forward":
      each(i.params, false, places, see);
      each(i.in, false, places, see);
      each(i.out, true, places, see);
      break;
    case "turn":
    case "backward":
      each(i.params, false, places, see);
      each(i.in, false, places, see);
      if (i.op === "backward") each(i.dOut, false, places, see);
      each(i.dIn, true, places, see);
      whole(i.sums, true, places, see);
      break;
    case "cast":
      whole(i.from, false, places, see);
      whole(i.to, true, places, see);
      break;
    case "norm":
      // Tied uses are added into sums of the first user; those of one alone are only read.
      each(i.sums, i.sums.length > 1, places, see);
      break;
    case "partial":
    case "pack":
      each(i.sums, false, places, see);
      whole(i.to, true, places, see);
      break;
    case "reduce":
      each(i.parts, false, places, see);
      whole(i.to, true, places, see);
      break;
    case "update":
      whole(i.param, true, places, see);
      whole(i.state, true, places, see);
      each(i.grad, false, places, see);
      break;
    case "copy":
      see(i.from, false, i.at, i.bytes);
      see(i.to, true, i.at, i.bytes);
      break;
    case "send":
    case "receive":
      // What is shared changes with the word of it.
      see(i.place, i.op === "receive", 0, i.operand.kind === "updated" ? places[i.place]!.bytes : i.bytes);
      break;
    case "report":
    case "agree":
    case "coefficient":
      break;
  }
}

/** Fills `waits` of every instruction, latest position first. */
export function deriveWaits(instructions: readonly Instruction[], places: readonly Place[]): void {
  const Q = instructions.reduce((most, i) => Math.max(most, lineOf(i) + 1), COPIES.length);
  /** clocks[i * Q + q]: the last instruction of queue q that has completed once i has. */
  const clocks = new Int32Array(instructions.length * Q).fill(-1);
  const latest = new Int32Array(Q).fill(-1);
  const spaces: Record<Space, Ranges> = {
    device: new Ranges(Q),
    host: new Ranges(Q),
    shared: new Ranges(Q),
    disk: new Ranges(Q),
    slot: new Ranges(Q),
  };
  const needed = new Int32Array(Q);
  for (const [i, instruction] of instructions.entries()) {
    const queue = lineOf(instruction);
    needed.fill(-1);
    accesses(instruction, places, (p, writes, at, bytes) => {
      const { space, offset } = places[p]!;
      const start = space === "slot" ? offset : offset + at;
      const end = space === "slot" ? offset + 1 : start + bytes;
      if (writes) spaces[space].write(start, end, i, queue, needed);
      else spaces[space].read(start, end, i, queue, needed);
    });
    const clock = i * Q;
    if (latest[queue]! >= 0) learn(clocks, clock, latest[queue]! * Q, Q);
    instruction.waits = [];
    // Only a later instruction can imply an earlier one: taken from the latest down, none is redundant.
    for (;;) {
      let wait = -1;
      for (let q = 0; q < Q; q++) if (q !== queue && needed[q]! > clocks[clock + q]!) wait = Math.max(wait, needed[q]!);
      if (wait < 0) break;
      instruction.waits.push(wait);
      learn(clocks, clock, wait * Q, Q);
    }
    clocks[clock + queue] = i;
    latest[queue] = i;
  }
}

/** What has completed at `from` has completed at `to`. */
function learn(clocks: Int32Array, to: number, from: number, queues: number): void {
  for (let q = 0; q < queues; q++) clocks[to + q] = Math.max(clocks[to + q]!, clocks[from + q]!);
}

interface Range {
  start: number;
  end: number;
  writer: number;
  writerQueue: number;
  /** Last reader on each queue since the write; null: none. */
  readers: number[] | null;
}

/** Disjoint ranges of one arena in order of address, each with its last write and the reads since. */
class Ranges {
  private readonly list: Range[] = [];

  constructor(private readonly queues: number) {}

  read(start: number, end: number, i: number, queue: number, needed: Int32Array): void {
    let k = this.split(start, end);
    let at = start;
    while (at < end) {
      let range = this.list[k];
      if (range === undefined || range.start > at) {
        const until = Math.min(end, range?.start ?? end);
        range = { start: at, end: until, writer: -1, writerQueue: queue, readers: null };
        this.list.splice(k, 0, range);
      }
      needed[range.writerQueue] = Math.max(needed[range.writerQueue]!, range.writer);
      range.readers ??= Array(this.queues).fill(-1) as number[];
      range.readers[queue] = i;
      at = range.end;
      k++;
    }
  }

  write(start: number, end: number, i: number, queue: number, needed: Int32Array): void {
    if (start >= end) return;
    const first = this.split(start, end);
    let k = first;
    for (let range = this.list[k]; range !== undefined && range.start < end; range = this.list[++k]) {
      needed[range.writerQueue] = Math.max(needed[range.writerQueue]!, range.writer);
      for (let q = 0; range.readers !== null && q < needed.length; q++)
        needed[q] = Math.max(needed[q]!, range.readers[q]!);
    }
    const written: Range = { start, end, writer: i, writerQueue: queue, readers: null };
    if (k - first === 1) this.list[first] = written;
    else this.list.splice(first, k - first, written);
  }

  /** Cuts ranges that cross start or end; index of the first range at or after start. */
  private split(start: number, end: number): number {
    const first = this.cut(start);
    this.cut(end);
    return first;
  }

  private cut(at: number): number {
    let low = 0;
    let high = this.list.length;
    while (low < high) {
      const mid = (low + high) >> 1;
      if (this.list[mid]!.end <= at) low = mid + 1;
      else high = mid;
    }
    const range = this.list[low];
    if (range === undefined || range.start >= at) return low;
    this.list.splice(low + 1, 0, { ...range, start: at, readers: range.readers?.slice() ?? null });
    range.end = at;
    return low + 1;
  }
}
