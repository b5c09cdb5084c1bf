/**
 * Times of a machine that has been measured: every operator by the curve of its own kind, products by their three sizes,
 * sums and updates by what streams through memory.
 */
import type { OpName } from "../graph/schemas.js";
import type { DType } from "../graph/types.js";
import { dtypeBytes } from "../graph/value.js";
import { sequenceCall, sequenceTraffic, withTransfers } from "./context.js";
import type { SizedCall, SizedProgram, SizedValue } from "./cost-calls.js";
import { type BlockSizes, type Cost, moving, none, plus, type Times } from "./cost-times.js";
import { type MachineProfile, RANK_LINK } from "./profiles.js";
import {
  type Curve,
  formatKey,
  type MEASURED_OPS,
  type MeasuredRates,
  type OperatorRates,
  onCurve,
  onGrid,
  type ProductRates,
} from "./rates.js";
import type { RetainedDType, StateFormat } from "./types.js";

/** Timed by their sizes, not by a curve of elements. */
type Product =
  | "linear"
  | "matmul"
  | "scaledDotProductAttention"
  | "crossEntropyHead"
  | "ringAttention"
  | "allToAllAttention";
type Own = (typeof MEASURED_OPS)[number];
/** What is timed by another op's curve, because the same kind of loop runs. */
const LIKE: Record<Exclude<OpName, Own | Product>, Own> = {
  sub: "add",
  subScalar: "addScalar",
  divScalar: "mulScalar",
  abs: "neg",
  log: "exp",
  sin: "cos",
  sigmoid: "tanh",
  sqrt: "rsqrt",
  scalarPow: "exp",
  maximum: "div",
  minimum: "div",
  ne: "eq",
  lt: "eq",
  le: "eq",
  gt: "eq",
  ge: "eq",
  eqScalar: "eq",
  neScalar: "eq",
  ltScalar: "eq",
  leScalar: "eq",
  gtScalar: "eq",
  geScalar: "eq",
  logicalOr: "logicalAnd",
  logicalNot: "logicalAnd",
  maskedFill: "where",
  newZeros: "newOnes",
  amax: "sum",
  mean: "sum",
  logSoftmax: "softmax",
  reshape: "view",
  transpose: "view",
  permute: "view",
  unsqueeze: "view",
  squeeze: "view",
  expand: "view",
  contiguous: "view",
  select: "slice",
  stack: "cat",
  repeatInterleave: "cat",
  indexSelect: "embedding",
  rotaryTable: "cos",
};

/** One kernel makes the gradients of all inputs. */
const TOGETHER: ReadonlySet<OpName> = new Set(["rmsNorm", "siluMul"]);

export class MeasuredTimes implements Times {
  private readonly products: ProductRates;
  /** Loops over elements are bound by bytes: bfloat16 takes half of what float32 does. */
  private readonly width: number;

  constructor(
    private readonly rates: MeasuredRates,
    private readonly profile: MachineProfile,
    dtype: DType,
  ) {
    this.products = rates.products[dtype === "bfloat16" || dtype === "float64" ? dtype : "float32"];
    this.width = dtypeBytes(dtype) / 4;
  }

  forward(call: SizedCall, recorded: boolean): Cost {
    const { op, out, tensors } = call;
    switch (op) {
      case "linear":
      case "matmul":
        return this.product(call, "forward");
      case "scaledDotProductAttention":
        return { ...this.attention(call, "forward"), flops: call.flops };
      case "ringAttention":
      case "allToAllAttention":
        return { ...this.overRanks(call, "forward"), flops: call.flops };
      case "crossEntropyHead":
        return this.headProducts(call, ["forward"], this.rates.logits.forward);
      case "to":
        if (tensors[0]!.dtype === out.dtype) return { ...none, seconds: this.profile.operatorSeconds };
    }
    const rates = this.operator(call);
    const seconds = onCurve(rates.forward, this.count(call)) + (recorded && out.grad ? rates.recorded : 0);
    return { seconds, memorySeconds: seconds, flops: call.flops };
  }

