import { describe, expect, it } from "vitest";
import { parseConfig } from "../../../src/cli/config-file.js";
import { demoTraining } from "../../../src/cli/demo.js";
import { describeError } from "../../../src/cli/errors.js";
import {
  camel,
  checkOption,
  checkOptions,
  demoOptions,
  evalOptions,
  generateOptions,
  kebab,
  type OptionSpec,
  trainOptions,
} from "../../../src/cli/options.js";
import { toTrainerOptions } from "../../../src/cli/train.js";
import { StromaError } from "../../../src/errors.js";
import { resolveOptions } from "../../../src/train/options.js";

const tables: Record<string, Record<string, OptionSpec>> = {
  train: trainOptions,
  eval: evalOptions,
  generate: generateOptions,
  demo: demoOptions,
};

function thrown(body: () => unknown): StromaError {
  try {
    body();
  } catch (error) {
    if (error instanceof StromaError) return error;
    throw error;
  }
  throw new Error("nothing was thrown");
}

describe("the options, declared once", () => {
  it("the flags are these: adding or renaming one is a decision", () => {
    expect(
      Object.fromEntries(Object.entries(tables).map(([c, t]) => [c, Object.keys(t).map((n) => `--${kebab(n)}`)])),
    ).toMatchInlineSnapshot(`
      {
        "demo": [
          "--steps",
          "--output-dir",
          "--planets",
          "--threads",
          "--json",
        ],
        "eval": [
          "--checkpoint",
          "--data",
          "--sequence-length",
          "--micro-batch-size",
          "--micro-batches",
          "--device",
          "--threads",
          "--json",
        ],
        "generate": [
          "--checkpoint",
          "--prompt",
          "--max-tokens",
          "--temperature",
          "--top-k",
          "--top-p",
          "--seed",
          "--device",
          "--threads",
          "--json",
        ],
        "train": [
          "--model",
          "--data",
          "--template",
          "--split-key",
          "--validation-share",
          "--packing",
          "--on-bad-source",
          "--seed",
          "--resume",
          "--config",
          "--steps",
          "--epochs",
          "--batch-size",
          "--micro-batch-size",
          "--gradient-accumulation-steps",
          "--sequence-length",
          "--learning-rate",
          "--learning-rate-schedule",
          "--warmup-steps",
          "--decay-steps",
          "--weight-decay",
          "--max-grad-norm",
          "--clip",
          "--optimizer",
          "--non-finite",
          "--output-dir",
          "--log-every-n-steps",
          "--save-every-n-steps",
          "--save-every-n-epochs",
          "--keep-last",
          "--eval-every-n-steps",
          "--eval-micro-batches",
          "--sample-every-n-steps",
          "--sample-prompt",
          "--sample-tokens",
          "--profile-memory",
          "--json",
          "--device",
          "--dtype",
          "--threads",
          "--precision",
          "--master-weight",
          "--plan",
          "--offload",
          "--device-memory",
          "--host-memory",
          "--disk",
          "--disk-folder",
          "--recompute",
          "--layers-per-block",
          "--update",
          "--order",
          "--ranks",
          "--gpus",
          "--restart",
          "--rank-timeout",
          "--stages",
          "--shards",
          "--replicas",
          "--context",
          "--reduce-dtype",
          "--shared-host",
          "--transport",
          "--distributed",
          "--use-8bit-optimizer",
          "--use-mixed-precision",
          "--use-cpu-offloading",
          "--use-gradient-checkpointing",
        ],
      }
    `);
  });

  it("every example is taken, names survive the way to the command line and back, and help is there", () => {
    for (const table of Object.values(tables))
      for (const [name, spec] of Object.entries(table)) {
        if (!spec.switch) expect(() => checkOption(table, name, spec.example, name)).not.toThrow();
        expect(camel(kebab(name))).toBe(name);
        expect(spec.help.length).toBeGreaterThan(3);
      }
  });

  it("defaults in the help are the Trainer's", () => {
    const resolved = resolveOptions({ model: "tiny", data: "planets" }) as unknown as Record<string, unknown>;
    const elsewhere = new Set([
      "weightDecay",
      "learningRateSchedule",
      "microBatchSize",
      "outputDir",
      "ranks", // their number here, which rank this is there
      "stages", // what is not said, training settles: by a rule, or as the planner finds
      "shards",
      "transport", // chosen when all ranks are there
      "validationShare",
      "packing",
      "onBadSource",
      "optimizer",
      "dtype",
      "device", // what it becomes here is the machine's
      "deviceMemory",
      "hostMemory",
      "disk",
      "diskFolder",
    ]);
    for (const [name, spec] of Object.entries(trainOptions as Record<string, OptionSpec>)) {
      if (spec.default === null || spec.switch || elsewhere.has(name) || !(name in resolved)) continue;
      // After a semicolon: what it is where another option is given.
      expect([name, String(resolved[name])]).toEqual([name, String(spec.default).split(";")[0]]);
    }
    expect(resolved.deviceAsked).toBe(trainOptions.device.default);
    expect((resolved.optimizer as { kind: string }).kind).toBe(trainOptions.optimizer.default);
    expect((resolved.optimizer as { weightDecay: number }).weightDecay).toBe(trainOptions.weightDecay.default);
  });

  it("every option but the command line's own reaches the Trainer and is accepted by it", () => {
    const values = Object.fromEntries(
      Object.entries(trainOptions as Record<string, OptionSpec>)
        .filter(
          ([name, spec]) =>
            !spec.commandLineOnly &&
            !spec.switch &&
            !["epochs", "resume", "microBatchSize", "decaySteps", "data"].includes(name) &&
            // The planner's choice, as --plan auto says below.
            !["order", "recompute", "update"].includes(name),
        )
        .map(([name, spec]) => [name, spec.example]),
    );
    const flags = checkOptions(trainOptions, { ...values, data: "stars.csv", learningRateSchedule: "cosine" });
    const resolved = resolveOptions(toTrainerOptions(flags));
    expect(resolved).toMatchObject({
      model: "tiny",
      data: { source: "stars.csv", splitKey: "hostname", validationShare: 0.1, packing: "split", onBadSource: "skip" },
      seed: 1,
      steps: 400,
      batchSize: 32,
      gradientAccumulationSteps: 8,
      microBatchSize: 4,
      learningRateSchedule: { kind: "cosine", warmupSteps: 50, finalFraction: 0.1 },
      maxGradNorm: 0.5,
      clip: "global",
      nonFinite: "skip",
      samplePrompts: ["synthetic star"],
      device: "sim",
      dtype: "bfloat16",
      precision: "bfloat16",
      masterWeight: "float32",
      plan: "auto",
      offload: "auto",
      deviceMemory: 2 ** 33,
      hostMemory: 64e9,
      disk: 200e9,
      diskFolder: "/tmp",
      profileMemory: 3,
      order: null,
      recompute: null,
      update: null,
    });
    expect(resolved.optimizer.kind).toBe("adamw8bit");
    const ordered = checkOptions(trainOptions, { order: "depthFirst", recompute: "all", update: "forward" });
    expect(resolveOptions(toTrainerOptions(ordered))).toMatchObject({
      order: "depthFirst",
      recompute: "all",
      update: "forward",
      plan: "resident",
      offload: "none",
    });
    expect(resolved.optimizer.weightDecay).toBe(0.1);
  });

  it("switches stand for values of other options, and do not contradict them", () => {
    const all = Object.fromEntries(
      ["use8bitOptimizer", "useMixedPrecision", "useCpuOffloading", "useGradientCheckpointing"].map((n) => [n, true]),
    );
    const given = toTrainerOptions(checkOptions(trainOptions, { ...all, device: "sim" }));
    expect(given).toEqual({
      ...{ model: "tiny", data: "planets", device: "sim" },
      ...{ optimizer: "adamw8bit", precision: "bfloat16", offload: "host", recompute: "all" },
    });
    expect(resolveOptions(given)).toMatchObject({ offload: "host", update: "forward", dtype: null });
    expect(toTrainerOptions({ use8bitOptimizer: false })).toEqual({ model: "tiny", data: "planets" });
    expect(thrown(() => toTrainerOptions({ use8bitOptimizer: true, optimizer: "adamw" })).message).toBe(
      "[cli] --use-8bit-optimizer means --optimizer adamw8bit, and --optimizer adamw is given: leave one out",
    );
  });

  it("the demonstration's training is accepted at any length", () => {
    for (const steps of [1, 7, 600]) expect(() => resolveOptions(demoTraining(steps, "x", 2))).not.toThrow();
  });
});

