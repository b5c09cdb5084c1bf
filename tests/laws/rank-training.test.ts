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

describe.skipIf(!native)("ranks", () => {
  const options: TrainerOptions = { ...REAL, evalEveryNSteps: 4, evalMicroBatches: 2, order: "breadthFirst" };
  const folder = (name: string) => join(root, name);

  test.each([
    [2, {}],
    [3, { stages: "contiguous", order: "depthFirst" }],
    [2, { device: "sim", offload: "host", optimizer: "adamw8bit", clip: "block", update: "backward" }],
    [2, { order: undefined, plan: "auto", offload: "auto" }],
  ] as [number, Partial<TrainerOptions>][])("%i train what one does: %j", async (size, extra) => {
    const all = { ...options, ...extra };
    const [one, many] = [folder(`one-${size}-${Object.keys(extra)}`), folder(`many-${size}-${Object.keys(extra)}`)];
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

  test("go on from another number of ranks, to the bit", async () => {
    const [one, many] = [folder("straight"), folder("changing")];
    await using alone = new Trainer({ ...options, outputDir: one });
    await collect(alone);
    values(await runRanks(2, { ...options, steps: 3, learningRateSchedule: "constant", outputDir: many }));
    // The schedule is the straight run's: only where it ends differs.
    const rest = { ...options, learningRateSchedule: "constant", outputDir: many } as const;
    values(await runRanks(3, { ...rest, steps: 5, resume: true }));
    await using last = new Trainer({ ...rest, resume: true });
    await collect(last);
    await using straight = new Trainer({ ...rest, outputDir: folder("straight-constant") });
    await collect(straight);
    expect(await tensorsOf(many)).toEqual(await tensorsOf(folder("straight-constant")));
  });

  test("that run something else are told what", async () => {
    const settled = await runRanks(2, { ...options, outputDir: folder("differ") }, (rank) => ({ seed: rank }));
    for (const s of settled) {
      expect(s.status).toBe("rejected");
      expect((s as PromiseRejectedResult).reason).toMatchObject({ code: "RANKS" });
      expect((s as PromiseRejectedResult).reason.message).toMatch(/seed: 0 on rank 0, 1 on rank 1/);
    }
  });

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
