/**
 * Runs tapes on symbols, as the worst engine would that still keeps to the tape's waits. Memory is 256-byte units; a value
 * is an interned term over everything it was computed from, so two runs agree exactly when they end with equal terms.
 *
 * An instruction begins when its queue is free and its waits are over: it reads its operands and fills what it will write
 * with poison. It completes later, when it reads them again: should they have changed meanwhile, its result is poison.
 * Which instruction moves next is the adversary's choice.
 */

import { evaluate } from "../../../src/graph/dims.js";
import type { Graph } from "../../../src/graph/types.js";
import { dtypeBytes } from "../../../src/graph/value.js";
import { type BlockLayout, blockLayouts, room, usersOf } from "../../../src/plan/layout.js";
import type { Instruction, Place, Space, Tape } from "../../../src/plan/types.js";

export const UNIT = 256;
/** A unit's token is value * SPAN + its index in what was written. */
const SPAN = 512;
const POISON = -1;
const GARBAGE = -2;

/** Units [start, end) of all memory: those of one space follow those of another. A slot is one. */
export interface Range {
  start: number;
  end: number;
}
const SPACES: readonly Space[] = ["device", "host", "disk", "slot"];
/** Units of an arena at most: 16 MiB. */
const ROOM = 2 ** 16;

export const queueOf = (i: Instruction) => (i.op === "copy" ? i.queue : "compute");

export function rangeOf(place: Place, at = 0, bytes = place.bytes): Range {
  const base = SPACES.indexOf(place.space) * ROOM;
  if (place.space === "slot") return { start: base + place.offset, end: base + place.offset + 1 };
  const byte = place.offset + at;
  return { start: base + Math.floor(byte / UNIT), end: base + Math.ceil((byte + bytes) / UNIT) };
}

const units = (ranges: readonly Range[]): number[] => {
  const list: number[] = [];
  for (const { start, end } of ranges) for (let u = start; u < end; u++) list.push(u);
  return list;
};

/** What an instruction reads and writes; what it changes in place is among both. */
export function touches(graph: Graph, tape: Tape, i: Instruction): { reads: Range[]; writes: Range[] } {
  const all = (list: readonly number[]) => list.filter((p) => p >= 0).map((p) => rangeOf(tape.places[p]!));
  switch (i.op) {
    case "forward":
      return { reads: all([...i.params, ...i.in]), writes: all(i.out) };
    case "turn":
    case "backward": {
      const added = i.dIn.filter((_, k) => i.add[k]);
      const reads = [
        ...i.params,
        ...i.in,
        ...(i.op === "backward" ? i.dOut : []),
        ...added,
        ...(i.first ? [] : [i.sums]),
      ];
      return { reads: all(reads), writes: all([...i.dIn, i.sums]) };
    }
    case "cast":
      return { reads: all([i.from]), writes: all([i.to]) };
    case "norm":
      return { reads: all(i.sums), writes: all(i.sums) };
    case "partial":
      return { reads: all(i.sums), writes: all([i.to]) };
    case "reduce":
      return { reads: all(i.parts), writes: all([i.to]) };
    case "report":
    case "agree":
    case "coefficient":
      return { reads: [], writes: [] };
    case "send":
      return { reads: [rangeOf(tape.places[i.place]!, 0, i.bytes)], writes: [] };
    case "receive":
      return { reads: [], writes: [rangeOf(tape.places[i.place]!, 0, i.bytes)] };
    case "pack":
      return { reads: all(i.sums), writes: all([i.to]) };
    case "update": {
      const bytes = blockLayouts(graph, tape.state)[i.block]!.trainableBytes;
      const changed = [rangeOf(tape.places[i.param]!, 0, bytes), ...all([i.state])];
      return { reads: [...all(i.grad), ...changed], writes: changed };
    }
    case "copy":
      return {
        reads: [rangeOf(tape.places[i.from]!, i.at, i.bytes)],
        writes: [rangeOf(tape.places[i.to]!, i.at, i.bytes)],
      };
  }
}

/** Waits anew, from hazards unit by unit: all of them, none left out as implied by others. */
export function deriveWaits(graph: Graph, tape: Tape): void {
  const write = new Map<number, number>();
  const readers = new Map<number, number[]>();
  for (const [now, i] of tape.instructions.entries()) {
    const waits = new Set<number>();
    const touched = touches(graph, tape, i);
    const reads = units(touched.reads);
    const writes = units(touched.writes);
    for (const u of [...reads, ...writes]) waits.add(write.get(u) ?? -1);
    for (const u of writes) for (const r of readers.get(u) ?? []) waits.add(r);
    for (const u of reads) readers.set(u, [...(readers.get(u) ?? []), now]);
    for (const u of writes) {
      write.set(u, now);
      readers.delete(u);
    }
    const queue = queueOf(i);
    i.waits = [...waits].filter((w) => w >= 0 && w !== now && queueOf(tape.instructions[w]!) !== queue);
    i.waits.sort((a, b) => a - b);
  }
}