  backward(call: SizedCall): Cost {
    const { op, out, tensors } = call;
    switch (op) {
      case "linear":
      case "matmul": {
        const [x, weight] = tensors as [SizedValue, SizedValue];
        const bias = op === "linear" ? tensors[2] : undefined;
        return plus(
          x.grad ? this.product(call, "inputGradient") : none,
          weight.grad ? this.product(call, "weightGradient") : none,
          bias?.grad ? moving(onCurve(this.rates.operators["sum leading"].forward, out.elements)) : none,
        );
      }
      case "scaledDotProductAttention":
        return { ...this.attention(call, "backward"), flops: 2 * call.flops };
      case "ringAttention":
      case "allToAllAttention":
        return { ...this.overRanks(call, "backward"), flops: 2 * call.flops };
      case "embedding": {
        const { table, rows } = this.rates.embeddingGradient;
        return moving(onCurve(table, tensors[0]!.elements) + onCurve(rows, out.elements));
      }
      case "to":
        if (tensors[0]!.dtype === out.dtype) return none;
    }
    const count = this.count(call);
    const each = onCurve(this.operator(call).backward, count);
    let seconds = 0;
    const derived = tensors.filter((t) => t.grad);
    for (const t of TOGETHER.has(op) ? derived.slice(0, 1) : derived) {
      seconds += each;
      // What was stretched is summed back: over rows where its last dim was whole, else along them.
      if (broadcasts(call) && t.elements < out.elements)
        seconds += onCurve(
          this.rates.operators[t.shape.at(-1) === out.shape.at(-1) ? "sum leading" : "sum"].forward,
          count,
        );
    }
    return { seconds, memorySeconds: seconds, flops: 2 * call.flops };
  }

  head(call: SizedCall): Cost {
    const { forward, gradient } = this.rates.logits;
    return plus(
      this.headProducts(call, ["forward"], forward),
      this.headProducts(call, ["inputGradient", "weightGradient"], gradient),
    );
  }

  beside({ inputs, calls, values, outputs }: SizedProgram, pass: "forward" | "backward"): Cost {
    const kept = pass === "forward" ? outputs.map((id) => values[id]!) : inputs.filter((i) => i.grad);
    let seconds = kept.reduce((n, v) => n + onCurve(this.rates.copy, v.elements), 0);
    if (pass === "backward") {
      const uses = new Map<SizedValue, number>();
      for (const call of calls)
        if (call.out.grad) for (const t of call.tensors) if (t.grad) uses.set(t, (uses.get(t) ?? 0) + 1);
      const add = this.rates.operators.add.forward;
      for (const [value, n] of uses) seconds += (n - 1) * onCurve(add, value.elements);
    }
    return moving(seconds);
  }

  sum({ used, workingBytes }: BlockSizes, first: boolean): Cost {
    return moving(this.streamed(first ? this.rates.copy : this.rates.add, used, workingBytes));
  }

  cast({ trainable, paramBytes, computeBytes }: BlockSizes): Cost {
    const elements = Math.max(total(trainable), Math.min(paramBytes, computeBytes) / 4);
    return moving(onCurve(paramBytes < computeBytes ? this.rates.widen : this.rates.narrow, elements));
  }

  norm({ trainable, workingBytes }: BlockSizes, uses: number): Cost {
    const { norm, add } = this.rates;
    const sums = Math.max(0, uses - 1) * this.streamed(add, trainable, workingBytes);
    return moving(sums + this.streamed(norm, trainable, workingBytes));
  }

  pack({ trainable, workingBytes }: BlockSizes, dtype: RetainedDType): Cost {
    if (dtype === "float32" || dtype === "float64")
      return moving(this.streamed(this.rates.copy, trainable, workingBytes));
    const curve = dtype === "bfloat16" ? this.rates.narrow : this.rates.quantize;
    return moving(trainable.reduce((n, elements) => n + onCurve(curve, elements), 0));
  }

  update({ trainable }: BlockSizes, state: StateFormat, retained: RetainedDType | null): Cost {
    const curve = this.rates.update[formatKey(state)] ?? this.rates.update["float32 none adamw"]!;
    // Once a step, hence from memory, whatever a tensor's own size.
    const each = curve.at(-1)![1] / curve.at(-1)![0];
    return moving(
      trainable.reduce(
        (n, elements) =>
          n +
          Math.max(elements * each, onCurve(curve, elements)) +
          (retained === "dynamic8" ? onCurve(this.rates.dequantize, elements) : 0),
        0,
      ),
    );
  }

