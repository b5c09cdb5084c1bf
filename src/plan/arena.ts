/**
 * Gives every buffer of a program its place. Lifetimes are positions in the program, so two buffers may share bytes
 * exactly when one's last use stands before the other's first; the derived waits make that hold on every queue.
 *
 * An arena begins with what is there between steps (homes of param and state, then retained gradients), at offsets that
 * depend on the policy alone and not on the batch. Large transients (a block's state and sums) follow, largest first.
 * Boundaries come last, in program order; they also use the bytes of a retained gradient between its update and the
 * next one's pack.
 */
import { pushAt } from "./lists.js";
import type { P, Place, Space } from "./types.js";

type Size = "large" | "small";
interface Buffer {
  space: Space;
  bytes: number;
  /** Transients: unknown (-1) until `place`. */
  offset: number;
  fixed: boolean;
  size: Size;
  /** Slots are reused among values of one dtype and shape. */
  key: string;
  first: number;
  last: number;
  /** Fixed and free in between: from the last use in the front of the program to the first one behind it. */
  window: { opens: number; closes: number } | null;
  /** It is these bytes of another one. */
  part: { of: P; at: number } | null;
}

export class Buffers {
  readonly list: Buffer[] = [];
  private readonly ends: Record<Space, number> = { device: 0, host: 0, shared: 0, disk: 0, slot: 0 };

  /** What is there before and after the program; `bytes` a multiple of a page. */
  fixed(space: Space, bytes: number): P {
    const offset = this.ends[space];
    this.ends[space] += bytes;
    return this.add({ space, bytes, offset, fixed: true, size: "large", key: "" });
  }

  transient(space: Space, bytes: number, size: Size, key = ""): P {
    return this.add({ space, bytes, offset: -1, fixed: false, size, key });
  }

  /** Bytes [at, at + bytes) of another buffer; `at` a multiple of 256. Its life is part of the other's. */
  part(of: P, at: number, bytes: number): P {
    const { space, fixed, size } = this.list[of]!;
    const p = this.add({ space, bytes, offset: -1, fixed, size, key: "" });
    this.list[p]!.part = { of, at };
    return p;
  }

  touch(p: P, position: number): void {
    const buffer = this.list[p]!;
    if (buffer.first < 0) buffer.first = position;
    buffer.last = Math.max(buffer.last, position);
    if (buffer.part !== null) this.touch(buffer.part.of, position);
  }

  /** A fixed buffer's bytes serve boundaries that begin after `opens` and end before `closes`. */
  lend(p: P, opens: number, closes: number): void {
    this.list[p]!.window = { opens, closes };
  }

  /** Sets every offset; bytes of each arena and the number of slots. */
  place(positions: number): Record<Space, number> {
    const used = { ...this.ends };
    for (const space of ["device", "host", "shared", "disk", "slot"] as const) {
      const here = this.list.filter((b) => b.space === space && b.part === null);
      const transients = here.filter((b) => !b.fixed && b.first >= 0);
      if (space === "slot") used.slot = numberSlots(transients);
      else {
        const large = transients.filter((b) => b.size === "large");
        const small = transients.filter((b) => b.size === "small");
        used[space] = packSmall(small, here, packLarge(large, used[space], positions), positions);
      }
    }
    for (const b of this.list) if (b.part !== null) b.offset = this.list[b.part.of]!.offset + b.part.at;
    return used;
  }

  toPlaces(): { places: Place[]; index: P[] } {
    const places: Place[] = [];
    const known = new Map<string, P>();
    const index = this.list.map(({ space, offset, bytes, first, fixed }) => {
      if (first < 0 && !fixed) return -1;
      const key = `${space} ${offset} ${bytes}`;
      let p = known.get(key);
      if (p === undefined) {
        p = places.push({ space, offset, bytes }) - 1;
        known.set(key, p);
      }
      return p;
    });
    return { places, index };
  }

  private add(b: Pick<Buffer, "space" | "bytes" | "offset" | "fixed" | "size" | "key">): P {
    const { space, bytes, offset, fixed, size, key } = b;
    return (
      this.list.push({ space, bytes, offset, fixed, size, key, first: -1, last: -1, window: null, part: null }) - 1
    );
  }
}

