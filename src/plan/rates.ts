/**
 * What `stroma doctor --measure` found out about a machine beyond its large rates: seconds of each kind of work at a few sizes,
 * and how to read between them. Plain data, stored in the machine's profile.
 */
import type { OpName } from "../graph/schemas.js";

/**
 * Seconds by a count, ascending: constant below the first point (what a call costs at all), linear between points, and on
 * along the last two beyond them.
 */
export type Curve = readonly (readonly [count: number, seconds: number])[];

export function onCurve(curve: Curve, count: number): number {
  const [first, last] = [curve[0]!, curve.at(-1)!];
  if (count <= first[0] || curve.length === 1) return first[1] * (curve.length === 1 ? count / first[0] : 1);
  let i = 1;
  while (i < curve.length - 1 && curve[i]![0] < count) i++;
  const [[x0, y0], [x1, y1]] = [curve[i - 1]!, curve[i]!];
  const slope = Math.max(0, (y1 - y0) / (x1 - x0));
  return count > last[0] ? last[1] + slope * (count - last[0]) : y0 + slope * (count - x0);
}

/**
 * Seconds over a grid of sizes, row-major. Read in the logarithm of everything, so that what is a power of the sizes between
 * its points is exact; beyond the largest size in proportion, below the smallest as at the smallest.
 */
export interface Grid {
  axes: readonly (readonly number[])[];
  seconds: readonly number[];
}

export function onGrid({ axes, seconds }: Grid, sizes: readonly number[]): number {
  let beyond = 1;
  const at = axes.map((axis, a) => {
    const [size, most] = [sizes[a]!, axis.at(-1)!];
    if (size >= most) beyond *= size / most;
    const x = Math.min(Math.max(size, axis[0]!), most);
    let low = 0;
    while (low < axis.length - 2 && axis[low + 1]! <= x) low++;
    if (axis.length === 1) return { low: 0, share: 0 };
    return { low, share: Math.log(x / axis[low]!) / Math.log(axis[low + 1]! / axis[low]!) };
  });
  const mean = (axis: number, offset: number): number => {
    if (axis === axes.length) return Math.log(seconds[offset]!);
    const { low, share } = at[axis]!;
    const next = offset * axes[axis]!.length + low;
    const here = mean(axis + 1, next);
    return share === 0 ? here : here + share * (mean(axis + 1, next + 1) - here);
  };
  return beyond * Math.exp(mean(0, 0));
}

/**
 * A product x [rows, in] W^T [in, out] and its gradients dy W and dy^T x: grids over rows, in, out, and the bytes that pass
 * between two uses of one weight, in which it leaves the caches.
 */
export interface ProductRates {
  forward: Grid;
  inputGradient: Grid;
  weightGradient: Grid;
}

/**
 * One operator by elements of its largest tensor, fp32. Backward: of one input, of all where one kernel makes them; 0 where
 * nothing is derived.
 */
export interface OperatorRates {
  forward: Curve;
  /** Seconds more where autograd notes the call down. */
  recorded: number;
  backward: Curve;
}

/** Operators that have a curve of their own, and sums over rows ("sum leading"; "sum" is along them). */
export const MEASURED_OPS = [
  "add",
  "mul",
  "div",
  "addScalar",
  "mulScalar",
  "powScalar",
  "neg",
  "exp",
  "cos",
  "tanh",
  "rsqrt",
  "reciprocal",
  "relu",
  "silu",
  "gelu",
  "siluMul",
  "rotate",
  "softmax",
  "layerNorm",
  "rmsNorm",
  "sum",
  "cumsum",
  "to",
  "view",
  "slice",
  "cat",
  "where",
  "eq",
  "logicalAnd",
  "newOnes",
  "embedding",
  "dropout",
] as const satisfies readonly OpName[];
export type MeasuredOp = (typeof MEASURED_OPS)[number] | "sum leading";

export interface MeasuredRates {
  products: { float32: ProductRates; bfloat16: ProductRates; float64: ProductRates };
  operators: Record<MeasuredOp, OperatorRates>;
  /** Of one head of one row of the batch: grids over tokens and head dim. */
  attention: Record<"causal" | "masked", { forward: Grid; backward: Grid }>;
  /** By logits at hand: log-softmax, loss, and the gradient of the logits; without the products. */
  logits: { forward: Curve; gradient: Curve };
  /** By elements of the table (zeros), and of the rows that are added into it. */
  embeddingGradient: { table: Curve; rows: Curve };
  /** By elements of both operands that pass through memory over and over: from caches to memory. */
  add: Curve;
  copy: Curve;
  norm: Curve;
  /** fp32 -> bfloat16, and back. */
  narrow: Curve;
  widen: Curve;
  quantize: Curve;
  dequantize: Curve;
  /** By "storage masterWeight optimizer" and elements; state that lies in memory. */
  update: Record<string, Curve>;
}

export const formatKey = (f: { storage: string; masterWeight: string; optimizer: string }): string =>
  `${f.storage} ${f.masterWeight} ${f.optimizer}`;
