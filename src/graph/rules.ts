/**
 * One rule for each op that a graph may hold: the shape and dtype it returns, the floating-point operations it takes
 * and what autograd holds of it until backward. A missing rule is a type error.
 */

import { dimAdd, dimDivideExactly, dimEqual, dimFloorDiv, dimMul, dimSub, shapeEqual, showShape } from "./dims.js";
import {
  axis,
  broadcast,
  describe,
  fail,
  last,
  meta,
  needFloating,
  needInteger,
  numel,
  type OpRule,
  type Rules,
  replaced,
  sameDType,
} from "./rule.js";
import { ours } from "./rules-ours.js";
import type { Dim, DType } from "./types.js";
import { isFloating, promote, type TensorMeta } from "./value.js";

// ---- elementwise

/** keeps: what the derivative needs. Integers become float32 where the function is not closed over them. */
function unary(cost: number, keeps: "self" | "result" | "none", float = true): OpRule<[TensorMeta]> {
  return {
    infer: ([x]) => meta(float && !isFloating(x.dtype) ? "float32" : x.dtype, x.shape, x),
    flops: (_, out) => dimMul(cost, ...out.shape),
    saved: ([x], out) => (!out.grad || keeps === "none" ? [] : [keeps === "self" ? x : out]),
  };
}

/** The dtype of a tensor without dims gives way to one with dims of the same kind, as in PyTorch. */
function resultType(tensors: readonly TensorMeta[]): DType {
  const kind = (d: DType) => (d === "bool" ? 0 : isFloating(d) ? 2 : 1);
  const of = (list: readonly TensorMeta[]) => list.map((t) => t.dtype).reduce(promote);
  const dimensioned = tensors.filter((t) => t.shape.length > 0);
  if (dimensioned.length === 0 || dimensioned.length === tensors.length) return of(tensors);
  const main = of(dimensioned);
  const rest = of(tensors.filter((t) => t.shape.length === 0));
  return kind(rest) > kind(main) ? rest : main;
}

function binary(keeps: readonly ("self" | "other" | "result")[], division = false): OpRule<[TensorMeta, TensorMeta]> {
  return {
    infer: ([a, b]) => {
      const common = resultType([a, b]);
      return meta(division && !isFloating(common) ? "float32" : common, broadcast([a, b]), a, b);
    },
    flops: (_, out) => numel(out.shape),
    saved: ([a, b], out) => {
      if (!out.grad) return [];
      // d(ab)/da needs b, d(ab)/db needs a.
      return keeps.flatMap((k) => (k === "self" ? (b.grad ? [a] : []) : k === "other" ? (a.grad ? [b] : []) : [out]));
    },
  };
}

function compare(): OpRule<[TensorMeta, TensorMeta]> {
  return {
    infer: ([a, b]) => meta("bool", broadcast([a, b])),
    flops: (_, out) => numel(out.shape),
    saved: () => [],
  };
}

function compareScalar(): OpRule<[TensorMeta, number]> {
  return { infer: ([a]) => meta("bool", a.shape), flops: (_, out) => numel(out.shape), saved: () => [] };
}

function scalarArithmetic(division = false): OpRule<[TensorMeta, number]> {
  return {
    infer: ([a, s]) => {
      const float = !isFloating(a.dtype) && (division || !Number.isInteger(s));
      return meta(float ? "float32" : a.dtype === "bool" ? "int64" : a.dtype, a.shape, a);
    },
    flops: (_, out) => numel(out.shape),
    saved: () => [],
  };
}

// ---- views

const free = { flops: () => 0, saved: () => [] } as const;

/** Resolves one -1 of a view's size and checks the count of elements. */
function viewed(t: TensorMeta, size: readonly Dim[]): Dim[] {
  const total = numel(t.shape);
  const open = size.indexOf(-1);
  if (open < 0) {
    if (!dimEqual(numel(size), total)) {
      fail(`cannot view ${describe(t)} as ${showShape(size)}: ${total} against ${numel(size)} elements`);
    }
    return [...size];
  }
  if (size.indexOf(-1, open + 1) >= 0) fail(`${showShape(size)} leaves more than one size open`);
  const rest = dimDivideExactly(total, numel(size.filter((_, i) => i !== open)));
  if (rest === null) fail(`cannot view ${describe(t)} as ${showShape(size)}: it does not come out even`);
  return size.map((d, i) => (i === open ? rest : d));
}

