/**
 * The tables of a machine's profile (rates.ts): each kind of work is run at a few sizes through the eager operators, hence
 * the kernels that training runs.
 */
import { type OpName, schemas } from "../graph/schemas.js";
import type { DType } from "../graph/types.js";
import { dtypeBytes } from "../graph/value.js";
import { callOp, enableGrad, grad, noGrad, scope, type Tensor, trusted } from "../tensor/index.js";
import {
  type Curve,
  formatKey,
  type Grid,
  type MeasuredOp,
  type MeasuredRates,
  type OperatorRates,
  type ProductRates,
} from "./rates.js";
import type { StateFormat } from "./types.js";

/**
 * Takes most of a minute: all tables three times, and of each figure the median, since what shares the machine slows it for
 * seconds at a time, hence whole tables, which no number of calls in a row evens out; and the least of them would be a machine
 * that nobody shares. Needs the addon.
 */
export function measureRates(): MeasuredRates {
  return middleRates(measureOnce(), measureOnce(), measureOnce());
}

/** Of three measurements, of each figure the middle one. */
export const middleRates = (a: MeasuredRates, b: MeasuredRates, c: MeasuredRates): MeasuredRates => middle(a, b, c);

/** Of three trees of one shape, the middle one of each three numbers (sizes are equal in all). */
function middle<T>(a: T, b: T, c: T): T {
  if (typeof a === "number")
    return Math.max(Math.min(a, b as number), Math.min(Math.max(a, b as number), c as number)) as T;
  const at = (of: T, key: string) => (of as Record<string, unknown>)[key];
  const entries = Object.entries(a as object).map(([key, x]) => [key, middle(x, at(b, key), at(c, key))] as const);
  return (Array.isArray(a) ? entries.map(([, x]) => x) : Object.fromEntries(entries)) as T;
}

/** All tables, once. */
export function measureOnce(): MeasuredRates {
  return trusted(() =>
    noGrad(() =>
      scope(() => ({
        products: {
          float32: products("float32", [1, 16, 64, 256, 1024], [64, 256, 1024, 2048]),
          bfloat16: products("bfloat16", [16, 256], [64, 512]),
          float64: products("float64", [16, 256], [64, 512]),
        },
        operators: operators(),
        attention: { causal: attention(true), masked: attention(false) },
        logits: logits(),
        embeddingGradient: embeddingGradient(),
        ...streams(),
        update: updates(),
      })),
    ),
  );
}

/** Seconds of a call: the median of as many as fit into `budget` seconds, after one that warms up. */
export function seconds(work: () => void, budget = 0.01): number {
  const once = (times: number): number => {
    const begin = performance.now();
    for (let i = 0; i < times; i++) work();
    return (performance.now() - begin) / 1e3 / times;
  };
  once(1);
  const first = once(1);
  // What takes microseconds is timed several at a time.
  const times = Math.max(1, Math.round(1e-4 / Math.max(first, 1e-6)));
  const rounds = Math.min(25, Math.max(1, Math.round(budget / (first * times))));
  const all = [first, ...Array.from({ length: rounds }, () => once(times))].sort((a, b) => a - b);
  return all[all.length >> 1]!;
}

const COLUMNS = 256;
const SIZES = [64, 16_384, 131_072, 1_048_576, 8_388_608];
const full = (shape: readonly number[], dtype = "float32", value = 0.5): Tensor =>
  callOp("aten::full", [shape, value], { dtype }) as Tensor;
const shaped = (n: number): number[] => (n < COLUMNS ? [1, n] : [n / COLUMNS, COLUMNS]);
const derived = (x: Tensor): Tensor => {
  x.requiresGrad = true;
  return x;
};

const curve = (sizes: readonly number[], of: (n: number) => number): Curve =>
  sizes.map((n) => [n, scope(() => of(n))] as const);

/** A grid whose largest points are left out where they would take long: they follow the next smaller in proportion. */
function grid(axes: number[][], of: (sizes: number[]) => number, work: (sizes: number[]) => number): Grid {
  const points = axes.reduce<number[][]>((list, axis) => list.flatMap((p) => axis.map((x) => [...p, x])), [[]]);
  const known: { sizes: number[]; seconds: number }[] = [];
  const order = points.map((sizes, i) => ({ sizes, i })).sort((a, b) => work(a.sizes) - work(b.sizes));
  const result = new Array<number>(points.length);
  for (const { sizes, i } of order) {
    const like = known.findLast((k) => k.sizes.every((x, a) => x <= sizes[a]!));
    const expected = like === undefined ? 0 : (like.seconds * work(sizes)) / work(like.sizes);
    if (expected > LONG) {
      result[i] = expected;
      continue;
    }
    result[i] = scope(() => of(sizes));
    known.push({ sizes, seconds: result[i] });
  }
  return { axes, seconds: result };
}
const LONG = 0.2;

