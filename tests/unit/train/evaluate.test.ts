import { describe, expect, test } from "vitest";
import { ByteTokenizer } from "../../../src/data/tokenizer.js";
import { EVAL, evaluateSession } from "../../../src/train/evaluate.js";
import type { Batch, NativeSession } from "../../../src/train/native-session.js";
import { letters } from "../../support/fake-data.js";
import { bigramGraph } from "../../support/fake-session.js";

/** Loss of a batch: the mean over its labels of label + 1. */
const session = {
  run: async (name: string, { labels }: Batch) => {
    expect(name).toBe(EVAL);
    const real = Array.from(labels!.data as BigInt64Array, Number).filter((l) => l >= 0);
    const loss = real.reduce((s, l) => s + l + 1, 0) / real.length;
    return { loss: { dtype: "float64", shape: [], data: Float64Array.of(loss) } };
  },
} as unknown as NativeSession;
const counting = (count: () => void): NativeSession =>
  ({
    run: (...args: Parameters<NativeSession["run"]>) => {
      count();
      return session.run(...args);
    },
  }) as unknown as NativeSession;
const graph = bigramGraph(16, "eval");

describe("evaluating", () => {
  test("weighs micro-batches by their labels: the result does not depend on their size", async () => {
    const by = (microBatchSize: number) =>
      evaluateSession(session, graph, letters(), { sequenceLength: 10, microBatchSize });
    const one = await by(1);
    expect(one.tokens).toBeGreaterThan(100);
    for (const size of [3, 64]) {
      const other = await by(size);
      expect(other.tokens).toBe(one.tokens);
      expect(other.loss).toBeCloseTo(one.loss, 12);
    }
  });

  test.each([
    [2, undefined],
    [3, undefined],
    [3, 4],
    [4, 2],
  ])(
    "deals micro-batches out to %i members, who run equally many, and has the same bits (of %s)",
    async (members, microBatches) => {
      const options = {
        sequenceLength: 10,
        microBatchSize: 3,
        ...(microBatches === undefined ? {} : { microBatches }),
      };
      const one = await evaluateSession(session, graph, letters(), options);
      const runs = Array.from({ length: members }, () => 0);
      let alone = 0;
      await evaluateSession(
        counting(() => alone++),
        graph,
        letters(),
        options,
      );
      const texts: string[] = [];
      let told: (all: string[]) => void;
      const everyone = new Promise<string[]>((resolve) => {
        told = resolve;
      });
      const gather = (mine: string) => {
        if (texts.push(mine) === members) told(texts);
        return everyone;
      };
      const results = await Promise.all(
        runs.map((_, member) =>
          evaluateSession(
            counting(() => runs[member]!++),
            graph,
            letters(),
            options,
            { member, members, gather },
          ),
        ),
      );
      for (const result of results) expect(result).toEqual(one);
      expect(runs).toEqual(runs.map(() => Math.ceil(alone / members)));
    },
  );

  test("ends after so many micro-batches", async () => {
    const options = { sequenceLength: 10, microBatchSize: 4 };
    const all = await evaluateSession(session, graph, letters(), options);
    const some = await evaluateSession(session, graph, letters(), { ...options, microBatches: 2 });
    expect(some.tokens).toBeLessThan(all.tokens / 4);
  });

  test("counts bytes, not special tokens, for bits per byte", async () => {
    const labels = BigInt64Array.of(9n, 256n, 1n, -100n);
    const batch = {
      tensors: {
        input_ids: { dtype: "int64" as const, shape: [1, 4], data: new BigInt64Array(4) },
        labels: { dtype: "int64" as const, shape: [1, 4], data: labels },
      },
      tokens: 3,
      epoch: 0,
      position: { version: 1 as const, epoch: 0 },
    };
    const batches = [batch, null];
    const stream = {
      next: async () => batches.shift() ?? null,
      close: async () => {},
      [Symbol.asyncDispose]: async () => {},
    };
    const data = { ...letters(), tokenizer: new ByteTokenizer(), open: async () => stream };
    const result = await evaluateSession(session, graph, data, { sequenceLength: 4, microBatchSize: 1 });
    expect(result.tokens).toBe(3);
    expect(result.loss).toBeCloseTo((10 + 257 + 2) / 3, 10);
    expect(result.bitsPerByte).toBeCloseTo((10 + 257 + 2) / Math.LN2 / 2, 10);
  });

  test("refuses a split without labels and a graph without the loss", async () => {
    const empty = {
      ...letters(),
      open: async () => ({ next: async () => null, close: async () => {}, [Symbol.asyncDispose]: async () => {} }),
    };
    const options = { sequenceLength: 4, microBatchSize: 1 };
    await expect(evaluateSession(session, graph, empty, options)).rejects.toMatchObject({ code: "DATA" });
    await expect(evaluateSession(session, bigramGraph(16, "generate"), letters(), options)).rejects.toMatchObject({
      code: "GRAPH",
    });
  });
});