/** Picks the next of several possible moves: e.g. the first, or any. Moves are instructions and whether they complete. */
export type Adversary = (moves: readonly { queue: string; completes: boolean }[]) => number;

/** Always the queue that stands first; it completes a move at once (eager), or only when nothing can begin (lazy). */
export function stubborn(queues: readonly string[], lazy: boolean): Adversary {
  return (moves) => {
    const rank = (m: { queue: string; completes: boolean }) =>
      queues.indexOf(m.queue) + (m.completes === lazy ? queues.length : 0);
    let best = 0;
    for (const [k, m] of moves.entries()) if (rank(m) < rank(moves[best]!)) best = k;
    return best;
  };
}

/** All that a run leaves: by tape, what the homes hold and what the step reports. */
export type Outcome = string[];

export class Session {
  private readonly terms = new Map<string, number>();
  private readonly touched = new WeakMap<Tape, { writes: number[]; others: number[] }[]>();
  private readonly layoutsByFormat = new Map<string, BlockLayout[]>();
  private readonly memory = new Int32Array(SPACES.length * ROOM);
  private record = 0;
  private pending = false;
  private step = 0;

  readonly hasBackward: boolean[];

  constructor(private readonly graph: Graph) {
    this.hasBackward = graph.blocks.map((_, b) => graph.losses.some((l) => l.block === b));
    for (const [b, { program, inputs }] of [...graph.blocks.entries()].reverse())
      for (const [k, source] of inputs.entries())
        if (this.hasBackward[b] && "block" in source && graph.programs[program]!.inputs[k]!.grad)
          this.hasBackward[source.block] = true;
  }

  /** Plays the tapes one after the other from fresh homes. Throws for what no engine could run. */
  run(tapes: readonly Tape[], adversary: Adversary | null): Outcome {
    this.memory.fill(GARBAGE);
    this.record = this.term("no record");
    this.pending = false;
    this.step = 0;
    for (const [b, home] of tapes[0]!.placement.homes.entries())
      for (const kind of ["param", "state"] as const)
        if (home[kind] !== null) {
          const value = this.term("initial", kind, b);
          for (const [k, u] of units([rangeOf(home[kind])]).entries()) this.memory[u] = value * SPAN + k;
        }
    return tapes.map((tape) => this.play(tape, adversary));
  }

  private play(tape: Tape, adversary: Adversary | null): string {
    const play = new Play(this.graph, tape, this, this.step, this.pending, this.record);
    const { instructions } = tape;
    const touched = this.touchedBy(tape);
    const begun = new Map<number, { seen: number[]; written: number[] }>();
    const done = new Uint8Array(instructions.length);
    const begin = (i: number) => {
      const { writes, others } = touched[i]!;
      const seen = others.map((u) => this.at(u));
      const store = new Store(this);
      play.execute(instructions[i]!, store);
      begun.set(i, { seen, written: writes.map((u) => store.at(u)) });
      for (const u of writes) this.memory[u] = POISON;
    };
    const complete = (i: number) => {
      const { writes, others } = touched[i]!;
      const { seen, written } = begun.get(i)!;
      const changed = others.some((u, k) => this.at(u) !== seen[k]);
      for (const [k, u] of writes.entries()) this.memory[u] = changed ? POISON : written[k]!;
      if (changed) play.spoil(instructions[i]!);
      done[i] = 1;
    };
    if (adversary === null) {
      for (const i of instructions.keys()) {
        begin(i);
        complete(i);
      }
    } else this.race(instructions, done, begin, complete, adversary);
    this.record = play.record;
    this.pending = tape.update === "forward" && tape.kind === "step";
    this.step++;
    const homes = tape.placement.homes.flatMap(({ param, state }) =>
      [param, state].map((place) => (place === null ? "" : this.value(units([rangeOf(place)]).map((u) => this.at(u))))),
    );
    return `${homes.join()};${play.report()};${play.record}`;
  }

  private race(
    instructions: readonly Instruction[],
    done: Uint8Array,
    begin: (i: number) => void,
    complete: (i: number) => void,
    adversary: Adversary,
  ): void {
    const queues = new Map<string, number[]>();
    for (const [i, instruction] of instructions.entries()) {
      const queue = queueOf(instruction);
      const list = queues.get(queue);
      if (list === undefined) queues.set(queue, [i]);
      else list.push(i);
    }
    const fronts = [...queues].map(([queue, list]) => ({ queue, list, next: 0, completes: false }));
    for (let left = 2 * instructions.length; left > 0; left--) {
      const moves = fronts.filter(({ list, next, completes }) => {
        const i = list[next];
        return i !== undefined && (completes || instructions[i]!.waits.every((w) => done[w]));
      });
      const move = moves[adversary(moves)]!;
      const i = move.list[move.next]!;
      if (move.completes) {
        complete(i);
        move.next++;
      } else begin(i);
      move.completes = !move.completes;
    }
  }