/** Largest first, each at the lowest offset that is free for its whole life. Returns the end. */
function packLarge(buffers: Buffer[], base: number, positions: number): number {
  // A coarse calendar of what is placed: most lives are short, and only neighbours in time are asked.
  const width = Math.max(1, Math.ceil(positions / 512));
  const calendar: Buffer[][] = [];
  let end = base;
  for (const b of buffers.toSorted((x, y) => y.bytes - x.bytes || x.first - y.first)) {
    const near = new Set<Buffer>();
    const pages = { from: Math.floor(b.first / width), to: Math.floor(b.last / width) };
    for (let c = pages.from; c <= pages.to; c++) {
      for (const other of calendar[c] ?? []) if (other.last >= b.first && other.first <= b.last) near.add(other);
    }
    b.offset = base;
    for (const other of [...near].sort((x, y) => x.offset - y.offset)) {
      if (other.offset >= b.offset + b.bytes) break;
      b.offset = Math.max(b.offset, other.offset + other.bytes);
    }
    end = Math.max(end, b.offset + b.bytes);
    for (let c = pages.from; c <= pages.to; c++) pushAt(calendar, c, b);
  }
  return end;
}

interface Pool {
  opens: number;
  closes: number;
  gaps: { start: number; end: number }[];
}

/** In program order, into the narrowest lent window that fits, else behind everything. Returns the arena's end. */
function packSmall(buffers: Buffer[], all: Buffer[], base: number, positions: number): number {
  const pools: Pool[] = all
    .filter((b) => b.window !== null)
    .map((b) => ({ ...b.window!, gaps: [{ start: b.offset, end: b.offset + b.bytes }] }))
    .sort((a, b) => b.opens - a.opens);
  pools.push({ opens: -1, closes: positions, gaps: [{ start: base, end: Number.POSITIVE_INFINITY }] });
  const ending: { buffer: Buffer; pool: Pool }[][] = [];
  let swept = 0;
  let end = base;
  for (const b of buffers.toSorted((x, y) => x.first - y.first)) {
    for (; swept < b.first; swept++) for (const { buffer, pool } of ending[swept] ?? []) release(pool.gaps, buffer);
    for (const pool of pools) {
      if (pool.opens >= b.first || pool.closes <= b.last) continue;
      const g = pool.gaps.findIndex((gap) => gap.end - gap.start >= b.bytes);
      if (g < 0) continue;
      const gap = pool.gaps[g]!;
      b.offset = gap.start;
      gap.start += b.bytes;
      if (gap.start === gap.end) pool.gaps.splice(g, 1);
      pushAt(ending, b.last, { buffer: b, pool });
      if (pool.opens < 0) end = Math.max(end, b.offset + b.bytes);
      break;
    }
  }
  return end;
}

function release(gaps: Pool["gaps"], { offset, bytes }: Buffer): void {
  const k = gaps.findIndex((gap) => gap.start >= offset + bytes);
  const at = k < 0 ? gaps.length : k;
  const [before, after] = [gaps[at - 1], gaps[at]];
  const joinsBefore = before?.end === offset;
  const joinsAfter = after?.start === offset + bytes;
  if (joinsBefore && joinsAfter) {
    before.end = after.end;
    gaps.splice(at, 1);
  } else if (joinsBefore) before.end += bytes;
  else if (joinsAfter) after.start = offset;
  else gaps.splice(at, 0, { start: offset, end: offset + bytes });
}

/** Numbers slots in program order, latest freed first. Returns their count. */
function numberSlots(buffers: Buffer[]): number {
  let count = 0;
  const idle = new Map<string, number[]>();
  const ending: Buffer[][] = [];
  let swept = 0;
  for (const b of buffers.toSorted((x, y) => x.first - y.first)) {
    for (; swept < b.first; swept++) {
      for (const done of ending[swept] ?? []) {
        const list = idle.get(done.key);
        if (list === undefined) idle.set(done.key, [done.offset]);
        else list.push(done.offset);
      }
    }
    b.offset = idle.get(b.key)?.pop() ?? count++;
    pushAt(ending, b.last, b);
  }
  return count;
}
