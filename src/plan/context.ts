/**
 * What attention over ranks sends and takes, and which of its two kinds to take for a model: plain arithmetic over sizes,
 * as the operators do it (native/kernels/ring_attention.cc, all_to_all_attention.cc).
 */
import { StromaError } from "../errors.js";
import { CONTEXT_OPS, type ContextKind, type ContextOptions, contextOf, ranksOfGroup } from "../graph/context.js";
import type { DType, Graph } from "../graph/types.js";
import { dtypeBytes } from "../graph/value.js";
import { type SizedCall, type SizedValue, sizedProgram } from "./cost-calls.js";
import { type MachineProfile, RANK_LINK } from "./profiles.js";

/** One call of attention on a rank: q [B, N, t, H], k [B, K, t, H], v [B, K, t, V], t = T / R tokens of each row. */
export interface SequenceShape {
  batch: number;
  heads: number;
  kvHeads: number;
  /** t: of this rank. */
  tokens: number;
  headDim: number;
  valueDim: number;
  dtype: DType;
  /** Rows are packed documents: their ids travel too. */
  documents: boolean;
}

export interface Traffic {
  /** Bytes that a rank sends, and as many that it receives. */
  forward: number;
  backward: number;
}

/**
 * ring: keys and values go on R - 1 times, in the backward again with R hops of their gradients' sums, in fp32 (fp64).
 * allToAll: the share that is not one's own, (R - 1) / R, of q, k, v and the result, and of their gradients; keys and
 * values as often as it takes for R to divide their heads.
 */
export function sequenceTraffic(kind: ContextKind, ranks: number, s: SequenceShape): Traffic {
  const size = dtypeBytes(s.dtype);
  const row = s.batch * s.tokens;
  const documents = s.documents ? (ranks - 1) * row * 8 : 0;
  const width = s.headDim + s.valueDim;
  if (kind === "ring") {
    const block = row * s.kvHeads * width;
    const forward = (ranks - 1) * block * size + documents;
    return { forward, backward: forward + ranks * block * (s.dtype === "float64" ? 8 : 4) };
  }
  const heads = s.heads + lcm(s.kvHeads, ranks);
  const exchanged = ((ranks - 1) / ranks) * row * heads * width * size;
  return { forward: exchanged + documents, backward: exchanged };
}

/** Seconds with the transfers: the ring hides them behind all but one of its R steps, an exchange hides nothing. */
export function withTransfers(kind: ContextKind, ranks: number, compute: number, transfer: number): number {
  return kind === "ring" ? compute / ranks + Math.max((compute * (ranks - 1)) / ranks, transfer) : compute + transfer;
}

/** Null where the call is no attention over ranks. */
export function sequenceCall(call: SizedCall): { kind: ContextKind; ranks: number; shape: SequenceShape } | null {
  const kind = (Object.keys(CONTEXT_OPS) as ContextKind[]).find((k) => CONTEXT_OPS[k] === call.op);
  if (kind === undefined) return null;
  const [q, , v] = call.tensors as [SizedValue, SizedValue, SizedValue];
  const [batch, heads, tokens, headDim] = q.shape as [number, number, number, number];
  const [kvHeads, valueDim] = [v.shape[1]!, v.shape[3]!];
  const shape = { batch, heads, kvHeads, tokens, headDim, valueDim, dtype: q.dtype, documents: call.args[3] !== null };
  return { kind, ranks: ranksOfGroup(call.args[6] as string)!, shape };
}

export interface ContextSizes extends Omit<SequenceShape, "tokens" | "valueDim"> {
  /** T: of a whole row. */
  tokens: number;
  /** Default headDim. */
  valueDim?: number;
}

export interface ContextRates {
  /** Bytes a second between two ranks, each way. */
  link: number;
  /** Of one message, beside its bytes. */
  messageSeconds: number;
  /** Floating-point operations a second of attention on one rank. */
  attentionFlops: number;
}

export interface ContextCost extends Traffic {
  /** Of one call, forward and backward, transfers and arithmetic. */
  seconds: number;
}

export interface ContextChoice {
  kind: ContextKind;
  ring: ContextCost;
  /** Null where query heads are no multiple of the ranks. */
  allToAll: ContextCost | null;
  /** One sentence with the figures. */
  why: string;
}

/**
 * The faster of the two for causal attention over rows of `tokens`; on a tie the ring, which takes any number of heads.
 * @throws CONFIG where 2 R does not divide the tokens
 */