function sliced(length: Dim, start: Dim | null, end: Dim | null, step: Dim): Dim {
  if (typeof step !== "number" || step < 1) fail(`expected a slice step of at least 1, got ${step}`);
  const bound = (at: Dim): Dim => (typeof at === "number" && at < 0 ? dimAdd(length, at) : at);
  const from = bound(start ?? 0);
  let to = bound(end ?? length);
  if (typeof to === "number" && typeof length === "number") to = Math.min(to, length);
  const span = dimSub(to, from);
  if (typeof span === "number") return Math.max(0, Math.ceil(span / step));
  return step === 1 ? span : dimFloorDiv(dimAdd(span, step - 1), step);
}

function reduced(t: TensorMeta, dims: readonly number[], keepdim: boolean): Dim[] {
  const gone = new Set((dims.length === 0 ? t.shape.map((_, i) => i) : dims).map((d) => axis(t, d)));
  return t.shape.flatMap((d, i) => (gone.has(i) ? (keepdim ? [1] : []) : [d]));
}

function softmaxRule(): OpRule<[TensorMeta, number, DType | null]> {
  return {
    infer: ([x, dim, dtype]) => {
      axis(x, dim);
      const out = dtype ?? x.dtype;
      if (!isFloating(out)) fail(`expected a floating dtype, got ${describe(x)}`);
      return meta(out, x.shape, x);
    },
    flops: (_, out) => dimMul(5, ...out.shape),
    saved: (_, out) => (out.grad ? [out] : []),
  };
}

const elementwise = {
  neg: unary(1, "none", false),
  abs: unary(1, "self", false),
  exp: unary(1, "result"),
  log: unary(1, "self"),
  sqrt: unary(1, "result"),
  rsqrt: unary(1, "result"),
  reciprocal: unary(1, "result"),
  sin: unary(1, "self"),
  cos: unary(1, "self"),
  tanh: unary(1, "result"),
  sigmoid: unary(1, "result"),
  relu: unary(1, "result", false),
  silu: unary(5, "self"),
  gelu: {
    infer: ([x, approximate]) => {
      if (approximate !== "none" && approximate !== "tanh")
        fail(`expected approximate "none" or "tanh", got ${approximate}`);
      needFloating(x);
      return meta(x.dtype, x.shape, x);
    },
    flops: (_, out) => dimMul(8, ...out.shape),
    saved: ([x], out) => (out.grad ? [x] : []),
  },
  add: binary([]),
  sub: binary([]),
  mul: binary(["self", "other"]),
  div: {
    ...binary([], true),
    saved: ([a, b], out) => (!out.grad ? [] : b.grad ? [a, b] : [b]),
  },
  maximum: { ...binary([]), saved: ([a, b], out) => (out.grad ? [a, b] : []) },
  minimum: { ...binary([]), saved: ([a, b], out) => (out.grad ? [a, b] : []) },
  addScalar: scalarArithmetic(),
  subScalar: scalarArithmetic(),
  mulScalar: scalarArithmetic(),
  divScalar: scalarArithmetic(true),
  powScalar: {
    ...scalarArithmetic(),
    flops: (_, out) => numel(out.shape),
    saved: ([x], out) => (out.grad ? [x] : []),
  },
  scalarPow: {
    infer: ([, x]) => meta(isFloating(x.dtype) ? x.dtype : "float32", x.shape, x),
    flops: (_, out) => numel(out.shape),
    saved: (_, out) => (out.grad ? [out] : []),
  },
  eq: compare(),
  ne: compare(),
  lt: compare(),
  le: compare(),
  gt: compare(),
  ge: compare(),
  eqScalar: compareScalar(),
  neScalar: compareScalar(),
  ltScalar: compareScalar(),
  leScalar: compareScalar(),
  gtScalar: compareScalar(),
  geScalar: compareScalar(),
  logicalAnd: compare(),
  logicalOr: compare(),
  logicalNot: { infer: ([x]) => meta("bool", x.shape), flops: (_, out) => numel(out.shape), saved: () => [] },
  where: {
    infer: ([c, a, b]) => {
      if (c.dtype !== "bool") fail(`expected a bool condition, got ${describe(c)}`);
      return meta(resultType([a, b]), broadcast([c, a, b]), a, b);
    },
    flops: (_, out) => numel(out.shape),
    saved: ([c], out) => (out.grad ? [c] : []),
  },
  maskedFill: {
    infer: ([x, mask]) => {
      if (mask.dtype !== "bool") fail(`expected a bool mask, got ${describe(mask)}`);
      return meta(x.dtype, broadcast([x, mask]), x);
    },
    flops: (_, out) => numel(out.shape),
    saved: ([, mask], out) => (out.grad ? [mask] : []),
  },
  to: {
    infer: ([x, dtype]) => meta(dtype, x.shape, x),
    ...free,
    view: true,
  },
  newOnes: { infer: ([x, size, dtype]) => meta(dtype ?? x.dtype, size), ...free },
  newZeros: { infer: ([x, size, dtype]) => meta(dtype ?? x.dtype, size), ...free },
} satisfies Partial<Rules>;

