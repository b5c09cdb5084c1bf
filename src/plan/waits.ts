/**
 * Derives what an instruction waits for from what it reads and writes. Two instructions on different queues are in
 * hazard where their bytes overlap and one of them writes (read after write, write after read, write after write);
 * slots are in hazard by number. A wait that the queues' order or another wait already implies is left out: with vector
 * clocks, so the waits are minimal.
 */
import type { Instruction, P, Place, Queue, Space } from "./types.js";

export const QUEUES: readonly Queue[] = ["compute", "in", "out", "load", "save"];
export const queueOf = (i: Instruction): Queue => (i.op === "copy" ? i.queue : "compute");

/** Calls `see` for every place that an instruction touches, with the bytes of it; what it adds to counts as written. */
export function accesses(
  i: Instruction,
  places: readonly Place[],
  see: (p: P, writes: boolean, at: number, bytes: number) => void,
): void {
  const whole = (p: P, writes: boolean) => {
    if (p >= 0) see(p, writes, 0, places[p]!.bytes);
  };
  const each = (list: readonly P[], writes: boolean) => {
    for (const p of list) whole(p, writes);
  };
  switch (i.op) {
    case "forward":
      each(i.params, false);
      each(i.in, false);
      each(i.out, true);
      break;
    case "turn":
    case "backward":
      each(i.params, false);
      each(i.in, false);
      if (i.op === "backward") each(i.dOut, false);
      each(i.dIn, true);
      whole(i.sums, true);
      break;
    case "cast":
      whole(i.from, false);
      whole(i.to, true);
      break;
    case "norm":
      // Tied uses are added into the first user's sums.
      for (const [j, p] of i.sums.entries()) whole(p, j === 0);
      break;
    case "pack":
      each(i.sums, false);
      whole(i.to, true);
      break;
    case "update":
      whole(i.param, true);
      whole(i.state, true);
      each(i.grad, false);
      break;
    case "copy":
      see(i.from, false, i.at, i.bytes);
      see(i.to, true, i.at, i.bytes);
      break;
    case "coefficient":
      break;
  }
}

/** Fills `waits` of every instruction, latest position first. */
export function deriveWaits(instructions: readonly Instruction[], places: readonly Place[]): void {
  const Q = QUEUES.length;
  /** clocks[i * Q + q]: the last instruction of queue q that has completed once i has. */
  const clocks = new Int32Array(instructions.length * Q).fill(-1);
  const latest = new Int32Array(Q).fill(-1);
  const spaces: Record<Space, Ranges> = {
    device: new Ranges(),
    host: new Ranges(),
    disk: new Ranges(),
    slot: new Ranges(),
  };
  const needed = new Int32Array(Q);
  for (const [i, instruction] of instructions.entries()) {
    const queue = QUEUES.indexOf(queueOf(instruction));
    needed.fill(-1);
    accesses(instruction, places, (p, writes, at, bytes) => {
      const { space, offset } = places[p]!;
      const start = space === "slot" ? offset : offset + at;
      const end = space === "slot" ? offset + 1 : start + bytes;
      if (writes) spaces[space].write(start, end, i, queue, needed);
      else spaces[space].read(start, end, i, queue, needed);
    });
    const clock = clocks.subarray(i * Q, i * Q + Q);
    const learn = (from: number) => {
      for (let q = 0; q < Q; q++) clock[q] = Math.max(clock[q]!, clocks[from * Q + q]!);
    };
    if (latest[queue]! >= 0) learn(latest[queue]!);
    // Only a later instruction can imply an earlier one: taken from the latest down, none is redundant.
    const candidates = [...needed.keys()].filter((q) => q !== queue && needed[q]! > clock[q]!);
    candidates.sort((a, b) => needed[b]! - needed[a]!);
    instruction.waits = [];
    for (const q of candidates) {
      if (needed[q]! <= clock[q]!) continue;
      instruction.waits.push(needed[q]!);
      learn(needed[q]!);
    }
    clock[queue] = i;
    latest[queue] = i;
  }
}

interface Range {
  start: number;
  end: number;
  writer: number;
  writerQueue: number;
  /** Last reader on each queue since the write; null: none. */
  readers: Int32Array | null;
}

/** Disjoint ranges of one arena in order of address, each with its last write and the reads since. */
class Ranges {
  private readonly list: Range[] = [];

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
      range.readers ??= new Int32Array(QUEUES.length).fill(-1);
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
