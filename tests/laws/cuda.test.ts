/**
 * One card: plans carried out there agree with the processors' plain run, move what they say, take what they say, ask the
 * driver for nothing new after the first step, and give all back. Left out, with the reason, where no card can be used.
 */
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, describe, expect, it } from "vitest";
import { type CardDevice, machineFacts, visibleCards, whyNoCard } from "../../src/device.js";
import { traceModel } from "../../src/graph/index.js";
import { decoderConfig } from "../../src/models/decoder/config.js";
import { decoder } from "../../src/models/decoder/model.js";
import { tapePeaks } from "../../src/plan/simulate.js";
import { type Policy, writeTape } from "../../src/plan/write-tape.js";
import type { StepResult } from "../../src/train/native-session.js";
import { nativeOrSkip } from "../support/native.js";
import { random, randomBatch } from "../support/random-models.js";
import { lawCase, trainCase } from "./offload-case.js";
import { randomPolicy, sessionOptions, trafficDifferences, trainResident } from "./trial.js";

const native = nativeOrSkip();
const none = native === null ? "no addon" : (whyNoCard(machineFacts())?.message ?? null);
if (none !== null) console.warn(`left out, a card is needed: ${none}`);
const devices: CardDevice[] =
  none === null
    ? visibleCards(machineFacts())
        .filter((c) => c.unusable === null)
        .map((c) => c.device)
    : [];
const diskFolder = mkdtempSync(join(tmpdir(), "stroma-cuda-"));
afterAll(() => rmSync(diskFolder, { recursive: true, force: true }));

const config = { vocabSize: 2048, dim: 512, layers: 6, heads: 8, kvHeads: 4, ffn: 1408, maxPositions: 256 };
const dims = { B: 2, T: 256 };
const policy: Policy = {
  schedule: "breadthFirst",
  recompute: "all",
  update: "forward",
  clip: "global",
  state: { storage: "float32", masterWeight: "none", optimizer: "adamw" },
  microBatches: 3,
  dims,
  param: "host",
  optimizer: "host",
  boundary: "host",
  retained: "host",
  retainedDType: "float32",
  prefetch: 1,
  parts: 4,
};

/** Every device of the machine by itself: an event or a context of another one shows on the second card alone. */
describe.skipIf(none !== null).each(devices.length === 0 ? ["cuda:0" as const] : devices)("on %s", (device) => {
  it("random plans give the losses of the processors' resident run, and move what they say", {
    timeout: 600_000,
  }, async () => {
    const unlike: string[] = [];
    for (let seed = 1; seed <= 12; seed++) {
      const c = lawCase(seed);
      const tapes = writeTape(c.graph, randomPolicy(random(seed), c));
      const plain = await trainResident(native!, c);
      const card = await trainCase(native!, sessionOptions(c, { device, diskFolder }), c, tapes);
      expect(trafficDifferences(card, tapes.step), c.label).toEqual([]);
      // Bfloat16 storage rounds parameters, 8-bit state quantizes moments: another order of sums moves single elements.
      const bound = c.state.storage === "bfloat16" || c.state.optimizer === "adamw8bit" ? 3e-2 : 1e-3;
      for (const [i, r] of plain.results.entries()) {
        const off = Math.abs(card.results[i]!.loss / r.loss - 1);
        if (!(off < bound)) unlike.push(`seed ${seed}, step ${i}: ${card.results[i]!.loss} for ${r.loss}, ${c.label}`);
      }
    }
    expect(unlike).toEqual([]);
  });

  it("takes what the plan says, no new memory after the first step, and gives all back", {
    timeout: 300_000,
  }, async () => {
    const graph = traceModel(decoder, decoderConfig(config), { mode: "train", dtype: "float32" });
    const { step: tape, flush } = writeTape(graph, policy);
    const c = { ...lawCase(1), graph, dtype: "float32" as const, state: policy.state };
    const free = () => visibleCards(machineFacts()).find((card) => card.device === device)!.freeBytes!;
    const left: number[] = [];
    for (let round = 0; round < 2; round++) {
      const session = native!.createSession(sessionOptions(c, { device, diskFolder }));
      const results: StepResult[] = [];
      try {
        await session.load(graph, tape.placement);
        await session.initialize(1);
        for (let step = 0; step < 5; step++)
          results.push(
            await session.step({
              tape,
              ...(flush === null ? {} : { flush }),
              microBatches: Array.from({ length: policy.microBatches }, (_, m) =>
                randomBatch(graph, config.vocabSize, dims.B, dims.T, step * 100 + m),
              ),
              ...{ step, seed: 1, learningRate: 1e-3, maxGradNorm: 1 },
            }),
          );
      } finally {
        await session.dispose();
      }
      left.push(free());
      // Update on forward: the second step is the first that updates.
      expect(results.slice(2).map((r) => r.newDeviceSegments)).toEqual([0, 0, 0]);
      const measured = Math.max(...results.map((r) => r.peakDeviceBytes));
      const predicted = tapePeaks(graph, tape, "cuda", dims).deviceBytes;
      expect(Math.abs(predicted / measured - 1), `predicted ${predicted}, measured ${measured}`).toBeLessThan(0.05);
    }
    // The context stays, and so does cuBLAS's workspace; what a session took does not.
    expect(Math.abs(left[1]! - left[0]!)).toBeLessThan(64 * 2 ** 20);
  });

  it("refuses what goes beyond the memory that it was given", { timeout: 120_000 }, async () => {
    const graph = traceModel(decoder, decoderConfig(config), { mode: "train", dtype: "float32" });
    const c = { ...lawCase(1), graph, dtype: "float32" as const, state: policy.state };
    const { step } = writeTape(graph, { ...policy, param: "device", optimizer: "device", boundary: "device" });
    const session = native!.createSession(sessionOptions(c, { device, deviceMemory: 64e6 }));
    await expect(session.load(graph, step.placement)).rejects.toMatchObject({ code: "OUT_OF_MEMORY" });
    await session.dispose();
  });
});