const reductions = {
  sum: {
    infer: ([x, dims, keepdim, dtype]) =>
      meta(dtype ?? (isFloating(x.dtype) ? x.dtype : "int64"), reduced(x, dims, keepdim), x),
    flops: ([x]) => numel(x.shape),
    saved: () => [],
  },
  mean: {
    infer: ([x, dims, keepdim, dtype]) => {
      const out = dtype ?? x.dtype;
      if (!isFloating(out)) fail(`expected a floating dtype, got ${describe(x)}`);
      return meta(out, reduced(x, dims, keepdim), x);
    },
    flops: ([x]) => numel(x.shape),
    saved: () => [],
  },
  amax: {
    infer: ([x, dims, keepdim]) => meta(x.dtype, reduced(x, dims, keepdim), x),
    flops: ([x]) => numel(x.shape),
    saved: ([x], out) => (out.grad ? [x, out] : []),
  },
  cumsum: {
    infer: ([x, dim]) => {
      axis(x, dim);
      return meta(isFloating(x.dtype) ? x.dtype : "int64", x.shape, x);
    },
    flops: ([x]) => numel(x.shape),
    saved: () => [],
  },
  softmax: softmaxRule(),
  logSoftmax: softmaxRule(),
  layerNorm: {
    infer: ([x, normalized, w, b]) => {
      needFloating(x);
      if (!shapeEqual(x.shape.slice(x.shape.length - normalized.length), normalized)) {
        fail(`expected the last dims to be ${showShape(normalized)}, got ${describe(x)}`);
      }
      for (const p of [w, b]) {
        if (p !== null && !shapeEqual(p.shape, normalized))
          fail(`expected ${showShape(normalized)}, got ${describe(p)}`);
      }
      return meta(x.dtype, x.shape, x, w, b);
    },
    flops: (_, out) => dimMul(8, ...out.shape),
    saved: ([x, normalized], out) => {
      if (!out.grad) return [];
      const rows = [...x.shape.slice(0, x.shape.length - normalized.length)];
      return [x, { own: { dtype: "float32", shape: [2, ...rows] } }];
    },
  },
} satisfies Partial<Rules>;

