/**
 * Bytes of a block's state. The engine lays tensors out by the same rules (native/engine/layout.cc) and refuses a tape
 * whose places differ from them.
 *
 * Tensors stand in the order of the block's `parameters`, each in a room of `room(n)` elements, so that every one begins
 * on a multiple of 256 elements in every buffer. Every buffer's length is rounded up to 4,096 bytes (O_DIRECT).
 *   param     rooms of owned trainable tensors, then of owned frozen ones, in the storage dtype
 *   state     for each owned trainable tensor: master (room x 4 float32, room x 2 split16, or none), then
 *             8-bit (n >= 4,096): state1 (room), state2 (room), absmax1, absmax2 (each room / 256 x 4, up to 256)
 *             else: exp_avg, exp_avg_sq, each room x 4 (x 8 in float64)
 *   sums      rooms of every trainable tensor that the block uses, float32 (float64)
 *   partial   rooms of owned trainable tensors, float32 (float64) or bfloat16
 *   retained  for each owned trainable tensor: room x 4, x 8 or x 2; dynamic8: room, then absmax (room / 256 x 4, up to 256)
 *
 * Shards (ZeRO, arXiv 1910.02054; FSDP, arXiv 2304.11277): the rooms of all owned tensors, one behind the other, are cut
 * into S parts of equally many elements, a multiple of 256 (the last has what is left), so a tensor may be cut and its 8-bit
 * blocks are not. A rank's param, state, retained and reduced have the rooms of its own part only; compute has all, to the
 * byte. In shared host memory the params of all shards lie one behind the other, each rounded up to whole pages.
 */
import { StromaError } from "../errors.js";
import type { Graph } from "../graph/types.js";
import { dtypeBytes } from "../graph/value.js";
import { shardOf, shardsOf } from "./mesh.js";
import type { GradientDType, RetainedDType, Stages, StateFormat } from "./types.js";

export const PLACE_ALIGN = 256;
export const PAGE = 4096;
export const QUANT_BLOCK = 256;
/** Smaller tensors keep fp32 moments under an 8-bit optimizer, as in bitsandbytes. */
export const LEAST_QUANTIZED = 4096;

export const roundUp = (n: number, unit: number): number => Math.ceil(n / unit) * unit;
/** Elements that a tensor of n takes in every buffer. */
export const room = (n: number): number => roundUp(n, QUANT_BLOCK);
const absmaxBytes = (n: number): number => roundUp((room(n) / QUANT_BLOCK) * 4, PLACE_ALIGN);

export interface BlockLayout {
  /** Elements of the owned trainable and frozen tensors, in order; of what the shard has of them. */
  trainable: number[];
  frozen: number[];
  /** Elements of every trainable tensor that the block uses. */
  used: number[];
  paramBytes: number;
  /** Of param: the leading part that an update changes, up to a whole page; what is stored back. */
  trainableBytes: number;
  /** param in the graph's dtype; 0 where that is the storage dtype. */
  computeBytes: number;
  stateBytes: number;
  sumsBytes: number;
  retainedBytes(dtype: RetainedDType): number;
  /** Whether sums have the layout of partial: the block uses the trainable tensors that it owns, and no other. */
  sumsArePartial: boolean;
  partialBytes(dtype: GradientDType): number;
  /** Elements that shard k of `shards` has in compute and in partial. */
  shard(k: number): { compute: Range; partial: Range };
  /** Param of shard k, and where it lies in shared host memory. */
  slab(k: number): Slab;
}

/** Bytes: from the first shard's on, of its whole pages, of its elements, and what of paramBytes an update changes. */
export interface Slab {
  at: number;
  paramBytes: number;
  heldBytes: number;
  trainableBytes: number;
}

/** Elements [begin, end). */
export interface Range {
  begin: number;
  end: number;
}

