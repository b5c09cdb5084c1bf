/**
 * Races: two accesses to the same bytes, one of them a write, on two queues, with nothing that orders them.
 *
 * An instruction happens after the one before it on its queue and after those it waits for. Its clock holds, for every
 * queue, how many instructions happened before it. The tape is played in its written order, which is its meaning, and
 * every byte remembers its last write and each queue's last read since; earlier ones are ordered before those.
 */
import { type Facts, type Op, refuse, title } from "./check-facts.js";
import { queueOf } from "./check-form.js";
import { Intervals } from "./intervals.js";
import type { Space, Tape } from "./types.js";

/** Bytes [start, end) of a space; a slot is one of its own. */
interface Range {
  space: Space;
  start: number;
  end: number;
}

/** What happened to some bytes: positions of instructions, -1: none. */
interface Accesses {
  write: number;
  reads: readonly number[];
}

/** Waits point backwards already (check-form.ts). Throws TAPE for the later one of two instructions that race. */
export function checkOrder(facts: Facts, tape: Tape): void {
  const order = new Order(tape);
  for (const now of tape.instructions.keys()) {
    order.advance(now);
    const { reads, writes } = accesses(facts, tape, now);
    for (const range of reads) order.read(range);
    for (const range of writes) order.write(range);
  }
}

class Order {
  private now = -1;
  private readonly queues: Uint16Array;
  /** How many queues the tape uses. */
  private readonly count: number;
  /** By instruction and queue. */
  private readonly clocks: Int32Array;
  /** By queue. */
  private readonly last: number[];
  private readonly never: readonly number[];
  private readonly memory: Record<Space, Intervals<Accesses>> = {
    device: new Intervals(),
    host: new Intervals(),
    shared: new Intervals(),
    disk: new Intervals(),
    slot: new Intervals(),
  };

  constructor(private readonly tape: Tape) {
    const names = [...new Set(tape.instructions.map(queueOf))];
    this.queues = Uint16Array.from(tape.instructions, (i) => names.indexOf(queueOf(i)));
    this.count = names.length;
    this.clocks = new Int32Array(names.length * tape.instructions.length);
    this.last = names.map(() => -1);
    this.never = names.map(() => -1);
  }

  advance(now: number): void {
    this.now = now;
    const queue = this.queues[now]!;
    this.after(this.last[queue]!);
    for (const before of this.tape.instructions[now]!.waits) this.after(before);
    this.clocks[now * this.count + queue]!++;
    this.last[queue] = now;
  }

  private after(before: number): void {
    const { clocks, now } = this;
    const n = this.count;
    if (before >= 0)
      for (let q = 0; q < n; q++) clocks[now * n + q] = Math.max(clocks[now * n + q]!, clocks[before * n + q]!);
  }

  read({ space, start, end }: Range): void {
    const queue = this.queues[this.now]!;
    this.memory[space].change(start, end, (held, from, to) => {
      const { write, reads } = held ?? { write: -1, reads: this.never };
      this.demand(write, { space, start: from, end: to }, "writes", "reads");
      return { write, reads: reads.with(queue, this.now) };
    });
  }

  write({ space, start, end }: Range): void {
    const arena = this.memory[space];
    arena.each(start, end, (held, from, to) => {
      if (held === undefined) return;
      const range = { space, start: from, end: to };
      this.demand(held.write, range, "writes", "writes");
      for (const read of held.reads) this.demand(read, range, "reads", "writes");
    });
    arena.set(start, end, { write: this.now, reads: this.never });
  }

  private demand(before: number, { space, start, end }: Range, did: string, does: string): void {
    if (before < 0) return;
    const n = this.count;
    const queue = this.queues[before]!;
    if (this.clocks[before * n + queue]! <= this.clocks[this.now * n + queue]!) return;
    const bytes = space === "slot" ? `slot ${start}` : `${space} ${start}..${end}`;
    const other = `instruction ${before} (${title(this.tape.instructions[before]!)})`;
    refuse(this.tape, this.now, `${does} ${bytes}, which ${other} ${did}, and does not wait for it`);
  }
}

