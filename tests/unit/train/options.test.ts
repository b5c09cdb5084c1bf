import { describe, expect, test } from "vitest";
import {
  mergeOptions,
  resolveBatch,
  resolveOptions,
  resolveSchedule,
  savedOptions,
  type TrainerOptions,
} from "../../../src/train/options.js";

const base = { model: "tiny", data: "planets" };

describe("the arithmetic of the batch", () => {
  const trio = (batchSize: number, microBatchSize: number, gradientAccumulationSteps: number) => ({
    batchSize,
    microBatchSize,
    gradientAccumulationSteps,
  });

  test.each([
    [{}, trio(8, 8, 1)],
    [{ batchSize: 32 }, trio(32, 32, 1)],
    [{ microBatchSize: 4 }, trio(4, 4, 1)],
    [{ gradientAccumulationSteps: 32 }, trio(32, 1, 32)],
    [{ batchSize: 32, microBatchSize: 4 }, trio(32, 4, 8)],
    [{ batchSize: 32, gradientAccumulationSteps: 4 }, trio(32, 8, 4)],
    [{ microBatchSize: 3, gradientAccumulationSteps: 5 }, trio(15, 3, 5)],
    [trio(12, 3, 4), trio(12, 3, 4)],
  ])("%j gives %j", (given, expected) => {
    expect(resolveBatch(given)).toEqual(expected);
  });

  test("ranks that share blocks get a micro-batch each, unless it is said otherwise", () => {
    expect(resolveBatch({}, 2)).toEqual(trio(8, 4, 2));
    expect(resolveBatch({ batchSize: 12 }, 3)).toEqual(trio(12, 4, 3));
    expect(resolveBatch({ microBatchSize: 2 }, 4)).toEqual(trio(8, 2, 4));
    expect(resolveBatch({ batchSize: 12, microBatchSize: 2 }, 3)).toEqual(trio(12, 2, 6));
    expect(resolveBatch({ gradientAccumulationSteps: 8 }, 4)).toEqual(trio(8, 1, 8));
  });

  test("a contradiction is refused with the product shown", () => {
    expect(() => resolveBatch(trio(32, 4, 4))).toThrow("32 is not microBatchSize 4 x gradientAccumulationSteps 4 = 16");
    expect(() => resolveBatch({ batchSize: 10, microBatchSize: 4 })).toThrow("10 = 2 x 4 + 2");
    expect(() => resolveBatch({ batchSize: 10, gradientAccumulationSteps: 3 })).toThrow("10 = 3 x 3 + 1");
    expect(() => resolveBatch({ batchSize: 0 })).toThrow("batchSize");
    expect(() => resolveBatch({ microBatchSize: 1.5 })).toThrow("microBatchSize");
  });
});

describe("options", () => {
  test("that do not exist or miss are refused by name", () => {
    expect(() => resolveOptions({ ...base, learningrate: 1 } as never)).toThrow('unknown option "learningrate"');
    expect(() => resolveOptions({ data: "planets" })).toThrow("no model");
    expect(() => resolveOptions({ model: "tiny" })).toThrow("no data");
  });

  test("steps and epochs exclude each other; without either it is 1,000 steps", () => {
    expect(() => resolveOptions({ ...base, steps: 3, epochs: 2 })).toThrow("steps 3 and epochs 2");
    expect(resolveOptions(base)).toMatchObject({ steps: 1000, epochs: null });
    expect(resolveOptions({ ...base, epochs: 2 })).toMatchObject({ steps: null, epochs: 2 });
  });

  test.each([
    [{ learningRate: -1 }, "learningRate"],
    [{ learningRate: Number.NaN }, "learningRate"],
    [{ maxGradNorm: 0 }, "maxGradNorm"],
    [{ seed: -1 }, "seed"],
    [{ threads: 1025 }, "threads"],
    [{ samplePrompts: "text" as never }, "samplePrompts"],
    [{ samplePrompts: [5] as never }, "samplePrompts"],
    [{ seed: 2 ** 53 }, "seed"],
    [{ device: "gpu" }, "device"],
    [{ dtype: "float16" }, "dtype"],
    [{ order: "sideways" }, "order"],
    [{ nonFinite: "ignore" }, "nonFinite"],
    [{ keepLast: 0 }, "keepLast"],
    [{ weightDecay: -0.1 }, "weightDecay"],
    [{ learningRateSchedule: "exponential" }, "learningRateSchedule"],
    [{ steps: 10, learningRateSchedule: { kind: "warmupStableDecay", warmupSteps: 8, decaySteps: 4 } }, "8 \\+ 4 = 12"],
    [{ sampleEveryNSteps: 5 }, "samplePrompts"],
  ])("%j is refused", (given, name) => {
    expect(() => resolveOptions({ ...base, ...given } as never)).toThrow(new RegExp(name));
  });

  test("named schedules get phases that fit the run", () => {
    expect(resolveSchedule(null, 200)).toEqual({ kind: "cosine", warmupSteps: 10, finalFraction: 0.1 });
    expect(resolveSchedule("warmupStableDecay", 100_000)).toMatchObject({ warmupSteps: 100, decaySteps: 20_000 });
    expect(resolveSchedule("linear", 3)).toEqual({ kind: "linear", warmupSteps: 0 });
  });
});