  /** Tensors that come by among so many bytes: each by its share of a stream of that length, and not less than a call. */
  private streamed(curve: Curve, tensors: readonly number[], workingBytes: number): number {
    const count = Math.max(workingBytes / 8, 1);
    const each = onCurve(curve, count) / count;
    return tensors.reduce((n, elements) => n + Math.max(elements * each, onCurve(curve, elements)), 0);
  }

  private product(call: SizedCall, form: keyof ProductRates): Cost {
    const { op, out, tensors } = call;
    const [x, w] = tensors as [SizedValue, SizedValue];
    const columns = out.shape.at(-1) ?? 1;
    const inner = x.shape.at(-1) ?? 1;
    // A stack of products shares nothing; one with a matrix is one product of all rows.
    const stack = op === "matmul" && w.shape.length > 2 ? w.elements / (inner * columns) : 1;
    const rows = out.elements / columns / stack;
    const seconds = stack * this.oneProduct(form, [rows, inner, columns], call);
    return { seconds, memorySeconds: 0, flops: call.flops };
  }

  /** A backward has as much again to pass through: gradients of all that the forward made. */
  private oneProduct(form: keyof ProductRates, sizes: number[], { passBytes }: SizedCall): number {
    const grid = this.products[form];
    const between = form === "forward" ? passBytes : 2 * passBytes;
    return onGrid(grid, [...sizes, Math.min(between, grid.axes[3]!.at(-1)!)]);
  }

  private headProducts(call: SizedCall, forms: (keyof ProductRates)[], logits: Curve): Cost {
    const [x, weight] = call.tensors as [SizedValue, SizedValue];
    const [rows, inner] = x.shape as [number, number];
    const vocabulary = weight.shape[0]!;
    const chunk = Math.min(rows, call.args[5] as number);
    const moved = (rows / chunk) * onCurve(logits, chunk * vocabulary);
    const products = forms.reduce(
      (n, form) => n + (rows / chunk) * this.oneProduct(form, [chunk, inner, vocabulary], call),
      0,
    );
    return { seconds: products + moved, memorySeconds: moved, flops: forms.length * call.flops };
  }

  private attention({ args, tensors }: SizedCall, pass: "forward" | "backward"): Cost {
    const [q, k] = tensors as [SizedValue, SizedValue];
    const [tokens, width] = [q.shape.at(-2)!, q.shape.at(-1)!];
    const sources = k.shape.at(-2)!;
    const heads = q.elements / (tokens * width);
    const grid = this.rates.attention[args[3] === null && args[5] === true ? "causal" : "masked"][pass];
    const seconds = heads * onGrid(grid, [Math.sqrt(tokens * sources), width]);
    return { seconds, memorySeconds: 0, flops: 0 };
  }

  /** In the ring R blocks of half a square of pairs; all to all, a share of the heads over whole rows. */
  private overRanks(call: SizedCall, pass: "forward" | "backward"): Cost {
    const { kind, ranks, shape } = sequenceCall(call)!;
    const grid = this.rates.attention[shape.documents ? "masked" : "causal"][pass];
    const heads = shape.batch * shape.heads;
    const side = shape.documents ? shape.tokens / Math.SQRT2 : shape.tokens;
    const compute =
      kind === "ring"
        ? heads * ranks * onGrid(grid, [side, shape.headDim])
        : (heads / ranks) * onGrid(grid, [shape.tokens * ranks, shape.headDim]);
    const bytes = sequenceTraffic(kind, ranks, shape)[pass];
    const seconds = withTransfers(kind, ranks, compute, bytes / (this.profile.rankLink ?? RANK_LINK));
    return { seconds, memorySeconds: 0, flops: 0 };
  }

  private count({ out, tensors, op }: SizedCall): number {
    if (op === "embedding" || op === "indexSelect") return out.elements * this.width;
    // A view has nothing to do with its elements, until its gradient is laid into zeros.
    return Math.max(out.elements, ...tensors.map((t) => t.elements)) * this.width;
  }

  private operator({ op }: SizedCall): OperatorRates {
    return this.rates.operators[op in LIKE ? LIKE[op as keyof typeof LIKE] : (op as Own)];
  }
}

/** Ops whose tensors are stretched to the result's shape. */
const broadcasts = ({ op }: SizedCall): boolean =>
  op === "add" ||
  op === "sub" ||
  op === "mul" ||
  op === "div" ||
  op === "where" ||
  op === "maximum" ||
  op === "minimum";

const total = (list: readonly number[]): number => list.reduce((sum, n) => sum + n, 0);
