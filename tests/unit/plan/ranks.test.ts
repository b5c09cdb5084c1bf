/** Stages, and the tapes of several ranks: proved together, and refused when one of them is wrong. */
import fc from "fast-check";
import { describe, expect, it } from "vitest";
import { StromaError } from "../../../src/errors.js";
import { traceModel } from "../../../src/graph/index.js";
import { decoderConfig } from "../../../src/models/decoder/config.js";
import { decoder } from "../../../src/models/decoder/model.js";
import { checkRanks } from "../../../src/plan/check-ranks.js";
import { ownersOf } from "../../../src/plan/layout.js";
import { residentPolicy } from "../../../src/plan/planner.js";
import { findProfile } from "../../../src/plan/profiles.js";
import { simulateRanks } from "../../../src/plan/simulate-ranks.js";
import { assignStages, isContiguous, type StageRule } from "../../../src/plan/stages.js";
import type { Boundary, Instruction, Schedule, Tape, Tied } from "../../../src/plan/types.js";
import { writeTape } from "../../../src/plan/write-tape.js";
import { resolveModel } from "../../../src/train/model-source.js";
import { random, randomModel } from "../../support/random-models.js";
import { policies } from "./random-policies.js";

type Exchange = Extract<Instruction, { op: "send" | "receive" }>;

const graph = resolveModel("tiny").graph("train", "float32");
const dims = { B: 2, T: 16 };
/** Messages that take no time. */
const EVEN = { ...findProfile("cpu"), rankLink: 1e15, copySeconds: 0, instructionSeconds: 0 };

function tapesOf(
  ranks: number,
  rule: StageRule,
  schedule: Schedule,
  update: "end" | "backward" = "end",
  microBatches = rule === "interleaved" ? 6 : 4,
): Tape[] {
  const of = assignStages(graph, ranks, rule);
  const policy = { ...residentPolicy(graph, { microBatches, schedule, update, recompute: "all" }), dims };
  return Array.from({ length: ranks }, (_, rank) =>
    structuredClone(writeTape(graph, { ...policy, boundary: "device", stages: { rank, ranks, of } }).step),
  );
}
const refusal = (tapes: Tape[]): string => {
  try {
    checkRanks(graph, tapes);
  } catch (error) {
    expect(error).toBeInstanceOf(StromaError);
    expect(error).toMatchObject({ code: "TAPE" });
    return (error as Error).message;
  }
  return "";
};

describe("stages", () => {
  it("give every rank blocks, and dealt out in turn tied ones one rank, for random models", () => {
    for (let seed = 1; seed < 60; seed++) {
      const { graph: g } = randomModel(seed);
      const groups = new Set(g.blocks.map((_, b) => ownersOf(g, b)[0] ?? b)).size;
      for (const rule of ["alternating", "contiguous"] as const)
        for (let ranks = 1; ranks <= Math.min(3, groups); ranks++) {
          let of: number[];
          try {
            of = assignStages(g, ranks, rule);
          } catch (error) {
            // A tied block may have taken the only one of a rank.
            expect((error as Error).message).toMatch(/would have no block/);
            continue;
          }
          expect(new Set(of).size).toBe(ranks);
          if (rule === "alternating")
            for (const b of g.blocks.keys()) for (const o of ownersOf(g, b)) expect(of[o]).toBe(of[b]);
          if (rule === "contiguous") expect(isContiguous(g, { rank: 0, ranks, of })).toBe(true);
        }
    }
  });

  it("of a decoder are dealt out in turn, or cut where the work is halved", () => {
    const layers = graph.blocks.length - 2;
    expect(assignStages(graph, 2).slice(1, 1 + layers)).toEqual([...Array(layers).keys()].map((l) => (l + 1) % 2));
    const halves = assignStages(graph, 2, "contiguous");
    const cut = halves.indexOf(1);
    expect(cut).toBeGreaterThan(1);
    expect(cut).toBeLessThan(graph.blocks.length - 1);
  });

  it("are refused where a rank would have none, and where neighbours are needed", () => {
    expect(() => assignStages(graph, 40)).toThrow(/rank 5 of 40 would have no block/);
    expect(() => tapesOf(2, "alternating", "oneForwardOneBackward")).toThrow(/stages of neighbouring blocks/);
  });
});

