import { describe, expect, it } from "vitest";
import { countLosses, splitBatch } from "../../../src/distributed/split-batch.js";
import { model } from "../../../src/graph/model.js";
import * as ops from "../../../src/graph/ops.js";
import { traceModel } from "../../../src/graph/trace.js";
import type { Dim } from "../../../src/graph/types.js";
import { decoderConfig } from "../../../src/models/decoder/config.js";
import { decoder } from "../../../src/models/decoder/model.js";
import type { Batch, HostTensor } from "../../../src/train/native-session.js";

const config = decoderConfig({
  vocabSize: 11,
  dim: 16,
  layers: 2,
  heads: 4,
  kvHeads: 2,
  ffn: 24,
  documentMask: true,
});
const graph = traceModel(decoder, config, { context: { ranks: 2, kind: "ring" } });

const int64 = (shape: number[], of: (i: number) => number): HostTensor => {
  const n = shape.reduce((a, b) => a * b, 1);
  return { dtype: "int64", shape, data: BigInt64Array.from({ length: n }, (_, i) => BigInt(of(i))) };
};
/** Tokens say where they stand: 100 row + place. */
const placed = (B: number, T: number): HostTensor => int64([B, T], (i) => 100 * Math.floor(i / T) + (i % T));
const batchOf = (B: number, T: number): Batch => ({
  input_ids: placed(B, T),
  labels: int64([B, T], (i) => (i % 3 === 0 ? -100 : i)),
  position_ids: placed(B, T),
  segment_ids: placed(B, T),
});
const values = ({ data }: HostTensor): number[] => {
  const bytes = data.buffer.slice(data.byteOffset, data.byteOffset + data.byteLength) as ArrayBuffer;
  return [...new BigInt64Array(bytes)].map(Number);
};

