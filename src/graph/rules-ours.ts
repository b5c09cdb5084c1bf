/** Rules of our own operators (native/kernels). */
import { ranksOfGroup } from "./context.js";
import { dimAdd, dimDivideExactly, dimEqual, dimMul, shapeEqual, showShape } from "./dims.js";
import {
  describe,
  fail,
  last,
  meta,
  needFloating,
  type OpRule,
  type Rules,
  type Saved,
  sameDType,
  wider,
} from "./rule.js";
import type { OpArguments } from "./schemas.js";
import type { Dim } from "./types.js";
import { isFloating, type TensorMeta } from "./value.js";

// ---- attention over ranks: [B, heads, t, head dim], t tokens of R t

const logsumexp = (q: TensorMeta): Saved => ({
  own: { dtype: wider(q.dtype), shape: q.shape.slice(0, 3) },
});

const ranksOf = (group: string): number =>
  ranksOfGroup(group) ?? fail(`expected a group of ranks "context:R", got "${group}"`);

/** How often each key/value head stands, so that R divides them. */
function copiesOfHeads(heads: Dim, ranks: number): number {
  if (typeof heads !== "number") return 1;
  let copies = 1;
  while ((heads * copies) % ranks !== 0) copies++;
  return copies;
}

type OverRanks = OpArguments<TensorMeta>["ringAttention"];

function overRanks(
  check: (q: TensorMeta, ranks: number) => void,
  saved: (args: OverRanks, out: TensorMeta) => Saved[],
): OpRule<OverRanks> {
  return {
    infer: ([q, k, v, documents, , , group]) => {
      sameDType(q, k, "query and key");
      sameDType(q, v, "query and value");
      needFloating(q);
      for (const t of [q, k, v]) if (t.shape.length !== 4) fail(`expected [B, heads, t, head dim], got ${describe(t)}`);
      const [qs, ks, vs] = [q.shape, k.shape, v.shape];
      if (!shapeEqual([qs[0]!, ...qs.slice(2)], [ks[0]!, ...ks.slice(2)]))
        fail(`expected keys of the query's own tokens, got ${describe(q)} and ${describe(k)}`);
      if (!shapeEqual(ks.slice(0, 3), vs.slice(0, 3))) fail(`key ${describe(k)} and value ${describe(v)} do not match`);
      if (dimDivideExactly(qs[1]!, ks[1]!) === null)
        fail(`expected query heads to be a multiple of the key heads, got ${describe(q)} and ${describe(k)}`);
      if (documents !== null && (documents.dtype !== "int64" || !shapeEqual(documents.shape, [qs[0]!, qs[2]!])))
        fail(`expected document ids int64 ${showShape([qs[0]!, qs[2]!])}, got ${describe(documents)}`);
      check(q, ranksOf(group));
      return meta(q.dtype, [...qs.slice(0, 3), vs[3]!], q, k, v);
    },
    // The rank's own queries against the keys of all; causal, half of the pairs on every rank (the zigzag).
    flops: ([q, k, v, , causal, , group]) => {
      const pairs = dimMul(...q.shape.slice(0, 3), k.shape[2]!, ranksOf(group));
      const all = dimMul(2, pairs, dimAdd(q.shape[3]!, v.shape[3]!));
      return causal ? (dimDivideExactly(all, 2) ?? all) : all;
    },
    saved: (args, out) => (out.grad ? saved(args, out) : []),
  };
}

