/**
 * Law 2, exact resume, over the real engine: N steps equal k steps, save, another process's worth of nothing, N - k
 * steps, to the bit: weights, optimizer state, losses, data position. And a checkpoint is a Hugging Face folder.
 */
import { mkdtemp, readFile, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { loadPretrained } from "../../src/checkpoint/pretrained.js";
import { openCheckpoint } from "../../src/checkpoint/read.js";
import { readTensor, writeSafetensors } from "../../src/checkpoint/safetensors.js";
import { locateTensors } from "../../src/checkpoint/sharded.js";
import { loadModel } from "../../src/generate/load-model.js";
import type { DecoderOptions } from "../../src/models/decoder/config.js";
import type { TrainEvent } from "../../src/train/events.js";
import { resolveModel } from "../../src/train/model-source.js";
import type { NativeSession } from "../../src/train/native-session.js";
import type { TrainerOptions } from "../../src/train/options.js";
import { Trainer } from "../../src/train/trainer.js";
import { collect, only } from "../support/fake-trainer.js";
import { nativeOrSkip } from "../support/native.js";
import { oraclePython, runPython } from "../support/python.js";
import { REAL } from "../support/real-trainer.js";

const native = nativeOrSkip();
let root: string;
beforeAll(async () => {
  root = await mkdtemp(join(tmpdir(), "stroma-resume-"));
});
afterAll(() => rm(root, { recursive: true, force: true }));

const SIZES: DecoderOptions = { vocabSize: 260, dim: 32, layers: 2, heads: 4, kvHeads: 2, ffn: 48, maxPositions: 128 };
const base: TrainerOptions = REAL;

async function run(options: TrainerOptions, stopAfter?: number): Promise<TrainEvent[]> {
  await using trainer = new Trainer(options);
  if (stopAfter === undefined) return await collect(trainer);
  const events: TrainEvent[] = [];
  for await (const e of trainer.run()) {
    events.push(e);
    if (e.event === "step" && e.step === stopAfter) trainer.stop();
  }
  return events;
}

/** Hashes of weights and optimizer state, the position, and every step's loss and norm. */
async function outcome(outputDir: string) {
  const { state } = await openCheckpoint(outputDir);
  const lines = (await readFile(join(outputDir, "metrics.jsonl"), "utf8")).trim().split("\n");
  const steps = only(
    lines.map((l) => JSON.parse(l) as TrainEvent),
    "step",
  );
  return {
    model: state.files["model.safetensors"],
    optimizer: state.files["optimizer.safetensors"],
    position: state.data.position,
    optimizerStep: state.optimizerStep,
    steps: steps.map((e) => [e.step, e.loss, e.gradNorm, e.learningRate]),
  };
}

describe.skipIf(native === null)("exact resume", () => {
  test.each<[name: string, extra: TrainerOptions, after: number]>([
    ["float32 with dropout", {}, 3],
    [
      "float64, tied, depth first",
      { dtype: "float64", order: "depthFirst", model: { config: { ...SIZES, tiedEmbeddings: true } } },
      5,
    ],
    ["bfloat16 with float32 masters", { dtype: "bfloat16" }, 2],
    [
      "with recompute and documents packed apart",
      { recompute: "all", model: { config: { ...SIZES, documentMask: true, dropout: 0.2 } } },
      4,
    ],
    [
      "8-bit moments, bfloat16 rounded stochastically, updates on forward, state in host memory beside a simulated card",
      {
        ...{ device: "sim", offload: "host", deviceMemory: "4MB", update: "forward", dtype: "float32" },
        ...{ optimizer: "adamw8bit", precision: "bfloat16", masterWeight: "none" },
      },
      3,
    ],
    [
      "split16 masters on disk, clipped by block, at the end of the data",
      {
        ...{ offload: "disk", clip: "block", dtype: "float32", precision: "bfloat16", masterWeight: "split16" },
        ...{ steps: undefined, epochs: 1, data: { source: "planets", count: 64, workers: 0 } },
      },
      2,
    ],
    [
      "a plan chosen for a budget",
      { device: "sim", deviceMemory: "2MB", optimizer: "adamw8bit", saveEveryNSteps: 1, keepLast: 2 },
      4,
    ],
  ])("%s", async (name, extra, after) => {
    const whole = join(root, `${name} whole`);
    const parts = join(root, `${name} parts`);
    await run({ ...base, ...extra, outputDir: whole });
    const first = await run({ ...base, ...extra, outputDir: parts }, after);
    const stopped = only(first, "done")[0]!.step;
    expect(stopped).toBeLessThan(8);
    await run({ resume: true, outputDir: parts });
    expect(await outcome(parts)).toEqual(await outcome(whole));
  });

  test("in a run where a save in the background met the next steps", async () => {
    const whole = join(root, "background whole");
    const parts = join(root, "background parts");
    await run({ ...base, outputDir: whole });
    await run({ ...base, outputDir: parts, saveEveryNSteps: 1, keepLast: 9 });
    await run({ resume: join(parts, "checkpoints", "step-000003"), outputDir: parts });
    expect(await outcome(parts)).toEqual(await outcome(whole));
  });

  test("order of work and recompute do not change a bit, dropout included", async () => {
    const variants: TrainerOptions[] = [
      {},
      { order: "depthFirst" },
      { recompute: "all" },
      { order: "depthFirst", recompute: "all" },
    ];
    const outcomes = [];
    for (const [i, extra] of variants.entries()) {
      const outputDir = join(root, `variant ${i}`);
      await run({ ...base, steps: 4, ...extra, outputDir });
      outcomes.push(await outcome(outputDir));
    }
    for (const other of outcomes.slice(1)) expect(other).toEqual(outcomes[0]);
  });
});

describe.skipIf(native === null)("a loaded checkpoint", () => {
  test("generates and evaluates as the trainer did, and streams the same text", async () => {
    const outputDir = join(root, "loaded");
    await using trainer = new Trainer({ ...base, outputDir });
    await collect(trainer);
    await using model = await loadModel(outputDir, { threads: 1 });
    const options = { maxTokens: 24, seed: 3 };
    const text = await model.generate("planet", options);
    expect(text).toBe(await trainer.generate("planet", options));
    let streamed = "";
    for await (const piece of model.stream("planet", options)) streamed += piece;
    expect(streamed).toBe(text);
    expect(await model.generateMany(["planet", "x", "planes"], options)).toHaveLength(3);
    const { openDataset } = await import("../../src/data/index.js");
    const data = await openDataset({ source: "planets", count: 64, workers: 0 });
    const ours = await model.evaluate(data, { microBatchSize: 2 });
    const theirs = await trainer.evaluate();
    expect(ours.tokens).toBe(theirs.tokens);
    // Frozen parameters may take another matmul than trainable ones: equal to float32 rounding.
    expect(Math.abs(ours.loss - theirs.loss)).toBeLessThan(1e-5 * theirs.loss);
  });
});

describe.skipIf(native === null)("a trainer in a service", () => {
  test("answers requests while steps are running, and its own stop does not lose them", async () => {
    await using trainer = new Trainer({ ...base, steps: 12, outputDir: join(root, "service") });
    const answers: Promise<string>[] = [];
    const events = trainer.run();
    for await (const event of events)
      if (event.event === "step" && event.step <= 3)
        for (let i = 0; i < 20; i++) answers.push(trainer.generate("planet", { maxTokens: 6, seed: i }));
    expect(await Promise.all(answers)).toHaveLength(60);
  });

  test("gives all memory back with dispose", async () => {
    const live = (): number => {
      const session = native!.createSession(options("float32"));
      const { liveBytes } = session.stats();
      void session.dispose();
      return liveBytes;
    };
    const before = live();
    for (let i = 0; i < 2; i++) {
      await using trainer = new Trainer({ ...base, steps: 2, outputDir: join(root, `memory ${i}`) });
      await collect(trainer);
    }
    expect(live()).toBe(before);
  });
});

const options = (dtype: "float32" | "float64") => ({
  device: "cpu" as const,
  dtype,
  threads: 1,
  optimizer: { kind: "adamw" as const, beta1: 0.9, beta2: 0.95, epsilon: 1e-8, weightDecay: 0 },
});

async function logits(session: NativeSession, rows: number[][]): Promise<number[][]> {
  const shape = [rows.length, rows[0]!.length];
  const ids = BigInt64Array.from(rows.flat(), BigInt);
  const positions = BigInt64Array.from(rows.flatMap((r) => r.map((_, t) => BigInt(t))));
  const out = await session.run("generate", {
    input_ids: { dtype: "int64", shape, data: ids },
    position_ids: { dtype: "int64", shape, data: positions },
  });
  const { data } = out.logits!;
  const values = new Float32Array(data.buffer, data.byteOffset, data.byteLength / 4);
  return rows.map((_, b) =>
    Array.from(values.subarray((b * values.length) / rows.length, ((b + 1) * values.length) / rows.length)),
  );
}

function expectClose(actual: number[][], expected: number[][], relative: number): void {
  const scale = Math.max(...expected.flat().map(Math.abs));
  const worst = Math.max(...expected.flatMap((row, b) => row.map((v, i) => Math.abs(actual[b]![i]! - v))));
  expect(worst / scale).toBeLessThan(relative);
}

describe.skipIf(native === null || oraclePython() === null)("Hugging Face folders", () => {
  const script = "tests/oracle/pretrained.py";
  interface Made {
    rows: number[][];
    logits: Record<string, number[][]>;
  }

  async function open(folder: string): Promise<{ session: NativeSession; load: () => Promise<void> }> {
    const model = resolveModel(folder);
    const session = native!.createSession(options("float32"));
    const graph = model.graph("train", "float32");
    await session.load(graph);
    await session.attach("generate", model.graph("generate", "float32"));
    return { session, load: () => loadPretrained(session, graph, folder) };
  }

  test("of one or several files, float32, bfloat16 or float16, give transformers' logits", async () => {
    const made = await runPython<Made>(script, ["make", root]);
    expect(Object.keys(made.logits)).toHaveLength(4);
    for (const [name, expected] of Object.entries(made.logits)) {
      const { session, load } = await open(join(root, name));
      await load();
      expectClose(await logits(session, made.rows), expected, 1e-5);
      await session.dispose();
    }
  }, 300_000);

  test("with tensors missing, of another shape or too many are refused, each named", async () => {
    const folder = join(root, "llama-tied");
    const tensors = await locateTensors(folder);
    const read: Record<string, Awaited<ReturnType<typeof readTensor>>> = {};
    for (const [name, t] of tensors) read[name] = await readTensor(t.file, t);
    const norm = read["model.norm.weight"]!;
    delete read["model.layers.1.mlp.up_proj.weight"];
    read["model.norm.weight"] = { ...norm, shape: [6, 8] };
    read["model.layers.0.self_attn.q_proj.bias"] = norm;
    read["model.layers.0.self_attn.rotary_emb.inv_freq"] = norm;
    const broken = await mkdtemp(join(root, "broken-"));
    await writeFile(join(broken, "config.json"), await readFile(join(folder, "config.json")));
    await writeSafetensors(join(broken, "model.safetensors"), read, { format: "pt" });
    const { session, load } = await open(broken);
    const error = await load().then(
      () => null,
      (e: { code: string; details: { problems: string[] } }) => e,
    );
    expect(error?.code).toBe("CHECKPOINT");
    expect(error?.details.problems).toEqual([
      "missing model.layers.1.mlp.up_proj.weight [80, 48]",
      "model.norm.weight: expected [48], got [6, 8]",
      "unexpected model.layers.0.self_attn.q_proj.bias",
    ]);
    await session.dispose();
  });

  test("are what a checkpoint is: transformers loads it and gives our logits", async () => {
    const outputDir = join(root, "exported");
    const rows = [[104, 101, 108, 108, 111]];
    for (const [i, extra] of [{ tiedEmbeddings: true }, { qkNorm: true, headDim: 16 }].entries()) {
      const dir = `${outputDir}-${i}`;
      await using trainer = new Trainer({
        ...base,
        model: { config: { ...SIZES, ...extra } },
        steps: 3,
        outputDir: dir,
      });
      await collect(trainer);
      const { path } = await openCheckpoint(dir);
      const theirs = await runPython<{ problems: object; type: string; logits: number[][] }>(
        script,
        ["read", path],
        rows,
      );
      expect(theirs.problems).toEqual({});
      expect(theirs.type).toBe(["LlamaForCausalLM", "Qwen3ForCausalLM"][i]);
      const { session, load } = await open(path);
      await load();
      expectClose(await logits(session, rows), theirs.logits, 1e-5);
      await session.dispose();
    }
  }, 300_000);
});