export function chooseContext(sizes: ContextSizes, ranks: number, rates: ContextRates): ContextChoice {
  checkTokens(sizes.tokens, ranks);
  const { valueDim = sizes.headDim } = sizes;
  const shape: SequenceShape = { ...sizes, valueDim, tokens: sizes.tokens / ranks };
  const pairs = (sizes.batch * sizes.heads * shape.tokens * sizes.tokens) / 2;
  const compute = (2 * pairs * (sizes.headDim + valueDim)) / rates.attentionFlops;
  // Messages one after the other: a ring's steps (in the backward two at a time, and one last hop), four exchanges.
  const messages = { ring: { forward: ranks - 1, backward: ranks }, allToAll: { forward: 4, backward: 4 } };
  const cost = (kind: ContextKind): ContextCost => {
    const traffic = sequenceTraffic(kind, ranks, shape);
    const pass = (which: keyof Traffic, arithmetic: number) => {
      const transfer = traffic[which] / rates.link + messages[kind][which] * rates.messageSeconds;
      return withTransfers(kind, ranks, arithmetic * compute, transfer);
    };
    return { ...traffic, seconds: ranks === 1 ? 3 * compute : pass("forward", 1) + pass("backward", 2) };
  };
  const ring = cost("ring");
  if (sizes.heads % ranks !== 0) {
    const why = `${sizes.heads} query heads do not divide over ${ranks} ranks: only the ring takes them`;
    return { kind: "ring", ring, allToAll: null, why };
  }
  const allToAll = cost("allToAll");
  const kind = allToAll.seconds < ring.seconds ? "allToAll" : "ring";
  const said = ({ seconds, forward, backward }: ContextCost) =>
    `${(seconds * 1e3).toPrecision(3)} ms and ${((forward + backward) / 1e6).toPrecision(3)} MB sent`;
  return { kind, ring, allToAll, why: `a layer takes ${said(ring)} in the ring, ${said(allToAll)} all to all` };
}

/**
 * How `ranks` of a machine attend over rows that they share: whichever way is faster. `graph`: of whole rows, and so the T
 * of `dims`. @throws CONFIG where 2 R does not divide T, GRAPH where nothing attends
 */
export function contextOn(
  graph: Graph,
  dims: Readonly<Record<string, number>>,
  ranks: number,
  profile: MachineProfile,
): ContextOptions {
  const { gemm, attention, rankLink = RANK_LINK, copySeconds } = profile;
  const { flops } = gemm[graph.dtype === "bfloat16" || graph.dtype === "float64" ? graph.dtype : "float32"];
  const rates = { link: rankLink, messageSeconds: copySeconds, attentionFlops: attention * flops };
  return { ranks, kind: chooseContext(contextSizes(graph, dims), ranks, rates).kind };
}

/** What a rank sends in one pass of a block, as often as its program attends over rows of shared tokens. */
export function passTraffic(graph: Graph, block: number, dims: Readonly<Record<string, number>>): Traffic {
  const sum: Traffic = { forward: 0, backward: 0 };
  for (const call of sizedProgram(graph, block, dims).calls) {
    const over = sequenceCall(call);
    if (over === null) continue;
    const { forward, backward } = sequenceTraffic(over.kind, over.ranks, over.shape);
    sum.forward += forward;
    sum.backward += backward;
  }
  return sum;
}

/**
 * Sizes of a graph's widest attention over ranks or of whole rows, for batches of `dims` (T: tokens of a whole row).
 * @throws GRAPH where it has none
 */
export function contextSizes(graph: Graph, dims: Readonly<Record<string, number>>): ContextSizes {
  const ranks = contextOf(graph)?.ranks ?? 1;
  const share = { ...dims, ...(dims.T === undefined ? {} : { T: dims.T / ranks }) };
  let widest: { flops: number; sizes: ContextSizes } | null = null;
  const first = new Map(graph.blocks.map((b, i) => [b.program, i]));
  for (const block of first.values()) {
    for (const call of sizedProgram(graph, block, share).calls) {
      if (call.op !== "scaledDotProductAttention" && sequenceCall(call) === null) continue;
      if (widest !== null && call.flops <= widest.flops) continue;
      const [q, , v] = call.tensors as [SizedValue, SizedValue, SizedValue];
      const [batch, heads, tokens, headDim] = q.shape as [number, number, number, number];
      const [kvHeads, valueDim, dtype] = [v.shape[1]!, v.shape[3]!, q.dtype];
      const documents = call.args[3] !== null;
      const sizes = { batch, heads, kvHeads, tokens: tokens * ranks, headDim, valueDim, dtype, documents };
      widest = { flops: call.flops, sizes };
    }
  }
  if (widest === null)
    throw new StromaError("GRAPH", `[context] ${graph.model} has no attention to share out to ranks`);
  return widest.sizes;
}

/** @throws CONFIG with the arithmetic: a causal row is dealt out in 2 R chunks. */
export function checkTokens(tokens: number, ranks: number): void {
  const chunks = 2 * ranks;
  if (ranks === 1 || (tokens > 0 && tokens % chunks === 0)) return;
  const [below, above] = [Math.floor(tokens / chunks) * chunks, Math.ceil(Math.max(tokens, 1) / chunks) * chunks];
  throw new StromaError(
    "CONFIG",
    `[context] rows of ${tokens} tokens do not divide into 2 x ${ranks} = ${chunks} equal chunks, two for each rank: ${tokens} = ${Math.floor(tokens / chunks)} x ${chunks} + ${tokens % chunks}. Take ${below > 0 ? `${below} or ` : ""}${above} tokens`,
    { tokens, ranks, chunks },
  );
}

function lcm(a: number, b: number): number {
  let [x, y] = [a, b];
  while (y !== 0) [x, y] = [y, x % y];
  return (a / x) * b;
}
