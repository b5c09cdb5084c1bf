/**
 * Plays tapes blindly, as an engine would: arenas of bytes hold whatever was last written there, and a computation is a
 * term over what it read. Two runs mean the same exactly when their homes end with the same terms. Rounding is no part
 * of it: a cast or a packed gradient is the value itself.
 */
import type { Graph } from "../../../src/graph/types.js";
import { type BlockLayout, blockLayouts, ownersOf, usersOf } from "../../../src/plan/layout.js";
import type { Instruction, P, Place, Space, Tape } from "../../../src/plan/types.js";

/** Two 32-bit hashes of a text: terms are large and only compared. */
function term(...parts: (string | number)[]): string {
  const s = parts.join(" ");
  let a = 0xdeadbeef;
  let b = 0x41c6ce57;
  for (let i = 0; i < s.length; i++) {
    const c = s.charCodeAt(i);
    a = Math.imul(a ^ c, 2654435761);
    b = Math.imul(b ^ c, 1597334677);
    a ^= a >>> 15;
    b ^= b >>> 13;
  }
  return `t${(a >>> 0).toString(36)}.${(b >>> 0).toString(36)}`;
}

const inOrder = (table: Map<string, string>): string[] =>
  [...table].sort(([a], [b]) => (a < b ? -1 : 1)).map(([k, t]) => `${k} ${t}`);

/** Bytes [start, end) are those of `value` from `from` on. */
interface Piece {
  start: number;
  end: number;
  value: string;
  from: number;
}

class Arena {
  private pieces: Piece[] = [];

  write(start: number, end: number, value: string, from = 0): void {
    const rest = this.pieces.flatMap((p) => {
      if (p.end <= start || p.start >= end) return [p];
      const kept: Piece[] = [];
      if (p.start < start) kept.push({ ...p, end: start });
      if (p.end > end) kept.push({ ...p, start: end, from: p.from + end - p.start });
      return kept;
    });
    this.pieces = [...rest, { start, end, value, from }];
  }

  slice(start: number, end: number): Piece[] {
    return this.pieces
      .filter((p) => p.start < end && p.end > start)
      .map((p) => {
        const cut = Math.max(p.start, start);
        return { start: cut, end: Math.min(p.end, end), value: p.value, from: p.from + cut - p.start };
      })
      .sort((a, b) => a.start - b.start);
  }

  /** The value whose bytes lie here whole and in order; else a term that equals nothing sound. */
  read(start: number, end: number): string {
    if (start === end) return "empty";
    let at = start;
    const pieces = this.slice(start, end);
    for (const p of pieces) {
      if (p.start !== at || p.value !== pieces[0]!.value || p.from !== at - start) return term("broken", p.value, at);
      at = p.end;
    }
    return at === end ? pieces[0]!.value : "missing";
  }
}

export interface Outcome {
  /** By block: what its homes hold. */
  params: string[];
  states: string[];
  /** By step: every loss, every norm. */
  records: string[];
}

/** One session: memory stays from tape to tape. */
export class Machine {
  private readonly arenas: Record<Space, Arena> = {
    device: new Arena(),
    host: new Arena(),
    shared: new Arena(),
    disk: new Arena(),
    slot: new Arena(),
  };
  private readonly layouts: BlockLayout[];
  /** Of a value that is gradient sums: by parameter. */
  private readonly gradients = new Map<string, Map<string, string>>();
  private readonly kept = new Map<string, string>();
  private losses = new Map<string, string>();
  private norms = new Map<string, string>();
  private record: { closed: string; norms: Map<string, string> } | null = null;
  private readonly records: string[] = [];
  private places: readonly Place[] = [];
  private readonly homes: Tape["placement"]["homes"];

  constructor(
    private readonly graph: Graph,
    tape: Tape,
  ) {
    this.layouts = blockLayouts(graph, tape.state);
    this.homes = tape.placement.homes;
    for (const [b, { param, state }] of this.homes.entries()) {
      const { trainableBytes } = this.layouts[b]!;
      if (param !== null) {
        this.write(param, `param${b}@0`, 0, trainableBytes);
        this.write(param, `frozen${b}`, trainableBytes, param.bytes);
      }
      if (state !== null) this.write(state, `state${b}@0`);
    }
  }

