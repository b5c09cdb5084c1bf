import { mkdtemp, readFile, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, test } from "vitest";
import { EventQueue } from "../../../src/train/event-queue.js";
import type { StepEvent, TrainEvent } from "../../../src/train/events.js";
import { renderLossSvg, thinEvents } from "../../../src/train/loss-svg.js";
import { MetricsFile, readMetrics } from "../../../src/train/metrics.js";

const settled = async (promise: Promise<unknown>): Promise<boolean> => {
  let done = false;
  void promise.then(() => {
    done = true;
  });
  await new Promise((resolve) => setImmediate(resolve));
  return done;
};

describe("the event queue", () => {
  test("holds its maker once it is full, and lets it go as the consumer takes", async () => {
    const queue = new EventQueue<number>(2);
    await queue.push(1);
    const second = queue.push(2);
    expect(await settled(second)).toBe(false);
    const taken = queue[Symbol.asyncIterator]();
    expect(await taken.next()).toEqual({ done: false, value: 1 });
    expect(await settled(second)).toBe(true);
  });

  test("gives what waited before the failure, then the failure, also when it is undefined", async () => {
    for (const failure of [new Error("x"), undefined]) {
      const queue = new EventQueue<number>(8);
      await queue.push(1);
      queue.end(failure);
      const seen: unknown[] = [];
      try {
        for await (const n of queue) seen.push(n);
        seen.push("ended");
      } catch (error) {
        seen.push(error);
      }
      expect(seen).toEqual([1, failure]);
    }
  });

  test("lets the maker go when the consumer leaves", async () => {
    const queue = new EventQueue<number>(1);
    const held = queue.push(1);
    queue.leave();
    expect(await settled(held)).toBe(true);
    await queue.push(2);
    expect(queue.size).toBe(0);
  });
});

describe("metrics.jsonl", () => {
  let folder: string;
  let path: string;
  beforeEach(async () => {
    folder = await mkdtemp(join(tmpdir(), "stroma-metrics-"));
    path = join(folder, "metrics.jsonl");
  });
  afterEach(() => rm(folder, { recursive: true, force: true }));

  const skip = (step: number): TrainEvent => ({ event: "skip", step, microBatch: 0, loss: 1 });
  const steps = async (): Promise<number[]> => {
    const found: number[] = [];
    for await (const e of readMetrics(path)) found.push(e.step);
    return found;
  };

  test("keeps the order of many lines and is whole after flush", async () => {
    const file = await MetricsFile.open(path, null);
    for (let i = 1; i <= 500; i++) file.append(skip(i));
    await file.flush();
    expect(await steps()).toEqual(Array.from({ length: 500 }, (_, i) => i + 1));
    await file.close();
  });

  test("on a resume drops later steps and a last line that was cut", async () => {
    const line = (step: number): string => `${JSON.stringify(skip(step))}\n`;
    await writeFile(path, `${line(1)}${line(2)}${line(3)}${line(4).slice(0, 20)}`);
    const file = await MetricsFile.open(path, 2);
    file.append(skip(3));
    await file.close();
    expect(await readFile(path, "utf8")).toBe(line(1) + line(2) + line(3));
  });

  test("begins anew without a resume, and a resume without a file makes one", async () => {
    await writeFile(path, "old\n");
    await (await MetricsFile.open(path, null)).close();
    expect(await readFile(path, "utf8")).toBe("");
    await rm(path);
    await (await MetricsFile.open(path, 5)).close();
    expect(await readFile(path, "utf8")).toBe("");
  });
});

describe("the picture of the loss", () => {
  const step = (at: number, loss: number): StepEvent => ({
    event: "step",
    step: at,
    epoch: 0,
    loss,
    gradNorm: 1,
    learningRate: 1,
    tokens: 1,
    tokensPerSecond: 1,
    seconds: 1,
    peakDeviceBytes: 0,
    peakHostBytes: 0,
    bytesToDevice: 0,
    bytesFromDevice: 0,
    bytesLoaded: 0,
    bytesSaved: 0,
  });
  const points = (svg: string): number[][] =>
    /<polyline points="([^"]*)"/
      .exec(svg)![1]!
      .split(" ")
      .map((p) => p.split(",").map(Number));

  test("has the points of the losses inside its axes, falling where they fall", () => {
    const svg = renderLossSvg([step(1, 4), step(50, 3), step(100, 2.5)]);
    const [a, b, c] = points(svg) as [number[], number[], number[]];
    expect(a[0]!).toBeLessThan(b[0]!);
    expect(b[0]!).toBeLessThan(c[0]!);
    expect(a[1]!).toBeLessThan(b[1]!);
    expect(b[1]!).toBeLessThan(c[1]!);
    for (const [x, y] of [a, b, c]) {
      expect(x!).toBeGreaterThanOrEqual(64);
      expect(x!).toBeLessThanOrEqual(776);
      expect(y!).toBeGreaterThanOrEqual(56);
      expect(y!).toBeLessThanOrEqual(398);
    }
    expect(svg).toContain("train 2.500");
  });

  test("draws a long run in at most 400 points and marks held-out losses", () => {
    const events: TrainEvent[] = Array.from({ length: 5000 }, (_, i) => step(i + 1, 3 - i / 5000));
    events.push({ event: "eval", step: 5000, loss: 2.2, bitsPerByte: null, tokens: 1 });
    const svg = renderLossSvg(events);
    expect(points(svg)).toHaveLength(400);
    expect(svg).toContain("held out 2.200");
    expect(svg).toContain("<circle");
  });

  test("holds of a very long stream the means of neighbours, in bounded memory", async () => {
    const stream = async function* (): AsyncGenerator<TrainEvent> {
      for (let i = 1; i <= 40_000; i++) yield step(i, i);
      yield { event: "eval", step: 40_000, loss: 2.2, bitsPerByte: null, tokens: 1 };
    };
    const kept = await thinEvents(stream());
    expect(kept.length).toBeLessThanOrEqual(8193);
    expect(kept.length).toBeGreaterThan(4000);
    const steps = kept.filter((e) => e.event === "step");
    for (const e of steps) expect(e.loss).toBe(e.step);
    expect(steps[0]!.step).toBe(4.5);
    expect(kept.filter((e) => e.event === "eval")).toHaveLength(1);
  });

  test("survives a constant loss, one point, none, and losses that are not finite", () => {
    for (const events of [[step(1, 2)], [step(1, 2), step(2, 2)], [], [step(1, Number.NaN)]]) {
      const svg = renderLossSvg(events);
      expect(svg).not.toMatch(/NaN|Infinity|undefined/);
    }
    expect(renderLossSvg([])).toContain("no finite loss");
  });

  test("escapes names", () => {
    const svg = renderLossSvg([
      {
        event: "start",
        model: 'a<b & "c"',
        parameters: 1000,
        data: "d",
        step: 0,
        steps: 1,
        tokensPerStep: 1,
        schedule: "breadthFirst",
        device: "cpu",
        deviceReason: null,
        dtype: "float32",
        dtypeReason: null,
        precision: "float32",
        masterWeight: "none",
        optimizer: "adamw",
        plan: "all on the device",
        resumedFrom: null,
      },
    ]);
    expect(svg).toContain("a&lt;b &amp; &quot;c&quot; on d: 1,000 parameters");
  });
});