/** Bytes of weights that are used in turn: one that stays in the caches, and so many that each comes from memory. */
const IN_TURN = [2 << 20, 32 << 20];

function products(dtype: string, rows: number[], sizes: number[]): ProductRates {
  const memory = full([IN_TURN.at(-1)! / dtypeBytes(dtype as DType)], dtype);
  /** Matrices that lie one behind the other in that memory, one for each call. */
  const inTurn = (height: number, width: number, bytes: number): (() => Tensor) => {
    const elements = height * width;
    const count = Math.max(1, Math.floor(bytes / (elements * dtypeBytes(dtype as DType))));
    const all = Array.from({ length: count }, (_, i) => {
      const at = callOp("aten::narrow", [memory, 0, i * elements, elements]) as Tensor;
      return callOp("aten::view", [at, [height, width]]) as Tensor;
    });
    let next = 0;
    return () => all[next++ % count]!;
  };
  const form = (calling: (sizes: number[], weight: () => Tensor) => () => unknown): Grid =>
    grid(
      [rows, sizes, sizes, IN_TURN],
      ([m, k, n, bytes]) => {
        const call = calling([m!, k!, n!], inTurn(n!, k!, bytes!));
        return seconds(() => void scope(() => void call()));
      },
      ([m, k, n]) => m! * k! * n!,
    );
  const of = (height: number, width: number) => full([height, width], dtype);
  return {
    forward: form(([m, k], weight) => {
      const x = of(m!, k!);
      return () => callOp("aten::linear", [x, weight()]);
    }),
    inputGradient: form(([m, , n], weight) => {
      const dy = of(m!, n!);
      return () => callOp("aten::mm", [dy, weight()]);
    }),
    // Here the weight's gradient is what is written.
    weightGradient: form(([m, k, n], gradient) => {
      const [dy, x] = [callOp("aten::t", [of(m!, n!)]), of(m!, k!)];
      return () => callOp("aten::mm.out", [dy, x], { out: gradient() });
    }),
  };
}

/** The call, and the tensors that gradients are asked of. */
type Case = { call: () => Tensor; of: readonly Tensor[] };

const plain = (op: OpName, n: number, ...more: unknown[]): Case => {
  const x = derived(full(shaped(n)));
  return { call: () => callOp(schemas[op].overload, [x, ...more]) as Tensor, of: [x] };
};
/** [1, heads, T, 64] on a transposed view of n elements, as queries and keys come to their rotation. */
const heads = (n: number): Tensor => {
  const width = Math.min(n, 64);
  const count = n >= 512 ? 8 : 1;
  const x = derived(full([1, n / width / count, count, width]));
  return callOp("aten::transpose.int", [x, 1, 2]) as Tensor;
};
const bool = (n: number): Tensor => full(shaped(n), "bool", 1);

