import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import os from "node:os";
import path from "node:path";
import fc from "fast-check";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { openDataset, type TextDataset } from "../../../src/data/index.js";
import { simulatePlanet } from "../../../src/data/planets/simulate.js";
import { UnitPool } from "../../../src/data/pool.js";
import { END_OF_TEXT, PADDING } from "../../../src/data/tokenizer.js";
import type { DataBatch, StreamOptions } from "../../../src/data/types.js";
import { planetSplit, splitOf } from "../../../src/data/units.js";

let folder: string;
let file: string;
const LINES = 700;

beforeAll(() => {
  folder = mkdtempSync(path.join(os.tmpdir(), "stroma-stream-"));
  file = path.join(folder, "docs.jsonl");
  const lines = Array.from({ length: LINES }, (_, i) =>
    JSON.stringify({ text: `document ${i} ${"x".repeat((i * 7) % 61)}` }),
  );
  writeFileSync(file, lines.join("\n"));
});
afterAll(() => rmSync(folder, { recursive: true, force: true }));

const open = (options: object = {}): Promise<TextDataset> =>
  openDataset({
    source: file,
    cacheFolder: path.join(folder, "cache"),
    workers: 0,
    shardBytes: 2000,
    shardsPerWindow: 3,
    ...options,
  });
const planets = (options: object = {}): Promise<TextDataset> =>
  openDataset({ source: "planets", count: 200, workers: 0, ...options });

async function take(dataset: TextDataset, options: StreamOptions, count: number): Promise<DataBatch[]> {
  const stream = await dataset.open(options);
  const out: DataBatch[] = [];
  for (let i = 0; i < count; i++) {
    const batch = await stream.next();
    if (batch === null) break;
    out.push(batch);
  }
  await stream.close();
  return out;
}

/** Everything of a batch as plain numbers, so that equality is equality of bits. */
function plain(batch: DataBatch): unknown {
  const tensors = Object.fromEntries(
    Object.entries(batch.tensors).map(([k, t]) => [k, { ...t, data: [...(t.data as BigInt64Array)].map(Number) }]),
  );
  return { ...batch, tensors };
}

function row(batch: DataBatch, name: string, r: number): number[] {
  const t = batch.tensors[name]!;
  const T = t.shape[1]!;
  return [...(t.data as BigInt64Array).subarray(r * T, (r + 1) * T)].map(Number);
}

const TRAIN: StreamOptions = { split: "train", sequenceLength: 64, microBatchSize: 3, seed: 5 };

