/** The plan of a run: one placement for every number of micro-batches, budgets kept or refused. */
import { expect, test } from "vitest";
import type { Graph } from "../../../src/graph/types.js";
import { resolveModel } from "../../../src/train/model-source.js";
import { resolveOptions, type SettledOptions, type TrainerOptions } from "../../../src/train/options.js";
import { joinBatches } from "../../../src/train/parts.js";
import { planDifferences, planTraining } from "../../../src/train/plan.js";
import { REAL } from "../../support/real-trainer.js";

const settled = (extra: TrainerOptions): SettledOptions =>
  resolveOptions({ ...REAL, gradientAccumulationSteps: 4, batchSize: 8, ...extra }) as SettledOptions;
const graphOf = (o: SettledOptions): Graph => resolveModel(o.model).graph("train", o.dtype);

test("every smaller step has the homes of the whole one, inside its arenas, and its own flush", () => {
  const o = settled({ offload: "disk", steps: undefined, epochs: 1 });
  const plan = planTraining(graphOf(o), o);
  const whole = plan.tapes(4);
  for (const n of [1, 2, 3]) {
    const { step, flush } = plan.tapes(n);
    expect([step.microBatches, step.placement, flush!.placement]).toEqual([n, plan.placement, plan.placement]);
    expect(plan.tapes(n).step).toBe(step);
  }
  expect(whole.step.placement).toEqual(plan.placement);
  expect(plan.placement.homes.every((h) => h.param === null || h.param.space === "disk")).toBe(true);
  expect(plan.facts).toMatchObject({ fused: 1, blocksMerged: 1, update: "forward", retainedDType: "float32" });
});

test("budgets are kept, micro-batches fused into the rows of one pass", () => {
  const o = settled({ device: "sim", deviceMemory: "6MB" });
  const plan = planTraining(graphOf(o), o);
  expect(plan.predicted!.peaks.deviceBytes).toBeLessThanOrEqual(6e6);
  expect(plan.facts.fused).toBeGreaterThan(1);
  const { step } = plan.tapes(4 / plan.facts.fused);
  expect(step.dims).toEqual({ B: 2 * plan.facts.fused, T: 96 });
});

test.each<[extra: TrainerOptions, why: RegExp]>([
  [{ deviceMemory: "100kB" }, /does not fit: .* missing/],
  [{ deviceMemory: "100kB", plan: "resident" }, /takes .* of device memory, 100 kB are given/],
  [{ offload: "disk", disk: "100kB" }, /takes .* of disk, 100 kB are given/],
  [{ device: "sim", offload: "host", hostMemory: "10kB" }, /of host memory, 10 kB are given/],
])("%j does not fit, and says so", (extra, why) => {
  const o = settled(extra);
  expect(() => planTraining(graphOf(o), o)).toThrow(why);
});

test("what would fit in a leaner format of state is refused with its name", () => {
  const plan = (optimizer: "adamw" | "adamw8bit", hostMemory: number) => {
    const o = settled({ device: "sim", deviceMemory: "1.2MB", hostMemory, plan: "auto", optimizer });
    return () => planTraining(graphOf(o), o);
  };
  // Somewhere on the way from too little for both to enough for both.
  const hosts = [...Array(20).keys()].map((i) => 2e5 + 2e4 * i);
  const lean = hosts.find((bytes) => {
    try {
      return plan("adamw8bit", bytes)().predicted!.peaks.hostBytes <= bytes;
    } catch {
      return false;
    }
  })!;
  expect(plan("adamw", lean)).toThrow(/missing\. .*As it is, it fits with optimizer adamw8bit$/);
  expect(plan("adamw8bit", hosts[0]!)).toThrow(/missing\. (?!.*As it is)/);
});

test("a model of other dims trains resident, and is refused where sizes are needed", () => {
  const o = settled({});
  const graph = graphOf(o);
  const other = JSON.parse(JSON.stringify(graph).replaceAll('"T"', '"S"')) as Graph;
  expect(planTraining(other, o).predicted).toBeNull();
  expect(() => planTraining(other, settled({ offload: "disk" }))).toThrow("other dims than B and T");
});

test("what is computed again and layers a block are the user's, or the plan's", () => {
  const still = { model: { config: { ...REAL.model.config, dropout: 0 } } };
  for (const where of [{}, { plan: "auto" }, { offload: "disk" }] as const) {
    const o = settled({ ...where, ...still, recompute: "selective", layersPerBlock: 2 });
    const plan = planTraining(graphOf(o), o);
    const { step } = plan.tapes(o.gradientAccumulationSteps / plan.facts.fused);
    expect(plan.facts).toMatchObject({ recompute: "selective", blocksMerged: 2 });
    expect(plan.graph.blocks.length).toBe(graphOf(o).blocks.length - 1);
    expect(step.kept!.values.flat().length).toBeGreaterThan(0);
    expect(plan.summary).toContain("recompute selective");
    expect(plan.summary).toContain("2 layers a block");
  }
  const dropping = settled({ layersPerBlock: 2 });
  expect(() => planTraining(graphOf(dropping), dropping)).toThrow("no two blocks of decoder can be one");
});

test("what rounds otherwise after a resume is told, another place is not", () => {
  const o = settled({});
  const { facts } = planTraining(graphOf(o), o);
  expect(planDifferences(facts, { ...facts, tapeHash: "x", order: "depthFirst", update: "forward" })).toEqual([]);
  expect(planDifferences(facts, { ...facts, retainedDType: "float32" })).toEqual([]);
  expect(planDifferences(facts, { ...facts, fused: 4, retainedDType: "dynamic8" })).toEqual([
    "micro-batches at once: 1 before, 4 now",
    "gradients retained: exactly before, dynamic8 now",
  ]);
});

test("micro-batches join along their rows, whatever their number of rows", () => {
  const rows = (...shape: number[]) => ({
    dtype: "int64" as const,
    shape,
    data: BigInt64Array.from({ length: shape.reduce((a, b) => a * b, 1) }, (_, i) => BigInt(shape[0]! * 100 + i)),
  });
  const { x } = joinBatches([{ x: rows(2, 3) }, { x: rows(1, 3) }]);
  expect(x!.shape).toEqual([3, 3]);
  const { buffer, byteOffset, byteLength } = x!.data;
  expect([...new BigInt64Array(buffer.slice(byteOffset, byteOffset + byteLength))].map(Number)).toEqual([
    ...[200, 201, 202, 203, 204, 205],
    ...[100, 101, 102],
  ]);
  expect(() => joinBatches([{ x: rows(2, 3) }, { x: rows(2, 4) }])).toThrow("[2, 3] and [2, 4]");
});