describe("the tapes of ranks", () => {
  const kinds: [StageRule, Schedule, "end" | "backward"][] = [
    ["alternating", "breadthFirst", "backward"],
    ["contiguous", "oneForwardOneBackward", "end"],
    ["contiguous", "depthFirst", "backward"],
    ["interleaved", "oneForwardOneBackward", "backward"],
    ["interleaved", "breadthFirst", "end"],
  ];

  it.each(kinds)("%s, %s, update %s: are accepted; each boundary crosses once each way", (rule, schedule, update) => {
    const tapes = tapesOf(3, rule, schedule, update === "backward" ? "backward" : "end");
    expect(refusal(tapes)).toBe("");
    const sends = tapes.flatMap((t) => t.instructions.filter((i): i is Exchange => i.op === "send"));
    const keys = sends.map((i) => JSON.stringify([i.operand, i.peer]));
    expect(new Set(keys).size).toBe(keys.length);
    const of = tapes[0]!.stages!.of;
    const cuts = of.slice(1).filter((rank, b) => rank !== of[b]).length;
    const boundaries = sends.filter((i) => "output" in i.operand);
    expect(boundaries).toHaveLength(2 * tapes[0]!.microBatches * cuts);
    // The embedding, which is the head's matrix too, and the head's sums.
    const [head] = of.slice(-1);
    const tied = sends.filter((i) => !("output" in i.operand)).map((i) => [i.operand, i.peer]);
    const [lent, owed] = [
      { kind: "param", block: 0 },
      { kind: "sums", block: of.length - 1 },
    ];
    expect(tied).toEqual(
      head === 0
        ? []
        : [
            [lent, head],
            [owed, 0],
          ],
    );
  });

  it.each(kinds)("%s, %s, update %s: are refused with anything of an exchange changed", (rule, schedule, update) => {
    const next = random(7);
    const faults: Record<string, (t: Tape, at: number) => void> = {
      lost: (t, at) => removeAt(t, at),
      "to another place": (t, at) => {
        const i = exchange(t, at);
        i.place = t.places.findIndex((p, k) => k !== i.place && p.space === "device" && p.bytes >= i.bytes);
      },
      "of another micro-batch or block": (t, at) => {
        const operand = exchange(t, at).operand as Boundary | Tied;
        if ("output" in operand) operand.microBatch = (operand.microBatch + 1) % 4;
        else (operand as { block: number }).block ^= 1;
      },
      "with another count": (t, at) => {
        exchange(t, at).count += 1;
      },
      "to another rank": (t, at) => {
        const i = exchange(t, at);
        i.peer = [0, 1, 2].find((r) => r !== i.peer && r !== t.stages!.rank)!;
      },
    };
    const good = tapesOf(3, rule, schedule, update);
    for (const [name, plant] of Object.entries(faults))
      for (let k = 0; k < 6; k++) {
        const tapes = structuredClone(good);
        const t = tapes[Math.floor(next() * tapes.length)]!;
        const all = [...t.instructions.entries()].filter(([, i]) => i.op === "send" || i.op === "receive");
        plant(t, all[Math.floor(next() * all.length)]![0]);
        expect(refusal(tapes), `${name}, ${k}`).not.toBe("");
      }
  });

  it.each(kinds)(
    "%s, %s, update %s: never wait for each other, however many micro-batches there are",
    (rule, schedule, update) => {
      for (const microBatches of [8, 12, 32]) {
        const ranks = microBatches % 3 === 0 ? 3 : 2;
        expect(refusal(tapesOf(ranks, rule, schedule, update, microBatches)), `${microBatches}`).toBe("");
      }
    },
  );

  it("never wait for each other whatever is where, over 40 random policies of many micro-batches", () => {
    fc.assert(
      fc.property(policies, fc.integer({ min: 9, max: 32 }), fc.integer({ min: 2, max: 4 }), (policy, M, ranks) => {
        const of = assignStages(graph, ranks);
        const boundary = policy.boundary === "slot" ? "device" : policy.boundary;
        const plans = Array.from({ length: ranks }, (_, rank) =>
          writeTape(graph, { ...policy, dims, boundary, microBatches: M, stages: { rank, ranks, of } }),
        );
        const flushes = plans.flatMap((p) => (p.flush === null ? [] : [p.flush]));
        checkRanks(
          graph,
          plans.map((p) => p.step),
          flushes.length > 0 ? flushes : undefined,
        );
      }),
      { numRuns: 40, seed: 11 },
    );
  });

  it.each([false, true])(
    "have the bubble of their schedule: (R - 1) / (M + R - 1), and M doubled interleaved; tied %s",
    (tiedEmbeddings) => {
      const size = { vocabSize: 300, dim: 256, layers: 16, heads: 4, kvHeads: 2, ffn: 512, tiedEmbeddings };
      const deep = traceModel(decoder, decoderConfig(size), { mode: "train" });
      const M = 12;
      for (const R of [2, 4])
        for (const [rule, stretches] of [
          ["contiguous", 1],
          ["interleaved", 2],
        ] as const) {
          const of = assignStages(deep, R, rule);
          const policy = { ...residentPolicy(deep, { microBatches: M, schedule: "oneForwardOneBackward" }), dims };
          const tapes = Array.from(
            { length: R },
            (_, rank) => writeTape(deep, { ...policy, boundary: "device", stages: { rank, ranks: R, of } }).step,
          );
          const bubble = simulateRanks(deep, tapes, EVEN).ranks.reduce((sum, r) => sum + r.bubble, 0) / R;
          // The model's ends are not quite as much work as its layers.
          expect(Math.abs(bubble - (R - 1) / (M * stretches + R - 1)), `${R} ${rule}`).toBeLessThan(0.02);
        }
    },
  );

  it("are not written interleaved for micro-batches that do not come out", () => {
    expect(() => tapesOf(3, "interleaved", "oneForwardOneBackward", "end", 4)).toThrow(/4 \/ 3 is no whole number/);
  });

  it("are refused when a pass does not wait for what comes from another rank", () => {
    const tapes = tapesOf(2, "alternating", "breadthFirst");
    const [t] = tapes as [Tape];
    const waits = t.instructions.filter((i) => i.waits.some((w) => t.instructions[w]!.op === "receive"));
    expect(waits.length).toBeGreaterThan(8);
    const i = waits[3]!;
    i.waits = i.waits.filter((w) => t.instructions[w]!.op !== "receive");
    expect(refusal(tapes)).toMatch(/does not wait for it/);
  });

  it("are refused when ranks would wait for each other for ever", () => {
    const tapes = tapesOf(2, "alternating", "depthFirst");
    // Rank 0 asks for all that comes before it sends anything.
    const [t] = tapes as [Tape];
    const first = t.instructions.findIndex((i) => i.op === "forward");
    const last = t.instructions.findLastIndex((i) => i.op === "receive");
    t.instructions[first]!.waits.push(last);
    expect(refusal(tapes)).not.toBe("");
    const whole = tapesOf(2, "alternating", "depthFirst");
    // The report of a rank that updates on backward stands behind its agreement.
    const backward = tapesOf(2, "contiguous", "depthFirst", "backward");
    const late = backward[0]!;
    removeAt(
      late,
      late.instructions.findIndex((i) => i.op === "report"),
    );
    expect(refusal(backward)).toMatch(/agrees before it has reported/);
    // Two exchanges of one direction change their order on one side.
    const sends = whole[0]!.instructions.filter((i): i is Exchange => i.op === "send");
    [sends[0]!.operand, sends[1]!.operand] = [sends[1]!.operand, sends[0]!.operand];
    expect(refusal(whole)).not.toBe("");
  });
});

const exchange = (t: Tape, at: number) => t.instructions[at] as Exchange;

/** Waits are positions: those behind move up, and nothing waits for what is gone. */
function removeAt(t: Tape, at: number): void {
  t.instructions.splice(at, 1);
  for (const i of t.instructions) i.waits = i.waits.filter((w) => w !== at).map((w) => (w > at ? w - 1 : w));
}