const CASES: Record<MeasuredOp, (n: number) => Case> = {
  add: (n) => plain("add", n, full(shaped(n))),
  mul: (n) => plain("mul", n, full(shaped(n))),
  div: (n) => plain("div", n, full(shaped(n))),
  addScalar: (n) => plain("addScalar", n, 1.5),
  mulScalar: (n) => plain("mulScalar", n, 1.5),
  powScalar: (n) => plain("powScalar", n, 2),
  neg: (n) => plain("neg", n),
  exp: (n) => plain("exp", n),
  cos: (n) => plain("cos", n),
  tanh: (n) => plain("tanh", n),
  rsqrt: (n) => plain("rsqrt", n),
  reciprocal: (n) => plain("reciprocal", n),
  relu: (n) => plain("relu", n),
  silu: (n) => plain("silu", n),
  gelu: (n) => plain("gelu", n),
  softmax: (n) => plain("softmax", n, -1, null),
  layerNorm: (n) => plain("layerNorm", n, [Math.min(n, COLUMNS)], full([Math.min(n, COLUMNS)]), null, 1e-5),
  rmsNorm: (n) => {
    const [x, weight] = [derived(full(shaped(n))), derived(full([Math.min(n, COLUMNS)]))];
    return { call: () => callOp(schemas.rmsNorm.overload, [x, weight, 1e-5]) as Tensor, of: [x, weight] };
  },
  siluMul: (n) => plain("siluMul", n, full(shaped(n))),
  rotate: (n) => {
    const x = heads(n);
    const table = full([1, x.shape[2]!, x.shape[3]!]);
    return { of: [x], call: () => callOp(schemas.rotate.overload, [x, table]) as Tensor };
  },
  sum: (n) => plain("sum", n, [-1], true),
  "sum leading": (n) => plain("sum", n, [0], false),
  cumsum: (n) => plain("cumsum", n, 0),
  to: (n) => plain("to", n, "bfloat16"),
  view: (n) => plain("view", n, [n]),
  slice: (n) => plain("slice", n, -1, 0, Math.min(n, COLUMNS) / 2, 1),
  cat: (n) => {
    const x = derived(full(shaped(n / 2)));
    return { call: () => callOp(schemas.cat.overload, [[x, x], -1]) as Tensor, of: [x] };
  },
  where: (n) => {
    const [condition, x, y] = [bool(n), derived(full(shaped(n))), full(shaped(n))];
    return { call: () => callOp(schemas.where.overload, [condition, x, y]) as Tensor, of: [x] };
  },
  eq: (n) => {
    const [x, y] = [full(shaped(n), "int64", 1), full(shaped(n), "int64", 1)];
    return { call: () => callOp(schemas.eq.overload, [x, y]) as Tensor, of: [] };
  },
  logicalAnd: (n) => {
    const [x, y] = [bool(n), bool(n)];
    return { call: () => callOp(schemas.logicalAnd.overload, [x, y]) as Tensor, of: [] };
  },
  newOnes: (n) => {
    const x = full([1]);
    return { call: () => callOp(schemas.newOnes.overload, [x, shaped(n)]) as Tensor, of: [] };
  },
  embedding: (n) => {
    const table = full([64, COLUMNS]);
    const rows = full([Math.max(1, n / COLUMNS)], "int64", 7);
    return { call: () => callOp(schemas.embedding.overload, [table, rows]) as Tensor, of: [] };
  },
  dropout: (n) => {
    const [x, key] = [derived(full(shaped(n))), full([4], "int64", 1)];
    return { call: () => callOp(schemas.dropout.overload, [x, 0.1, key, 0]) as Tensor, of: [x] };
  },
};

function operators(): MeasuredRates["operators"] {
  /** What asking for a gradient costs, whatever is derived. */
  const asking = scope(() => enableGrad(() => backwardSeconds(plain("view", 64, [64]))));
  const result: Partial<MeasuredRates["operators"]> = {};
  for (const [op, build] of Object.entries(CASES) as [MeasuredOp, (n: number) => Case][]) {
    const forward: [number, number][] = [];
    const backward: [number, number][] = [];
    let recorded = 0;
    for (const n of SIZES) {
      scope(() =>
        enableGrad(() => {
          const it = build(n);
          const run = () => void scope(() => void it.call());
          forward.push([n, noGrad(() => seconds(run))]);
          if (n === SIZES[0]) recorded = Math.max(0, seconds(run) - forward[0]![1]);
          if (it.of.length > 0) backward.push([n, Math.max(NODE, backwardSeconds(it) - asking + NODE)]);
        }),
      );
    }
    result[op] = { forward, recorded, backward: backward.length > 0 ? backward : [[1, 0]] } satisfies OperatorRates;
  }
  return result as MeasuredRates["operators"];
}
/** What autograd takes to come to an operation and go on, in seconds: a node that does nothing, measured in C++. */
const NODE = 1e-6;

function backwardSeconds({ call, of }: Case): number {
  const y = call();
  const options = { gradOutputs: [noGrad(() => callOp("aten::ones_like", [y]) as Tensor)], retainGraph: true };
  return seconds(() => void scope(() => void grad([y], of, options)));
}

function attention(causal: boolean): { forward: Grid; backward: Grid } {
  const COUNT = 4;
  const axes = [
    [64, 256, 1024],
    [32, 64, 128],
  ];
  const pass = (backward: boolean): Grid =>
    grid(
      axes,
      ([tokens, width]) =>
        enableGrad(() => {
          const head = () => {
            const x = derived(full([1, tokens!, COUNT, width!]));
            return callOp("aten::transpose.int", [x, 1, 2]) as Tensor;
          };
          const [q, k, v] = [head(), head(), head()];
          const mask = causal
            ? null
            : noGrad(() => callOp("aten::tril", [full([1, 1, tokens!, tokens!], "bool", 1)]) as Tensor);
          const call = () => callOp(schemas.scaledDotProductAttention.overload, [q, k, v, mask, 0, causal]) as Tensor;
          if (!backward) return seconds(() => void scope(() => void call())) / COUNT;
          const y = call();
          const options = { gradOutputs: [noGrad(() => callOp("aten::ones_like", [y]) as Tensor)], retainGraph: true };
          return seconds(() => void scope(() => void grad([y], [q, k, v], options))) / COUNT;
        }),
      ([tokens, width]) => tokens! * tokens! * width!,
    );
  return { forward: pass(false), backward: pass(true) };
}

