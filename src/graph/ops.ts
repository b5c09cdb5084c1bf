/**
 * The ops as functions over Values: recorded while a model is traced, run on Tensors when it runs eagerly.
 * Names and order of arguments follow PyTorch; a number as second operand takes the Scalar overload.
 */
import { StromaError } from "../errors.js";
import { CONTEXT_OPS, type Context } from "./context.js";
import type { OpArguments, OpName } from "./schemas.js";
import type { Dim, DType } from "./types.js";
import type { Value } from "./value.js";

export function apply<K extends OpName>(op: K, ...args: OpArguments<Value>[K]): Value {
  for (const arg of args as readonly unknown[]) {
    const value = Array.isArray(arg) ? arg[0] : arg;
    if (value !== null && typeof value === "object" && "backend" in value) {
      return (value as Value).backend.call(op, args);
    }
  }
  throw new StromaError("GRAPH", `[${op}] expected a Value of this model among its arguments, got none`);
}

type Operand = Value | number;
const arithmetic =
  (op: "add" | "sub" | "mul" | "div") =>
  (a: Value, b: Operand): Value =>
    typeof b === "number" ? apply(`${op}Scalar`, a, b) : apply(op, a, b);
const comparison =
  (op: "eq" | "ne" | "lt" | "le" | "gt" | "ge") =>
  (a: Value, b: Operand): Value =>
    typeof b === "number" ? apply(`${op}Scalar`, a, b) : apply(op, a, b);
const unary =
  (
    op:
      | "neg"
      | "abs"
      | "exp"
      | "log"
      | "sqrt"
      | "rsqrt"
      | "reciprocal"
      | "sin"
      | "cos"
      | "tanh"
      | "sigmoid"
      | "relu"
      | "silu"
      | "logicalNot"
      | "contiguous",
  ) =>
  (x: Value): Value =>
    apply(op, x);

export const add = arithmetic("add");
export const sub = arithmetic("sub");
export const mul = arithmetic("mul");
export const div = arithmetic("div");
export const eq = comparison("eq");
export const ne = comparison("ne");
export const lt = comparison("lt");
export const le = comparison("le");
export const gt = comparison("gt");
export const ge = comparison("ge");
export const neg = unary("neg");
export const abs = unary("abs");
export const exp = unary("exp");
export const log = unary("log");
export const sqrt = unary("sqrt");
export const rsqrt = unary("rsqrt");
export const reciprocal = unary("reciprocal");
export const sin = unary("sin");
export const cos = unary("cos");
export const tanh = unary("tanh");
export const sigmoid = unary("sigmoid");
export const relu = unary("relu");
export const silu = unary("silu");
export const logicalNot = unary("logicalNot");
export const contiguous = unary("contiguous");

/** tensor ** number, or number ** tensor. */
export function pow(a: Operand, b: Operand): Value {
  if (typeof a === "number") {
    if (typeof b === "number") throw new StromaError("INVALID_ARGUMENT", "[pow] expected a Value, got two numbers");
    return apply("scalarPow", a, b);
  }
  if (typeof b !== "number") throw new StromaError("INVALID_ARGUMENT", "[pow] expected a number as exponent");
  return apply("powScalar", a, b);
}

export const maximum = (a: Value, b: Value): Value => apply("maximum", a, b);
export const minimum = (a: Value, b: Value): Value => apply("minimum", a, b);
export const logicalAnd = (a: Value, b: Value): Value => apply("logicalAnd", a, b);
export const logicalOr = (a: Value, b: Value): Value => apply("logicalOr", a, b);
export const gelu = (x: Value, approximate: "none" | "tanh" = "none"): Value => apply("gelu", x, approximate);
export const where = (condition: Value, a: Value, b: Value): Value => apply("where", condition, a, b);
export const maskedFill = (x: Value, mask: Value, value: number): Value => apply("maskedFill", x, mask, value);

/** silu(gate) * up, SwiGLU's product. */
export const siluMul = (gate: Value, up: Value): Value => apply("siluMul", gate, up);

/** The same value in another dtype; records nothing when it has it already. */
export const to = (x: Value, dtype: DType): Value => (x.dtype === dtype ? x : apply("to", x, dtype));

export const newOnes = (like: Value, size: readonly Dim[], dtype: DType | null = null): Value =>
  apply("newOnes", like, size, dtype);
export const newZeros = (like: Value, size: readonly Dim[], dtype: DType | null = null): Value =>
  apply("newZeros", like, size, dtype);

export const sum = (x: Value, dims: readonly number[], keepdim = false, dtype: DType | null = null): Value =>
  apply("sum", x, dims, keepdim, dtype);
export const mean = (x: Value, dims: readonly number[], keepdim = false, dtype: DType | null = null): Value =>
  apply("mean", x, dims, keepdim, dtype);
export const amax = (x: Value, dims: readonly number[], keepdim = false): Value => apply("amax", x, dims, keepdim);
export const cumsum = (x: Value, dim: number): Value => apply("cumsum", x, dim);
export const softmax = (x: Value, dim: number, dtype: DType | null = null): Value => apply("softmax", x, dim, dtype);
export const logSoftmax = (x: Value, dim: number, dtype: DType | null = null): Value =>
  apply("logSoftmax", x, dim, dtype);