export const ours = {
  crossEntropyHead: {
    infer: ([x, w, bias, labels, scale, chunk]) => {
      sameDType(x, w, "input and weight");
      if (x.shape.length !== 2 || w.shape.length !== 2 || !dimEqual(x.shape[1]!, w.shape[1]!)) {
        fail(`expected input [N, D] and weight [V, D], got ${describe(x)} and ${describe(w)}`);
      }
      if (bias !== null && !shapeEqual(bias.shape, [w.shape[0]!]))
        fail(`expected a bias of [${w.shape[0]}], got ${describe(bias)}`);
      if (labels.dtype !== "int64" || !shapeEqual(labels.shape, [x.shape[0]!])) {
        fail(`expected labels int64 [${x.shape[0]}], got ${describe(labels)}`);
      }
      if ((scale.dtype !== "float32" && scale.dtype !== "float64") || scale.shape.length !== 0)
        fail(`expected a float32 or float64 scalar as scale, got ${describe(scale)}`);
      if (!Number.isInteger(chunk) || chunk < 1) fail(`expected a chunk of at least 1 row, got ${chunk}`);
      // Summed in at least float32, in float64 where the model computes in it.
      return meta(wider(x.dtype), [], x, w, bias);
    },
    flops: ([x, w]) => dimMul(dimAdd(dimMul(2, x.shape[1]!), 5), x.shape[0]!, w.shape[0]!),
    // The gradients are made chunk by chunk during the forward and held.
    saved: ([x, w, bias], out) =>
      out.grad
        ? [x, w, ...(bias === null ? [] : [bias])]
            .filter((t) => t.grad)
            .map((t) => ({ own: { dtype: t.dtype, shape: t.shape } }))
        : [],
  },
  // Nothing but what autograd holds anyhow; the blocks of other ranks come by again in the backward.
  ringAttention: overRanks(
    () => {},
    ([q, k, v, documents], out) => [q, k, v, out, ...(documents === null ? [] : [documents]), logsumexp(q)],
  ),
  allToAllAttention: overRanks(
    (q, ranks) => {
      if (dimDivideExactly(q.shape[1]!, ranks) === null)
        fail(`expected query heads to be a multiple of the ${ranks} ranks, got ${describe(q)}: use "ring"`);
    },
    // Whole rows of N / R heads: as many elements as q has; keys and values as often as R does not divide their heads.
    ([q, k, v, documents, , , group], out) => {
      const ranks = ranksOf(group);
      const own = (t: TensorMeta, copies = 1): Saved => ({ own: { dtype: q.dtype, shape: [copies, ...t.shape] } });
      const copies = copiesOfHeads(k.shape[1]!, ranks);
      const T = dimMul(ranks, q.shape[2]!);
      // As attention saves it: additive.
      const mask: Saved = { own: { dtype: q.dtype, shape: [q.shape[0]!, T, T] } };
      return [own(q), own(k, copies), own(v, copies), own(out), ...(documents === null ? [] : [mask]), logsumexp(q)];
    },
  ),
  rmsNorm: {
    infer: ([x, w]) => {
      needFloating(x);
      sameDType(x, w, "input and weight");
      if (!shapeEqual(w.shape, [last(x)])) fail(`expected a weight of [${last(x)}], got ${describe(w)}`);
      return meta(x.dtype, x.shape, x, w);
    },
    flops: (_, out) => dimMul(5, ...out.shape),
    // The reciprocal root of each row.
    saved: ([x, w], out) =>
      out.grad ? [x, w, { own: { dtype: wider(x.dtype), shape: [...x.shape.slice(0, -1), 1] } }] : [],
  },
  rotaryTable: {
    infer: ([positions, headDim, theta, factor, low, high, original, dtype]) => {
      if (positions.dtype !== "int64" || positions.shape.length !== 2)
        fail(`expected positions int64 [B, T], got ${describe(positions)}`);
      if (!Number.isInteger(headDim) || headDim < 2 || headDim % 2 !== 0)
        fail(`expected an even head dim, got ${headDim}`);
      if (!(theta > 0)) fail(`expected theta above 0, got ${theta}`);
      const scaling = [factor, low, high, original];
      if (scaling.some((s) => (s === null) !== (factor === null)) || scaling.some((s) => s !== null && !(s > 0)))
        fail(`expected four numbers above 0 that scale the frequencies, or none, got ${scaling.join(", ")}`);
      if (!isFloating(dtype)) fail(`expected a floating dtype, got ${dtype}`);
      return meta(dtype, [...positions.shape, headDim]);
    },
    flops: (_, out) => dimMul(2, ...out.shape),
    saved: () => [],
  },
  rotate: {
    infer: ([x, table]) => {
      needFloating(x);
      sameDType(x, table, "input and table");
      if (x.shape.length !== 4) fail(`expected [B, heads, T, head dim], got ${describe(x)}`);
      const [B, , T, H] = x.shape as [Dim, Dim, Dim, Dim];
      if (dimDivideExactly(H, 2) === null) fail(`expected an even head dim, got ${describe(x)}`);
      if (!shapeEqual(table.shape, [B, T, H]))
        fail(`expected a table of ${showShape([B, T, H])}, got ${describe(table)}`);
      if (table.grad) fail(`expected a table without a gradient, got ${describe(table)}`);
      return meta(x.dtype, x.shape, x);
    },
    flops: (_, out) => dimMul(3, ...out.shape),
    saved: ([, table], out) => (out.grad ? [table] : []),
  },
  siluMul: {
    infer: ([gate, up]) => {
      needFloating(gate);
      sameDType(gate, up, "gate and up");
      if (!shapeEqual(gate.shape, up.shape))
        fail(`expected gate and up of one shape, got ${describe(gate)} and ${describe(up)}`);
      return meta(gate.dtype, gate.shape, gate, up);
    },
    flops: (_, out) => dimMul(6, ...out.shape),
    saved: ([gate, up], out) => (out.grad ? [gate, up] : []),
  },
  dropout: {
    infer: ([x, p, key, site]) => {
      needFloating(x);
      if (!(p >= 0 && p < 1)) fail(`expected a dropout probability in [0, 1), got ${p}`);
      if (key.dtype !== "int64" || !shapeEqual(key.shape, [4])) fail(`expected a key int64 [4], got ${describe(key)}`);
      if (!Number.isInteger(site) || site < 0) fail(`expected a site index, got ${site}`);
      return meta(x.dtype, x.shape, x);
    },
    flops: (_, out) => dimMul(2, ...out.shape),
    // Drawn again in the backward from the key.
    saved: ([, , key], out) => (out.grad ? [key] : []),
  },
} satisfies Partial<Rules>;
