/**
 * Ops that a graph may hold: the overload in libtorch's dispatcher and the kinds of its arguments in the schema's order.
 * Trailing arguments that keep their schema's default are left out. Every overload is in libtorch 2.11 and later.
 *
 * No op here writes its inputs, draws from a global generator, or returns a list of tensors.
 */
import type { Dim, DType } from "./types.js";

/** How an argument looks to TypeScript; T stands for a tensor. */
interface Kinds<T> {
  tensor: T;
  "tensor?": T | null;
  tensors: readonly T[];
  /** SymInt */
  dim: Dim;
  "dim?": Dim | null;
  /** SymInt[] */
  dims: readonly Dim[];
  /** int: an axis, a flag; never a size. */
  int: number;
  ints: readonly number[];
  /** Scalar: a number in the tensor's dtype. */
  scalar: number;
  float: number;
  "float?": number | null;
  bool: boolean;
  string: string;
  dtype: DType;
  "dtype?": DType | null;
}
export type Kind = keyof Kinds<unknown>;

/** "tensor? bias": kind and name as in the dispatcher's schema. */
export type Argument = `${Kind} ${string}`;

export interface OpSchema {
  readonly overload: string;
  /** Positional arguments by name. */
  readonly args: readonly Argument[];
  /** Keyword-only arguments; in TypeScript they follow the positional ones. */
  readonly kwargs?: readonly Argument[];
  /**
   * The operators below autograd one of which does its work, and whose results, kept from the forward, stand for it in the
   * backward. Absent: it is computed again. What it becomes on the way (a transpose, a padded head) is computed again too.
   */
  readonly kernels?: readonly string[];
}

const unary = <const S extends string>(overload: S) => ({ overload, args: ["tensor self"] }) as const;
const binary = <const S extends string>(overload: S) => ({ overload, args: ["tensor self", "tensor other"] }) as const;
const withScalar = <const S extends string>(overload: S) =>
  ({ overload, args: ["tensor self", "scalar other"] }) as const;
const reduction = <const S extends string>(overload: S) =>
  ({ overload, args: ["tensor self", "ints dim", "bool keepdim"], kwargs: ["dtype? dtype"] }) as const;

const overRanks = <const S extends string>(overload: S) =>
  ({
    overload,
    args: [
      "tensor q",
      "tensor k",
      "tensor v",
      "tensor? document_ids",
      "bool is_causal",
      "float? scale",
      "string group",
    ],
  }) as const;

