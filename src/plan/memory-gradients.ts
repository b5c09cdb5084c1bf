/**
 * What libtorch allocates while it differentiates an op: one row for each op a graph may hold, from the formulas of
 * tools/autograd/derivatives.yaml and FunctionsManual.cpp (2.13). A missing row is a type error.
 */
import type { OpName } from "../graph/schemas.js";
import { sequenceCall } from "./context.js";
import type { SizedCall, SizedValue } from "./cost-calls.js";

/** The gradient of one tensor argument. */
export interface Gradient {
  to: SizedValue;
  /** Bytes before it is reduced to the argument's shape; null: a view of the gradient that came in. */
  raw: number | null;
  /** Temporaries beside it while it is computed. */
  temporary: number;
}

export type MemoryDevice = "cpu" | "cuda";
type Row = (call: SizedCall, device: MemoryDevice) => Gradient[];

const full = (call: SizedCall, to: SizedValue | null | undefined, temporaries = 0): Gradient[] =>
  to?.grad ? [{ to, raw: call.out.bytes, temporary: temporaries * call.out.bytes }] : [];
const own = (to: SizedValue | null | undefined, temporary = 0): Gradient[] =>
  to?.grad ? [{ to, raw: to.bytes, temporary }] : [];
const shared = (to: SizedValue | null | undefined): Gradient[] => (to?.grad ? [{ to, raw: null, temporary: 0 }] : []);

/** A new tensor of the result's shape and so many temporaries of that size. */
const unary =
  (temporaries = 0): Row =>
  (call) =>
    full(call, call.tensors[0], temporaries);
const view: Row = (call) => shared(call.tensors[0]);
const selfSized: Row = (call) => own(call.tensors[0]);
const none: Row = () => [];
const passed: Row = (call) => call.tensors.flatMap((t) => (t.dtype === call.out.dtype ? shared(t) : full(call, t)));

/** tensors[i] of an argument that may be null. */
const argument = (call: SizedCall, i: number): SizedValue | null => call.args[i] as SizedValue | null;