  /** In the tape's order, or in any order that its queues and waits allow. */
  run(tape: Tape, step: number, order: readonly number[] = [...tape.instructions.keys()]): void {
    this.places = tape.places;
    const before = this.record;
    if (tape.kind === "step") {
      this.losses = new Map();
      this.norms = new Map();
    }
    for (const i of order) this.execute(tape, tape.instructions[i]!, step, before);
    if (tape.kind === "flush") this.record = null;
  }

  outcome(): Outcome {
    const home = (b: number, kind: "param" | "state") => {
      const place = this.homes[b]![kind];
      if (place === null) return "none";
      return kind === "param" ? this.parameters(b, place) : this.read(place);
    };
    const blocks = [...this.graph.blocks.keys()];
    return {
      params: blocks.map((b) => home(b, "param")),
      states: blocks.map((b) => home(b, "state")),
      records: this.records,
    };
  }

  private execute(tape: Tape, i: Instruction, step: number, before: Machine["record"]): void {
    switch (i.op) {
      case "copy": {
        const [from, to] = [this.places[i.from]!, this.places[i.to]!];
        const shift = to.offset - from.offset;
        const start = from.offset + i.at;
        if (i.at + i.bytes > Math.min(from.bytes, to.bytes)) throw new Error("a copy leaves its place");
        this.arenas[to.space].write(start + shift, start + shift + i.bytes, "torn");
        for (const p of this.arenas[from.space].slice(start, start + i.bytes))
          this.arenas[to.space].write(p.start + shift, p.end + shift, p.value, p.from);
        break;
      }
      case "cast":
        this.write(this.places[i.to]!, "torn");
        this.write(this.places[i.to]!, this.parameters(i.block, this.places[i.from]!));
        break;
      case "coefficient":
        // Partial norms and losses lie in tables and are combined in one fixed order, whenever they came.
        this.records.push(`${inOrder(this.norms)} ${inOrder(this.losses)}`);
        this.record = { closed: term(...inOrder(this.norms), ...inOrder(this.losses)), norms: this.norms };
        break;
      case "norm":
        this.norms.set(`${i.block}`, this.sumUses(i.block, i.sums));
        break;
      case "pack":
        this.write(this.places[i.to]!, "torn");
        this.write(this.places[i.to]!, this.gradient(i.block, i.sums));
        break;
      case "update":
        if (i.from === "sums") {
          this.update(
            tape,
            i,
            { closed: this.record?.closed ?? "open", norms: this.norms },
            this.gradient(i.block, i.grad),
          );
        } else if (before !== null) this.update(tape, i, before, this.at(i.grad[0]!));
        break;
      case "report":
      case "agree":
      case "partial":
      case "reduce":
      case "send":
      case "receive":
        throw new Error("a replay is of one rank");
      default:
        this.pass(tape, i, step);
    }
  }

  private update(
    tape: Tape,
    i: Extract<Instruction, { op: "update" }>,
    record: NonNullable<Machine["record"]>,
    gradient: string,
  ): void {
    const [param, state] = [this.places[i.param]!, this.places[i.state]!];
    const clip = { global: record.closed, block: record.norms.get(`${i.block}`)!, none: "unclipped" }[tape.clip];
    const { trainableBytes } = this.layouts[i.block]!;
    const old = [this.read(param, 0, trainableBytes), this.read(state)];
    this.write(param, term("param", i.block, ...old, clip, gradient), 0, trainableBytes);
    this.write(state, term("state", i.block, ...old, clip, gradient));
  }

