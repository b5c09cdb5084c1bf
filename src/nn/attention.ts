/** Grouped-query attention. */
import { StromaError } from "../errors.js";
import type { BlockScope } from "../graph/model.js";
import * as ops from "../graph/ops.js";
import type { Init } from "../graph/types.js";
import type { Value } from "../graph/value.js";
import { fixed, linear, rmsNorm } from "./layers.js";

export interface AttentionOptions {
  heads: number;
  kvHeads: number;
  headDim: number;
  bias?: boolean;
  /** RMS norm of each query and key head before the rotation (Qwen3): its epsilon. */
  qkNormEps?: number | null;
  /** Turns queries and keys: a table [B, T, H] of ops.rotaryTable. */
  rotation: Value | null;
  /** int64 [B, T]: packed documents, which do not see each other. Without, every position sees all before it. */
  documents?: Value | null;
  init?: Init;
  outputInit?: Init;
}

/**
 * Causal grouped-query self-attention (Ainslie et al., arXiv 2305.13245). x [B, T, D] -> [B, T, D]. Where rows are shared
 * out to ranks (p.context) T is this rank's share, and attention goes over the shares of all.
 */
export function selfAttention(p: BlockScope, x: Value, options: AttentionOptions): Value {
  const { heads, kvHeads, headDim, bias, init } = options;
  if (heads % kvHeads !== 0) {
    throw new StromaError(
      "SHAPE",
      `[attention] expected query heads to be a multiple of key/value heads, got ${heads} and ${kvHeads}, at ${p.path}`,
    );
  }
  const { context } = p;
  const documents = options.documents ?? null;
  const mask = documents === null || context !== null ? null : documentMask(documents);
  const D = fixed(p, x, -1);
  const [B, T] = [x.shape[0]!, x.shape[1]!];
  const split = (name: string, count: number): Value =>
    ops.view(linear(p.sub(`${name}_proj`), x, count * headDim, { bias, init }), [B, T, count, headDim]);
  const normed = (name: string, y: Value): Value =>
    options.qkNormEps == null ? y : rmsNorm(p.sub(`${name}_norm`), y, options.qkNormEps);
  const heads_ = (y: Value): Value => ops.transpose(y, 1, 2);
  const turned = (y: Value): Value => (options.rotation === null ? y : ops.rotate(y, options.rotation));

  const q_BNTH = turned(heads_(normed("q", split("q", heads))));
  const k_BKTH = turned(heads_(normed("k", split("k", kvHeads))));
  const v_BKTH = heads_(split("v", kvHeads));
  const y_BNTH =
    context !== null
      ? ops.sequenceAttention(context, q_BNTH, k_BKTH, v_BKTH, { documents, causal: true })
      : ops.scaledDotProductAttention(q_BNTH, k_BKTH, v_BKTH, {
          mask,
          causal: mask === null,
          grouped: heads !== kvHeads,
        });
  const y = ops.reshape(ops.transpose(y_BNTH, 1, 2), [B, T, heads * headDim]);
  return linear(p.sub("o_proj"), y, D, { bias, init: options.outputInit ?? init });
}

/**
 * segments int64 [B, T] -> bool [B, 1, T, T], true where a position may look: not ahead, and only within
 * its own document. Order is that of the row, not of `positions`, which start anew in each document.
 */
export function documentMask(segments: Value): Value {
  const [B, T] = segments.shape as [Value["shape"][number], Value["shape"][number]];
  const order = ops.cumsum(ops.newOnes(segments, [T]), 0);
  const causal = ops.le(ops.view(order, [1, 1, 1, T]), ops.view(order, [1, 1, T, 1]));
  const same = ops.eq(ops.view(segments, [B, 1, T, 1]), ops.view(segments, [B, 1, 1, T]));
  return ops.logicalAnd(causal, same);
}
