/**
 * Recompute "selective": which results of a block's forward are kept for its backward, by a rule over the op table.
 *
 * A call is dear where making its result takes many floating-point operations for each byte that keeping it takes, and the
 * dispatcher has operators below autograd that do its work (`kernels` in graph/schemas.ts). In the backward the block's
 * program runs again; dear calls hand over what they kept, everything else (norms, activations, rotations, masks drawn by
 * key) is computed anew. A dear result that nothing in the backward reads is not kept: its shape is enough (Korthikanti et
 * al., arXiv 2205.05198, keep by hand what this rule finds).
 */

import { type OpSchema, schemas } from "../graph/schemas.js";
import type { Graph } from "../graph/types.js";
import { type SizedCall, sizedProgram } from "./cost-calls.js";
import type { Kept } from "./types.js";

/**
 * FLOPs a byte from which a result is kept. Below it, computing anew costs about as much as the memory traffic of keeping: a
 * processor does some 6 in the time in which its memory moves a byte. A product over `in` features takes in / 2 in float32.
 */
export const DEAR = 8;
/** Stands for a dim without a size, where boundaries lie in slots: what is a matter of length is dear. */
const LONG = 1024;

const known = new WeakMap<Graph, Map<string, Kept>>();

/** The choice for every program of the graph. `dims`: sizes of a device micro-batch; null: any. */
export function keptOf(graph: Graph, dims: Readonly<Record<string, number>> | null, flopsPerByte = DEAR): Kept {
  const cache = known.get(graph) ?? new Map<string, Kept>();
  known.set(graph, cache);
  const key = JSON.stringify([dims, flopsPerByte]);
  const found = cache.get(key) ?? choose(graph, dims, flopsPerByte);
  cache.set(key, found);
  return found;
}

function choose(graph: Graph, dims: Readonly<Record<string, number>> | null, flopsPerByte: number): Kept {
  const kept: Kept = { values: [], shapes: [], kernels: {} };
  const sizes = dims ?? longDims(graph);
  for (const p of graph.programs.keys()) {
    const block = graph.blocks.findIndex((b) => b.program === p);
    // A block of losses goes forward and back in one.
    const turns = graph.losses.some((l) => graph.blocks[l.block]!.program === p);
    const calls = turns || block < 0 ? [] : sizedProgram(graph, block, sizes).calls;
    const { values, shapes, ops } = chooseOf(calls, flopsPerByte);
    kept.values.push(values);
    kept.shapes.push(shapes);
    for (const op of ops) kept.kernels[schemas[op].overload] = [...kernelsOf(op)];
  }
  return kept;
}

const kernelsOf = (op: SizedCall["op"]): readonly string[] => (schemas[op] as OpSchema).kernels ?? [];

/** Bytes that a call's kernels return: its result, and what it saves of its own (attention's logsumexp). */
export const keptBytes = (call: SizedCall): number =>
  call.out.bytes + call.savedOwnBytes.reduce((sum, n) => sum + n, 0);

/** From the last call to the first: what later ones read in the backward is known before what makes it is decided. */
function chooseOf(calls: readonly SizedCall[], flopsPerByte: number) {
  const values: number[] = [];
  const shapes: number[] = [];
  const ops = new Set<SizedCall["op"]>();
  const read = new Set<number>();
  for (const call of calls.toReversed()) {
    for (const id of call.savedValues) read.add(id);
    const { op, out } = call;
    const needed = read.has(out.id);
    const keepable = kernelsOf(op).length > 0;
    if (keepable && (!needed || call.flops >= flopsPerByte * keptBytes(call))) {
      (needed ? values : shapes).unshift(out.id);
      ops.add(op);
    } else if (needed) for (const t of call.tensors) read.add(t.id);
  }
  return { values, shapes, ops };
}

function longDims(graph: Graph): Record<string, number> {
  const names = graph.inputs.flatMap((input) => input.shape.flatMap((d) => String(d).match(/[A-Za-z_]\w*/g) ?? []));
  return Object.fromEntries(names.map((name) => [name, LONG]));
}
