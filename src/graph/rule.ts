/** What a rule of the op table is, and what all of them are written with. */
import { dimEqual, dimMul, showShape } from "./dims.js";
import type { OpArguments, OpName } from "./schemas.js";
import type { Dim, DType } from "./types.js";
import { isFloating, type TensorMeta } from "./value.js";

/** What a rule reports; the tracer adds model, block and op. */
export class RuleError extends Error {}

/** A tensor that autograd keeps: one of the values at hand, or one of its own. */
export type Saved = TensorMeta | { readonly own: { dtype: DType; shape: readonly Dim[] } };

export interface OpRule<A> {
  infer(args: A): TensorMeta;
  /** Multiplications and additions of the forward, for a backward's estimate of twice as much. */
  flops(args: A, out: TensorMeta): Dim;
  /** What stays until backward; parameters among it cost nothing more. */
  saved(args: A, out: TensorMeta): readonly Saved[];
  /** The result shares memory with the first tensor (always or when it can). */
  readonly view?: true;
}

export type Rules = { readonly [K in OpName]: OpRule<OpArguments<TensorMeta>[K]> };

export const numel = (shape: readonly Dim[]): Dim => dimMul(...shape);

export const describe = (t: TensorMeta): string =>
  `${t.label === undefined ? "" : `${t.label} `}${t.dtype} ${showShape(t.shape)}`;

export function fail(message: string): never {
  throw new RuleError(message);
}

export function axis(t: TensorMeta, dim: number, extra = 0): number {
  const rank = t.shape.length + extra;
  if (!Number.isInteger(dim) || dim < -rank || dim >= rank) fail(`dim ${dim} is not one of ${describe(t)}`);
  return dim < 0 ? dim + rank : dim;
}

export function sameDType(a: TensorMeta, b: TensorMeta, what: string): void {
  if (a.dtype !== b.dtype) fail(`expected ${what} of one dtype, got ${describe(a)} and ${describe(b)}`);
}

export function needFloating(t: TensorMeta): void {
  if (!isFloating(t.dtype)) fail(`expected a floating dtype, got ${describe(t)}`);
}

export function needInteger(t: TensorMeta, what: string): void {
  if (t.dtype !== "int64" && t.dtype !== "int32") fail(`expected ${what} of int64 or int32, got ${describe(t)}`);
}

/** Broadcast of shapes; a dim is stretched only when it is the number 1. */
export function broadcast(tensors: readonly TensorMeta[]): Dim[] {
  const rank = Math.max(...tensors.map((t) => t.shape.length));
  const out: Dim[] = [];
  for (let i = 0; i < rank; i++) {
    let dim: Dim = 1;
    for (const t of tensors) {
      const j = i - (rank - t.shape.length);
      const d = j < 0 ? 1 : t.shape[j]!;
      if (d === 1 || dimEqual(d, dim)) continue;
      if (dim !== 1) fail(`shapes do not broadcast: ${tensors.map(describe).join(" and ")} differ in ${dim} and ${d}`);
      dim = d;
    }
    out.push(dim);
  }
  return out;
}

/** What sums and norms are made in. */
export const wider = (dtype: DType): DType => (dtype === "float64" ? "float64" : "float32");

export const anyGrad = (dtype: DType, ...tensors: (TensorMeta | null)[]): boolean =>
  isFloating(dtype) && tensors.some((t) => t?.grad === true);

export const meta = (dtype: DType, shape: readonly Dim[], ...from: (TensorMeta | null)[]): TensorMeta => ({
  dtype,
  shape,
  grad: anyGrad(dtype, ...from),
});

export const replaced = (shape: readonly Dim[], i: number, d: Dim): Dim[] => shape.map((s, j) => (i === j ? d : s));
export const last = (t: TensorMeta, back = 1): Dim =>
  t.shape[t.shape.length - back] ?? fail(`expected at least ${back} dims, got ${describe(t)}`);
