import { describe, expect, it } from "vitest";
import { traceModel } from "../../../src/graph/trace.js";
import { decoderConfig } from "../../../src/models/decoder/config.js";
import { decoder } from "../../../src/models/decoder/model.js";
import { findModel } from "../../../src/models/registry.js";
import {
  type ContextSizes,
  chooseContext,
  contextOn,
  contextSizes,
  sequenceTraffic,
  withTransfers,
} from "../../../src/plan/context.js";
import { CostModel } from "../../../src/plan/cost.js";
import { planResident } from "../../../src/plan/planner.js";
import { findProfile } from "../../../src/plan/profiles.js";

const sizes: ContextSizes = {
  batch: 1,
  heads: 32,
  kvHeads: 8,
  tokens: 32_768,
  headDim: 128,
  dtype: "bfloat16",
  documents: false,
};
const rates = { link: 4e9, messageSeconds: 20e-6, attentionFlops: 100e12 };
const shape = { ...sizes, tokens: 1024, valueDim: 128 };

describe("traffic of attention over ranks", () => {
  it("is what the operators send: keys and values round the ring, and their sums in fp32 on the way back", () => {
    // 2 x 8 heads x 1024 tokens x 128 in bfloat16, three times; sums in fp32 four times.
    const block = 2 * 8 * 1024 * 128;
    expect(sequenceTraffic("ring", 4, shape)).toEqual({
      forward: 3 * block * 2,
      backward: 3 * block * 2 + 4 * block * 4,
    });
    expect(sequenceTraffic("ring", 4, { ...shape, dtype: "float64" }).backward).toBe(3 * block * 8 + 4 * block * 8);
    expect(sequenceTraffic("ring", 4, { ...shape, documents: true }).forward).toBe(3 * block * 2 + 3 * 1024 * 8);
  });

  it("is the others' share of queries, keys, values and result, all to all", () => {
    const head = 1024 * 256 * 2;
    expect(sequenceTraffic("allToAll", 4, shape)).toEqual({ forward: 0.75 * head * 40, backward: 0.75 * head * 40 });
    // 8 key/value heads on 16 ranks stand twice; on 3 ranks three times.
    expect(sequenceTraffic("allToAll", 16, shape).forward).toBe((15 / 16) * head * 48);
    expect(sequenceTraffic("allToAll", 3, { ...shape, heads: 33, kvHeads: 11 }).forward).toBeCloseTo(
      (2 / 3) * head * 66,
    );
    const packed = sequenceTraffic("allToAll", 4, { ...shape, documents: true });
    expect(packed.forward - packed.backward).toBe(3 * 1024 * 8);
  });

  it("is nothing on one rank", () => {
    expect(sequenceTraffic("ring", 1, shape).forward).toBe(0);
    expect(sequenceTraffic("allToAll", 1, shape)).toEqual({ forward: 0, backward: 0 });
  });

  it("hides behind all but one step of the ring, and not at all in an exchange", () => {
    expect(withTransfers("ring", 4, 8, 5)).toBe(8);
    expect(withTransfers("ring", 4, 8, 7)).toBe(9);
    expect(withTransfers("allToAll", 4, 8, 5)).toBe(13);
  });
});

describe("choosing between the two", () => {
  it("takes the ring where it hides its transfers, and the exchange on many ranks that have little to compute", () => {
    expect(chooseContext({ ...sizes, tokens: 131_072 }, 4, rates).kind).toBe("ring");
    const short = { ...sizes, kvHeads: 32, tokens: 8192 };
    const many = chooseContext(short, 32, { ...rates, link: 50e9 });
    expect(many.kind).toBe("allToAll");
    expect(many.allToAll!.seconds).toBeLessThan(many.ring.seconds);
    expect(many.allToAll!.forward).toBeLessThan(many.ring.forward);
    expect(many.why).toMatch(/^a layer takes .* ms and .* MB sent in the ring, .* ms and .* MB sent all to all$/);
  });

  it("takes the ring where heads do not divide, and says so", () => {
    const choice = chooseContext({ ...sizes, heads: 34, kvHeads: 2, tokens: 24_576 }, 3, rates);
    expect(choice).toMatchObject({ kind: "ring", allToAll: null });
    expect(choice.why).toBe("34 query heads do not divide over 3 ranks: only the ring takes them");
  });

  it("refuses rows that do not divide, with the arithmetic", () => {
    expect(() => chooseContext({ ...sizes, tokens: 1000 }, 3, rates)).toThrow(/1000 = 166 x 6 \+ 4. Take 996 or 1002/);
  });

  it("reads the sizes off a graph, whole or shared out", () => {
    const config = decoderConfig({
      vocabSize: 11,
      dim: 24,
      layers: 2,
      heads: 6,
      kvHeads: 2,
      ffn: 24,
      documentMask: true,
    });
    const expected = {
      batch: 2,
      heads: 6,
      kvHeads: 2,
      tokens: 48,
      headDim: 4,
      valueDim: 4,
      dtype: "float32",
      documents: true,
    };
    expect(contextSizes(traceModel(decoder, config), { B: 2, T: 48 })).toEqual(expected);
    for (const kind of ["ring", "allToAll"] as const)
      expect(contextSizes(traceModel(decoder, config, { context: { ranks: 2, kind } }), { B: 2, T: 48 })).toEqual(
        expected,
      );
  });
});

describe("what a pass over ranks costs", () => {
  it("is a share of the arithmetic where the link is fast, and the transfers where it is slow", () => {
    const seconds = (ranks: number, kind: "ring" | "allToAll", rankLink: number) => {
      const graph = findModel("1b").graph({ dtype: "bfloat16", context: { ranks, kind } });
      const tape = planResident(graph, { microBatches: 1, recompute: "all" });
      const cost = new CostModel(graph, tape, { B: 1, T: 32_768 / ranks }, { ...findProfile("h200"), rankLink });
      const forward = tape.instructions.find((i) => i.op === "forward" && i.block === 1)!;
      return cost.of(forward).seconds;
    };
    const whole = seconds(1, "ring", 50e9);
    for (const kind of ["ring", "allToAll"] as const) {
      expect(seconds(4, kind, 1e15)).toBeGreaterThan(whole / 4.2);
      expect(seconds(4, kind, 1e15)).toBeLessThan(whole / 3.5);
      expect(seconds(4, kind, 1e8)).toBeGreaterThan(whole);
    }
    expect(seconds(4, "ring", 20e9)).toBeLessThan(seconds(4, "allToAll", 20e9));
  });
});

describe("the faster way of attending, on a machine", () => {
  it("is chosen by the rate of the graph's dtype", () => {
    const profile = findProfile("a100");
    // Products cost nothing in bfloat16, and everything in float32: only behind these a ring hides what it sends.
    const gemm = { ...profile.gemm, bfloat16: { flops: 1e21, halfRows: 1 }, float32: { flops: 1e9, halfRows: 1 } };
    const kind = (dtype: "bfloat16" | "float32") =>
      contextOn(findModel("100m").graph({ mode: "train", dtype }), { B: 1, T: 4096 }, 2, { ...profile, gemm }).kind;
    expect([kind("bfloat16"), kind("float32")]).toEqual(["allToAll", "ring"]);
  });
});
