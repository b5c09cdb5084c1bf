/** What the checker knows of a graph by itself, and how it words a refusal. It shares no code with the planner. */
import { StromaError } from "../errors.js";
import { evaluate } from "../graph/dims.js";
import type { Graph, Program } from "../graph/types.js";
import { dtypeBytes } from "../graph/value.js";
import { type BlockLayout, blockLayouts, ownersOf, usersOf } from "./layout.js";
import { stageOf } from "./mesh.js";
import type { Instruction, Operand, Place, Shard, Stages, StateFormat, Tape, Tied } from "./types.js";

export type Pass = Extract<Instruction, { op: "forward" | "turn" | "backward" }>;
export const samePlace = (a: Place | null | undefined, b: Place | null): boolean =>
  a?.space === b?.space && a?.offset === b?.offset && a?.bytes === b?.bytes;

export type Op<K extends Instruction["op"]> = Extract<Instruction, { op: K }>;

export class Facts {
  readonly layouts: BlockLayout[];
  /** Blocks whose outputs are losses: they run as turn. */
  readonly losses: Set<number>;
  readonly needsBackward: boolean[];
  /** By block: owners of the parameters that it uses; users of the trainable parameters that it owns. */
  readonly owners: readonly (readonly number[])[];
  readonly users: number[][];
  /** By block and output: the consumers "block:input" with a gradient, in the order in which they must contribute. */
  readonly contributors: string[][][];
  /** By block and output: whether a block reads it. */
  readonly isRead: boolean[][];

  constructor(
    readonly graph: Graph,
    readonly format: StateFormat,
    readonly stages?: Stages,
  ) {
    this.layouts = blockLayouts(graph, format, stages);
    this.losses = new Set(graph.losses.map((l) => l.block));
    this.needsBackward = graph.blocks.map(() => false);
    this.contributors = graph.blocks.map((_, b) => this.program(b).outputs.map(() => []));
    this.isRead = graph.blocks.map((_, b) => this.program(b).outputs.map(() => false));
    for (let b = graph.blocks.length - 1; b >= 0; b--) {
      this.needsBackward[b] = this.losses.has(b) || this.contributors[b]!.some((list) => list.length > 0);
      for (const [i, source] of graph.blocks[b]!.inputs.entries()) {
        if (!("block" in source)) continue;
        this.isRead[source.block]![source.output] = true;
        if (this.needsBackward[b] && this.program(b).inputs[i]!.grad)
          this.contributors[source.block]![source.output]!.push(`${b}:${i}`);
      }
    }
    this.owners = graph.blocks.map((_, b) => ownersOf(graph, b));
    this.users = graph.blocks.map((_, b) => usersOf(graph, b, (user) => this.needsBackward[user]!));
  }

  program(block: number): Program {
    return this.graph.programs[this.graph.blocks[block]!.program]!;
  }

  /** Whether this rank runs the block. */
  isMine(block: number): boolean {
    return this.stages === undefined || this.stages.of[block] === stageOf(this.stages);
  }

  /** Whether the rank holds something of the block that trains: it has state, a norm and an update. */
  trains(block: number): boolean {
    return this.layouts[block]!.trainable.length > 0;
  }

  /** Whether the block owns a trainable parameter, whoever holds it. */
  isTrained(block: number): boolean {
    return this.layouts[block]!.partialBytes("float32") > 0;
  }

  /** Where shard k of a block's parameters lies in shared host memory; null: nowhere. */
  slab({ homes }: Tape["placement"], block: number, k: number): Place | null {
    const whole = homes[block]!.shared;
    const { at, paramBytes } = this.layouts[block]!.slab(k);
    if (whole === undefined || paramBytes === 0) return null;
    return { space: whole.space, offset: whole.offset + at, bytes: paramBytes };
  }

  /** Bytes of param elements, of compute elements, and of gradient sums. */
  get storedItemsize(): number {
    return dtypeBytes(this.format.storage);
  }
  get computeItemsize(): number {
    return dtypeBytes(this.graph.dtype ?? "float32");
  }
  get wideItemsize(): number {
    return this.graph.dtype === "float64" ? 8 : 4;
  }

  /** Which contribution to its source's gradient input i of the block is, and of how many; null where none flows. */
  contribution(block: number, i: number): { index: number; of: number } | null {
    const source = this.graph.blocks[block]!.inputs[i]!;
    if (!("block" in source)) return null;
    const list = this.contributors[source.block]![source.output]!;
    const index = list.indexOf(`${block}:${i}`);
    return index < 0 ? null : { index, of: list.length };
  }

  /** Bytes of every boundary that is read, and of its gradient, by block and output. Slots (dims null) have none. */
  boundaryBytes(dims: Record<string, number> | null): number[][] {
    return this.isRead.map((outputs, b) =>
      outputs.map((read, o) => {
        if (!read || dims === null) return 0;
        const { dtype, shape } = this.program(b).outputs[o]!;
        return shape.reduce<number>((product, dim) => product * evaluate(dim, dims), dtypeBytes(dtype));
      }),
    );
  }
}

export const nameOf = (o: Operand | Shard | Tied): string =>
  "output" in o
    ? `${o.kind}(${o.block}, ${o.output}, ${o.microBatch})`
    : "shard" in o && o.shard !== undefined
      ? `shard ${o.shard} of ${o.kind}(${o.block})${o.kind === "partial" || o.kind === "reduced" ? ` of ${o.of}` : ""}`
      : `${o.kind}(${o.block})`;

export const showPlace = (tape: Tape, p: number): string => {
  const place = tape.places[p];
  return place === undefined ? `place ${p}` : `place ${p} (${showRange(place)})`;
};

export const showRange = ({ space, offset, bytes }: Place): string =>
  space === "slot" ? `slot ${offset}` : `${space} ${offset}..${offset + bytes}`;

/** Throws TAPE for instruction `at`; -1: for the tape as a whole. */
export function refuse(tape: Tape, at: number, why: string): never {
  const instruction = tape.instructions[at];
  const end = at >= 0 ? "at its end: " : "";
  const where = instruction === undefined ? end : `instruction ${at} (${title(instruction)}): `;
  throw new StromaError("TAPE", `[tape] ${tape.kind === "flush" ? "flush, " : ""}${where}${why}`, { instruction: at });
}

export function title(i: Instruction): string {
  if (i.op === "send" || i.op === "receive")
    return `${i.op} of ${nameOf(i.operand)} ${i.op === "send" ? "to" : "from"} rank ${i.peer}`;
  if (i.op === "copy") return `copy ${i.queue} of ${nameOf(i.operand)}, bytes ${i.at}..${i.at + i.bytes}`;
  if (!("block" in i)) return i.op;
  return `${i.op} of block ${i.block}${"microBatch" in i ? `, micro-batch ${i.microBatch}` : ""}`;
}