/** `stages`: whose shard; absent: all is one. Throws CONFIG for a master weight that the storage dtype cannot have. */
export function blockLayouts(graph: Graph, format: StateFormat, stages?: Stages): BlockLayout[] {
  const dtype = graph.dtype ?? "float32";
  if (format.masterWeight !== "none" && format.storage !== "bfloat16")
    throw new StromaError(
      "CONFIG",
      `[plan] masterWeight "${format.masterWeight}" is for parameters stored in bfloat16, not ${format.storage}`,
    );
  const wide = dtype === "float64" ? 8 : 4;
  const stored = dtypeBytes(format.storage);
  const shards = shardsOf(stages);
  const byName = new Map(graph.parameters.map((p) => [p.name, p]));
  return graph.blocks.map((block, b) => {
    const uses = block.parameters.map((name) => {
      const p = byName.get(name)!;
      return { ...p, elements: p.shape.reduce((x, y) => x * y, 1) };
    });
    const owned = uses.filter((p) => p.owner === b);
    const ownedTrainable = owned.filter((p) => p.trainable).map((p) => p.elements);
    const ownedFrozen = owned.filter((p) => !p.trainable).map((p) => p.elements);
    const used = uses.filter((p) => p.trainable).map((p) => p.elements);
    const rooms = (list: number[]) => list.reduce((sum, n) => sum + room(n), 0);
    const trained = rooms(ownedTrainable);
    const whole = trained + rooms(ownedFrozen);
    const each = shards === 1 ? whole : roundUp(whole / shards, QUANT_BLOCK);
    const shard = (k: number) => {
      const range = (end: number): Range => ({ begin: Math.min(k * each, end), end: Math.min((k + 1) * each, end) });
      return { compute: range(whole), partial: range(trained) };
    };
    const slab = (k: number): Slab => {
      const bytes = ({ begin, end }: Range) => (end - begin) * stored;
      const paramBytes = (j: number) => roundUp(bytes(shard(j).compute), PAGE);
      const at = Array.from({ length: k }, (_, j) => paramBytes(j)).reduce((sum, n) => sum + n, 0);
      const { compute, partial } = shard(k);
      const trainableBytes = roundUp(bytes(partial), PAGE);
      return { at, paramBytes: paramBytes(k), heldBytes: bytes(compute), trainableBytes };
    };
    const own = stages === undefined ? 0 : shardOf(stages);
    const [mine, { paramBytes, trainableBytes }] = [shard(own), slab(own)];
    const trainable = pieces(ownedTrainable, 0, mine.compute);
    const frozen = pieces(ownedFrozen, trained, mine.compute);
    const master = { none: 0, split16: 2, float32: 4 }[format.masterWeight];
    const moments = ({ elements: n, of }: Piece) =>
      format.optimizer === "adamw8bit" && of >= LEAST_QUANTIZED
        ? 2 * (room(n) + absmaxBytes(n))
        : 2 * roundUp(room(n) * wide, PLACE_ALIGN);
    const elements = (list: Piece[]) => list.map((p) => p.elements);
    return {
      trainable: elements(trainable),
      frozen: elements(frozen),
      used,
      paramBytes,
      trainableBytes,
      computeBytes:
        shards > 1
          ? whole * dtypeBytes(dtype)
          : format.storage === dtype
            ? 0
            : roundUp(whole * dtypeBytes(dtype), PAGE),
      stateBytes: roundUp(
        trainable.reduce((sum, p) => sum + room(p.elements) * master + moments(p), 0),
        PAGE,
      ),
      sumsBytes: roundUp(rooms(used) * wide, PAGE),
      sumsArePartial: uses.every((p) => p.owner === b || !p.trainable),
      partialBytes: (kind) => roundUp(trained * dtypeBytes(kind), PAGE),
      shard,
      slab,
      retainedBytes(kind) {
        const each = (n: number) =>
          kind === "dynamic8"
            ? room(n) + absmaxBytes(n)
            : room(n) * (kind === "float64" ? 8 : kind === "float32" ? 4 : 2);
        return roundUp(
          trainable.reduce((sum, p) => sum + each(p.elements), 0),
          PAGE,
        );
      },
    };
  });
}

/** What a range of a block's elements has of a tensor of `of` elements. */
interface Piece {
  elements: number;
  of: number;
}

/** `first`: where the rooms of the list begin. */
function pieces(list: readonly number[], first: number, { begin, end }: Range): Piece[] {
  const result: Piece[] = [];
  let at = first;
  for (const of of list) {
    const from = Math.max(begin, at);
    const to = Math.min(end, at + of);
    if (to > from) result.push({ elements: to - from, of });
    at += room(of);
  }
  return result;
}

/** Blocks that own a parameter of `block`, ascending. */
export function ownersOf(graph: Graph, block: number): readonly number[] {
  return tiesOf(graph).owners[block]!;
}

/** Blocks that use a trainable parameter that `block` owns and that have a backward, ascending. */
export function usersOf(graph: Graph, block: number, hasBackward: (b: number) => boolean): number[] {
  return tiesOf(graph).users[block]!.filter(hasBackward);
}

interface GraphTies {
  owners: number[][];
  users: number[][];
}
/** Planning asks for them again and again, and a graph never changes. */
const known = new WeakMap<Graph, GraphTies>();

function tiesOf(graph: Graph): GraphTies {
  const found = known.get(graph);
  if (found !== undefined) return found;
  const byName = new Map(graph.parameters.map((p) => [p.name, p]));
  const [owners, users] = [graph.blocks.map(() => new Set<number>()), graph.blocks.map(() => new Set<number>())];
  for (const [b, { parameters }] of graph.blocks.entries())
    for (const name of parameters) {
      const { owner, trainable } = byName.get(name)!;
      owners[b]!.add(owner);
      if (trainable) users[owner]!.add(b);
    }
  const ascending = (sets: readonly Set<number>[]) => sets.map((set) => [...set].sort((x, y) => x - y));
  const made = { owners: ascending(owners), users: ascending(users) };
  known.set(graph, made);
  return made;
}
