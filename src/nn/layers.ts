/**
 * Layers as functions over a parameter scope. Shapes: B batch, T tokens, D width, N query heads, K key/value heads,
 * H head dim, F feed-forward width, V vocabulary. Parameter names are Hugging Face's.
 */
import { StromaError } from "../errors.js";
import type { BlockScope } from "../graph/model.js";
import * as ops from "../graph/ops.js";
import type { Dim, Init } from "../graph/types.js";
import { isFloating, type Value } from "../graph/value.js";

export interface LinearOptions {
  bias?: boolean;
  /** Default: normal, std 0.02. Biases start at zero. */
  init?: Init;
}

/** x [..., in] -> [..., features]; parameters weight [features, in], bias [features]. */
export function linear(p: BlockScope, x: Value, features: number, options: LinearOptions = {}): Value {
  const weight = p.param("weight", [features, fixed(p, x, -1)], { init: options.init });
  const bias = options.bias ? p.param("bias", [features], { init: { kind: "zeros" }, decay: false }) : null;
  return ops.linear(x, weight, bias);
}

export interface EmbeddingOptions {
  init?: Init;
  /**
   * Weight decay on the table. Default true: like the matrices, as nanoGPT, Llama recipes and Hugging Face's Trainer do
   * (they leave out only biases and norms). Rows that a batch does not touch decay too.
   */
  decay?: boolean;
}

/** ids int64 [...] -> [..., dim]; parameter weight [rows, dim]. */
export function embedding(p: BlockScope, ids: Value, rows: number, dim: number, options: EmbeddingOptions = {}): Value {
  return ops.embedding(p.param("weight", [rows, dim], options), ids);
}

/**
 * Root-mean-square norm over the last dim (Zhang and Sennrich, arXiv 1910.07467), computed in float32 (float64 for
 * float64 input) and cast back before the weight multiplies it, as in Hugging Face. Parameter weight [D], ones.
 */
export function rmsNorm(p: BlockScope, x: Value, eps: number): Value {
  const weight = p.param("weight", [fixed(p, x, -1)], { init: { kind: "ones" }, decay: false });
  return ops.rmsNorm(x, weight, eps);
}

/** Layer norm over the last dim (Ba et al., arXiv 1607.06450). Parameters weight [D] ones, bias [D] zeros. */
export function layerNorm(p: BlockScope, x: Value, eps: number): Value {
  const size = fixed(p, x, -1);
  const weight = p.param("weight", [size], { init: { kind: "ones" }, decay: false });
  const bias = p.param("bias", [size], { init: { kind: "zeros" }, decay: false });
  return ops.layerNorm(x, [size], weight, bias, eps);
}

/**
 * Zeroes each element with probability `rate` and scales the rest by 1/(1 - rate); recorded in train mode only. Draws
 * from (seed, step, micro-batch, block, site), so recompute and every schedule draw the same.
 */
export function dropout(p: BlockScope, x: Value, rate: number): Value {
  if (!(rate >= 0 && rate < 1)) {
    throw new StromaError("INVALID_ARGUMENT", `[dropout] expected a probability in [0, 1), got ${rate}, at ${p.path}`);
  }
  if (rate === 0 || p.mode !== "train") return x;
  return ops.apply("dropout", x, rate, p.rngKey(), p.site());
}

export interface GatedMlpOptions {
  bias?: boolean;
  /** Init of down_proj, which writes into the residual stream. */
  outputInit?: Init;
  init?: Init;
}

/** SwiGLU (Shazeer, arXiv 2002.05202): down_proj(silu(gate_proj x) * up_proj x). x [..., D] -> [..., D] */
export function swiGlu(p: BlockScope, x: Value, ffn: number, options: GatedMlpOptions = {}): Value {
  const { bias, init } = options;
  const gate = linear(p.sub("gate_proj"), x, ffn, { bias, init });
  const up = linear(p.sub("up_proj"), x, ffn, { bias, init });
  const outputInit = options.outputInit ?? init;
  return linear(p.sub("down_proj"), ops.siluMul(gate, up), fixed(p, x, -1), { bias, init: outputInit });
}

/** A dim that a parameter's shape needs as a number. */
export function fixed(p: BlockScope, x: Value, dim: number): number {
  const d: Dim | undefined = x.shape.at(dim);
  if (typeof d === "number" && isFloating(x.dtype)) return d;
  throw new StromaError(
    "SHAPE",
    `[nn] expected floating input with a fixed dim ${dim}, got ${x.dtype} [${x.shape.join(", ")}], at ${p.path}`,
    { at: p.path },
  );
}
