/**
 * What the bytes of every arena hold: pieces of operands, in a version, from some byte of theirs on. An instruction puts
 * what it writes and demands what it reads.
 *
 * Versions: param, state and compute count updates; x and retained carry the step that made them; dx and sums also how
 * many contributions they hold (in the one order allowed, so the number says which), partial whose it is, reduced of which
 * replica (0: of all). The part of param behind its trainable bytes never changes and has a version of its own.
 */
import { type Facts, nameOf, type Op, refuse } from "./check-facts.js";
import { RETAINED_DTYPES } from "./check-form.js";
import { Intervals } from "./intervals.js";
import type { Operand, Place, Shard, Space, Tape } from "./types.js";

/** others: param of all of a block's shards, in storage, as far as other ranks have them. */
export type Kind = Operand["kind"] | Shard["kind"] | "sums" | "others";
const KINDS: readonly Kind[] = [
  "param",
  "state",
  "compute",
  "sums",
  "retained",
  "partial",
  "reduced",
  "others",
  "x",
  "dx",
];
/** Of them those that blocks have, not boundaries. */
const FLAT = 8;

export interface Content {
  /** Of the operand: operandId. */
  id: number;
  version: number;
  /** Where in the arena byte 0 of the operand would stand. */
  base: number;
  /** Instructions that ran before the one that wrote it, in all tapes. */
  written: number;
}

/** Version of what no update touches. */
export const FROZEN = -1;
/** Steps count above it, contributions below. */
const STEP = 2 ** 24;

/** Bytes of arenas between and in tapes. */
export class Contents {
  protected readonly arenas: Record<Space, Intervals<Content>> = {
    device: new Intervals(),
    host: new Intervals(),
    shared: new Intervals(),
    disk: new Intervals(),
    slot: new Intervals(),
  };
  protected readonly outputOffsets: number[] = [];
  protected readonly boundaries: number;

  protected tape!: Tape;
  /** Position of the instruction that runs. */
  protected at = 0;
  /** Instructions that ran, in all tapes. */
  protected ran = 0;
  protected step = 0;

  constructor(
    protected readonly facts: Facts,
    protected readonly microBatches: number,
  ) {
    let outputs = 0;
    for (const list of facts.isRead) {
      this.outputOffsets.push(outputs);
      outputs += list.length;
    }
    this.boundaries = outputs * microBatches;
  }

  /**
   * Bytes [at, at + bytes) of the place are those of the operand; version null: each in any. start: the operand's byte at
   * which the place begins.
   */
  protected demand(
    what: string,
    p: number,
    kind: Kind,
    operand: number,
    version: number | null,
    bytes = this.tape.places[p]!.bytes,
    at = 0,
    start = 0,
  ): void {
    this.demandAt(what, this.tape.places[p]!, kind, operand, version, at, at + bytes, start);
  }

  protected demandAt(
    what: string,
    place: Place,
    kind: Kind,
    operand: number,
    version: number | null,
    from: number,
    to: number,
    startsAt = 0,
  ): void {
    if (from === to && place.space !== "slot") return;
    const { space, offset } = place;
    const id = this.operandId(kind, operand);
    const [start, end] = space === "slot" ? [offset, offset + 1] : [offset + from, offset + to];
    this.arenas[space].each(start, end, (content, a, b) => {
      const good =
        content !== undefined &&
        content.id === id &&
        content.base === offset - startsAt &&
        (version === null || content.version === version);
      if (good) return;
      const where = space === "slot" ? `slot ${offset}` : `${space} ${a}..${b}`;
      const base = offset - startsAt;
      const shift = content === undefined || content.base === base ? "" : ` from its byte ${a - content.base} on`;
      const wanted = this.show(id, version) + (shift === "" ? "" : ` from its byte ${a - base} on`);
      const held = content === undefined ? "nothing" : this.show(content.id, content.version) + shift;
      this.fail(`${what}: ${where} holds ${held}, expected ${wanted}`);
    });
  }

  protected put(kind: Kind, operand: number, place: Place, version: number, written = this.ran, start = 0): void {
    const { space, offset, bytes } = place;
    if (space !== "slot" && bytes === 0) return;
    const content = { id: this.operandId(kind, operand), version, base: offset - start, written };
    this.arenas[space].set(offset, offset + (space === "slot" ? 1 : bytes), content);
  }

  protected boundary(block: number, output: number, microBatch: number): number {
    return (this.outputOffsets[block]! + output) * this.microBatches + microBatch;
  }

  protected operandId(kind: Kind, operand: number): number {
    const k = KINDS.indexOf(kind);
    const blocks = this.facts.layouts.length;
    return kind === "dx" ? FLAT * blocks + this.boundaries + operand : k * blocks + operand;
  }

  protected counted(contributions: number): number {
    return this.step * STEP + contributions;
  }

  protected retained(step: number, dtype: Op<"pack">["dtype"]): number {
    return step * STEP + RETAINED_DTYPES.indexOf(dtype);
  }

  /** e.g. "dx(3, 0, 1) with 1 of its 2 contributions". */
  protected show(id: number, version: number | null): string {
    const blocks = this.facts.layouts.length;
    const kind = KINDS[Math.min(Math.floor(id / blocks), id < FLAT * blocks + this.boundaries ? FLAT : FLAT + 1)]!;
    const steps = (step: number) => (step === this.step ? "" : " of an earlier step");
    const step = version === null ? this.step : Math.floor(version / STEP);
    const count = version === null ? 0 : version % STEP;
    if (kind === "x" || kind === "dx") {
      const operand = id - FLAT * blocks - (kind === "dx" ? this.boundaries : 0);
      const output = Math.floor(operand / this.microBatches);
      const block = this.outputOffsets.findLastIndex((first) => first <= output);
      const microBatch = operand % this.microBatches;
      const name = nameOf({ kind, block, output: output - this.outputOffsets[block]!, microBatch });
      if (version === null) return name;
      if (kind === "x") return name + steps(version);
      const of = this.facts.contributors[block]![output - this.outputOffsets[block]!]!.length;
      return `${name} with ${count} of its ${of} contributions${steps(step)}`;
    }
    const name = kind === "others" ? `others' param(${id % blocks})` : `${kind}(${id % blocks})`;
    if (version === null) return name;
    if (kind === "sums") return `${name} of ${count} micro-batches${steps(step)}`;
    if (kind === "partial") return `${name} of member ${count}${steps(step)}`;
    if (kind === "reduced") return `${name} of ${count === 0 ? "all" : `replica ${count - 1}`}${steps(step)}`;
    if (kind === "retained") return `${name} in ${RETAINED_DTYPES[count]} of step ${step} (this is step ${this.step})`;
    return version === FROZEN ? `the frozen part of ${name}` : `${name} after ${version} updates`;
  }

  protected fail(why: string): never {
    refuse(this.tape, this.at, why);
  }
}
