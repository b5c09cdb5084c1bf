import { existsSync } from "node:fs";
import { mkdir, mkdtemp, readdir, readFile, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import { afterEach, beforeEach, describe, expect, test } from "vitest";
import { StromaError } from "../../../src/errors.js";
import type { Mode } from "../../../src/graph/types.js";
import type { TrainEvent } from "../../../src/train/events.js";
import { Trainer } from "../../../src/train/trainer.js";
import { LETTERS, letters } from "../../support/fake-data.js";
import { bigramGraph } from "../../support/fake-session.js";
import { collect, type FakeParts, fakeParts, only, SMALL, stateBytes, train } from "../../support/fake-trainer.js";

let root: string;
let outputDir: string;
beforeEach(async () => {
  root = await mkdtemp(join(tmpdir(), "stroma-trainer-"));
  outputDir = join(root, "run");
});
afterEach(() => rm(root, { recursive: true, force: true }));

const metrics = async (dir = outputDir): Promise<TrainEvent[]> =>
  (await readFile(join(dir, "metrics.jsonl"), "utf8"))
    .split("\n")
    .filter(Boolean)
    .map((line) => JSON.parse(line) as TrainEvent);
const losses = (events: TrainEvent[]): number[] => only(events, "step").map((e) => e.loss);
const saved = async (): Promise<string[]> => (await readdir(join(outputDir, "checkpoints"))).sort();
const failure = (promise: Promise<unknown>): Promise<StromaError> =>
  promise.then(
    () => {
      throw new Error("expected a failure");
    },
    (e: unknown) => {
      expect(e).toBeInstanceOf(StromaError);
      return e as StromaError;
    },
  );

describe("a run", () => {
  test("yields start, each step, the checkpoint and done; the loss falls", async () => {
    const events = await train({ ...SMALL, outputDir }, fakeParts());
    expect(events.map((e) => e.event)).toEqual(["start", ...new Array(20).fill("step"), "checkpoint", "done"]);
    expect(only(events, "step").map((e) => e.step)).toEqual(Array.from({ length: 20 }, (_, i) => i + 1));
    expect(events[0]).toMatchObject({
      model: "bigram",
      data: "letters",
      parameters: 272,
      steps: 20,
      tokensPerStep: 72,
    });
    const [first, last] = [losses(events)[0]!, losses(events).at(-1)!];
    expect(first).toBeCloseTo(Math.log(16), 1);
    expect(last).toBeLessThan(first - 0.5);
    expect(events.at(-1)).toMatchObject({ reason: "steps", step: 20, loss: last });
    expect((events.at(-1) as { checkpoint: string }).checkpoint).toBe(join(outputDir, "checkpoints", "step-000020"));
  });

  test("writes every event to metrics.jsonl and a picture of the loss", async () => {
    const events = await train({ ...SMALL, outputDir }, fakeParts());
    expect(await metrics()).toEqual(events);
    expect(await readFile(join(outputDir, "loss.svg"), "utf8")).toMatch(
      /^<svg [\s\S]*bigram on letters[\s\S]*<\/svg>\n$/,
    );
  });

  test("that is refused leaves no folder that was not there", async () => {
    const openDataset = async () => {
      throw new StromaError("DATA", "none");
    };
    const refuse = () => failure(train({ ...SMALL, outputDir }, { ...fakeParts(), openDataset }));
    expect((await refuse()).code).toBe("DATA");
    expect(existsSync(outputDir)).toBe(false);
    await mkdir(outputDir);
    await refuse();
    expect(await readdir(outputDir)).toEqual([]);
  });

  test("shows every n-th step and the first and last, and stores all", async () => {
    const events = await train({ ...SMALL, outputDir, logEveryNSteps: 8 }, fakeParts());
    expect(only(events, "step").map((e) => e.step)).toEqual([1, 8, 16, 20]);
    expect(only(await metrics(), "step")).toHaveLength(20);
  });

  test("hands the engine the step, seed, rate and as many micro-batches as the tape has", async () => {
    const parts = fakeParts();
    await train({ ...SMALL, steps: 3, outputDir, learningRateSchedule: "linear", maxGradNorm: null }, parts);
    const [session] = parts.sessions;
    expect(session!.steps.map((s) => [s.step, s.seed, s.microBatches.length, s.maxGradNorm])).toEqual([
      [0, 7, 3, null],
      [1, 7, 3, null],
      [2, 7, 3, null],
    ]);
    expect(session!.steps.map((s) => s.learningRate * 60)).toEqual([3, 2, 1].map((r) => expect.closeTo(r, 12)));
    // Only what the graph takes crosses into the engine.
    expect(Object.keys(session!.steps[0]!.microBatches[0]!)).toEqual(["input_ids", "labels"]);
    expect(session!.disposed).toBe(true);
    expect(session!.openSnapshots).toBe(0);
  });

  test("of epochs ends with the data, the last step smaller, the rate planned over the true number of steps", async () => {
    const parts = fakeParts();
    const options = { ...SMALL, steps: undefined, epochs: 2, outputDir, data: letters({ rowsPerEpoch: 8 }) };
    const events = await train({ ...options, learningRateSchedule: { kind: "linear" } }, parts);
    // 8 micro-batches of 2 rows in 2 epochs, 3 a step.
    expect(parts.sessions[0]!.steps.map((s) => s.microBatches.length)).toEqual([3, 3, 2]);
    expect(only(events, "start")[0]!.steps).toBe(3);
    expect(only(events, "step").map((e) => Number((e.learningRate / 0.05).toFixed(6)))).toEqual([
      1, 0.666667, 0.333333,
    ]);
    expect(only(events, "done")[0]).toMatchObject({ reason: "steps", step: 3 });
  });

  test("of epochs over data of known size plans its steps from a part, and shows and evaluates its last step", async () => {
    const opened: number[] = [];
    const data = letters({ rowsPerEpoch: 1000, onNext: (row) => void opened.push(row) });
    const tokens = async (): Promise<number> => {
      let total = 0;
      await using stream = await data.open({
        split: "train",
        sequenceLength: 12,
        microBatchSize: 2,
        seed: 7,
        epochs: 1,
      });
      for (let b = await stream.next(); b !== null; b = await stream.next()) total += b.tokens;
      return total;
    };
    const known = { ...data, tokensPerEpoch: tokens };
    const options = {
      ...SMALL,
      steps: undefined,
      epochs: 1,
      batchSize: 4,
      outputDir,
      logEveryNSteps: 1000,
      evalEveryNSteps: 1000,
    };
    const events = await train({ ...options, data: known }, fakeParts());
    // 250 steps in truth; 64 micro-batches of rows of random length tell it within a tenth.
    expect(only(events, "start")[0]!.steps).not.toBe(250);
    expect(Math.abs(only(events, "start")[0]!.steps - 250)).toBeLessThan(25);
    expect(events.map((e) => [e.event, e.step])).toEqual([
      ["start", 0],
      ["step", 1],
      ["step", 250],
      ["eval", 250],
      ["checkpoint", 250],
      ["done", 250],
    ]);
  });

  test("evaluates and samples at its steps, and evaluates at the end", async () => {
    const sampling = { sampleEveryNSteps: 10, samplePrompts: ["ab", "c"], sampleTokens: 3 };
    const events = await train(
      { ...SMALL, outputDir, evalEveryNSteps: 8, evalMicroBatches: 3, ...sampling },
      fakeParts(),
    );
    expect(only(events, "eval").map((e) => e.step)).toEqual([8, 16, 20]);
    const [early, , late] = only(events, "eval").map((e) => e.loss);
    expect(late!).toBeLessThan(early!);
    expect(only(events, "sample").map((e) => [e.step, e.prompt])).toEqual([
      [10, "ab"],
      [10, "c"],
      [20, "ab"],
      [20, "c"],
    ]);
  });

  test("reads the next batches while a step runs", async () => {
    const order: string[] = [];
    const data = letters({ onNext: (row) => void order.push(`row ${row}`) });
    const parts = fakeParts({
      onStep: async (step) => {
        order.push(`step ${step} begins`);
        await new Promise((resolve) => setTimeout(resolve, 5));
        order.push(`step ${step} ends`);
      },
    });
    await train({ ...SMALL, batchSize: 2, steps: 2, outputDir, data }, parts);
    expect(order.indexOf("row 2")).toBeLessThan(order.indexOf("step 0 ends"));
    expect(order).not.toContain("row 4");
  });

  test("waits for a consumer that is behind by 64 events, and loses none", async () => {
    const parts = fakeParts();
    await using trainer = new Trainer({ ...SMALL, steps: 200, outputDir }, parts);
    const events: TrainEvent[] = [];
    for await (const event of trainer.run()) {
      if (events.length === 0) {
        let before = -1;
        while (parts.sessions[0]!.steps.length !== before) {
          before = parts.sessions[0]!.steps.length;
          await new Promise((resolve) => setTimeout(resolve, 100));
        }
        expect(before).toBeGreaterThan(50);
        expect(before).toBeLessThanOrEqual(65);
      }
      events.push(event);
    }
    expect(only(events, "step").map((e) => e.step)).toEqual(Array.from({ length: 200 }, (_, i) => i + 1));
  });

  test("awaits onEvent at the step boundary", async () => {
    const seen: string[] = [];
    const parts = fakeParts({ onStep: (step) => void seen.push(`step ${step}`) });
    const onEvent = async (e: TrainEvent): Promise<void> => {
      await new Promise((resolve) => setTimeout(resolve, 2));
      if (e.event === "step") seen.push(`event ${e.step}`);
    };
    await train({ ...SMALL, steps: 3, outputDir, onEvent }, parts);
    expect(seen).toEqual(["step 0", "event 1", "step 1", "event 2", "step 2", "event 3"]);
  });

  test("runs once, and not after dispose", async () => {
    const trainer = new Trainer({ ...SMALL, steps: 1, outputDir }, fakeParts());
    await collect(trainer);
    expect((await failure(collect(trainer))).code).toBe("BUSY");
    await trainer.dispose();
    expect((await failure(trainer.generate("a"))).code).toBe("DISPOSED");
  });

  test("answers requests while it trains", async () => {
    const parts = fakeParts();
    await using trainer = new Trainer({ ...SMALL, outputDir }, parts);
    const answers: string[] = [];
    for await (const event of trainer.run())
      if (event.event === "step" && event.step % 5 === 0)
        answers.push(await trainer.generate("abc", { maxTokens: 4, seed: 1 }));
    expect(answers).toHaveLength(4);
    expect(await trainer.evaluate({ microBatches: 2 })).toMatchObject({ bitsPerByte: null });
  });
});

describe("stopping", () => {
  test("by stop() ends the step, saves, and says interrupted", async () => {
    await using trainer = new Trainer({ ...SMALL, outputDir }, fakeParts());
    const events: TrainEvent[] = [];
    for await (const event of trainer.run()) {
      events.push(event);
      if (event.event === "step" && event.step === 4) trainer.stop();
    }
    const done = only(events, "done")[0]!;
    expect(done.reason).toBe("interrupted");
    expect(done.step).toBeGreaterThanOrEqual(4);
    expect(done.checkpoint).toContain(`step-${String(done.step).padStart(6, "0")}`);
    expect(existsSync(done.checkpoint!)).toBe(true);
  });

  test("by a signal is the same, also one that is aborted already", async () => {
    const events = await collect(new Trainer({ ...SMALL, outputDir }, fakeParts()), AbortSignal.abort());
    expect(events.map((e) => e.event)).toEqual(["start", "checkpoint", "done"]);
    expect(events.at(-1)).toMatchObject({ reason: "interrupted", step: 0 });
  });

  test("by leaving the loop saves too, and frees the folder", async () => {
    const trainer = new Trainer({ ...SMALL, outputDir }, fakeParts());
    for await (const event of trainer.run()) if (event.event === "step") break;
    const [name] = (await saved()).filter((n) => n.startsWith("step"));
    expect(name).toMatch(/^step-0000\d\d$/);
    await trainer.dispose();
    await train({ ...SMALL, outputDir, resume: true }, fakeParts());
    expect(only(await metrics(), "step").map((e) => e.step)).toEqual(Array.from({ length: 20 }, (_, i) => i + 1));
  });
});

describe("resuming", () => {
  const whole = async (extra = {}) => {
    const parts = fakeParts();
    const dir = join(root, "whole");
    const trainer = new Trainer({ ...SMALL, ...extra, outputDir: dir }, parts);
    const events = await collect(trainer);
    const state = await stateBytes(parts.sessions[0]!);
    await trainer.dispose();
    return { events, state };
  };
  const stopAt = async (step: number, extra = {}) => {
    await using trainer = new Trainer({ ...SMALL, ...extra, outputDir }, fakeParts());
    for await (const e of trainer.run()) if (e.event === "step" && e.step === step) trainer.stop();
  };

  test.each([1, 7, 19])("after step %i equals the uninterrupted run to the bit", async (step) => {
    const expected = await whole();
    // stop() may let steps pass that were under way: any boundary must do.
    await stopAt(step);
    const parts = fakeParts();
    const trainer = new Trainer({ resume: true, outputDir }, parts);
    const events = await collect(trainer);
    expect(await stateBytes(parts.sessions[0]!)).toEqual(expected.state);
    await trainer.dispose();
    expect(only(events, "start")[0]!.resumedFrom).toContain(join(outputDir, "checkpoints"));
    expect(losses(await metrics())).toEqual(losses(expected.events));
    expect(only(await metrics(), "step").map((e) => e.step)).toEqual(Array.from({ length: 20 }, (_, i) => i + 1));
  });

  test("from an older checkpoint drops the later lines of metrics.jsonl, and its saves are the latest", async () => {
    await train({ ...SMALL, outputDir, saveEveryNSteps: 5, keepLast: 9 }, fakeParts());
    const from = join(outputDir, "checkpoints", "step-000010");
    await train({ resume: from, steps: 12 }, fakeParts());
    expect(only(await metrics(), "step").map((e) => e.step)).toEqual([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]);
    await train({ resume: outputDir, steps: 14 }, fakeParts());
    expect(only(await metrics(), "step").at(-1)!.step).toBe(14);
    expect(only(await metrics(), "start").map((e) => e.step)).toEqual([0, 10, 12]);
  });

  test("with everything done takes no step and still says where the checkpoint is", async () => {
    await train({ ...SMALL, outputDir }, fakeParts());
    const events = await train({ resume: true, outputDir }, fakeParts());
    expect(events.map((e) => e.event)).toEqual(["start", "done"]);
    expect(only(events, "done")[0]).toMatchObject({
      reason: "steps",
      step: 20,
      checkpoint: join(outputDir, "checkpoints", "step-000020"),
    });
  });

  test("into another folder leaves the first as it is", async () => {
    await stopAt(3);
    const before = await saved();
    const other = join(root, "other");
    const events = await train({ resume: outputDir, outputDir: other }, fakeParts());
    expect(await saved()).toEqual(before);
    expect(only(events, "done")[0]!.checkpoint).toBe(join(other, "checkpoints", "step-000020"));
  });

  test("refuses what would not go on to the bit, naming each difference", async () => {
    await stopAt(3);
    const refuse = (options: object, parts = fakeParts()) =>
      failure(train({ resume: true, outputDir, ...options }, parts));
    const error = await refuse({ seed: 8, sequenceLength: 13, data: "numbers", adamw: { beta2: 0.9 } });
    expect(error.code).toBe("CHECKPOINT");
    for (const text of ["seed: the checkpoint has 7, this run 8", "sequenceLength", "letters", "numbers", "beta2"])
      expect(error.message).toContain(text);
    const other = await refuse({}, fakeParts({}, 17));
    expect(other.message).toContain("bigram.weight: the checkpoint has 16 x 16, this run 17 x 17");
    // Names and shapes agree: what else the model was traced from, or into, says which.
    const traced = (change: object): FakeParts => {
      const parts = fakeParts();
      const graph = (mode?: Mode) => ({ ...bigramGraph(LETTERS.length, mode), ...change });
      return { ...parts, resolveModel: (spec) => ({ ...parts.resolveModel(spec), graph }) };
    };
    expect((await refuse({}, traced({ config: { vocabulary: 16, depth: 2 } }))).message).toContain(
      "its config differs",
    );
    expect((await refuse({}, traced({ dtype: "float64" }))).message).toContain("its layers were other operators");
  });

  test("takes other steps, rates and batch sizes", async () => {
    await stopAt(3);
    const parts = fakeParts();
    await train(
      { resume: true, outputDir, batchSize: 4, steps: 8, learningRate: 1e-3, learningRateSchedule: "constant" },
      parts,
    );
    const last = parts.sessions[0]!.steps.at(-1)!;
    expect([last.step, last.learningRate, last.microBatches.length]).toEqual([7, 1e-3, 2]);
  });

  test("needs a checkpoint, or auto", async () => {
    expect((await failure(train({ ...SMALL, outputDir, resume: true }, fakeParts()))).message).toContain(
      "nothing to resume",
    );
    const events = await train({ ...SMALL, steps: 2, outputDir, resume: "auto" }, fakeParts());
    expect(only(events, "start")[0]).toMatchObject({ step: 0, resumedFrom: null });
    const again = await train({ ...SMALL, steps: 4, outputDir, resume: "auto" }, fakeParts());
    expect(only(again, "start")[0]!.step).toBe(2);
  });

  test("a new run into a folder with checkpoints is refused, and so is a second trainer at the same time", async () => {
    await stopAt(3);
    const error = await failure(train({ ...SMALL, outputDir }, fakeParts()));
    expect([error.code, error.message]).toEqual(["CONFIG", expect.stringContaining("earlier run")]);
    await using first = new Trainer({ resume: true, outputDir }, fakeParts());
    const events = first.run();
    await events.next();
    expect((await failure(train({ resume: true, outputDir }, fakeParts()))).code).toBe("BUSY");
    await events.return();
  });
});

describe("saving", () => {
  test("keeps the last n", async () => {
    const events = await train({ ...SMALL, outputDir, saveEveryNSteps: 4, keepLast: 2 }, fakeParts());
    expect(only(events, "checkpoint").map((e) => e.step)).toEqual([4, 8, 12, 16, 20]);
    expect(await saved()).toEqual(["latest", "step-000016", "step-000020"]);
  });

  test("goes on training while it writes, and one save waits for the one before", async () => {
    let go = (): void => {};
    const later = new Promise<void>((resolve) => {
      go = resolve;
    });
    const steps: number[] = [];
    // The first save's bytes wait for step 7 to begin: a save that stalls training would never end.
    const parts = fakeParts({
      onStep: (step) => {
        steps.push(step);
        if (step === 7) go();
      },
      onWrite: () => later,
    });
    const events = await train({ ...SMALL, steps: 10, outputDir, saveEveryNSteps: 4 }, parts);
    expect(steps).toHaveLength(10);
    expect(only(events, "checkpoint").map((e) => e.step)).toEqual([4, 8, 10]);
  });

  test("from the state itself, where memory does not hold it twice, lets no step begin before its end", async () => {
    const overlaps: number[] = [];
    const parts: FakeParts = fakeParts({
      uncopied: true,
      onStep: (step) => {
        if (parts.sessions[0]!.openSnapshots > 0) overlaps.push(step);
      },
    });
    await train({ ...SMALL, steps: 10, outputDir, saveEveryNSteps: 2 }, parts);
    expect(overlaps).toEqual([]);
  });

  test("after every n passes over the data", async () => {
    const data = letters({ rowsPerEpoch: 10 });
    const events = await train({ ...SMALL, steps: 9, batchSize: 2, outputDir, data, saveEveryNEpochs: 1 }, fakeParts());
    // 5 steps are an epoch; that the data turned over is seen with the first batch of the next one.
    expect(only(events, "checkpoint").map((e) => e.step)).toEqual([6, 9]);
  });

  test("on a full disk is DISK_FULL, the partial folder removed, the older checkpoint whole", async () => {
    const folders = new Set<string>();
    const parts = fakeParts({
      onWrite: (path) => {
        folders.add(dirname(path));
        if (path.includes("optimizer") && folders.size > 1)
          throw Object.assign(new Error("ENOSPC: no space left on device, write"), { code: "ENOSPC" });
      },
    });
    const error = await failure(train({ ...SMALL, outputDir, saveEveryNSteps: 5 }, parts));
    expect(error.code).toBe("DISK_FULL");
    expect(await saved()).toEqual(["latest", "step-000005"]);
    expect(parts.sessions[0]!.openSnapshots).toBe(0);
    const events = await train({ resume: true, outputDir }, fakeParts());
    expect(only(events, "start")[0]!.step).toBe(5);
  });
});

describe("a loss that is not finite", () => {
  const faults = { loss: (step: number, m: number) => (step === 4 && m === 1 ? Number.NaN : undefined) };

  test("ends the run naming step and micro-batch, with parameters as before it", async () => {
    const constant = { ...SMALL, learningRateSchedule: { kind: "constant" } } as const;
    const parts = fakeParts(faults);
    const trainer = new Trainer({ ...constant, outputDir }, parts);
    const error = await failure(collect(trainer));
    expect(error).toMatchObject({ code: "NON_FINITE", details: { step: 5, microBatch: 1 } });
    expect(error.message).toContain("step 5: the loss of micro-batch 1 (of 3, from 0) is NaN");
    const good = fakeParts();
    const four = new Trainer({ ...constant, steps: 4, outputDir: join(root, "four") }, good);
    await collect(four);
    expect(await stateBytes(parts.sessions[0]!)).toEqual(await stateBytes(good.sessions[0]!));
    await trainer.dispose();
    await four.dispose();
  });

  test("is skipped by choice, counted, and a resume after it is exact", async () => {
    const parts = fakeParts(faults);
    const trainer = new Trainer({ ...SMALL, outputDir: join(root, "whole"), nonFinite: "skip" }, parts);
    const events = await collect(trainer);
    const state = await stateBytes(parts.sessions[0]!);
    await trainer.dispose();
    expect(only(events, "skip")).toEqual([{ event: "skip", step: 5, microBatch: 1, loss: Number.NaN }]);
    expect(only(events, "step")).toHaveLength(19);
    expect(state.optimizerStep).toBe("19");
    const half = new Trainer({ ...SMALL, outputDir: join(root, "half"), nonFinite: "skip" }, fakeParts(faults));
    for await (const e of half.run()) if (e.event === "skip") half.stop();
    await half.dispose();
    const resumed = fakeParts(faults);
    const rest = new Trainer({ resume: true, outputDir: join(root, "half") }, resumed);
    await collect(rest);
    expect(await stateBytes(resumed.sessions[0]!)).toEqual(state);
    await rest.dispose();
  });

  test("ends the run after eleven in a row even so", async () => {
    const parts = fakeParts({ loss: (step) => (step >= 3 ? Number.POSITIVE_INFINITY : undefined) });
    const error = await failure(train({ ...SMALL, outputDir, nonFinite: "skip" }, parts));
    expect(error.message).toContain("step 14");
    expect(error.message).toContain("after 10 skipped steps in a row");
  });
});