  term(...parts: (string | number)[]): number {
    const key = parts.join(" ");
    let id = this.terms.get(key);
    if (id === undefined) {
      id = this.terms.size + 1;
      this.terms.set(key, id);
    }
    return id;
  }

  layouts(tape: Tape): BlockLayout[] {
    const { state } = tape;
    const key = JSON.stringify(state);
    let layouts = this.layoutsByFormat.get(key);
    if (layouts === undefined) {
      layouts = blockLayouts(this.graph, state);
      this.layoutsByFormat.set(key, layouts);
    }
    return layouts;
  }

  at(u: number): number {
    return this.memory[u]!;
  }

  /** One value where all units are of one write and in place, else the mixture. */
  value(tokens: readonly number[]): number {
    const first = tokens[0] ?? GARBAGE;
    if (first >= 0 && first % SPAN === 0 && tokens.every((t, k) => t === first + k)) return first / SPAN;
    return this.term("mixed", ...tokens);
  }

  /** others: what is read and not also written. */
  private touchedBy(tape: Tape) {
    let touched = this.touched.get(tape);
    if (touched === undefined) {
      touched = tape.instructions.map((i) => {
        const ranges = touches(this.graph, tape, i);
        const reads = units(ranges.reads);
        const writes = units(ranges.writes);
        const own = new Set(writes);
        return { writes, others: reads.filter((u) => !own.has(u)) };
      });
      this.touched.set(tape, touched);
    }
    return touched;
  }
}

/** What an instruction sees: memory as it began, and over it what it has written itself. */
class Store {
  private readonly own = new Map<number, number>();

  constructor(private readonly session: Session) {}

  at(u: number): number {
    return this.own.get(u) ?? this.session.at(u);
  }

  read({ start, end }: Range): number {
    const tokens: number[] = [];
    for (let u = start; u < end; u++) tokens.push(this.at(u));
    return this.session.value(tokens);
  }

  write({ start, end }: Range, value: number): void {
    for (let u = start; u < end; u++) this.own.set(u, value * SPAN + u - start);
  }

  put(u: number, token: number): void {
    this.own.set(u, token);
  }
}

/** One tape's run: the meaning of every instruction, blind to whether its operands are the right ones. */
class Play {
  private readonly layouts;
  private readonly kept = new Map<string, number>();
  private readonly losses = new Map<string, number>();
  private readonly norms = new Map<number, number>();

  constructor(
    private readonly graph: Graph,
    private readonly tape: Tape,
    private readonly session: Session,
    private readonly step: number,
    private readonly pending: boolean,
    public record: number,
  ) {
    this.layouts = session.layouts(tape);
  }

  /** Its operands changed under it: what it reports is worthless too. */
  spoil(i: Instruction): void {
    if (i.op === "turn") this.losses.set(`${i.block} ${i.microBatch}`, POISON);
    if (i.op === "norm") this.norms.set(i.block, POISON);
  }

  report(): string {
    const list = (m: Map<string | number, number>) => [...m].map(([k, v]) => `${k}=${v}`).sort();
    return [...list(this.losses), ...list(this.norms)].join();
  }