describe("the packed stream", () => {
  it("gives labels already shifted, positions and segments that restart, and counts the labels", async () => {
    const dataset = await open();
    for (const batch of await take(dataset, TRAIN, 20)) {
      let labelled = 0;
      for (let r = 0; r < 3; r++) {
        const [ids, labels, positions, segments] = ["input_ids", "labels", "position_ids", "segment_ids"].map((n) =>
          row(batch, n, r),
        ) as [number[], number[], number[], number[]];
        for (let t = 0; t < 64; t++) {
          const starts = t === 0 || segments[t] !== segments[t - 1];
          expect(positions[t]).toBe(starts ? 0 : positions[t - 1]! + 1);
          if (t > 0) expect([0, 1]).toContain(segments[t]! - segments[t - 1]!);
          if (ids[t] === END_OF_TEXT || ids[t] === PADDING) expect(labels[t]).toBe(-100);
          else {
            labelled++;
            if (t < 63) expect(labels[t]).toBe(ids[t + 1]);
          }
          if (ids[t] === END_OF_TEXT && t < 63) expect(segments[t + 1]).toBe(segments[t]! + 1);
        }
      }
      expect(batch.tokens).toBe(labelled);
    }
  });

  it("never cuts a document that fits a row, and with packing split wastes nothing", async () => {
    const whole = await take(await open({ packing: "whole" }), { ...TRAIN, sequenceLength: 96 }, 30);
    for (const batch of whole)
      for (let r = 0; r < 3; r++)
        expect(String.fromCharCode(...row(batch, "input_ids", r).slice(0, 8))).toBe("document");
    const split = await take(await open({ packing: "split" }), TRAIN, 30);
    for (const batch of split) for (let r = 0; r < 3; r++) expect(row(batch, "input_ids", r)).not.toContain(PADDING);
  });

  it("gives every document of a split exactly once an epoch, in another order each epoch", async () => {
    const dataset = await open();
    const known: string[] = [];
    for await (const text of dataset.texts("train", 1e9)) known.push(text);
    const held: string[] = [];
    for await (const text of dataset.texts("validation", 1e9)) held.push(text);
    expect(known.length + held.length).toBe(LINES);
    expect(held.length).toBeGreaterThan(10);
    const stream = await dataset.open({ ...TRAIN, microBatchSize: 1, epochs: 2 });
    let text = "";
    for (let batch = await stream.next(); batch !== null; batch = await stream.next())
      text += row(batch, "input_ids", 0)
        .map((t) => (t === END_OF_TEXT ? "\n" : t === PADDING ? "" : String.fromCharCode(t)))
        .join("");
    await stream.close();
    const documents = text.split("\n").slice(0, -1);
    expect(documents.length).toBe(2 * known.length);
    const first = documents.slice(0, known.length);
    const second = documents.slice(known.length);
    expect([...first].sort()).toEqual([...known].sort());
    expect([...second].sort()).toEqual([...known].sort());
    expect(first).not.toEqual(second);
    expect(first).not.toEqual(known);
    expect(await dataset.tokensPerEpoch("train")).toBe(known.join("").length + known.length);
  });

  it("permutes shards, documents of a window, and planets, each by seed and epoch", async () => {
    const order = async (dataset: TextDataset, seed: number) => {
      const stream = await dataset.open({ ...TRAIN, seed, microBatchSize: 1, sequenceLength: 256, epochs: 2 });
      const epochs: string[][] = [[], []];
      for (let batch = await stream.next(); batch !== null; batch = await stream.next())
        epochs[batch.epoch]!.push(String.fromCharCode(...row(batch, "input_ids", 0).filter((t) => t < 256)));
      await stream.close();
      return epochs.map((e) => e.join());
    };
    const sources = [
      await open({ shardBytes: 1, shardsPerWindow: 1 }), // one document a shard: only shards move
      await open({ shardBytes: 1e9 }), // one shard: only documents move
      await planets(),
    ];
    for (const dataset of sources) {
      const [first, second] = await order(dataset, 1);
      const [other] = await order(dataset, 2);
      expect(new Set([first, second, other]).size).toBe(3);
    }
  });

  it("ends validation after one pass in the source's order, the last batch padded", async () => {
    const dataset = await open();
    const batches = await take(dataset, { ...TRAIN, split: "validation" }, 1e6);
    const known: string[] = [];
    for await (const text of dataset.texts("validation", 1e9)) known.push(text);
    const text = batches
      .flatMap((b) => [0, 1, 2].flatMap((r) => row(b, "input_ids", r)))
      .filter((t) => t !== PADDING)
      .map((t) => (t === END_OF_TEXT ? "\n" : String.fromCharCode(t)))
      .join("");
    expect(text).toBe(`${known.join("\n")}\n`);
    for (const b of batches) expect(b.tokens).toBeGreaterThan(0);
  });

  it("resumes from any position with bit-identical batches", async () => {
    await fc.assert(
      fc.asyncProperty(
        fc.record({
          source: fc.constantFrom("files", "planets"),
          packing: fc.constantFrom("whole", "split"),
          split: fc.constantFrom("train" as const, "validation" as const),
          sequenceLength: fc.integer({ min: 1, max: 300 }),
          microBatchSize: fc.integer({ min: 1, max: 5 }),
          seed: fc.integer({ min: 0, max: 2 ** 53 - 1 }),
          skip: fc.integer({ min: 1, max: 40 }),
        }),
        async ({ source, packing, skip, ...options }) => {
          const dataset = source === "files" ? await open({ packing }) : await planets({ packing });
          const all = await take(dataset, options, skip + 5);
          const at = Math.min(skip, all.length);
          // Through JSON, as a checkpoint stores it.
          const position = JSON.parse(JSON.stringify(all[at - 1]!.position)) as DataBatch["position"];
          const rest = await take(dataset, { ...options, position }, 5);
          expect(rest.map(plain)).toEqual(all.slice(at).map(plain));
        },
      ),
      { numRuns: 40 },
    );
  });

  it("does not depend on the number of workers", async () => {
    for (const make of [open, planets]) {
      const none = (await take(await make({ workers: 0 }), TRAIN, 25)).map(plain);
      for (const [workers, readAhead] of [
        [1, 2],
        [3, 5],
      ])
        expect((await take(await make({ workers, readAhead }), TRAIN, 25)).map(plain)).toEqual(none);
    }
  });

  it("depends on the seed", async () => {
    const dataset = await open();
    const a = (await take(dataset, TRAIN, 2)).map(plain);
    const b = (await take(dataset, { ...TRAIN, seed: 6 }, 2)).map(plain);
    expect(a).not.toEqual(b);
  });

  it("refuses positions of other data, seeds and shapes, and says which", async () => {
    const dataset = await open();
    const [batch] = await take(dataset, TRAIN, 1);
    const position = batch!.position;
    const fail = (options: Partial<StreamOptions>, d = dataset) => d.open({ ...TRAIN, position, ...options });
    await expect(fail({ seed: 6 })).rejects.toThrow(/seed/);
    await expect(fail({ sequenceLength: 65 })).rejects.toThrow(/sequenceLength/);
    await expect(fail({ split: "validation" })).rejects.toThrow(/split/);
    await expect(fail({}, await planets())).rejects.toThrow(/fingerprint/);
    await expect(fail({ position: { ...position, unit: -1 } })).rejects.toThrow(/position.unit/);
    await expect(fail({ position: { ...position, version: 2 as 1 } })).rejects.toThrow(/version/);
    // These two would never come to an end.
    await expect(fail({ position: { ...position, epoch: 1e15 } })).rejects.toThrow(/position.epoch/);
    await using past = await fail({ position: { ...position, token: 1e9 } });
    await expect(past.next()).rejects.toThrow(/position.token/);
  });

  it("of a micro-batch that no memory holds is OUT_OF_MEMORY", async () => {
    const dataset = await open();
    await using stream = await dataset.open({ ...TRAIN, microBatchSize: 2 ** 40 });
    await expect(stream.next()).rejects.toMatchObject({ code: "OUT_OF_MEMORY", message: /1099511627776 x 64 tokens/ });
  });

  it("refuses sizes that are not positive integers", async () => {
    const dataset = await open();
    for (const bad of [0, -1, 1.5, Number.NaN]) {
      await expect(dataset.open({ ...TRAIN, sequenceLength: bad })).rejects.toThrow(/sequenceLength/);
      await expect(dataset.open({ ...TRAIN, microBatchSize: bad })).rejects.toThrow(/microBatchSize/);
    }
  });

  it("says that a split without documents is empty, instead of searching for ever", async () => {
    const dataset = await open({ validationShare: 0 });
    expect(await take(dataset, { ...TRAIN, split: "train" }, 1)).toHaveLength(1);
    const stream = await dataset.open({ ...TRAIN, split: "validation" });
    await expect(stream.next()).rejects.toThrow(/validation split has no documents/);
    await stream.close();
  });

  it("answers next() calls in order, also when they are not waited for, and refuses them after close", async () => {
    const dataset = await open();
    const expected = (await take(dataset, TRAIN, 3)).map(plain);
    const stream = await dataset.open(TRAIN);
    const got = await Promise.all([stream.next(), stream.next(), stream.next()]);
    expect(got.map((b) => plain(b!))).toEqual(expected);
    await stream.close();
    await expect(stream.next()).rejects.toMatchObject({ code: "DISPOSED" });
  });
});