export const layerNorm = (
  x: Value,
  size: readonly Dim[],
  weight: Value | null,
  bias: Value | null,
  eps: number,
): Value => apply("layerNorm", x, size, weight, bias, eps);

/** Over the last dim, computed in at least float32 and rounded before weight [D] multiplies. x [..., D] -> [..., D] */
export const rmsNorm = (x: Value, weight: Value, eps: number): Value => apply("rmsNorm", x, weight, eps);

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

/**
 * Rotary positions (Su et al., arXiv 2104.09864): positions int64 [B, T] -> [B, T, H] in `dtype`, half of it cosines and
 * half sines of position x frequency, computed in at least float32. For `rotate`; no gradient.
 */
export function rotaryTable(positions: Value, headDim: number, options: RopeOptions, dtype: DType): Value {
  const { theta, scaling: s = null } = options;
  const of = <K extends keyof Llama3RopeScaling>(key: K) => s?.[key] ?? null;
  return apply(
    "rotaryTable",
    positions,
    headDim,
    theta,
    of("factor"),
    of("lowFreqFactor"),
    of("highFreqFactor"),
    of("originalMaxPositions"),
    dtype,
  );
}
/** x [B, N, T, H] turned by a table [B, T, H]; halves pair up as in Hugging Face (GPT-NeoX order). */
export const rotate = (x: Value, table: Value): Value => apply("rotate", x, table);

/** One size may be -1. The strides of `x` must allow it; `reshape` copies where they do not. */
export const view = (x: Value, size: readonly Dim[]): Value => apply("view", x, size);
export const reshape = (x: Value, size: readonly Dim[]): Value => apply("reshape", x, size);
export const transpose = (x: Value, a: number, b: number): Value => apply("transpose", x, a, b);
export const permute = (x: Value, dims: readonly number[]): Value => apply("permute", x, dims);
export const unsqueeze = (x: Value, dim: number): Value => apply("unsqueeze", x, dim);
export const squeeze = (x: Value, dim: number): Value => apply("squeeze", x, dim);
export const expand = (x: Value, size: readonly Dim[]): Value => apply("expand", x, size);
/** x[start:end:step] along dim; null: from the start, to the end. */
export const slice = (x: Value, dim: number, start: Dim | null, end: Dim | null = null, step = 1): Value =>
  apply("slice", x, dim, start, end, step);
export const select = (x: Value, dim: number, index: Dim): Value => apply("select", x, dim, index);
export const cat = (tensors: readonly Value[], dim: number): Value => apply("cat", tensors, dim);
export const stack = (tensors: readonly Value[], dim: number): Value => apply("stack", tensors, dim);
export const repeatInterleave = (x: Value, repeats: Dim, dim: number): Value =>
  apply("repeatInterleave", x, repeats, dim);

export const matmul = (a: Value, b: Value): Value => apply("matmul", a, b);
/** x [..., in], weight [out, in], bias [out] -> [..., out] */
export const linear = (x: Value, weight: Value, bias: Value | null = null): Value => apply("linear", x, weight, bias);
/** weight [V, D], indices [...] -> [..., D] */
export const embedding = (weight: Value, indices: Value): Value => apply("embedding", weight, indices);
export const indexSelect = (x: Value, dim: number, index: Value): Value => apply("indexSelect", x, dim, index);

export interface AttentionOptions {
  /** bool (true: attend) or additive, broadcast to [B, N, T, S]. */
  mask?: Value | null;
  causal?: boolean;
  /** Default 1 / sqrt(head dim). */
  scale?: number | null;
  /** Key and value have fewer heads than the query. */
  grouped?: boolean;
}

/** q [B, N, T, H], k and v [B, K, S, H] -> [B, N, T, H] */
export function scaledDotProductAttention(q: Value, k: Value, v: Value, options: AttentionOptions = {}): Value {
  const { mask = null, causal = false, scale = null, grouped = false } = options;
  return apply("scaledDotProductAttention", q, k, v, mask, 0, causal, scale, grouped);
}

export interface SequenceAttentionOptions {
  /** int64 [B, t]: a token attends only to tokens of the same id in its row. */
  documents?: Value | null;
  causal?: boolean;
  /** Default 1 / sqrt(head dim). */
  scale?: number | null;
}

/**
 * Attention of this rank's t tokens over all R t of the group: q [B, N, t, H], k and v [B, K, t, H] -> [B, N, t, H].
 * Causal: every rank holds its two chunks of the zigzag, in order (native/kernels/ring_attention.h).
 */
export function sequenceAttention(
  context: Context,
  q: Value,
  k: Value,
  v: Value,
  options: SequenceAttentionOptions = {},
): Value {
  const { documents = null, causal = false, scale = null } = options;
  return apply(CONTEXT_OPS[context.kind], q, k, v, documents, causal, scale, context.group);
}