export const gradients: Readonly<Record<OpName, Row>> = {
  neg: unary(),
  abs: unary(1),
  exp: unary(),
  log: unary(),
  sqrt: unary(1),
  rsqrt: unary(2),
  reciprocal: unary(2),
  sin: unary(1),
  cos: unary(2),
  tanh: unary(),
  sigmoid: unary(),
  relu: unary(),
  silu: unary(),
  gelu: unary(),
  add: passed,
  sub: (call) => [...passed({ ...call, tensors: call.tensors.slice(0, 1) }, "cpu"), ...full(call, call.tensors[1])],
  mul: (call) => call.tensors.flatMap((t) => full(call, t)),
  div: (call) => [...full(call, call.tensors[0]), ...full(call, call.tensors[1], 2)],
  maximum: (call) => call.tensors.flatMap((t) => full(call, t, 2)),
  minimum: (call) => call.tensors.flatMap((t) => full(call, t, 2)),
  addScalar: view,
  subScalar: view,
  mulScalar: unary(),
  divScalar: unary(),
  powScalar: unary(2),
  scalarPow: unary(1),
  eq: none,
  ne: none,
  lt: none,
  le: none,
  gt: none,
  ge: none,
  eqScalar: none,
  neScalar: none,
  ltScalar: none,
  leScalar: none,
  gtScalar: none,
  geScalar: none,
  logicalAnd: none,
  logicalOr: none,
  logicalNot: none,
  where: (call) => call.tensors.slice(1).flatMap((t) => full(call, t)),
  maskedFill: (call) => full(call, call.tensors[0]),
  to: passed,
  newOnes: none,
  newZeros: none,
  sum: view,
  mean: selfSized,
  amax: (call) => own(call.tensors[0], call.tensors[0]!.bytes),
  cumsum: unary(2),
  softmax: unary(),
  logSoftmax: unary(),
  layerNorm: (call) => [0, 2, 3].flatMap((i) => own(argument(call, i))),
  view,
  reshape: view,
  transpose: view,
  permute: view,
  unsqueeze: view,
  squeeze: view,
  expand: (call) => (call.tensors[0]!.elements === call.out.elements ? view : selfSized)(call, "cpu"),
  // Zeros of the whole, with the gradient copied into its part.
  slice: selfSized,
  select: selfSized,
  contiguous: view,
  cat: passed,
  stack: passed,
  repeatInterleave: selfSized,
  matmul: (call) => call.tensors.flatMap((t) => own(t)),
  linear: (call) => call.tensors.flatMap((t) => own(t)),
  embedding: (call) => own(call.tensors[0]),
  indexSelect: selfSized,
  scaledDotProductAttention: (call, device) => {
    const [q, k, v] = call.tensors as [SizedValue, SizedValue, SizedValue];
    const [batch, heads, rows, headDim] = q.shape as [number, number, number, number];
    // FlashAttention 2: gradients of queries are summed in fp32, those of a group's keys and values before they are added.
    const padded = Math.ceil(rows / 128) * 128;
    const sums = batch * heads * padded * (Math.ceil(headDim / 32) * 32 + 1) * 4;
    const expanded = heads === k.shape[1] ? 0 : (2 * k.bytes * heads) / k.shape[1]!;
    const temporary = device === "cuda" ? sums + expanded : 0;
    return [...own(k), ...own(v), ...own(q, temporary)];
  },
  // Two blocks of keys and values on their way, three of their gradients' sums, wide; the queries' sum, where it is wider.
  ringAttention: (call) => {
    const [q, k, v] = call.tensors as [SizedValue, SizedValue, SizedValue];
    const wide = wideBytes(q);
    const sums = 3 * wide * (k.elements + v.elements) + (wide * q.elements > q.bytes ? wide * q.elements : 0);
    return [...own(k), ...own(v), ...own(q, 2 * (k.bytes + v.bytes) + sums)];
  },
  // The gradients of whole rows, and each again as it comes back in parts.
  allToAllAttention: (call) => {
    const [q, k, v] = call.tensors as [SizedValue, SizedValue, SizedValue];
    return [...own(k, k.bytes), ...own(v, v.bytes), ...own(q, 2 * q.bytes)];
  },
  // Made in the forward and held: handed over as they are.
  crossEntropyHead: (call) => [0, 1, 2].flatMap((i) => shared(argument(call, i))),
  rmsNorm: (call, device) => {
    const [x, weight] = call.tensors as [SizedValue, SizedValue];
    // ATen's operators hand out a gradient of what is not rounded in two parts (native/kernels/rms_norm.cc).
    const parts = device === "cpu" && !isNarrow(x) ? own(x) : [];
    return [...own(weight), ...own(x, normBackward(x, device)), ...parts];
  },
  rotaryTable: none,
  rotate: unary(),
  siluMul: (call) => call.tensors.flatMap((t) => own(t)),
  dropout: unary(),
};

// A norm's temporaries: on the CPU ATen's operators, statement by statement (native/kernels/rms_norm.cc).

/** A number for each row. */
const rowBytes = (x: SizedValue): number => (x.elements / Math.max(1, x.shape.at(-1)!)) * wideBytes(x);

/** Of a narrow x two wide copies of two x each, less the result, whose place is not there yet. */
function normForward(x: SizedValue, grad: boolean, device: MemoryDevice): number {
  const copies = device === "cpu" && isNarrow(x) ? 3 * x.bytes : 0;
  return copies + (grad ? 0 : rowBytes(x));
}

/** Of a narrow x three wide copies less the result; else a product. A card has the weight's sums over chunks of rows. */
function normBackward(x: SizedValue, device: MemoryDevice): number {
  if (device === "cpu") return (isNarrow(x) ? 5 : 1) * x.bytes + rowBytes(x);
  const width = x.shape.at(-1)!;
  const rows = x.elements / Math.max(1, width);
  return Math.ceil(rows / Math.max(64, Math.ceil(rows / 256))) * width * wideBytes(x);
}

const isNarrow = (t: SizedValue): boolean => t.bytes < t.elements * 4;
/** Of the dtype that sums are made in. */
const wideBytes = (t: SizedValue): number => (t.dtype === "float64" ? 8 : 4);

