import { describe, expect, it } from "vitest";
import { findModel } from "../../../src/models/registry.js";
import { CostModel } from "../../../src/plan/cost.js";
import { sizedProgram } from "../../../src/plan/cost-calls.js";
import { MeasuredTimes } from "../../../src/plan/cost-measured.js";
import type { BlockSizes } from "../../../src/plan/cost-times.js";
import { findProfile, type MachineProfile } from "../../../src/plan/profiles.js";
import { type Curve, type Grid, MEASURED_OPS, type MeasuredRates, onCurve, onGrid } from "../../../src/plan/rates.js";
import type { Instruction } from "../../../src/plan/types.js";
import { type Policy, writeTape } from "../../../src/plan/write-tape.js";

describe("a curve", () => {
  const curve: Curve = [
    [10, 1],
    [20, 2],
    [40, 8],
  ];
  it.each([
    [1, 1],
    [10, 1],
    [15, 1.5],
    [20, 2],
    [30, 5],
    [60, 14],
  ])("at %d is %d", (count, seconds) => expect(onCurve(curve, count)).toBeCloseTo(seconds, 12));

  it("never falls, whatever noise its points have", () => {
    const noisy: Curve = [
      [10, 2],
      [20, 1],
    ];
    expect(onCurve(noisy, 15)).toBe(2);
    expect(onCurve(noisy, 1000)).toBe(1);
  });

  it("of one point is in proportion to it", () => expect(onCurve([[10, 3]], 5)).toBe(1.5));
});

describe("a grid", () => {
  const axes = [
    [1, 4, 16],
    [2, 8],
  ];
  /** A power of both sizes: exact between the points, too. */
  const power = (x: number, y: number) => 3 * x ** 0.5 * y ** 1.5;
  const grid: Grid = { axes, seconds: axes[0]!.flatMap((x) => axes[1]!.map((y) => power(x, y))) };

  it("is exact at its points and where it is a power between them", () => {
    for (const [x, y] of [
      [1, 2],
      [16, 8],
      [4, 8],
      [2, 3],
      [11, 5],
    ] as const)
      expect(onGrid(grid, [x, y])).toBeCloseTo(power(x, y), 10);
  });

  it("goes on in proportion beyond its largest sizes and stays at its smallest", () => {
    expect(onGrid(grid, [32, 16])).toBeCloseTo(power(16, 8) * 2 * 2, 10);
    expect(onGrid(grid, [0.5, 1])).toBeCloseTo(power(1, 2), 10);
  });
});

/** Every kind of work takes its own power of ten, so that a sum says what it was made of. */
const flat = (seconds: number): Curve => [[1e12, seconds * 1e12]];
const constant = (seconds: number): Curve => [
  [1, seconds],
  [1e15, seconds],
];
const product = (seconds: number): Grid => ({ axes: [[1], [1], [1], [1]], seconds: [seconds] });
const pair = (seconds: number): Grid => ({ axes: [[1], [1]], seconds: [seconds] });
const op = (forward: number, recorded = 0, backward = 0) => ({
  forward: constant(forward),
  recorded,
  backward: constant(backward),
});
const products = { forward: product(1), inputGradient: product(2), weightGradient: product(3) };
const free = constant(0);
/** All at nothing but those given. */
const operators = (given: Partial<MeasuredRates["operators"]> = {}): MeasuredRates["operators"] => {
  const all = Object.fromEntries([...MEASURED_OPS, "sum leading"].map((name) => [name, op(0)]));
  return { ...(all as unknown as MeasuredRates["operators"]), ...given };
};
const base: MeasuredRates = {
  products: { float32: products, bfloat16: products, float64: products },
  operators: operators(),
  attention: {
    causal: { forward: pair(0), backward: pair(0) },
    masked: { forward: pair(0), backward: pair(0) },
  },
  logits: { forward: free, gradient: free },
  embeddingGradient: { table: free, rows: free },
  add: free,
  copy: free,
  norm: free,
  narrow: free,
  widen: free,
  quantize: free,
  dequantize: free,
  update: { "float32 none adamw": free },
};
const none = product(0);
const noProducts = { forward: none, inputGradient: none, weightGradient: none };
const quiet = { ...base, products: { float32: noProducts, bfloat16: noProducts, float64: noProducts } };