const views = {
  view: { infer: ([x, size]) => meta(x.dtype, viewed(x, size), x), ...free, view: true },
  reshape: { infer: ([x, size]) => meta(x.dtype, viewed(x, size), x), ...free, view: true },
  transpose: {
    infer: ([x, a, b]) => {
      const [i, j] = [axis(x, a), axis(x, b)];
      return meta(x.dtype, replaced(replaced(x.shape, i, x.shape[j]!), j, x.shape[i]!), x);
    },
    ...free,
    view: true,
  },
  permute: {
    infer: ([x, dims]) => {
      const order = dims.map((d) => axis(x, d));
      if (order.length !== x.shape.length || new Set(order).size !== order.length) {
        fail(`[${dims.join(", ")}] is not an order of the dims of ${describe(x)}`);
      }
      return meta(
        x.dtype,
        order.map((d) => x.shape[d]!),
        x,
      );
    },
    ...free,
    view: true,
  },
  unsqueeze: {
    infer: ([x, dim]) => meta(x.dtype, x.shape.toSpliced(axis(x, dim, 1), 0, 1), x),
    ...free,
    view: true,
  },
  squeeze: {
    infer: ([x, dim]) => {
      const i = axis(x, dim);
      if (x.shape[i] !== 1) fail(`expected dim ${dim} to be 1, got ${describe(x)}`);
      return meta(x.dtype, x.shape.toSpliced(i, 1), x);
    },
    ...free,
    view: true,
  },
  expand: {
    infer: ([x, size]) => {
      const extra = size.length - x.shape.length;
      if (extra < 0) fail(`cannot expand ${describe(x)} to ${showShape(size)}`);
      const out = size.map((d, i) => {
        const from = i < extra ? 1 : x.shape[i - extra]!;
        if (d === -1) return from;
        if (from !== 1 && !dimEqual(from, d))
          fail(`cannot expand ${describe(x)} to ${showShape(size)}: ${from} is not 1`);
        return d;
      });
      return meta(x.dtype, out, x);
    },
    ...free,
    view: true,
  },
  slice: {
    infer: ([x, dim, start, end, step]) => {
      const i = axis(x, dim);
      return meta(x.dtype, replaced(x.shape, i, sliced(x.shape[i]!, start, end, step)), x);
    },
    ...free,
    view: true,
  },
  select: {
    infer: ([x, dim, index]) => {
      const i = axis(x, dim);
      const length = x.shape[i]!;
      if (typeof index === "number" && typeof length === "number" && (index >= length || index < -length)) {
        fail(`index ${index} is out of dim ${dim} of ${describe(x)}`);
      }
      return meta(x.dtype, x.shape.toSpliced(i, 1), x);
    },
    ...free,
    view: true,
  },
  contiguous: { infer: ([x]) => meta(x.dtype, x.shape, x), ...free, view: true },
  cat: {
    infer: ([tensors, dim]) => {
      const first = tensors[0] ?? fail("expected at least one tensor");
      const i = axis(first, dim);
      let length: Dim = 0;
      for (const t of tensors) {
        if (
          t.shape.length !== first.shape.length ||
          !shapeEqual(replaced(t.shape, i, 0), replaced(first.shape, i, 0))
        ) {
          fail(`expected equal dims but for dim ${dim}, got ${describe(first)} and ${describe(t)}`);
        }
        length = dimAdd(length, t.shape[i]!);
      }
      return meta(tensors.map((t) => t.dtype).reduce(promote), replaced(first.shape, i, length), ...tensors);
    },
    ...free,
  },
  stack: {
    infer: ([tensors, dim]) => {
      const first = tensors[0] ?? fail("expected at least one tensor");
      for (const t of tensors) {
        if (!shapeEqual(t.shape, first.shape)) fail(`expected equal shapes, got ${describe(first)} and ${describe(t)}`);
      }
      const dtype = tensors.map((t) => t.dtype).reduce(promote);
      return meta(dtype, first.shape.toSpliced(axis(first, dim, 1), 0, tensors.length), ...tensors);
    },
    ...free,
  },
  repeatInterleave: {
    infer: ([x, repeats, dim]) => {
      const i = axis(x, dim);
      return meta(x.dtype, replaced(x.shape, i, dimMul(x.shape[i]!, repeats)), x);
    },
    ...free,
  },
} satisfies Partial<Rules>;

