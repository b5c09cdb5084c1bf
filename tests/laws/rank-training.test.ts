/**
 * Laws 1, 2 and 4 for a whole run of several ranks: the checkpoint is that of one rank, to the bit, and any number of
 * ranks goes on from it; what one rank meets, all are told.
 */
import { mkdtemp, readdir, readFile, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { openCheckpoint } from "../../src/checkpoint/read.js";
import { loadModel } from "../../src/generate/load-model.js";
import type { TrainEvent } from "../../src/train/events.js";
import type { TrainerOptions } from "../../src/train/options.js";
import { Trainer } from "../../src/train/trainer.js";
import { tensorsOf } from "../support/checkpoint-tensors.js";
import { collect, only } from "../support/fake-trainer.js";
import { nativeOrSkip } from "../support/native.js";
import { REAL } from "../support/real-trainer.js";
import { freePort } from "./rank-case.js";

const native = nativeOrSkip();
let root: string;
beforeAll(async () => {
  root = await mkdtemp(join(tmpdir(), "stroma-ranks-"));
});
afterAll(() => rm(root, { recursive: true, force: true }));

async function runRanks(size: number, options: TrainerOptions, each: (rank: number) => TrainerOptions = () => ({})) {
  const port = await freePort();
  const spec = { size, address: "127.0.0.1", port, serve: true, prefix: "", joinSeconds: 30, silenceSeconds: 30 };
  return Promise.allSettled(
    [...Array(size).keys()].map(async (rank) => {
      await using trainer = new Trainer({ ...options, ...each(rank), ranks: { ...spec, rank } });
      return await collect(trainer);
    }),
  );
}
const values = <T>(settled: PromiseSettledResult<T>[]): T[] =>
  settled.map((s) => {
    if (s.status === "rejected") throw s.reason;
    return s.value;
  });

const losses = (events: TrainEvent[]) => only(events, "step").map((e) => [e.step, e.loss, e.gradNorm]);

const TIED_STILL = { config: { ...REAL.model.config, dropout: 0, tiedEmbeddings: true } };
const TIED = { config: { ...REAL.model.config, tiedEmbeddings: true } };

describe.skipIf(!native)("ranks", () => {
  const options: TrainerOptions = { ...REAL, evalEveryNSteps: 4, evalMicroBatches: 2, order: "breadthFirst" };
  const folder = (name: string) => join(root, name);
  // What a folder is named after: the options that differ.
  const named = (extra: Partial<TrainerOptions>) => JSON.stringify(extra).replaceAll(/[^A-Za-z0-9]+/g, "-");

  test.each([
    [2, {}],
    [3, { stages: "contiguous", order: "depthFirst" }],
    [2, { device: "sim", offload: "host", optimizer: "adamw8bit", clip: "block", update: "backward" }],
    [2, { order: undefined, plan: "auto", offload: "auto" }],
    // The embedding is on the first rank, and on the last as the head's matrix.
    [2, { model: TIED, stages: "contiguous", order: "oneForwardOneBackward", precision: "bfloat16" }],
    [2, { model: TIED, stages: "interleaved", order: "oneForwardOneBackward", batchSize: 8 }],
    [3, { model: TIED, stages: "contiguous", device: "sim", offload: "host", clip: "global", update: "forward" }],
  ] as [number, Partial<TrainerOptions>][])("%i train what one does: %j", async (size, extra) => {
    const all = { ...options, ...extra };
    const [one, many] = [folder(`one-${size}-${named(extra)}`), folder(`many-${size}-${named(extra)}`)];
    const { stages: _, plan: __, offload: ___, update: ____, device: _____, ...plain } = all;
    await using alone = new Trainer({ ...plain, outputDir: one });
    const expected = await collect(alone);
    const ranks = values(await runRanks(size, { ...all, outputDir: many }));
    for (const events of ranks) {
      expect(losses(events)).toEqual(losses(expected));
      expect(only(events, "eval").map((e) => e.loss)).toEqual(only(expected, "eval").map((e) => e.loss));
    }
    expect(await tensorsOf(many)).toEqual(await tensorsOf(one));
    expect(await readFile(join(many, "metrics.jsonl"), "utf8")).toContain('"event":"done"');
    expect((await readdir(join(many, "checkpoints"))).filter((n) => n.startsWith("."))).toEqual([]);
    await using model = await loadModel(many);
    await using same = await loadModel(one);
    expect(await model.generate("synthetic", { temperature: 0, maxTokens: 8 })).toBe(
      await same.generate("synthetic", { temperature: 0, maxTokens: 8 }),
    );
  });

  test.each([{}, { model: TIED, stages: "contiguous" }] as Partial<TrainerOptions>[])(
    "go on from another number of ranks, to the bit: %j",
    async (extra) => {
      const [straight, many] = [folder(`straight-${named(extra)}`), folder(`changing-${named(extra)}`)];
      // The schedule is the straight run's: only where it ends differs.
      const rest = { ...options, ...extra, learningRateSchedule: "constant", outputDir: many } as const;
      values(await runRanks(2, { ...rest, steps: 3 }));
      values(await runRanks(3, { ...rest, steps: 5, resume: true }));
      const { stages: _, ...alone } = rest;
      await using last = new Trainer({ ...alone, resume: true });
      await collect(last);
      await using never = new Trainer({ ...alone, outputDir: straight });
      await collect(never);
      expect(await tensorsOf(many)).toEqual(await tensorsOf(straight));
    },
  );

  // One micro-batch a rank, unclipped: the sums are those of one rank (sharding.test.ts).
  const shared = { ...options, clip: "none", maxGradNorm: null } satisfies TrainerOptions;
  test.each([
    [3, { shards: 3 }],
    [3, { replicas: 3, device: "sim", offload: "host" }],
    [3, { shards: 3, device: "sim", offload: "host", sharedHost: "on" }],
    [3, { shards: 3, device: "sim", offload: "host", sharedHost: "off" }],
    [
      3,
      {
        ...{ shards: 3, device: "sim", offload: "host", sharedHost: "on" },
        ...{ optimizer: "adamw8bit", precision: "bfloat16", update: "forward" },
      },
    ],
    [3, { shards: 3, device: "sim", offload: "disk", optimizer: "adamw8bit", precision: "bfloat16" }],
  ] as [number, Partial<TrainerOptions>][])("%i that share the state train what one does: %j", async (size, extra) => {
    const { device: _, offload: __, shards: ___, replicas: ____, sharedHost: _____, ...same } = extra;
    const [one, many] = [folder(`shared-one-${size}-${named(extra)}`), folder(`shared-many-${size}-${named(extra)}`)];
    await using alone = new Trainer({ ...shared, ...same, outputDir: one });
    const expected = await collect(alone);
    for (const events of values(await runRanks(size, { ...shared, ...extra, outputDir: many }))) {
      expect(only(events, "step").map((e) => e.loss)).toEqual(only(expected, "step").map((e) => e.loss));
      expect(only(events, "eval").map((e) => e.loss)).toEqual(only(expected, "eval").map((e) => e.loss));
    }
    expect(await tensorsOf(many)).toEqual(await tensorsOf(one));
    expect((await readdir(join(many, "checkpoints"))).filter((n) => n.startsWith("."))).toEqual([]);
    await using model = await loadModel(many);
    expect(await model.generate("synthetic", { temperature: 0, maxTokens: 8 })).toHaveLength(8);
  });

  test("in stages of shards, which share a parameter too, learn what shards alone do", async () => {
    const all = { ...shared, model: TIED, device: "sim", offload: "host", shards: 2 } satisfies TrainerOptions;
    const [shards, stages] = [folder("shards-alone"), folder("stages-of-shards")];
    const [expected] = values(await runRanks(2, { ...all, outputDir: shards }));
    for (const events of values(await runRanks(4, { ...all, stages: "contiguous", outputDir: stages }))) {
      expect(only(events, "step").map((e) => e.loss)).toEqual(only(expected!, "step").map((e) => e.loss));
      expect(only(events, "eval").map((e) => e.loss)).toEqual(only(expected!, "eval").map((e) => e.loss));
    }
    expect(await tensorsOf(stages)).toEqual(await tensorsOf(shards));
  });

  test("that share the state go on to the bit, also as another number", async () => {
    const rest = { ...shared, learningRateSchedule: "constant" } as const;
    const [straight, halves] = [folder("shared-straight"), folder("shared-halves")];
    values(await runRanks(2, { ...rest, shards: 2, outputDir: straight }));
    values(await runRanks(2, { ...rest, shards: 2, steps: 3, outputDir: halves }));
    values(await runRanks(2, { ...rest, shards: 2, resume: true, outputDir: halves }));
    expect(await tensorsOf(halves)).toEqual(await tensorsOf(straight));
    // With as many ranks as micro-batches each order of sums is the same.
    const changing = folder("shared-changing");
    values(await runRanks(3, { ...rest, shards: 3, steps: 2, outputDir: changing }));
    await using alone = new Trainer({ ...rest, steps: 4, resume: true, outputDir: changing });
    await collect(alone);
    values(await runRanks(3, { ...rest, replicas: 3, steps: 6, resume: true, outputDir: changing }));
    values(await runRanks(2, { ...rest, resume: true, outputDir: changing }));
    await using one = new Trainer({ ...rest, outputDir: folder("shared-one") });
    await collect(one);
    expect(await tensorsOf(changing)).toEqual(await tensorsOf(folder("shared-one")));
  });

  test("that share host memory go on from ranks that do not, and the other way round", async () => {
    const host = { ...shared, learningRateSchedule: "constant", shards: 2, device: "sim", offload: "host" } as const;
    const [straight, changing] = [folder("host-straight"), folder("host-changing")];
    values(await runRanks(2, { ...host, sharedHost: "off", steps: 6, outputDir: straight }));
    values(await runRanks(2, { ...host, sharedHost: "on", steps: 2, outputDir: changing }));
    values(await runRanks(2, { ...host, sharedHost: "off", steps: 4, resume: true, outputDir: changing }));
    values(await runRanks(2, { ...host, steps: 6, resume: true, outputDir: changing }));
    expect(await tensorsOf(changing)).toEqual(await tensorsOf(straight));
  });

  test("that share the state take what is left at the end of the data", async () => {
    // Two micro-batches at the end for three ranks.
    const all = { ...shared, steps: undefined, epochs: 1, data: { source: "planets", count: 70, workers: 0 } as const };
    const [one, many, host] = [folder("rest-one"), folder("rest-many"), folder("rest-host")];
    await using alone = new Trainer({ ...all, outputDir: one });
    const expected = await collect(alone);
    const counts = only(expected, "step").map((e) => e.tokens);
    expect(counts.at(-1)).toBeLessThan(counts[0]!);
    const shares = { sharedHost: "on", device: "sim", offload: "host" } as const;
    for (const [outputDir, extra] of [[many, {}] as const, [host, shares] as const]) {
      const [events] = values(await runRanks(3, { ...all, ...extra, shards: 3, outputDir }));
      expect(only(events!, "step").map((e) => e.loss)).toEqual(only(expected, "step").map((e) => e.loss));
      expect(await tensorsOf(outputDir)).toEqual(await tensorsOf(one));
    }
  });

  test.each([
    [2, { context: 2 }],
    [4, { context: 2, shards: 4, order: "breadthFirst" }],
    [4, { context: 2, shards: 1, replicas: 2, stages: "alternating", batchSize: 4 }],
    [4, { context: 2, shards: 1, replicas: 2, stages: "contiguous", batchSize: 4, model: TIED_STILL }],
    [2, { context: 2, plan: "auto", order: undefined }],
    [4, { context: 2, device: "sim", deviceMemory: "2.5MB", hostMemory: "20MB", order: undefined }],
  ] as [number, Partial<TrainerOptions>][])("%i that share rows learn what one does: %j", async (size, extra) => {
    const model = { config: { ...REAL.model.config, dropout: 0, tiedEmbeddings: false } };
    const all = { ...options, model, dtype: "float64", precision: "float64", ...extra } satisfies TrainerOptions;
    const { context: _, shards: __, replicas: ___, stages: ____, ...rest } = all;
    const { plan: _____, device: ______, deviceMemory: _______, hostMemory: ________, ...plain } = rest;
    const [one, many] = [folder(`rows-one-${size}-${named(extra)}`), folder(`rows-${size}-${named(extra)}`)];
    await using alone = new Trainer({ ...plain, outputDir: one });
    const expected = await collect(alone);
    const ranks = values(await runRanks(size, { ...all, outputDir: many }));
    for (const events of ranks) {
      for (const [i, step] of only(events, "step").entries()) {
        const wanted = only(expected, "step")[i]!;
        expect(Math.abs(step.loss / wanted.loss - 1)).toBeLessThan(1e-9);
        expect(Math.abs(step.gradNorm / wanted.gradNorm - 1)).toBeLessThan(1e-7);
        expect(step.tokens).toBe(wanted.tokens);
      }
      // Whole rows: each rank by itself.
      const evals = only(events, "eval").map((e) => e.loss);
      for (const [i, e] of only(expected, "eval").entries())
        expect(Math.abs(evals[i]! / e.loss - 1)).toBeLessThan(1e-9);
    }
    // The checkpoint is that of one rank, in its form: either goes on from it.
    await using after = new Trainer({ ...plain, steps: 9, resume: true, outputDir: many });
    expect(only(await collect(after), "done")[0]!.step).toBe(9);
  });

  test("that share rows of a length that does not divide are told the arithmetic", async () => {
    const settled = await runRanks(2, { ...options, context: 2, sequenceLength: 98, outputDir: folder("odd") });
    for (const s of settled)
      expect((s as PromiseRejectedResult).reason).toMatchObject({
        code: "CONFIG",
        message: expect.stringMatching(/98 = 24 x 4 \+ 2/),
      });
  });

  test("that run something else are told what", async () => {
    const settled = await runRanks(2, { ...options, outputDir: folder("differ") }, (rank) => ({ seed: rank }));
    for (const s of settled) {
      expect(s.status).toBe("rejected");
      expect((s as PromiseRejectedResult).reason).toMatchObject({ code: "RANKS" });
      expect((s as PromiseRejectedResult).reason.message).toMatch(/seed: 0 on rank 0, 1 on rank 1/);
    }
  });

  test.each([
    [
      "on another kind of device",
      { device: "sim" },
      "train on the same kind of device",
      "sim, computing in float32",
      "--device cpu",
    ],
    [
      "in another dtype",
      { dtype: "float64" },
      "compute in the same dtype",
      "cpu, computing in float64",
      "--dtype float32",
    ],
  ] as [string, TrainerOptions, string, string, string][])(
    "that would train %s are told which has what",
    async (name, other, alike, has, cure) => {
      const settled = await runRanks(3, { ...options, outputDir: folder(name) }, (rank) => (rank === 1 ? other : {}));
      for (const s of settled)
        expect((s as PromiseRejectedResult).reason).toMatchObject({
          code: "RANKS",
          message: `[ranks] the ranks do not ${alike}:\n  ranks 0, 2: cpu, computing in float32\n  rank 1: ${has}\nSay ${cure} to all`,
        });
    },
  );

  test("all end when one fails, and say which", async () => {
    const bad = (rank: number): TrainerOptions =>
      rank === 1
        ? {
            onEvent: (e) => {
              if (e.event === "step" && e.step === 2) throw new Error("the disk of rank 1 burned");
            },
          }
        : {};
    const settled = await runRanks(2, { ...options, outputDir: folder("fails") }, bad);
    expect(settled.map((s) => s.status)).toEqual(["rejected", "rejected"]);
    expect((settled[0] as PromiseRejectedResult).reason.message).toMatch(/rank 1 \(.*\) failed: .*burned/);
  });

  test("stop at one boundary when one of them is asked to, with a whole checkpoint", async () => {
    const port = await freePort();
    const spec = { size: 2, address: "127.0.0.1", port, serve: true, prefix: "", joinSeconds: 30, silenceSeconds: 30 };
    const outputDir = folder("asked");
    const done = await Promise.all(
      [0, 1].map(async (rank) => {
        await using trainer = new Trainer({ ...options, steps: 500, outputDir, ranks: { ...spec, rank } });
        const events: TrainEvent[] = [];
        for await (const e of trainer.run()) {
          events.push(e);
          if (rank === 1 && e.event === "step" && e.step === 2) trainer.stop();
        }
        return only(events, "done")[0]!;
      }),
    );
    expect(done.map((d) => d.reason)).toEqual(["interrupted", "interrupted"]);
    expect(done[1]!.step).toBe(done[0]!.step);
    expect((await openCheckpoint(outputDir)).state.step).toBe(done[0]!.step);
  });

  test("one that never comes is named", async () => {
    const port = await freePort();
    const spec = { rank: 0, size: 2, address: "127.0.0.1", port, serve: true, prefix: "", silenceSeconds: 5 };
    await expect(native!.joinRanks({ ...spec, joinSeconds: 0.5 })).rejects.toThrow(
      /waited 0.5 s for rank 1 at 127\.0\.0\.1/,
    );
    await expect(native!.joinRanks({ ...spec, rank: 1, joinSeconds: 0.5, serve: false })).rejects.toThrow(
      /found no store at 127\.0\.0\.1/,
    );
  });
});