describe("saved options under given ones", () => {
  const saved = { ...base, steps: 100, batchSize: 32, microBatchSize: 4, gradientAccumulationSteps: 8, seed: 3 };

  test("keep what is not named", () => {
    expect(mergeOptions(saved, { seed: undefined, keepLast: 2 })).toEqual({ ...saved, keepLast: 2 });
  });

  test("give way where a given number would contradict them", () => {
    expect(resolveBatch(mergeOptions(saved, { gradientAccumulationSteps: 2 }))).toMatchObject({
      batchSize: 8,
      microBatchSize: 4,
    });
    expect(resolveBatch(mergeOptions(saved, { batchSize: 64 }))).toMatchObject({ gradientAccumulationSteps: 16 });
    expect(resolveBatch(mergeOptions(saved, { batchSize: 6, gradientAccumulationSteps: 2 }))).toMatchObject({
      microBatchSize: 3,
    });
    expect(mergeOptions(saved, { epochs: 2 }).steps).toBeUndefined();
  });
});

describe("how state is stored and where it lives", () => {
  test.each<[given: object, why: string]>([
    [{ precision: "float32", dtype: "bfloat16" }, "precision float32 does not go with dtype bfloat16"],
    [{ precision: "bfloat16", dtype: "float64" }, "does not go with dtype float64"],
    [{ masterWeight: "split16" }, "stored in bfloat16, not float32"],
    [{ clip: "none", maxGradNorm: 2 }, "leave one out"],
    [{ clip: "block", maxGradNorm: null }, "without a maxGradNorm"],
    [{ update: "backward" }, "before the norm of all gradients"],
    [{ plan: "resident", offload: "disk" }, "leave one out"],
    [{ plan: "auto", offload: "disk" }, "leave one out"],
    [{ offload: "host" }, "on device cpu that is the host's"],
    [{ hostMemory: "4GB", plan: "auto" }, "one memory"],
    [{ device: "sim", hostMemory: "4GB", plan: "resident" }, "offload none keeps everything there"],
    [{ disk: "4GB", plan: "resident" }, "keeps nothing on one"],
    [{ diskFolder: "/tmp" }, "nothing goes to disk"],
    [{ plan: "auto", order: "depthFirst" }, "plan auto chooses it"],
    [{ plan: "auto", update: "end" }, "plan auto chooses it"],
    [{ deviceMemory: "1GB", recompute: "none" }, "plan auto chooses it"],
    [{ offload: "disk", recompute: "none" }, "takes them away between passes"],
    [{ recompute: "some" }, "one of all, none, selective"],
    [{ layersPerBlock: 0 }, "a whole number of at least 1"],
    [{ deviceMemory: "much" }, "deviceMemory to be a size"],
    [{ deviceMemory: 0 }, "a size above 0"],
    [{ optimizer: "lion" }, "one of adamw, adamw8bit"],
    [{ offload: "gpu" }, "one of none, host, disk, auto"],
  ])("%j is refused", (given, why) => {
    expect(() => resolveOptions({ ...base, ...given } as never)).toThrow(why);
  });

  const ranks = { rank: 0, size: 2, address: "a", port: 1, serve: true, prefix: "", joinSeconds: 1, silenceSeconds: 1 };
  test.each<[given: object, resolved: object]>([
    [{}, { plan: "auto", offload: "auto", planUnasked: true, order: null, update: null, layersPerBlock: null }],
    [{ recompute: "all" }, { plan: "auto", recompute: "all" }],
    [{ order: "depthFirst" }, { plan: "resident", offload: "none", order: "depthFirst" }],
    [{ recompute: "none" }, { plan: "resident", offload: "none" }],
    [{ ranks }, { plan: "auto", offload: "auto", planUnasked: true }],
    [
      { ranks, stages: "contiguous", shards: 2 },
      { plan: "auto", stages: "contiguous", shards: 2 },
    ],
    [
      { ranks, order: "breadthFirst" },
      { plan: "resident", offload: "none" },
    ],
    [{ plan: "resident" }, { plan: "resident", offload: "none" }],
  ])("on a card, %j: the planner chooses unless something of it is said", (given, resolved) => {
    const card = () => ({ device: "cuda:0", why: null }) as const;
    expect(resolveOptions({ ...base, ...given } as never, card)).toMatchObject(resolved);
  });

  test("what a card left to the planner is left to whatever goes on", () => {
    const card = () => ({ device: "cuda:0", why: null }) as const;
    const saved = (given: object) =>
      savedOptions(resolveOptions({ ...base, ...given } as never, card), null, null).options;
    for (const name of ["plan", "offload", "planUnasked"]) expect(saved({})).not.toHaveProperty(name);
    expect(saved({ plan: "auto" })).toMatchObject({ plan: "auto", offload: "auto" });
  });

  test.each<[given: object, resolved: object]>([
    [{}, { plan: "resident", offload: "none", update: "end", clip: "global", precision: "float32", dtype: "float32" }],
    [{ dtype: "bfloat16" }, { precision: "bfloat16", dtype: "bfloat16", masterWeight: "float32" }],
    [{ precision: "bfloat16" }, { dtype: null, masterWeight: "float32" }],
    [
      { precision: "bfloat16", dtype: "float32", masterWeight: "none" },
      { dtype: "float32", masterWeight: "none" },
    ],
    [{ precision: "float64" }, { dtype: "float64", masterWeight: "none" }],
    [{ maxGradNorm: null }, { clip: "none", maxGradNorm: null }],
    [{ clip: "none" }, { clip: "none", maxGradNorm: null }],
    [{ deviceMemory: "8GiB" }, { plan: "auto", offload: "auto", deviceMemory: 2 ** 33, order: null, update: null }],
    [
      { plan: "resident", deviceMemory: "8GiB" },
      { plan: "resident", offload: "none", deviceMemory: 2 ** 33 },
    ],
    [{ offload: "disk" }, { plan: null, update: "forward", recompute: "all", order: "breadthFirst" }],
    [
      { offload: "disk", recompute: "selective", layersPerBlock: 2 },
      { plan: null, recompute: "selective", layersPerBlock: 2 },
    ],
    [{}, { layersPerBlock: 1 }],
    [{ plan: "auto" }, { layersPerBlock: null, recompute: null }],
    [
      { plan: "auto", recompute: "selective", layersPerBlock: 2 },
      { recompute: "selective", layersPerBlock: 2 },
    ],
    [{ offload: "disk", clip: "block" }, { update: "backward" }],
    [
      { offload: "none", plan: "auto", recompute: "all" },
      { plan: "auto", offload: "none", recompute: "all" },
    ],
  ])("%j means %j", (given, resolved) => {
    expect(resolveOptions({ ...base, ...given } as never)).toMatchObject(resolved);
  });

  test("what is saved gives the same options again; another place does not inherit half of the old plan", () => {
    for (const given of [{}, { offload: "disk", clip: "block" }, { deviceMemory: "8GB", precision: "bfloat16" }]) {
      const resolved = resolveOptions({ ...base, ...given } as never);
      const { options } = savedOptions(resolved, "planets", "tiny") as { options: TrainerOptions };
      expect(resolveOptions(JSON.parse(JSON.stringify(options)))).toEqual(resolved);
    }
    const { options } = savedOptions(resolveOptions(base), "planets", "tiny") as { options: TrainerOptions };
    expect(resolveOptions(mergeOptions(options, { offload: "disk" }))).toMatchObject({ recompute: "all", plan: null });
    expect(resolveOptions(mergeOptions(options, { maxGradNorm: null }))).toMatchObject({ clip: "none" });
    expect(resolveOptions(mergeOptions({ ...options, maxGradNorm: 3 }, { clip: "none" }))).toMatchObject({
      maxGradNorm: null,
    });
  });
});
