/**
 * Recompute "selective" against law 1: whatever dear results a forward keeps, the numbers are those of kept graphs, to the
 * bit; memory between that and recompute "all"; and what is kept wrongly shows.
 */
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { describe, expect, it } from "vitest";
import { traceModel } from "../../src/graph/index.js";
import { decoderConfig } from "../../src/models/decoder/config.js";
import { decoder } from "../../src/models/decoder/model.js";
import { checkTape } from "../../src/plan/checker.js";
import { planResident } from "../../src/plan/planner.js";
import { keptOf } from "../../src/plan/selective.js";
import type { Kept, Recompute, Tape } from "../../src/plan/types.js";
import { writeTape } from "../../src/plan/write-tape.js";
import { nativeOrSkip } from "../support/native.js";
import { random, randomBatch } from "../support/random-models.js";
import { type LawCase, lawCase, trainCase } from "./offload-case.js";
import { describeTrial, differences, randomTrial, sessionOptions, trainResident } from "./trial.js";

const native = nativeOrSkip();
const CASES = 30;

/** Any part of what may be kept; everything for every third. The rest is computed again, or its value is read after all. */
function someOf(kept: Kept, next: () => number): Kept {
  const share = next() < 0.35 ? 1 : next();
  const some = (lists: number[][]) => lists.map((ids) => ids.filter(() => next() < share));
  // A value that nothing reads may be kept as well.
  const moved = kept.shapes.map((ids) => ids.filter(() => next() < 0.2));
  const shapes = some(kept.shapes).map((ids, p) => ids.filter((id) => !moved[p]!.includes(id)));
  return { ...kept, shapes, values: some(kept.values).map((ids, p) => [...ids, ...moved[p]!].sort((a, b) => a - b)) };
}

const resident = (c: LawCase, recompute: Recompute, schedule: Tape["schedule"] = "breadthFirst"): Tape =>
  planResident(c.graph, { microBatches: c.microBatches, clip: c.clip, state: c.state, schedule, recompute });