describe("workers that fail", () => {
  const source = { kind: "planets" as const, seed: 0, count: 10, validationShare: 0, splitSeed: 0 };
  const request = { split: "train" as const, epoch: 0, seed: 0, unit: 0 };

  it("give a typed error when they throw at the start, die at work, or exit, and every later call too", async () => {
    for (const code of [
      "throw new Error('broken at start')",
      "require('worker_threads').parentPort.on('message', () => { throw new Error('broken at work'); })",
      "require('worker_threads').parentPort.on('message', () => process.exit(3))",
    ]) {
      const pool = new UnitPool(source, 2, { code });
      await expect(pool.make(request)).rejects.toMatchObject({ name: "StromaError", code: "DATA" });
      await expect(pool.make(request)).rejects.toThrow(/worker thread \d ended/);
      await pool.close();
    }
  });

  it("pass a unit's own error on, with its code", async () => {
    const dataset = await open({ workers: 1, cacheFolder: path.join(folder, "lost") });
    rmSync(path.join(folder, "lost"), { recursive: true });
    const stream = await dataset.open(TRAIN);
    await expect(stream.next()).rejects.toMatchObject({
      name: "StromaError",
      code: "DATA",
      message: expect.stringMatching(/is gone/),
    });
    await stream.close();
  });

  it("leave no call waiting when the pool is closed", async () => {
    const pool = new UnitPool(source, 1, { code: "require('worker_threads').parentPort.on('message', () => {})" });
    const waiting = pool.make(request);
    await Promise.all([expect(waiting).rejects.toMatchObject({ code: "DISPOSED" }), pool.close()]);
  });
});

describe("the split", () => {
  it("is a function of the key alone, near the share asked for, and keeps a star's planets together", async () => {
    let held = 0;
    for (let i = 0; i < 20_000; i++) if (splitOf(`star ${i}`, 0.1, 0) === "validation") held++;
    // Five standard deviations.
    expect(Math.abs(held - 2000)).toBeLessThan(5 * Math.sqrt(20_000 * 0.1 * 0.9));
    // Frozen: a change would mix splits of data already trained on.
    expect(Array.from({ length: 12 }, (_, i) => (splitOf(`k${i}`, 0.5, 0) === "train" ? "t" : "v")).join("")).toBe(
      "vttvvttvtvtt",
    );
  });

  it("of the planets puts no star on both sides", async () => {
    const spec = { kind: "planets" as const, seed: 0, count: 600, validationShare: 0.3, splitSeed: 0 };
    const hosts = { train: new Set<string>(), validation: new Set<string>() };
    for (let i = 0; i < spec.count; i++) hosts[planetSplit(spec, i)].add(simulatePlanet(0, i).host);
    expect(hosts.validation.size).toBeGreaterThan(60);
    expect(hosts.train.size + hosts.validation.size).toBe(300);
    expect([...hosts.validation].filter((h) => hosts.train.has(h))).toEqual([]);
  });
});
