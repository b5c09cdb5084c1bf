/**
 * Boundaries in slots: a slot holds its tensor until another is written there. What a forward gives that keeps its graph is
 * held by both, and counts as the slot's only from its backward on.
 */
import { evaluate } from "../graph/dims.js";
import type { Graph } from "../graph/types.js";
import { dtypeBytes } from "../graph/value.js";
import { allocated } from "./memory.js";
import type { Tape } from "./types.js";

export interface SlotLife {
  block: number;
  /** As the allocator gives them. */
  bytes: number;
  /** The instruction behind which it is held, and the one that writes another there (all instructions: none does). */
  from: number;
  to: number;
}

/** `dims`: sizes of a micro-batch; throws SHAPE where one is missing. */
export function slotLives(graph: Graph, tape: Tape, dims: Readonly<Record<string, number>>): SlotLife[] {
  const lives: SlotLife[] = [];
  /** By slot; keptBy: the pass whose graph holds it too. */
  const held: (SlotLife & { keptBy: string | null })[] = [];
  const close = ({ keptBy, ...life }: (typeof held)[number], to: number) => {
    if (keptBy === null) lives.push({ ...life, to });
  };
  for (const [i, at] of tape.instructions.entries()) {
    if (at.op !== "forward" && at.op !== "turn" && at.op !== "backward") continue;
    const pass = `${at.block} ${at.microBatch}`;
    if (at.op === "backward")
      for (const slot of held) if (slot?.keptBy === pass) Object.assign(slot, { keptBy: null, from: i });
    const keptBy = at.op === "forward" && at.keep && tape.recompute === "none" ? pass : null;
    const program = graph.programs[graph.blocks[at.block]!.program]!;
    const [into, specs] = at.op === "forward" ? [at.out, program.outputs] : [at.dIn, program.inputs];
    for (const [k, p] of into.entries()) {
      const place = p < 0 ? undefined : tape.places[p];
      if (place?.space !== "slot") continue;
      const before = held[place.offset];
      if (before !== undefined) close(before, i);
      const { dtype, shape } = specs[k]!;
      const bytes = allocated(shape.reduce<number>((n, d) => n * evaluate(d, dims), dtypeBytes(dtype)));
      held[place.offset] = { block: at.block, bytes, from: i, to: i, keptBy };
    }
  }
  for (const last of held) if (last !== undefined) close(last, tape.instructions.length);
  return lives;
}

/** Bytes in slots while each instruction runs. */
export function slotBytes(graph: Graph, tape: Tape, dims: Readonly<Record<string, number>>): Float64Array {
  const bytes = new Float64Array(tape.instructions.length);
  for (const life of slotLives(graph, tape, dims)) {
    if (life.from + 1 < bytes.length) bytes[life.from + 1]! += life.bytes;
    if (life.to + 1 < bytes.length) bytes[life.to + 1]! -= life.bytes;
  }
  for (let i = 1; i < bytes.length; i++) bytes[i]! += bytes[i - 1]!;
  return bytes;
}