describe.skipIf(!native)("recompute selective", () => {
  it(`gives the resident run's numbers over ${CASES} random models, plans and choices`, {
    timeout: 240_000,
  }, async () => {
    const diskFolder = mkdtempSync(join(tmpdir(), "stroma-laws-"));
    const failures: string[] = [];
    let held = 0;
    for (let seed = 70_000; seed < 70_000 + CASES; seed++) {
      const trial = randomTrial(seed);
      const { c, sim } = trial;
      const policy = { ...trial.policy, recompute: "selective" } as const;
      const next = random(seed);
      const plan = writeTape(c.graph, policy);
      // By the rule, dims as small as here's make few results dear.
      const kept = someOf(keptOf(c.graph, c.dims, 0), next);
      held += kept.values.flat().length + kept.shapes.flat().length;
      const step = { ...plan.step, kept };
      checkTape(c.graph, step);
      const other = await trainCase(native!, sessionOptions(c, { device: "sim", diskFolder, sim }), c, {
        ...plan,
        step,
      });
      const unequal = differences(other, await trainResident(native!, c));
      if (unequal.length > 0)
        failures.push(`seed ${seed}: ${unequal.slice(0, 3).join(", ")}: ${describeTrial({ ...trial, policy })}`);
    }
    rmSync(diskFolder, { recursive: true });
    expect(failures).toEqual([]);
    expect(held).toBeGreaterThan(CASES * 3);
  });

  it("keeps what is dear and read: 7 of a layer's 8, and of the last its shape", () => {
    const graph = traceModel(
      decoder,
      decoderConfig({ vocabSize: 64, dim: 64, layers: 2, heads: 2, kvHeads: 2, ffn: 128 }),
      {
        mode: "train",
      },
    );
    const { values, shapes, kernels } = keptOf(graph, { B: 2, T: 64 });
    const layer = graph.blocks[1]!.program;
    const op = (id: number) => graph.programs[layer]!.nodes.find((n) => n.outputs[0] === id)!.op;
    expect(values[layer]!.map(op)).toEqual([
      ...["aten::linear", "aten::linear", "aten::linear", "aten::scaled_dot_product_attention"],
      ...["aten::linear", "aten::linear", "aten::linear"],
    ]);
    // The last product is added to the residual, and a sum's gradient asks for no value.
    expect(shapes[layer]!.map(op)).toEqual(["aten::linear"]);
    expect([...values, ...shapes].flat().length).toBe(8);
    expect(Object.keys(kernels).sort()).toEqual(["aten::linear", "aten::scaled_dot_product_attention"]);
    // Too short for attention to be dear: about T / 2 FLOPs a byte.
    expect(keptOf(graph, { B: 2, T: 8 }).values[layer]!.map(op)).not.toContain("aten::scaled_dot_product_attention");
  });

  it("takes memory between all and none", { timeout: 120_000 }, async () => {
    const config = { vocabSize: 300, dim: 128, layers: 4, heads: 4, kvHeads: 2, ffn: 384 };
    const graph = traceModel(decoder, decoderConfig(config), { mode: "train" });
    const peak = async (recompute: Recompute) => {
      const session = native!.createSession(sessionOptions(lawCase(1), { dtype: "float32", device: "sim" }));
      await session.load(graph);
      await session.initialize(1);
      const tape = planResident(graph, { microBatches: 3, recompute });
      const microBatches = [1, 2, 3].map((m) => randomBatch(graph, 300, 2, 128, m));
      const result = await session.step({ tape, microBatches, step: 0, seed: 1, learningRate: 1e-3, maxGradNorm: 1 });
      await session.dispose();
      return { bytes: result.peakDeviceBytes, norm: result.gradNorm };
    };
    const [all, selective, none] = [await peak("all"), await peak("selective"), await peak("none")];
    expect([selective.norm, none.norm]).toEqual([all.norm, all.norm]);
    expect(selective.bytes).toBeGreaterThan(all.bytes * 1.05);
    // Norms and SwiGLU's product save no results of their own, so what selective leaves out of a whole graph is little.
    expect(selective.bytes).toBeLessThan(none.bytes * 0.95);
  });

  /** Whether it changes the numbers, or ends the step. */
  const seen = async (c: LawCase, step: Tape): Promise<boolean> => {
    const plain = await trainResident(native!, c);
    return trainCase(native!, sessionOptions(c), c, { step, flush: null }).then(
      (outcome) => differences(outcome, plain).length > 0,
      (error: { code: string }) => {
        expect(["NON_FINITE", "NATIVE"]).toContain(error.code);
        return true;
      },
    );
  };

  it("shows a planted fault: a result that is read kept as a shape alone", { timeout: 120_000 }, async () => {
    const shown: boolean[] = [];
    for (let seed = 80_000; shown.length < 8; seed++) {
      const c = lawCase(seed, 1);
      const tape = { ...resident(c, "selective"), kept: keptOf(c.graph, c.dims, 0) };
      const { values, shapes } = tape.kept;
      const p = values.findIndex((ids) => ids.length > 0);
      if (p < 0) continue;
      const hollow = values[p]![seed % values[p]!.length]!;
      const kept: Kept = {
        ...tape.kept,
        values: values.map((ids, q) => (q === p ? ids.filter((id) => id !== hollow) : ids)),
        shapes: shapes.map((ids, q) => (q === p ? [...ids, hollow] : ids)),
      };
      expect(await seen(c, tape)).toBe(false);
      shown.push(await seen(c, { ...tape, kept }));
    }
    expect(shown).toEqual(shown.map(() => true));
  });

  /** Micro-batches alike in all but their tokens: what a layer reads beside its boundary is the same for each. */
  it("shows a planted fault: one micro-batch's results taken for another's", { timeout: 120_000 }, async () => {
    const config = { vocabSize: 64, dim: 32, layers: 2, heads: 2, kvHeads: 1, ffn: 48 };
    const graph = traceModel(decoder, decoderConfig(config), { mode: "train" });
    const c = { ...lawCase(1), graph, dtype: "float32", clip: "none", maxGradNorm: null, microBatches: 3 } as LawCase;
    c.state = { storage: "float32", masterWeight: "none", optimizer: "adamw" };
    const [first, ...rest] = [1, 2, 3].map((m) => randomBatch(graph, 64, 2, 8, m));
    const { input_ids: _, labels: __, ...shared } = first!;
    const microBatches = [first!, ...rest.map((b) => ({ ...b, ...shared }))];
    c.steps = [{ microBatches, step: 0, seed: 1, learningRate: 1e-2, maxGradNorm: null }];
    const faulty = (recompute: Recompute) => {
      const tape = resident(c, recompute);
      if (recompute === "selective") tape.kept = keptOf(graph, c.dims, 0);
      const forwards = tape.instructions.flatMap((i) => (i.op === "forward" && i.block === 1 ? [i] : []));
      // Each leaves what it kept under the other's number; its boundaries stay in their places.
      [forwards[0]!.microBatch, forwards[1]!.microBatch] = [1, 0];
      expect(() => checkTape(graph, tape)).toThrow(expect.objectContaining({ code: "TAPE" }));
      return tape;
    };
    expect(await seen(c, resident(c, "selective"))).toBe(false);
    expect(await seen(c, faulty("all"))).toBe(false);
    expect(await seen(c, faulty("selective"))).toBe(true);
  });

  it("refuses a tape that keeps what it cannot", async () => {
    const c = lawCase(3);
    const tape = resident(c, "selective");
    const { kept, ...without } = tape;
    for (const wrong of [
      without as Tape,
      { ...tape, recompute: "all" } as Tape,
      { ...tape, kept: { ...kept!, values: kept!.values.map(() => [0]) } },
      { ...tape, kept: { ...keptOf(c.graph, c.dims, 0), kernels: {} } },
    ])
      expect(() => checkTape(c.graph, wrong)).toThrow(expect.objectContaining({ code: "TAPE" }));
    const kernels = { "aten::linear": ["aten::add_.Tensor"] };
    const writes = { ...tape, kept: { ...keptOf(c.graph, c.dims, 0), kernels } };
    await expect(trainCase(native!, sessionOptions(c), c, { step: writes, flush: null })).rejects.toMatchObject({
      code: "TAPE",
      message: expect.stringContaining("cannot be kept"),
    });
  });
});