describe("refused values", () => {
  it("the message names the flag, what it takes, what it got and an example", () => {
    expect(thrown(() => checkOptions(trainOptions, { steps: "ten" })).message).toBe(
      '[options] expected a whole number of at least 1, got "ten", at --steps. For example: --steps 400',
    );
    expect(thrown(() => checkOptions(trainOptions, { nonFinite: "explode" })).message).toContain("one of stop, skip");
    expect(thrown(() => checkOptions(trainOptions, { model: { config: {}, x: 1 } })).code).toBe("INVALID_ARGUMENT");
  });

  it.each([
    ["steps", "0"],
    ["steps", "1.5"],
    ["steps", "0x10"],
    ["steps", ""],
    ["learningRate", "-1"],
    ["learningRate", "NaN"],
    ["learningRate", "Infinity"],
    ["validationShare", "1"],
    ["maxGradNorm", "0"],
    ["deviceMemory", "many"],
    ["disk", "-4GB"],
    ["offload", "gpu"],
  ])("--%s %s", (name, value) => {
    expect(thrown(() => checkOptions(trainOptions, { [name]: value })).code).toBe("INVALID_ARGUMENT");
  });

  it("an option that is given twice", () => {
    expect(thrown(() => checkOptions(trainOptions, { steps: ["4", "5"] })).message).toContain("2 values: 4, 5");
  });

  it("flags that need another one say which", () => {
    expect(thrown(() => toTrainerOptions({ decaySteps: 3 })).message).toContain("--learning-rate-schedule");
    expect(
      thrown(() => toTrainerOptions({ learningRateSchedule: "warmupStableDecay", decaySteps: 3 })).message,
    ).toContain("--warmup-steps");
    expect(thrown(() => toTrainerOptions({ template: "{a}" })).message).toContain("--template is for files");
    expect(thrown(() => toTrainerOptions({ resume: true, packing: "split" })).message).toContain("--data");
  });
});