const tiny = findModel("tiny").graph({ mode: "train" });
const dims = { B: 2, T: 32 };
const policy: Policy = {
  schedule: "breadthFirst",
  recompute: "all",
  update: "backward",
  clip: "none",
  state: { storage: "float32", masterWeight: "none", optimizer: "adamw" },
  microBatches: 2,
  dims,
  param: "device",
  optimizer: "device",
  boundary: "device",
  retained: "device",
  retainedDType: "float32",
  prefetch: 0,
  parts: 1,
};
const { step } = writeTape(tiny, policy);
const LAYER = 1;
const find = (name: Instruction["op"], block: number) =>
  step.instructions.find((i) => i.op === name && "block" in i && i.block === block)!;

function seconds(measured: MeasuredRates, instruction: Instruction, recompute: "all" | "none" = "all"): number {
  const machine: MachineProfile = { ...findProfile("cpu"), measured, instructionSeconds: 0, operatorSeconds: 0 };
  return new CostModel(tiny, { state: policy.state, recompute }, dims, machine).of(instruction).seconds;
}

describe("costs on a measured machine", () => {
  const rowsOf = (b: number, t: number) => b * t;
  // Sizes beyond a grid of ones: rows x in x out.
  const sizes = tiny.blocks[LAYER]!.parameters.map(
    (name) => tiny.parameters.find((p) => p.name === name)!.shape,
  ).filter((shape) => shape.length === 2);
  const work = sizes.reduce((n, [out, inner]) => n + rowsOf(2, 32) * out! * inner!, 0);

  it("take a product forward, and both of its gradients backward", () => {
    expect(seconds(base, find("forward", LAYER))).toBeCloseTo(work, 3);
    expect(seconds(base, find("backward", LAYER), "none")).toBeCloseTo(5 * work, 3);
    expect(seconds(base, find("backward", LAYER), "all")).toBeCloseTo(6 * work, 3);
  });

  it("read a product's table by what passes between two uses of its weight, twice as much backward", () => {
    const { passBytes } = sizedProgram(tiny, LAYER, dims).calls[0]!;
    // Where seconds grow with the bytes in between, seconds say how many they were.
    const apart: Grid = { axes: [[1e9], [1e9], [1e9], [1, 1e12]], seconds: [1, 1e12] };
    const rates = { forward: apart, inputGradient: noProducts.forward, weightGradient: apart };
    const by = { ...quiet, products: { ...quiet.products, float32: rates } };
    expect(seconds(by, find("forward", LAYER))).toBeCloseTo(sizes.length * passBytes, -1);
    expect(seconds(by, find("backward", LAYER), "none")).toBeCloseTo(2 * sizes.length * passBytes, -1);
  });

  it("take no longer for a weight whose uses lie further apart than was measured", () => {
    // Beyond a grid of sizes seconds grow in proportion: of the bytes in between they must not.
    const near: Grid = { axes: [[1e9], [1e9], [1e9], [1, 2]], seconds: [1, 3] };
    const rates = { forward: near, inputGradient: near, weightGradient: near };
    const by = { ...quiet, products: { ...quiet.products, float32: rates } };
    expect(seconds(by, find("forward", LAYER))).toBeCloseTo(3 * sizes.length, 10);
  });

  it("count all parameters and results, and no inputs, as what passes between two uses", () => {
    const program = sizedProgram(tiny, LAYER, dims);
    const bytes = (list: readonly { bytes: number }[]) => list.reduce((n, v) => n + v.bytes, 0);
    expect(program.calls[0]!.passBytes).toBe(bytes(program.parameters) + bytes(program.calls.map((c) => c.out)));
  });

  it("time norms as what comes by among all the bytes of a block, not as a tensor alone", () => {
    const norm: Curve = [
      [1e3, 0],
      [1e6, 0],
      [1e9, 5],
    ];
    const times = new MeasuredTimes({ ...quiet, norm }, findProfile("cpu"), "float32");
    const block: BlockSizes = {
      used: [1e5],
      trainable: [1e5, 1e5],
      paramBytes: 8e5,
      computeBytes: 8e5,
      stateBytes: 0,
      trainableBytes: 8e5,
      workingBytes: 8e9,
      gradientBytes: 4,
    };
    expect(times.norm(block, 1).seconds).toBeCloseTo(2e5 * 5e-9, 12);
  });

  it("take a head's three products in its turn", () => {
    const head = tiny.blocks.length - 1;
    const [out, inner] = tiny.parameters.find((p) => p.name === tiny.blocks[head]!.parameters.at(-1))!.shape;
    expect(seconds(base, find("turn", head))).toBeCloseTo(6 * rowsOf(2, 32) * out! * inner!, 3);
  });

  it("count what autograd adds only where it is on", () => {
    const noted = { ...quiet, operators: operators({ rotate: op(0, 1, 0) }) };
    expect(seconds(noted, find("forward", LAYER))).toBe(0);
    // Queries and keys.
    expect(seconds(noted, find("backward", LAYER), "all")).toBe(2);
    expect(seconds(noted, find("backward", LAYER), "none")).toBe(0);
  });

  it("give an op its own curve where it has one, once where one kernel makes all its gradients", () => {
    const gate = { ...quiet, operators: operators({ siluMul: op(7, 0, 11) }) };
    expect(seconds(gate, find("forward", LAYER))).toBe(7);
    expect(seconds(gate, find("backward", LAYER), "none")).toBe(11);
    const norms = { ...quiet, operators: operators({ rmsNorm: op(5, 0, 13) }) };
    expect(seconds(norms, find("forward", LAYER))).toBe(10);
    expect(seconds(norms, find("backward", LAYER), "none")).toBe(26);
    const table = { ...quiet, operators: operators({ cos: op(3) }) };
    expect(seconds(table, find("forward", LAYER))).toBe(3);
  });

  it("add the gradients of a value with several uses, and store boundaries", () => {
    const adding = { ...quiet, operators: operators({ add: op(1) }) };
    // forward: two residual sums.
    expect(seconds(adding, find("forward", LAYER))).toBe(2);
    const back = seconds(adding, find("backward", LAYER), "none");
    expect(back).toBeGreaterThan(2);
    expect(seconds({ ...quiet, copy: constant(3) }, find("forward", LAYER))).toBe(3);
  });

  it("time sums by the bytes that pass between two visits, updates by their format", () => {
    const later = step.instructions.find((i) => i.op === "backward" && i.block === LAYER && !i.first)!;
    const elements = sizes.reduce((n, [a, b]) => n + a! * b!, 0);
    const sum = seconds({ ...quiet, add: flat(1e-9) }, later, "none");
    expect(sum).toBeGreaterThanOrEqual(elements * 1e-9);
    expect(sum).toBeLessThan(elements * 1.01e-9);
    const update = { ...quiet, update: { "float32 none adamw": flat(2e-9), "bfloat16 none adamw": flat(1) } };
    expect(seconds(update, find("update", LAYER))).toBeGreaterThanOrEqual(elements * 2e-9);
    expect(seconds(update, find("update", LAYER))).toBeLessThan(elements * 2.02e-9);
    // What fits the caches where it is timed alone comes from memory in a step.
    const cached = {
      ...quiet,
      update: {
        "float32 none adamw": [
          [1e6, 0],
          [1e9, 3],
        ] as Curve,
      },
    };
    expect(seconds(cached, find("update", LAYER))).toBeGreaterThanOrEqual(elements * 3e-9);
  });
});

describe("a machine without tables", () => {
  it("is timed by its large rates, one with tables is not", () => {
    const machine = findProfile("cpu");
    const of = (m: MachineProfile) =>
      new CostModel(tiny, { state: policy.state, recompute: "all" }, dims, m).of(find("forward", LAYER)).seconds;
    expect(of({ ...machine, measured: quiet, instructionSeconds: 0, operatorSeconds: 0 })).toBe(0);
    expect(of(machine)).toBeGreaterThan(0);
  });
});