describe("sharing a batch out to ranks", () => {
  it("gives each rank two chunks of every row, mirrored, and every input the same ones", () => {
    const first = splitBatch(graph, batchOf(2, 8), { rank: 0, ranks: 2 }).batch;
    const second = splitBatch(graph, batchOf(2, 8), { rank: 1, ranks: 2 }).batch;
    expect(first.input_ids!.shape).toEqual([2, 4]);
    expect(values(first.input_ids!)).toEqual([0, 1, 6, 7, 100, 101, 106, 107]);
    expect(values(second.input_ids!)).toEqual([2, 3, 4, 5, 102, 103, 104, 105]);
    for (const name of ["position_ids", "segment_ids"]) {
      expect(values(first[name]!)).toEqual(values(first.input_ids!));
      expect(values(second[name]!)).toEqual(values(second.input_ids!));
    }
    expect(values(second.labels!)).toEqual([2, -100, 4, 5, 10, 11, -100, 13]);
  });

  it.each([2, 3, 4, 7])("hands every token to one of %d ranks", (ranks) => {
    const shares = [...Array(ranks).keys()].map((rank) => splitBatch(graph, batchOf(3, 4 * ranks), { rank, ranks }));
    const all = shares.flatMap(({ batch }) => values(batch.input_ids!)).sort((a, b) => a - b);
    expect(all).toEqual(values(batchOf(3, 4 * ranks).input_ids!).sort((a, b) => a - b));
  });

  it("counts losses over the whole rows, on every rank alike", () => {
    const batch = batchOf(2, 12);
    const expected = values(batch.labels!).filter((x) => x !== -100).length;
    expect(countLosses(graph, batch)).toEqual({ loss: expected });
    for (const rank of [0, 1, 2])
      expect(splitBatch(graph, batch, { rank, ranks: 3 }).counts).toEqual({ loss: expected });
  });

  it("adds the places of tokens where the batch has no positions", () => {
    const { position_ids: _, ...without } = batchOf(2, 8);
    expect(values(splitBatch(graph, without, { rank: 0, ranks: 2 }).batch.position_ids!)).toEqual([
      0, 1, 6, 7, 0, 1, 6, 7,
    ]);
  });

  it("leaves a batch of one rank as it is", () => {
    const batch = batchOf(2, 7);
    expect(splitBatch(graph, batch, { rank: 0, ranks: 1 }).batch).toEqual(batch);
    expect(splitBatch(graph, batch, { rank: 0, ranks: 1 }).batch.input_ids).toBe(batch.input_ids);
  });

  it("reads views that begin anywhere in their buffer", () => {
    const whole = values(batchOf(1, 8).input_ids!);
    const bytes = new Uint8Array(3 + 64);
    bytes.set(new Uint8Array(BigInt64Array.from(whole.map(BigInt)).buffer), 3);
    const odd: HostTensor = { dtype: "int64", shape: [1, 8], data: bytes.subarray(3) };
    const split = splitBatch(graph, { ...batchOf(1, 8), input_ids: odd, labels: odd }, { rank: 1, ranks: 2 });
    expect(values(split.batch.input_ids!)).toEqual([2, 3, 4, 5]);
    expect(split.counts).toEqual({ loss: 8 });
  });

  it.each([
    [
      10,
      2,
      "10 tokens do not divide into 2 x 2 = 4 equal chunks, two for each rank: 10 = 2 x 4 + 2. Take 8 or 12 tokens",
    ],
    [3, 3, "3 tokens do not divide into 2 x 3 = 6 equal chunks, two for each rank: 3 = 0 x 6 + 3. Take 6 tokens"],
  ])("refuses %d tokens on %d ranks, with the arithmetic", (tokens, ranks, said) => {
    expect(() => splitBatch(graph, batchOf(1, tokens), { rank: 0, ranks })).toThrow(
      expect.objectContaining({ code: "CONFIG", message: `[context] rows of ${said}` }),
    );
  });

  it("refuses ranks that are none, and batches that are not the graph's", () => {
    const at = (rank: number, ranks: number) => () => splitBatch(graph, batchOf(1, 8), { rank, ranks });
    expect(at(2, 2)).toThrow(/a rank from 0 to 1, got 2/);
    expect(at(0, 0)).toThrow(/at least 1 rank, got 0/);
    const flat = { ...batchOf(1, 8), labels: int64([8], (i) => i) };
    expect(() => splitBatch(graph, flat, { rank: 0, ranks: 2 })).toThrow(
      expect.objectContaining({ code: "SHAPE", message: expect.stringContaining("labels as [B, T], got [8]") }),
    );
    const { labels: _, ...unlabelled } = batchOf(1, 8);
    expect(() => splitBatch(graph, unlabelled, { rank: 0, ranks: 2 })).toThrow(/no input labels, which counts loss/);
  });

  it("gives an input without tokens to every rank whole, and refuses one whose size does not split", () => {
    const withImages = (shape: Dim[]) =>
      traceModel(
        model<null>("small", (m) => {
          const x = m.input("x", "float32", shape);
          const labels = m.input("labels", "int64", ["B", "T"]);
          return m.block("head", (p) => {
            const loss = ops.mul(ops.sum(ops.mul(x, x), []), p.lossScale("loss"));
            p.loss("loss", loss, { count: labels, ignore: -100 });
            return loss;
          });
        }),
        null,
      );
    const images: HostTensor = { dtype: "float32", shape: [1, 3], data: new Float32Array(3) };
    const batch = { x: images, labels: placed(1, 8) };
    expect(splitBatch(withImages(["B", "P"]), batch, { rank: 0, ranks: 2 }).batch.x).toBe(images);
    for (const shape of [
      ["T", "T"],
      ["B", "T+1"],
    ])
      expect(() => splitBatch(withImages(shape), batch, { rank: 0, ranks: 2 })).toThrow(
        expect.objectContaining({
          code: "GRAPH",
          message: expect.stringContaining("expected T in one dim and by itself"),
        }),
      );
  });
});