describe("resuming", () => {
  it("names neither model nor data, so that the saved run's are taken", () => {
    expect(toTrainerOptions({ resume: "runs/x" })).toEqual({ resume: "runs/x" });
    expect(toTrainerOptions({ resume: true })).toEqual({ resume: true, outputDir: "runs/tiny" });
    expect(toTrainerOptions({ resume: "auto" })).toEqual({ resume: "auto", model: "tiny", data: "planets" });
  });
});

describe("the config file", () => {
  const parse = (text: string) => parseConfig(text, "train.yaml", trainOptions);

  it("YAML and JSON mean the same, with dashes and without", () => {
    const expected = { steps: 40, learningRate: 1e-3, maxGradNorm: null, samplePrompt: "a: b", model: "tiny" };
    expect(
      parse("# a run\nsteps: 40\nlearning-rate: 1e-3\nmax-grad-norm: none\nsamplePrompt: 'a: b'\nmodel: tiny\n"),
    ).toEqual(expected);
    expect(
      parse('{\n\t"steps": 40, "learningRate": 0.001, "maxGradNorm": null, "samplePrompt": "a: b", "model": "tiny"}'),
    ).toEqual(expected);
    expect(parse("")).toEqual({});
  });

  it("holds a model's own config", () => {
    expect(parse("model:\n  config: {vocabSize: 258, dim: 64}\n")).toEqual({
      model: { config: { vocabSize: 258, dim: 64 } },
    });
  });

  it("an unknown key is refused with the nearest name", () => {
    expect(thrown(() => parse("learning_rate: 3")).message).toBe(
      '[config] unknown option "learning_rate", at train.yaml. Did you mean learningRate?',
    );
    expect(thrown(() => parse("batch-sise: 3")).message).toContain("Did you mean batch-size?");
    expect(thrown(() => parse("toString: 3")).code).toBe("CONFIG");
    expect(thrown(() => parse("config: other.yaml")).message).toContain("belongs on the command line");
  });

  it("doubled keys, lists and broken syntax are refused with the place", () => {
    expect(thrown(() => parse("steps: 4\nsteps: 5\n")).message).toContain("train.yaml:2:1");
    expect(thrown(() => parse("batchSize: 4\nbatch-size: 5\n")).message).toContain("given twice");
    expect(thrown(() => parse("steps: [4\n")).message).toMatch(/train\.yaml:\d+:\d+/);
    expect(thrown(() => parse("- 4\n")).message).toContain("got a list");
    expect(thrown(() => parse("steps: many\n")).message).toContain("at train.yaml: steps");
  });

  it("aliases that lead nowhere, or unfold without end, are refused", () => {
    expect(thrown(() => parse("model: *nowhere\n"))).toMatchObject({
      code: "CONFIG",
      message: /train\.yaml: .*nowhere/,
    });
    const tens = (of: string) => `[${Array(10).fill(of).join(", ")}]`;
    const bomb = ["a: &a [x]", ...["b", "c", "d", "e"].map((n, i) => `${n}: &${n} ${tens(`*${"abcd"[i]}`)}`)].join(
      "\n",
    );
    expect(thrown(() => parse(bomb))).toMatchObject({ code: "CONFIG", message: /train\.yaml: Excessive alias/ });
  });
});

it("messages of refusals name flags, also where the cure is one", () => {
  for (const code of ["CONFIG", "OUT_OF_MEMORY"] as const)
    expect(describeError(new StromaError(code, "it fits with masterWeight none")).message).toBe(
      "it fits with --master-weight none",
    );
  expect(describeError(new StromaError("DATA", "a column masterWeight")).message).toBe("a column masterWeight");
});