export const schemas = {
  // Elementwise
  neg: unary("aten::neg"),
  abs: unary("aten::abs"),
  exp: unary("aten::exp"),
  log: unary("aten::log"),
  sqrt: unary("aten::sqrt"),
  rsqrt: unary("aten::rsqrt"),
  reciprocal: unary("aten::reciprocal"),
  sin: unary("aten::sin"),
  cos: unary("aten::cos"),
  tanh: unary("aten::tanh"),
  sigmoid: unary("aten::sigmoid"),
  relu: unary("aten::relu"),
  silu: unary("aten::silu"),
  gelu: { overload: "aten::gelu", args: ["tensor self"], kwargs: ["string approximate"] },
  add: binary("aten::add.Tensor"),
  sub: binary("aten::sub.Tensor"),
  mul: binary("aten::mul.Tensor"),
  div: binary("aten::div.Tensor"),
  maximum: binary("aten::maximum"),
  minimum: binary("aten::minimum"),
  addScalar: withScalar("aten::add.Scalar"),
  subScalar: withScalar("aten::sub.Scalar"),
  mulScalar: withScalar("aten::mul.Scalar"),
  divScalar: withScalar("aten::div.Scalar"),
  powScalar: { overload: "aten::pow.Tensor_Scalar", args: ["tensor self", "scalar exponent"] },
  scalarPow: { overload: "aten::pow.Scalar", args: ["float self", "tensor exponent"] },
  eq: binary("aten::eq.Tensor"),
  ne: binary("aten::ne.Tensor"),
  lt: binary("aten::lt.Tensor"),
  le: binary("aten::le.Tensor"),
  gt: binary("aten::gt.Tensor"),
  ge: binary("aten::ge.Tensor"),
  eqScalar: withScalar("aten::eq.Scalar"),
  neScalar: withScalar("aten::ne.Scalar"),
  ltScalar: withScalar("aten::lt.Scalar"),
  leScalar: withScalar("aten::le.Scalar"),
  gtScalar: withScalar("aten::gt.Scalar"),
  geScalar: withScalar("aten::ge.Scalar"),
  logicalAnd: binary("aten::logical_and"),
  logicalOr: binary("aten::logical_or"),
  logicalNot: unary("aten::logical_not"),
  where: { overload: "aten::where.self", args: ["tensor condition", "tensor self", "tensor other"] },
  maskedFill: { overload: "aten::masked_fill.Scalar", args: ["tensor self", "tensor mask", "scalar value"] },
  to: { overload: "aten::to.dtype", args: ["tensor self", "dtype dtype"] },
  // Made from a tensor, so that they land on its device
  newOnes: { overload: "aten::new_ones", args: ["tensor self", "dims size"], kwargs: ["dtype? dtype"] },
  newZeros: { overload: "aten::new_zeros", args: ["tensor self", "dims size"], kwargs: ["dtype? dtype"] },
  // Reductions
  sum: reduction("aten::sum.dim_IntList"),
  mean: reduction("aten::mean.dim"),
  amax: { overload: "aten::amax", args: ["tensor self", "ints dim", "bool keepdim"] },
  cumsum: { overload: "aten::cumsum", args: ["tensor self", "int dim"] },
  softmax: { overload: "aten::softmax.int", args: ["tensor self", "int dim", "dtype? dtype"] },
  logSoftmax: { overload: "aten::log_softmax.int", args: ["tensor self", "int dim", "dtype? dtype"] },
  layerNorm: {
    overload: "aten::layer_norm",
    args: ["tensor input", "dims normalized_shape", "tensor? weight", "tensor? bias", "float eps"],
  },
  // Views and joins
  view: { overload: "aten::view", args: ["tensor self", "dims size"] },
  reshape: { overload: "aten::reshape", args: ["tensor self", "dims shape"] },
  transpose: { overload: "aten::transpose.int", args: ["tensor self", "int dim0", "int dim1"] },
  permute: { overload: "aten::permute", args: ["tensor self", "ints dims"] },
  unsqueeze: { overload: "aten::unsqueeze", args: ["tensor self", "int dim"] },
  squeeze: { overload: "aten::squeeze.dim", args: ["tensor self", "int dim"] },
  expand: { overload: "aten::expand", args: ["tensor self", "dims size"] },
  slice: {
    overload: "aten::slice.Tensor",
    args: ["tensor self", "int dim", "dim? start", "dim? end", "dim step"],
  },
  select: { overload: "aten::select.int", args: ["tensor self", "int dim", "dim index"] },
  contiguous: unary("aten::contiguous"),
  cat: { overload: "aten::cat", args: ["tensors tensors", "int dim"] },
  stack: { overload: "aten::stack", args: ["tensors tensors", "int dim"] },
  repeatInterleave: {
    overload: "aten::repeat_interleave.self_int",
    args: ["tensor self", "dim repeats", "int dim"],
  },
  // Products and lookups
  matmul: { ...binary("aten::matmul"), kernels: ["aten::mm", "aten::bmm"] },
  linear: {
    overload: "aten::linear",
    args: ["tensor input", "tensor weight", "tensor? bias"],
    kernels: ["aten::mm", "aten::addmm", "aten::bmm"],
  },
  embedding: { overload: "aten::embedding", args: ["tensor weight", "tensor indices"] },
  indexSelect: { overload: "aten::index_select", args: ["tensor self", "int dim", "tensor index"] },
  scaledDotProductAttention: {
    overload: "aten::scaled_dot_product_attention",
    args: ["tensor query", "tensor key", "tensor value", "tensor? attn_mask", "float dropout_p", "bool is_causal"],
    kwargs: ["float? scale", "bool enable_gqa"],
    // Not the products of the kernel written out in operators: its scores grow with the square of the length.
    kernels: [
      "aten::_scaled_dot_product_flash_attention_for_cpu",
      "aten::_scaled_dot_product_flash_attention",
      "aten::_scaled_dot_product_efficient_attention",
      "aten::_scaled_dot_product_cudnn_attention",
    ],
  },
  // Ours (native/kernels)
  crossEntropyHead: {
    overload: "stroma::cross_entropy_head",
    args: [
      "tensor x",
      "tensor weight",
      "tensor? bias",
      "tensor labels",
      "tensor scale",
      "int chunk",
      "int ignore_index",
    ],
  },
  rmsNorm: { overload: "stroma::rms_norm", args: ["tensor x", "tensor weight", "float eps"] },
  rotaryTable: {
    overload: "stroma::rotary_table",
    args: [
      "tensor positions",
      "int head_dim",
      "float theta",
      "float? factor",
      "float? low_freq_factor",
      "float? high_freq_factor",
      "float? original_max_positions",
      "dtype dtype",
    ],
  },
  rotate: { overload: "stroma::rotate", args: ["tensor x", "tensor table"] },
  siluMul: { overload: "stroma::silu_mul", args: ["tensor gate", "tensor up"] },
  dropout: { overload: "stroma::dropout", args: ["tensor x", "float p", "tensor key", "int site"] },
  // Attention over rows that a group of ranks holds in parts (native/kernels/ring_attention.h)
  ringAttention: overRanks("stroma::ring_attention"),
  allToAllAttention: overRanks("stroma::all_to_all_attention"),
} as const satisfies Record<string, OpSchema>;

export type OpName = keyof typeof schemas;

type KindOf<A> = A extends `${infer K extends Kind} ${string}` ? K : never;
type ArgumentsOf<S extends OpSchema, T> = [
  ...Mapped<S["args"], T>,
  ...(S["kwargs"] extends readonly Argument[] ? Mapped<S["kwargs"], T> : []),
];
type Mapped<A extends readonly Argument[], T> = { -readonly [I in keyof A]: Kinds<T>[KindOf<A[I]>] };

/** Arguments of every op, positional then keyword-only; T stands for a tensor. */
export type OpArguments<T> = { [K in OpName]: ArgumentsOf<(typeof schemas)[K], T> };

/** "tensor? bias" -> kind and name. */
export function splitArgument(argument: Argument): { kind: Kind; name: string } {
  const [kind, name] = argument.split(" ") as [Kind, string];
  return { kind, name };
}

const opOfOverload = new Map<string, OpName>(
  (Object.keys(schemas) as OpName[]).map((name) => [schemas[name].overload, name]),
);

/** The op that records this overload, or undefined where a graph may not hold it. */
export const opByOverload = (overload: string): OpName | undefined => opOfOverload.get(overload);
