/**
 * On a device of its own a loss is read at the end of a visit, not after each pass: what a step says of one that is not
 * finite, and what it leaves alone, is the same as where each is read at once.
 */
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, describe, expect, it } from "vitest";
import { traceModel } from "../../src/graph/index.js";
import { decoderConfig } from "../../src/models/decoder/config.js";
import { decoder } from "../../src/models/decoder/model.js";
import { residentPolicy } from "../../src/plan/planner.js";
import { writeTape } from "../../src/plan/write-tape.js";
import type { Batch, HostTensor, SessionOptions } from "../../src/train/native-session.js";
import { nativeOrSkip } from "../support/native.js";
import { bytesOf } from "./offload-case.js";

const native = nativeOrSkip();
const folder = mkdtempSync(join(tmpdir(), "stroma-late-"));
afterAll(() => rmSync(folder, { recursive: true, force: true }));

const VOCAB = 12;
const BAD = VOCAB - 1;
const config = { vocabSize: VOCAB, dim: 16, layers: 2, heads: 2, kvHeads: 1, ffn: 24, tiedEmbeddings: false };
const graph = traceModel(decoder, decoderConfig(config), { mode: "train", dtype: "float32" });
/** Only micro-batch `bad` has the token whose embedding is not a number; nowhere is it a label. */
const batches = (bad: number): Batch[] =>
  [0, 1, 2, 3].map((m) => {
    const ids = Array.from({ length: 8 }, (_, i) => BigInt((3 * m + 5 * i) % BAD));
    const labels: HostTensor = { dtype: "int64", shape: [1, 8], data: BigInt64Array.from(ids) };
    if (m === bad) ids[4] = BigInt(BAD);
    const rest = graph.inputs.filter(({ name }) => name !== "input_ids" && name !== "labels");
    const zeros = rest.map(
      ({ name }) => [name, { dtype: "int64", shape: [1, 8], data: new BigInt64Array(8) }] as const,
    );
    return { input_ids: { ...labels, data: BigInt64Array.from(ids) }, labels, ...Object.fromEntries(zeros) };
  });

const ORDERS = [
  ["breadthFirst", "end", "global"],
  ["depthFirst", "end", "global"],
  ["breadthFirst", "forward", "global"],
  ["breadthFirst", "backward", "block"],
] as const;

describe.skipIf(!native)("losses that are read late", () => {
  it.each(ORDERS)(
    "%s, update %s, clip %s: tell and keep what those read at once do",
    async (schedule, update, clip) => {
      const plan = writeTape(
        graph,
        residentPolicy(graph, {
          ...{ microBatches: 4, schedule, update, clip },
          state: { storage: "float32", masterWeight: "none", optimizer: "adamw" },
        }),
      );
      const run = async (device: SessionOptions["device"]) => {
        const optimizer = { kind: "adamw", beta1: 0.9, beta2: 0.95, epsilon: 1e-8, weightDecay: 0.1 } as const;
        const session = native!.createSession({ device, dtype: "float32", threads: 1, optimizer, diskFolder: folder });
        await session.load(graph, plan.step.placement);
        await session.initialize(3);
        const name = graph.parameters[0]!.name;
        const table = await session.read("param", name);
        const values = new Float32Array(bytesOf(table).buffer.slice(0, bytesOf(table).byteLength));
        values.fill(Number.NaN, BAD * config.dim);
        await session.write("param", name, { ...table, data: values });
        const state = async () => {
          const kept: string[] = [];
          for (const { kind, name } of await session.state())
            kept.push(bytesOf(await session.read(kind, name)).toString("hex"));
          return kept;
        };
        const before = await state();
        const step = (at: number, bad: number) =>
          session.step({
            ...{ tape: plan.step, ...(plan.flush === null ? {} : { flush: plan.flush }), microBatches: batches(bad) },
            ...{ step: at, seed: 1, learningRate: 1e-2, maxGradNorm: 1 },
          });
        const refused = await step(0, 2);
        const untouched = (await state()).every((bytes, i) => bytes === before[i]);
        const { losses, loss, microBatchLosses, nonFinite, gradNorm } = refused;
        await session.dispose();
        return { losses, loss, microBatchLosses, nonFinite, gradNorm, untouched };
      };
      const [late, once] = [await run("sim"), await run("cpu")];
      expect(late).toEqual(once);
      expect(late.untouched).toBe(true);
      expect(late.nonFinite).toMatchObject({ microBatch: 2 });
    },
  );
});
