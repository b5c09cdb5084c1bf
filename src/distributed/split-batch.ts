/**
 * A micro-batch shared out to the ranks of a context group. Row of T tokens in 2 R equal chunks: rank r holds chunks r and
 * 2 R - 1 - r, in this order (the zigzag: causal attention then has the same work on every rank). Every batch input with
 * a dim T is cut in the same way, so labels, positions and document ids stay those of their tokens; nothing is shifted.
 */
import { invalidArgument, StromaError } from "../errors.js";
import { sequenceDim } from "../graph/context.js";
import type { Graph } from "../graph/types.js";
import { checkTokens } from "../plan/context.js";
import type { Batch, HostTensor } from "../train/native-session.js";

/** A rank's place in its context group. */
export interface Place {
  rank: number;
  ranks: number;
}

export interface SplitBatch {
  batch: Batch;
  /** By loss term: of the whole rows. A step's sums of them are StepRequest.counts. */
  counts: Record<string, number>;
}

/**
 * The share of `place.rank`; with one rank the batch as it is. int64 position_ids that the graph asks for and the batch
 * lacks are added: each token's place in its whole row.
 * @throws CONFIG where T does not divide by 2 R, with the arithmetic; GRAPH where an input's shape does not split; SHAPE
 * where the batch is not of the graph's inputs
 */
export function splitBatch(graph: Graph, batch: Batch, place: Place): SplitBatch {
  const { rank, ranks } = place;
  if (!Number.isSafeInteger(ranks) || ranks < 1) throw invalidArgument("context", "at least 1 rank", ranks, "ranks");
  if (!Number.isSafeInteger(rank) || rank < 0 || rank >= ranks)
    throw invalidArgument("context", `a rank from 0 to ${ranks - 1}`, rank, "rank");
  const share: Batch = {};
  let like: HostTensor | null = null;
  for (const input of graph.inputs) {
    const dim = sequenceDim(input);
    const tensor = batch[input.name];
    if (tensor === undefined) continue;
    if (tensor.shape.length !== input.shape.length)
      throw new StromaError(
        "SHAPE",
        `[context] expected batch input ${input.name} as [${input.shape.join(", ")}], got [${tensor.shape.join(", ")}]`,
      );
    if (dim !== null && input.shape.length === 2 && dim === 1) like ??= tensor;
    share[input.name] = dim === null || ranks === 1 ? tensor : splitTensor(tensor, dim, place);
  }
  const positions = graph.inputs.find((i) => i.name === "position_ids");
  if (positions !== undefined && batch.position_ids === undefined && like !== null) {
    const whole = rowPositions(like.shape[0]!, like.shape[1]!);
    share.position_ids = ranks === 1 ? whole : splitTensor(whole, 1, place);
  }
  return { batch: share, counts: countLosses(graph, batch) };
}

/** Of a micro-batch that is whole: how many elements each loss term takes its mean over. */
export function countLosses(graph: Graph, batch: Batch): Record<string, number> {
  return Object.fromEntries(
    graph.losses.map(({ name, count }) => {
      const tensor = batch[count.input];
      if (tensor === undefined)
        throw new StromaError("SHAPE", `[context] the batch has no input ${count.input}, which counts loss ${name}`);
      return [name, different(tensor, count.ignore)];
    }),
  );
}

/** Chunks `rank` and `2 ranks - 1 - rank` of dim `dim`, copied. @throws CONFIG */
function splitTensor(tensor: HostTensor, dim: number, { rank, ranks }: Place): HostTensor {
  const { dtype, shape } = tensor;
  const length = shape[dim]!;
  checkTokens(length, ranks);
  const product = (dims: readonly number[]) => dims.reduce((n, d) => n * d, 1);
  const from = new Uint8Array(tensor.data.buffer, tensor.data.byteOffset, tensor.data.byteLength);
  const rows = product(shape.slice(0, dim));
  const row = rows === 0 ? 0 : from.byteLength / rows;
  const chunk = row / (2 * ranks);
  const to = new Uint8Array(rows * 2 * chunk);
  for (let r = 0; r < rows; r++) {
    for (const [i, c] of [rank, 2 * ranks - 1 - rank].entries())
      to.set(from.subarray(r * row + c * chunk, r * row + (c + 1) * chunk), (2 * r + i) * chunk);
  }
  return { dtype, shape: shape.with(dim, length / ranks), data: to };
}

function rowPositions(rows: number, length: number): HostTensor {
  const data = new BigInt64Array(rows * length);
  for (let i = 0; i < data.length; i++) data[i] = BigInt(i % length);
  return { dtype: "int64", shape: [rows, length], data };
}

const ARRAYS = {
  int64: BigInt64Array,
  int32: Int32Array,
  int16: Int16Array,
  int8: Int8Array,
  uint8: Uint8Array,
} as const;

function different({ dtype, data }: HostTensor, ignore: number): number {
  const Typed = ARRAYS[dtype as keyof typeof ARRAYS];
  if (Typed === undefined)
    throw new StromaError("SHAPE", `[context] expected integers to count a loss over, got ${dtype}`, { dtype });
  // Bytes of a file may begin anywhere; typed arrays begin at a multiple of their size.
  const bytes = data.buffer.slice(data.byteOffset, data.byteOffset + data.byteLength);
  const absent = dtype === "int64" ? BigInt(ignore) : ignore;
  let count = 0;
  for (const x of new Typed(bytes as ArrayBuffer)) if (x !== absent) count++;
  return count;
}