  execute(i: Instruction, store: Store): void {
    const term = this.session.term.bind(this.session);
    const place = (p: number) => this.tape.places[p]!;
    const read = (p: number, bytes?: number) => (p < 0 ? 0 : store.read(rangeOf(place(p), 0, bytes)));
    switch (i.op) {
      case "forward": {
        const inputs = this.inputs(i, read);
        if (i.keep) this.kept.set(`${i.block} ${i.microBatch}`, inputs);
        for (const [o, p] of i.out.entries()) if (p >= 0) store.write(rangeOf(place(p)), term("x", o, inputs));
        break;
      }
      case "turn":
      case "backward": {
        let inputs = this.inputs(i, read);
        const key = `${i.block} ${i.microBatch}`;
        if (i.op === "backward") {
          if (this.tape.recompute !== "all" && this.kept.get(key) !== inputs) inputs = term("lost graph", key);
          const gradients = i.dOut.map((p, o) => (p < 0 ? 0 : read(p, this.boundaryBytes(i.block, o))));
          inputs = term("back", inputs, ...gradients);
        } else this.losses.set(key, term("loss", inputs));
        for (const [k, p] of i.dIn.entries()) {
          const source = this.graph.blocks[i.block]!.inputs[k]!;
          if (p < 0 || !("block" in source)) continue;
          const own = term("dx", k, inputs);
          const bytes = this.boundaryBytes(source.block, source.output);
          store.write(rangeOf(place(p)), i.add[k] ? term("add", read(p, bytes), own) : own);
        }
        if (i.sums < 0) break;
        for (const [name, range] of this.sumRanges(i.block, place(i.sums))) {
          const own = term("g", name, inputs);
          store.write(range, i.first ? own : term("add", store.read(range), own));
        }
        break;
      }
      case "cast":
        store.write(rangeOf(place(i.to)), term("cast", read(i.from)));
        break;
      case "norm": {
        const grads: number[] = [];
        for (const ranges of this.gradients(i.block, i.sums)) {
          const total = ranges.map((r) => store.read(r)).reduce((a, b) => term("tied", a, b));
          if (ranges.length > 1) store.write(ranges[0]!, total);
          grads.push(total);
        }
        this.norms.set(i.block, term("norm", ...grads));
        break;
      }
      case "coefficient": {
        this.record = term("record", this.step, this.report());
        break;
      }
      case "pack": {
        const grads = this.gradients(i.block, i.sums).map((ranges) => store.read(ranges[0]!));
        store.write(rangeOf(place(i.to)), term("retained", i.dtype, ...grads));
        break;
      }
      case "update": {
        if (i.from === "retained" && !this.pending) break;
        const { trainableBytes } = this.layouts[i.block]!;
        const grads =
          i.from === "retained"
            ? [i.dtype, read(i.grad[0]!)]
            : this.gradients(i.block, i.grad).map((ranges) => store.read(ranges[0]!));
        const clip = { none: 0, block: this.norms.get(i.block) ?? -1, global: this.record }[this.tape.clip];
        const record = i.from === "retained" ? this.record : term("step", this.step, clip);
        const old = [read(i.param, trainableBytes), read(i.state)];
        store.write(rangeOf(place(i.param), 0, trainableBytes), term("param", record, ...old, ...grads));
        store.write(rangeOf(place(i.state)), term("state", record, ...old, ...grads));
        break;
      }
      case "copy":
        this.copy(i, store);
        break;
    }
  }

  /** Units that the copied range cuts are spoiled, except behind the last byte of a boundary. */
  private copy(i: Extract<Instruction, { op: "copy" }>, store: Store): void {
    const from = this.tape.places[i.from]!;
    const to = this.tape.places[i.to]!;
    const target = rangeOf(to).start;
    const source = rangeOf(from).start;
    const last =
      "output" in i.operand ? this.boundaryBytes(i.operand.block, i.operand.output) : Number.POSITIVE_INFINITY;
    for (const u of units([rangeOf(to, i.at, i.bytes)])) {
      const begins = (u - target) * UNIT;
      const whole = begins >= i.at && Math.min(begins + UNIT, last) <= i.at + i.bytes;
      store.put(u, whole ? store.at(source + u - target) : POISON);
    }
  }

  private inputs(
    i: Extract<Instruction, { op: "forward" | "turn" | "backward" }>,
    read: (p: number, bytes?: number) => number,
  ): number {
    const params = i.params.map((p) => read(p));
    const boundaries = this.graph.blocks[i.block]!.inputs.map((s, k) =>
      "block" in s ? read(i.in[k]!, this.boundaryBytes(s.block, s.output)) : 0,
    );
    return this.session.term("pass", this.step, i.block, i.microBatch, ...params, ...boundaries);
  }

  private boundaryBytes(block: number, output: number): number {
    const { dtype, shape } = this.graph.programs[this.graph.blocks[block]!.program]!.outputs[output]!;
    const dims = this.tape.dims;
    return dims === null ? UNIT : shape.reduce<number>((n, d) => n * evaluate(d, dims), dtypeBytes(dtype));
  }

  /** Where in the sums of a block the gradient of each parameter stands. */
  private sumRanges(block: number, place: Place): Map<string, Range> {
    const ranges = new Map<string, Range>();
    const wide = this.graph.dtype === "float64" ? 8 : 4;
    let at = 0;
    for (const name of this.graph.blocks[block]!.parameters) {
      const parameter = this.graph.parameters.find((p) => p.name === name)!;
      if (!parameter.trainable) continue;
      const bytes = room(parameter.shape.reduce((a, b) => a * b, 1)) * wide;
      ranges.set(name, rangeOf(place, at, bytes));
      at += bytes;
    }
    return ranges;
  }

  /** By owned parameter with a user: its sums in each. */
  private gradients(block: number, places: readonly number[]): Range[][] {
    const users = usersOf(this.graph, block, (b) => this.session.hasBackward[b]!).map((user, k) =>
      this.sumRanges(user, this.tape.places[places[k]!]!),
    );
    return this.graph.parameters
      .filter((p) => p.owner === block && p.trainable)
      .map((p) => users.flatMap((ranges) => ranges.get(p.name) ?? []))
      .filter((ranges) => ranges.length > 0);
  }
}