/** Attention makes a bool mask additive, in the queries' dtype, and saves that one. */
export function additiveMask(call: SizedCall): { of: number; bytes: number } | null {
  if (call.op !== "scaledDotProductAttention") return null;
  const mask = argument(call, 3);
  const q = call.tensors[0]!;
  return mask?.dtype === "bool" ? { of: mask.id, bytes: (mask.elements * q.bytes) / q.elements } : null;
}

/** Temporaries of an op's forward that are gone when it returns, beside its result and what it saves. */
export function forwardTemporary(call: SizedCall, grad: boolean, device: MemoryDevice): number {
  switch (call.op) {
    case "crossEntropyHead":
      return headTemporary(call, grad, device);
    case "scaledDotProductAttention": {
      const q = call.tensors[0]!;
      const logsumexp = grad ? 0 : (q.elements / q.shape[3]!) * 4;
      return logsumexp + (grad ? 0 : (additiveMask(call)?.bytes ?? 0));
    }
    case "dropout":
      return call.out.bytes;
    case "rmsNorm":
      return normForward(call.tensors[0]!, grad, device);
    case "rotaryTable":
      return device === "cpu" ? call.out.elements * wideBytes(call.out) : 0;
    case "ringAttention": {
      // Two blocks of keys and values, the result so far, wide, and one block's part of it.
      const [, k, v] = call.tensors as [SizedValue, SizedValue, SizedValue];
      return 2 * (k.bytes + v.bytes) + call.out.elements * wideBytes(call.out) + call.out.bytes;
    }
    case "allToAllAttention": {
      // Parts on their way in and joined, and of the result on its way back; a document mask, bool twice and additive.
      const { shape, ranks } = sequenceCall(call)!;
      const size = call.out.bytes / call.out.elements;
      const row = shape.batch * shape.tokens * size;
      const mask = shape.documents ? shape.batch * (ranks * shape.tokens) ** 2 * (2 + (grad ? 0 : size)) : 0;
      return mask + row * (shape.heads * (shape.headDim + shape.valueDim) + 2 * shape.kvHeads * shape.headDim);
    }
    default:
      return 0;
  }
}

/**
 * Our chunked head, statement by statement (native/kernels/cross_entropy_head.cc): its highest beside the gradients that it
 * returns, which are there from the first chunk's end.
 */
function headTemporary(call: SizedCall, grad: boolean, device: MemoryDevice): number {
  const [x, w] = call.tensors as [SizedValue, SizedValue];
  const [rows, vocabulary] = [x.shape[0]!, w.shape[0]!];
  const chunk = Math.min(rows, call.args[5] as number);
  const each = x.bytes / x.elements;
  const wide = Math.max(4, each);
  const widened = each < 4;
  const logits = chunk * vocabulary;
  // logits, their fp32 copy and log-probabilities.
  const forward = logits * (each + wide + (widened ? wide : 0));
  if (!grad) return forward;
  // log-probabilities, the loss's gradient and the softmax's.
  const softmax = Math.max(forward, 3 * logits * wide);
  const held = call.savedOwnBytes.reduce((sum, n) => sum + n, 0);
  const narrowed = widened ? logits * (wide + each) : 0;
  const product = logits * (widened ? each : wide);
  if (rows <= chunk) return Math.max(softmax - held, narrowed - held, product);
  // At the last chunk's softmax its own dx is not there yet; then it makes a weight gradient that is added to the sum, and
  // the chunks of dx are joined.
  const ahead = x.grad ? (x.bytes * (rows % chunk || chunk)) / rows : 0;
  // A narrow weight's gradient is summed in float32, and only rounded at the end. A CPU widens each term before it adds.
  const sum = w.grad && widened ? w.elements * wide : 0;
  const wider = Math.max(0, sum - w.bytes);
  const term = product + (w.grad ? w.bytes : 0) + (device === "cpu" ? sum : 0);
  return Math.max(Math.max(softmax, narrowed) - ahead + wider, term + wider, x.grad ? x.bytes : 0);
}