/**
 * What an instruction touches; what it works on in place is among both. Refuses an instruction that writes bytes which it
 * also reads as something else, or that writes bytes twice.
 */
function accesses(facts: Facts, tape: Tape, now: number): { reads: Range[]; writes: Range[] } {
  const i = tape.instructions[now]!;
  const range = (p: number, at = 0, bytes = tape.places[p]!.bytes): Range => {
    const { space, offset } = tape.places[p]!;
    const start = offset + at;
    return { space, start, end: start + (space === "slot" ? 1 : bytes) };
  };
  const all = (list: readonly number[]) => list.filter((p) => p !== -1).map((p) => range(p));
  // The word of a shared part is about all of it.
  const exchanged = ({ place, operand, bytes }: Op<"send" | "receive">) =>
    operand.kind === "param" ? range(place) : range(place, 0, bytes);
  let reads: Range[] = [];
  let writes: Range[] = [];
  let inPlace: Range[] = [];
  switch (i.op) {
    case "forward":
      reads = all([...i.params, ...i.in]);
      writes = all(i.out);
      break;
    case "turn":
    case "backward": {
      reads = all([...i.params, ...i.in, ...(i.op === "backward" ? i.dOut : [])]);
      const { added, overwritten } = gradients(tape, i);
      (i.first ? overwritten : added).push(i.sums);
      writes = all(overwritten);
      inPlace = all(added);
      break;
    }
    case "cast":
      reads = [range(i.from)];
      writes = [range(i.to)];
      break;
    case "norm":
      if (i.sums.length > 1) inPlace = all(i.sums);
      else reads = all(i.sums);
      break;
    case "partial": {
      // In place, where sums have its layout.
      const { offset } = tape.places[i.to]!;
      const rest = i.sums.filter((p) => tape.places[p]!.offset !== offset);
      reads = all(rest);
      if (rest.length === i.sums.length) writes = [range(i.to)];
      else inPlace = [range(i.to)];
      break;
    }
    case "reduce":
      reads = all(i.parts);
      writes = [range(i.to)];
      break;
    case "report":
    case "agree":
    case "coefficient":
      break;
    case "send":
      return { reads: [exchanged(i)], writes: [] };
    case "receive":
      return { reads: [], writes: [exchanged(i)] };
    case "pack":
      reads = all(i.sums);
      writes = [range(i.to)];
      break;
    case "update":
      reads = all(i.grad);
      inPlace = [range(i.param, 0, facts.layouts[i.block]!.trainableBytes), range(i.state)];
      break;
    case "copy":
      return { reads: [range(i.from, i.at, i.bytes)], writes: [range(i.to, i.at, i.bytes)] };
  }
  const changed = [...writes, ...inPlace];
  for (const [k, a] of changed.entries()) {
    for (const b of changed.slice(k + 1)) if (overlap(a, b)) refuse(tape, now, "writes the same bytes twice");
    for (const b of reads) if (overlap(a, b)) refuse(tape, now, "writes bytes that it also reads");
  }
  return { reads: [...reads, ...inPlace], writes: changed };
}

const overlap = (a: Range, b: Range): boolean => a.space === b.space && a.start < b.end && b.start < a.end;

/** dIn of a block that reads one boundary twice: the second contribution goes to the very place of the first. */
function gradients(tape: Tape, i: Op<"turn" | "backward">): { added: number[]; overwritten: number[] } {
  const added: number[] = [];
  const overwritten: number[] = [];
  const seen = new Set<string>();
  for (const [k, p] of i.dIn.entries()) {
    if (p === -1) continue;
    const { space, offset } = tape.places[p]!;
    const id = `${space} ${offset}`;
    if (i.add[k] && seen.has(id)) continue;
    seen.add(id);
    (i.add[k] ? added : overwritten).push(p);
  }
  return { added, overwritten };
}