/** 256 rows of logits, as the head passes through them (native/kernels/cross_entropy_head.cc). */
function logits(): MeasuredRates["logits"] {
  const ROWS = 256;
  const sizes = [16_384, 131_072, 1_048_576, 4_194_304];
  const part = (gradient: boolean): Curve =>
    curve(sizes, (n) => {
      const x = full([ROWS, n / ROWS]);
      const [labels, scale] = [full([ROWS], "int64", 3), full([], "float32", 1)];
      const logSoftmax = () => callOp("aten::log_softmax.int", [x, 1, null]) as Tensor;
      const loss = (y: Tensor) => callOp("aten::nll_loss_forward", [y, labels, null, 2, -100]) as [Tensor, Tensor];
      if (!gradient) return seconds(() => void scope(() => void loss(logSoftmax())));
      const y = logSoftmax();
      const [, total] = loss(y);
      return seconds(() => {
        scope(() => {
          const dy = callOp("aten::nll_loss_backward", [scale, y, labels, null, 2, -100, total]);
          callOp("aten::_log_softmax_backward_data", [dy, y, 1, "float32"]);
        });
      });
    });
  return { forward: part(false), gradient: part(true) };
}

function embeddingGradient(): MeasuredRates["embeddingGradient"] {
  const back = (rows: number, vocabulary: number): number => {
    const dy = full([rows, COLUMNS]);
    const ids = callOp("aten::remainder.Scalar", [callOp("aten::arange", [rows], { dtype: "int64" }), vocabulary]);
    return seconds(
      () => void scope(() => void callOp("aten::embedding_dense_backward", [dy, ids, vocabulary, -1, false])),
    );
  };
  return {
    table: curve(SIZES.slice(1), (n) => back(1, n / COLUMNS)),
    rows: curve(SIZES.slice(1, 4), (n) => back(n / COLUMNS, 64)),
  };
}

function streams(): Pick<MeasuredRates, "add" | "copy" | "norm" | "narrow" | "widen" | "quantize" | "dequantize"> {
  const sizes = [64, 4096, 65_536, 524_288, 4_194_304, 16_777_216];
  const two = (op: string, from: string, to: string): Curve =>
    curve(sizes, (n) => {
      const operands = [full([n], to), full([n], from)];
      return seconds(() => void scope(() => void callOp(op, operands)));
    });
  const codes = (op: "quantize" | "dequantize"): Curve =>
    curve(sizes.slice(1, -1), (n) => {
      const [x, code, absmax] = [full([n]), full([n], "uint8", 7), full([n / 256])];
      const operands = op === "quantize" ? [x, code, absmax, true] : [code, absmax, true, x];
      return seconds(() => void callOp(`stroma::${op}_blockwise_`, operands));
    });
  return {
    add: two("aten::add_.Tensor", "float32", "float32"),
    copy: two("aten::copy_", "float32", "float32"),
    norm: curve(sizes, (n) => {
      const x = full([n]);
      return seconds(() => void scope(() => void callOp("aten::linalg_vector_norm", [x, 2])));
    }),
    narrow: two("aten::copy_", "float32", "bfloat16"),
    widen: two("aten::copy_", "bfloat16", "float32"),
    quantize: codes("quantize"),
    dequantize: codes("dequantize"),
  };
}

const MASTERS = [
  ["float32", "none"],
  ["bfloat16", "none"],
  ["bfloat16", "split16"],
  ["bfloat16", "float32"],
] as const;

/** AdamW by how parameters and moments are stored: a first call, a tensor in the caches, and one in memory. */
function updates(): Record<string, Curve> {
  const result: Record<string, Curve> = {};
  for (const [storage, masterWeight] of MASTERS) {
    for (const optimizer of ["adamw", "adamw8bit"] as const) {
      const format: StateFormat = { storage, masterWeight, optimizer };
      result[formatKey(format)] = curve([256, 65_536, 4_194_304], (n) => {
        const eight = optimizer === "adamw8bit";
        const [param, gradient] = [full([n], storage), full([n], "float32", 1e-3)];
        const master = masterWeight === "none" ? null : full([n], masterWeight === "float32" ? "float32" : "int16", 1);
        const moment = () => (eight ? full([n], "uint8", 128) : full([n], "float32", 1e-3));
        const scales = () => (eight ? full([n / 256], "float32", 1e-3) : null);
        const [first, second, absmax1, absmax2] = [moment(), moment(), scales(), scales()];
        const numbers = [1e-4, 0.9, 0.95, 1e-8, 0.1, 10, 1, [1, 1, 0]];
        return seconds(
          () => void callOp("stroma::adamw_", [param, master, gradient, first, second, absmax1, absmax2, ...numbers]),
        );
      });
    }
  }
  return result;
}
