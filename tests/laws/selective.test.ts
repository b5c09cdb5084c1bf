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

  it("takes memory between all and none, and runs fewer kernels than all", { timeout: 120_000 }, async () => {
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
    expect(selective.bytes).toBeLessThan(none.bytes * 0.9);
  });

  /** A result kept as a shape alone is not-a-number to whoever reads it; one taken for another's, another number. */
  it("shows a planted fault: what is read kept as a shape, and a micro-batch's results taken for another's", {
    timeout: 120_000,
  }, async () => {
    let hollow = 0;
    let stale = 0;
    for (let seed = 80_000; seed < 80_010; seed++) {
      const c = lawCase(seed);
      const plain = await trainResident(native!, c);
      const tape = { ...resident(c, "selective"), kept: keptOf(c.graph, c.dims, 0) };
      const run = (step: Tape) =>
        trainCase(native!, sessionOptions(c), c, { step, flush: null }).then(
          (outcome) => differences(outcome, plain).length > 0,
          (error: { code: string }) => {
            expect(["NON_FINITE", "NATIVE"]).toContain(error.code);
            return true;
          },
        );
      expect(await run(tape)).toBe(false);
      const { values, shapes } = tape.kept;
      const p = values.findIndex((ids) => ids.length > 0);
      const first = values[p]![0]!;
      const faulty: Kept = {
        ...tape.kept,
        values: values.map((ids) => ids.filter((id) => id !== first || ids !== values[p])),
        shapes: shapes.map((ids, i) => (i === p ? [...ids, first].sort((a, b) => a - b) : ids)),
      };
      if (await run({ ...tape, kept: faulty })) hollow++;
      // Two forwards of one block change places: each leaves its results under the other's number.
      const swapped = structuredClone(tape);
      const forwards = swapped.instructions.flatMap((i) =>
        i.op === "forward" && c.graph.blocks[i.block]!.program === p && i.microBatch < 2 ? [i] : [],
      );
      const [a, b] = [forwards[0]!, forwards.find((f) => f.block === forwards[0]!.block && f.microBatch === 1)!];
      [a.in, b.in] = [b.in, a.in];
      expect(() => checkTape(c.graph, swapped)).toThrow(expect.objectContaining({ code: "TAPE" }));
      if (await run(swapped)) stale++;
    }
    expect([hollow, stale]).toEqual([10, 10]);
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