  private pass(tape: Tape, i: Extract<Instruction, { op: "forward" | "turn" | "backward" }>, step: number): void {
    const { block, microBatch } = i;
    // What it overwrites is torn from its first moment on: nothing may be read from there.
    const written = i.op === "forward" ? i.out : [...i.dIn.filter((_, j) => !i.add[j]), ...(i.first ? [i.sums] : [])];
    for (const p of written) if (p >= 0) this.write(this.places[p]!, "torn");
    const params = ownersOf(this.graph, block).map((o, j) => {
      const place = this.places[i.params[j]!]!;
      return this.layouts[o]!.computeBytes > 0 ? this.read(place) : this.parameters(o, place);
    });
    const inputs = term("in", step, block, microBatch, ...params, ...i.in.map((p) => this.at(p)));
    const key = `${block} ${microBatch}`;
    if (i.op === "forward") {
      if (i.keep) this.kept.set(key, this.views(inputs, i));
      for (const [o, p] of i.out.entries()) if (p >= 0) this.write(this.places[p]!, term("x", o, inputs));
      return;
    }
    let from = inputs;
    if (i.op === "turn") this.losses.set(key, term("loss", inputs));
    else {
      // A kept graph holds views of its inputs: they must still be what they were.
      if (tape.recompute === "none" && this.kept.get(key) !== this.views(inputs, i)) from = term("no graph of", inputs);
      this.kept.delete(key);
      from = term("dOut", from, ...i.dOut.map((p) => this.at(p)));
    }
    for (const [j, p] of i.dIn.entries()) {
      if (p < 0) continue;
      const gradient = term("dx", j, from);
      this.write(this.places[p]!, i.add[j] ? term("add", this.at(p), gradient) : gradient);
    }
    if (i.sums < 0) return;
    const old = i.first ? null : this.gradients.get(this.at(i.sums));
    const names = this.graph.blocks[block]!.parameters.filter((name) => this.trains(name));
    const sums = new Map(
      names.map((name) => {
        const gradient = term("gradient", name, from);
        return [name, i.first ? gradient : term("sum", old?.get(name) ?? "nothing", gradient)];
      }),
    );
    this.writeSums(i.sums, sums);
  }

  /** What a kept graph holds: not copies, but these very bytes. */
  private views(inputs: string, i: { params: P[]; in: P[] }): string {
    const where = [...i.params, ...i.in].filter((p) => p >= 0).map((p) => this.places[p]!);
    return term(inputs, ...where.map(({ space, offset }) => `${space}${offset}`));
  }

  /** Adds tied uses into the first user's sums; a term of all owned gradients. */
  private sumUses(b: number, places: readonly P[]): string {
    const users = usersOf(this.graph, b, (u) => this.hasBackward(u));
    if (users.length !== places.length)
      throw new Error(`norm ${b} has ${places.length} sums for ${users.length} users`);
    for (const { name } of this.owned(b)) {
      const uses = places.filter((_, j) => this.graph.blocks[users[j]!]!.parameters.includes(name));
      const [first, ...others] = uses;
      if (first === undefined || others.length === 0) continue;
      const sums = new Map(this.gradients.get(this.at(first)));
      const all = uses.map((p) => this.gradients.get(this.at(p))?.get(name) ?? "nothing");
      sums.set(name, term("uses", ...all));
      this.writeSums(first, sums);
    }
    return this.gradient(b, places);
  }

  private gradient(b: number, places: readonly P[]): string {
    const of = ({ name }: { name: string }) => {
      for (const p of places) {
        const found = this.gradients.get(this.at(p))?.get(name);
        if (found !== undefined) return found;
      }
      return "untouched";
    };
    return term("gradient", b, ...this.owned(b).map(of));
  }

  private writeSums(p: P, sums: Map<string, string>): void {
    const value = term("sums", ...inOrder(sums));
    this.gradients.set(value, sums);
    this.write(this.places[p]!, value);
  }

  private owned = (b: number) => this.graph.parameters.filter((p) => p.owner === b && p.trainable);
  private trains = (name: string) => this.graph.parameters.find((p) => p.name === name)!.trainable;

  private hasBackward(b: number): boolean {
    if (this.graph.losses.some((l) => l.block === b)) return true;
    return this.graph.blocks.some((c, i) =>
      c.inputs.some(
        (s, j) =>
          "block" in s && s.block === b && this.graph.programs[c.program]!.inputs[j]!.grad && this.hasBackward(i),
      ),
    );
  }

  private parameters(b: number, place: Place): string {
    const { trainableBytes } = this.layouts[b]!;
    return term("parameters", b, this.read(place, 0, trainableBytes), this.read(place, trainableBytes, place.bytes));
  }

  private at(p: P): string {
    return p < 0 ? "-" : this.read(this.places[p]!);
  }
  private read({ space, offset, bytes }: Place, from = 0, to = bytes): string {
    return space === "slot"
      ? this.arenas.slot.read(offset, offset + 1)
      : this.arenas[space].read(offset + from, offset + to);
  }
  private write({ space, offset, bytes }: Place, value: string, from = 0, to = bytes): void {
    if (space === "slot") this.arenas.slot.write(offset, offset + 1, value);
    else if (to > from) this.arenas[space].write(offset + from, offset + to, value);
  }
}

/** Plays one step. */
export function replay(graph: Graph, tape: Tape): Outcome {
  const machine = new Machine(graph, tape);
  machine.run(tape, 0);
  return machine.outcome();
}
