import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { type CheckpointState, encodeState } from "../../../src/checkpoint/format.js";
import { type DemoScore, demoFolder, scoreLines } from "../../../src/cli/demo.js";
import { checkModelName } from "../../../src/cli/train.js";

const score = (model: number, unparseable = 0): DemoScore => ({
  event: "score",
  checkpoint: "x",
  temperature: {
    count: 256,
    model: { meanAbsolute: model, rms: 2 * model },
    mean: { meanAbsolute: 20, rms: 30 },
    nearestNeighbour: { meanAbsolute: 10, rms: 15 },
    unparseable,
    trainingMean: 280,
    trainingCount: 20_000,
    examples: [],
  },
  bitsPerByte: { model: 1.25, gzip: 1.715, heldOutBytes: 67_500 },
  seconds: 3,
});

describe("the score, as it is", () => {
  it("stands beside its baselines", () => {
    expect(scoreLines(score(5))).toEqual([
      "Surface temperature of 256 simulated planets that it never saw",
      "                                 mean abs. error  rms error",
      "───────────────────────────────  ───────────────  ─────────",
      "this model                                5.00 K    10.00 K",
      "nearest of 20k training planets          10.00 K    15.00 K",
      "mean of the training planets             20.00 K    30.00 K",
      "better than the mean (0.25 of its error)",
      "better than the nearest neighbour (0.50 of its error)",
      "",
      "Bits per byte of 67.5k held-out bytes",
      "            bits per byte",
      "──────────  ─────────────",
      "this model          1.250",
      "gzip -9             1.715",
    ]);
  });

  it("says so when the model lost, also by a tie, and when it gave no number", () => {
    const text = scoreLines(score(20, 0.125)).join("\n");
    expect(text).toContain(
      "no better than the mean (1.00 times its error)\nno better than the nearest neighbour (2.00 times its error)",
    );
    expect(text).toContain("12.5 % of its answers were no temperature");
    expect(scoreLines(score(12)).join("\n")).toContain(
      "better than the mean (0.60 of its error)\nno better than the nearest",
    );
  });
});

describe("the folder of a demonstration", () => {
  let parent: string;
  beforeEach(() => {
    parent = mkdtempSync(join(tmpdir(), "stroma-demo-"));
  });
  afterEach(() => rmSync(parent, { recursive: true, force: true }));

  const checkpoint = (run: string, step: number, steps: number) => {
    const path = join(parent, run, "checkpoints", `step-${String(step).padStart(6, "0")}`);
    mkdirSync(path, { recursive: true });
    const state: CheckpointState = {
      format: "stromatolite.checkpoint",
      version: 2,
      sequence: 1,
      step,
      optimizerStep: step,
      tokens: 1,
      model: "decoder",
      graphHash: "x",
      dtype: "float32",
      storage: "float32",
      masterWeight: "none",
      plan: null,
      optimizer: { kind: "adamw", beta1: 0.9, beta2: 0.95, epsilon: 1e-8, weightDecay: 0.01 },
      data: { name: "planets", fingerprint: "x", sequenceLength: 226, microBatchSize: 16, position: null },
      rng: { generator: "philox4x32-10", seed: 0, step },
      versions: { stromatolite: "0", libtorch: "0", node: "0" },
      files: Object.fromEntries(
        ["model.safetensors", "optimizer.safetensors", "graph.json", "trainer.json"].map((name) => [
          name,
          { bytes: 1, sha256: "x" },
        ]),
      ),
    };
    writeFileSync(join(path, "state.json"), encodeState(state));
    writeFileSync(join(path, "trainer.json"), JSON.stringify({ options: { steps } }));
  };

  it("is new for the first run, and for each that follows a finished one", async () => {
    expect(await demoFolder(join(parent, "none"), 600)).toEqual({
      path: join(parent, "none", "planets-1"),
      resume: false,
    });
    checkpoint("planets-9", 600, 600);
    checkpoint("planets-10", 600, 600);
    expect(await demoFolder(parent, 600)).toEqual({ path: join(parent, "planets-11"), resume: false });
  });

  it("is that of an interrupted run of the same length, which goes on", async () => {
    checkpoint("planets-1", 250, 600);
    expect(await demoFolder(parent, 600)).toEqual({ path: join(parent, "planets-1"), resume: true });
    expect(await demoFolder(parent, 900)).toEqual({ path: join(parent, "planets-2"), resume: false });
  });

  it("is taken again when nothing was saved in it", async () => {
    mkdirSync(join(parent, "planets-3"));
    expect(await demoFolder(parent, 600)).toEqual({ path: join(parent, "planets-3"), resume: false });
  });
});

describe("a model's name", () => {
  it("a preset or a path, else the nearest preset is named", () => {
    expect(() => checkModelName("tiny")).not.toThrow();
    expect(() => checkModelName(tmpdir())).not.toThrow();
    expect(() => checkModelName("tinny")).toThrow('no folder "tinny". Did you mean tiny?');
  });
});
