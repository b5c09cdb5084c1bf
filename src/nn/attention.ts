/** Rotary positions and grouped-query attention. */
import { StromaError } from "../errors.js";
import type { BlockScope } from "../graph/model.js";
import * as ops from "../graph/ops.js";
import type { DType, Init } from "../graph/types.js";
import type { Value } from "../graph/value.js";
import { fixed, linear, rmsNorm, wideDType } from "./layers.js";

/** Llama 3.1's stretching of the slow frequencies (Hugging Face: rope_type "llama3"). */
export interface Llama3RopeScaling {
  type: "llama3";
  factor: number;
  lowFreqFactor: number;
  highFreqFactor: number;
  originalMaxPositions: number;
}

export interface RopeOptions {
  theta: number;
  scaling?: Llama3RopeScaling | null;
}

export interface Rotation {
  /** [B, 1, T, H] in the activations' dtype. */
  cos: Value;
  sin: Value;
}

/**
 * cos and sin of position x frequency (Su et al., arXiv 2104.09864), positions int64 [B, T], in float32 (float64 when the
 * model computes in it), by the same ops as Hugging Face's LlamaRotaryEmbedding, so that the bits agree.
 */
export function rotation(positions: Value, headDim: number, options: RopeOptions, dtype: DType): Rotation {
  const wide: DType = dtype === "float64" ? "float64" : "float32";
  const half = headDim / 2;
  // 0, 2, 4, ... made from the positions' device.
  const even = ops.mul(ops.sub(ops.cumsum(ops.newOnes(positions, [half]), 0), 1), 2);
  let frequency = ops.reciprocal(ops.pow(options.theta, ops.div(ops.to(even, wide), headDim)));
  if (options.scaling) frequency = llama3(frequency, options.scaling);
  const [B, T] = positions.shape as [Value["shape"][number], Value["shape"][number]];
  const at = ops.mul(ops.view(ops.to(positions, wide), [B, T, 1]), frequency);
  const both = (x: Value) => ops.unsqueeze(ops.to(ops.cat([x, x], -1), dtype), 1);
  return { cos: both(ops.cos(at)), sin: both(ops.sin(at)) };
}

function llama3(frequency: Value, s: Llama3RopeScaling): Value {
  const lowWavelength = s.originalMaxPositions / s.lowFreqFactor;
  const highWavelength = s.originalMaxPositions / s.highFreqFactor;
  const wavelength = ops.mul(ops.reciprocal(frequency), 2 * Math.PI);
  const slow = ops.where(ops.gt(wavelength, lowWavelength), ops.div(frequency, s.factor), frequency);
  const smooth = ops.div(
    ops.sub(ops.mul(ops.reciprocal(wavelength), s.originalMaxPositions), s.lowFreqFactor),
    s.highFreqFactor - s.lowFreqFactor,
  );
  const blended = ops.add(ops.div(ops.mul(ops.add(ops.neg(smooth), 1), slow), s.factor), ops.mul(smooth, slow));
  const medium = ops.logicalAnd(ops.ge(wavelength, highWavelength), ops.le(wavelength, lowWavelength));
  return ops.where(medium, blended, slow);
}

/** x [B, N, T, H] turned by the rotation; halves pair up as in Hugging Face (GPT-NeoX order). */
export function rotate(x: Value, { cos, sin }: Rotation): Value {
  const half = (x.shape[3] as number) / 2;
  const turned = ops.cat([ops.neg(ops.slice(x, -1, half)), ops.slice(x, -1, 0, half)], -1);
  return ops.add(ops.mul(x, cos), ops.mul(turned, sin));
}

export interface AttentionOptions {
  heads: number;
  kvHeads: number;
  headDim: number;
  bias?: boolean;
  /** RMS norm of each query and key head before the rotation (Qwen3): its epsilon. */
  qkNormEps?: number | null;
  rotation: Rotation | null;
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
  const turned = (y: Value): Value => (options.rotation === null ? y : rotate(y, options.rotation));

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

export { wideDType };