const products = {
  matmul: {
    infer: ([a, b]) => {
      sameDType(a, b, "factors");
      if (a.shape.length < 2 || b.shape.length < 2)
        fail(`expected at least 2 dims, got ${describe(a)} and ${describe(b)}`);
      if (!dimEqual(last(a), last(b, 2))) fail(`inner sizes differ: ${describe(a)} and ${describe(b)}`);
      const batch = broadcast([
        { ...a, shape: a.shape.slice(0, -2) },
        { ...b, shape: b.shape.slice(0, -2) },
      ]);
      return meta(a.dtype, [...batch, last(a, 2), last(b)], a, b);
    },
    flops: ([a], out) => dimMul(2, last(a), ...out.shape),
    saved: ([a, b], out) => (out.grad ? [...(b.grad ? [a] : []), ...(a.grad ? [b] : [])] : []),
  },
  linear: {
    infer: ([x, w, bias]) => {
      sameDType(x, w, "input and weight");
      if (w.shape.length !== 2) fail(`expected a weight of 2 dims, got ${describe(w)}`);
      if (!dimEqual(last(x), w.shape[1]!)) {
        fail(`expected input [..., ${w.shape[1]}] for ${describe(w)}, got ${describe(x)}`);
      }
      if (bias !== null && !shapeEqual(bias.shape, [w.shape[0]!])) {
        fail(`expected a bias of [${w.shape[0]}], got ${describe(bias)}`);
      }
      return meta(x.dtype, [...x.shape.slice(0, -1), w.shape[0]!], x, w, bias);
    },
    flops: ([x, , bias], out) => dimMul(dimAdd(dimMul(2, last(x)), bias === null ? 0 : 1), ...out.shape),
    saved: ([x, w], out) => (out.grad ? [...(w.grad ? [x] : []), ...(x.grad ? [w] : [])] : []),
  },
  embedding: {
    infer: ([w, ids]) => {
      needInteger(ids, "indices");
      if (w.shape.length !== 2) fail(`expected a weight of 2 dims, got ${describe(w)}`);
      return meta(w.dtype, [...ids.shape, w.shape[1]!], w);
    },
    flops: () => 0,
    saved: ([, ids], out) => (out.grad ? [ids] : []),
  },
  indexSelect: {
    infer: ([x, dim, index]) => {
      needInteger(index, "an index");
      if (index.shape.length !== 1) fail(`expected an index of 1 dim, got ${describe(index)}`);
      return meta(x.dtype, replaced(x.shape, axis(x, dim), index.shape[0]!), x);
    },
    flops: () => 0,
    saved: ([, , index], out) => (out.grad ? [index] : []),
  },
  scaledDotProductAttention: {
    infer: ([q, k, v, mask, dropout, causal, , gqa]) => {
      sameDType(q, k, "query and key");
      sameDType(q, v, "query and value");
      for (const t of [q, k, v]) if (t.shape.length !== 4) fail(`expected [B, heads, T, head dim], got ${describe(t)}`);
      const [qs, ks, vs] = [q.shape, k.shape, v.shape];
      if (!dimEqual(qs[3]!, ks[3]!)) fail(`head dims differ: query ${describe(q)}, key ${describe(k)}`);
      if (!shapeEqual(ks.slice(0, 3), vs.slice(0, 3))) fail(`key ${describe(k)} and value ${describe(v)} do not match`);
      if (!dimEqual(qs[0]!, ks[0]!)) fail(`batches differ: query ${describe(q)}, key ${describe(k)}`);
      const grouped = dimDivideExactly(qs[1]!, ks[1]!);
      if (gqa ? grouped === null : !dimEqual(qs[1]!, ks[1]!)) {
        fail(
          `expected query heads to be ${gqa ? "a multiple of" : ""} the key heads, got ${describe(q)} and ${describe(k)}`,
        );
      }
      if (mask !== null) {
        if (causal) fail("expected a mask or is_causal, got both");
        if (mask.dtype !== "bool" && mask.dtype !== q.dtype)
          fail(`expected a mask of bool or ${q.dtype}, got ${describe(mask)}`);
        const scores: TensorMeta = { dtype: q.dtype, shape: [qs[0]!, qs[1]!, qs[2]!, ks[2]!], grad: false };
        if (!shapeEqual(broadcast([mask, scores]), scores.shape))
          fail(`mask ${describe(mask)} does not fit ${showShape(scores.shape)}`);
      }
      if (dropout !== 0) fail("expected dropout_p 0: it would draw from a global generator; use dropout() instead");
      return meta(q.dtype, [...qs.slice(0, 3), vs[3]!], q, k, v);
    },
    // Two products over every pair of positions; a causal kernel skips half of them.
    flops: ([q, k, v, , , causal]) => {
      const pairs = dimMul(...q.shape.slice(0, 3), k.shape[2]!);
      const all = dimMul(2, pairs, dimAdd(q.shape[3]!, v.shape[3]!));
      return causal ? (dimDivideExactly(all, 2) ?? all) : all;
    },
    saved: ([q, k, v, mask], out) =>
      out.grad
        ? [q, k, v, out, ...(mask === null ? [] : [mask]), { own: { dtype: "float32", shape: q.shape.slice(0, 3) } }]
        : [],
  },
} satisfies Partial<Rules>;

export const rules: Rules = { ...elementwise, ...reductions, ...views, ...products, ...ours };
