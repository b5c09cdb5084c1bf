import { describe, expect, it } from "vitest";
import { findModel } from "../../../src/models/registry.js";
import { findProfile, type MachineProfile } from "../../../src/plan/profiles.js";
import { simulate } from "../../../src/plan/simulate.js";
import { meanBubble, simulateRanks } from "../../../src/plan/simulate-ranks.js";
import { assignStages, type StageRule } from "../../../src/plan/stages.js";
import type { Instruction, Tape } from "../../../src/plan/types.js";
import { type Policy, writeTape } from "../../../src/plan/write-tape.js";

const tiny = findModel("tiny").graph({ mode: "train" });
const dims = { B: 2, T: 32 };

/** An instruction takes a second, a boundary of `tiny` half a second from rank to rank, a byte on a link 10 ms. */
const free = { flops: Number.POSITIVE_INFINITY, halfRows: 0 };
const round: MachineProfile = {
  ...findProfile("rtx4090"),
  gemm: { float32: free, bfloat16: free, float64: free },
  deviceMemory: Number.POSITIVE_INFINITY,
  hostToDevice: 100,
  deviceToHost: 100,
  rankLink: 2 * (2 * 32 * 128 * 4),
  operatorSeconds: 0,
  instructionSeconds: 1,
  copySeconds: 0,
};

const policy: Policy = {
  schedule: "breadthFirst",
  recompute: "all",
  update: "end",
  clip: "global",
  state: { storage: "float32", masterWeight: "none", optimizer: "adamw" },
  microBatches: 2,
  dims,
  param: "device",
  optimizer: "device",
  boundary: "device",
  retained: "device",
  retainedDType: "float32",
  prefetch: 0,
  parts: 1,
};

const tapesOf = (graph: typeof tiny, given: Policy, rule: StageRule, ranks = 2): Tape[] => {
  const of = assignStages(graph, ranks, rule);
  return [...Array(ranks).keys()].map((rank) => writeTape(graph, { ...given, stages: { rank, ranks, of } }).step);
};

/** When the passes of each block begin until the losses are there, by block. */
function starts(rule: StageRule): number[][] {
  const tapes = tapesOf(tiny, policy, rule);
  const { ranks } = simulateRanks(tiny, tapes, round);
  const found: number[][] = tiny.blocks.map(() => []);
  for (const [rank, tape] of tapes.entries())
    for (const [at, i] of tape.instructions.entries())
      if (i.op === "forward" || i.op === "turn") found[i.block]!.push(ranks[rank]!.start[at]!);
  return found;
}

describe("several ranks in time", () => {
  it("are one tape's simulation where there is one rank", () => {
    const { step } = writeTape(tiny, { ...policy, param: "host", optimizer: "host", prefetch: 1, parts: 4 });
    const alone = simulate(tiny, step, findProfile("rtx4090"));
    const { seconds, ranks } = simulateRanks(tiny, [step], findProfile("rtx4090"));
    expect(seconds).toBe(alone.seconds);
    expect(ranks).toEqual([{ ...alone, bubble: 1 - alone.busySeconds.compute / alone.seconds }]);
  });

  it("pass boundaries on: a block begins half a second after the same micro-batch left the block before", () => {
    // The head shares the embedding's weight, so it is on rank 0, as the last layer is: nothing crosses between them.
    expect(starts("alternating")).toEqual([
      [0, 1],
      [1.5, 2.5],
      [3, 4],
      [4.5, 5.5],
      [6, 7],
      [8, 9],
    ]);
    // The second rank begins when the first has done all but one pass; it has the embedding since the second second, as
    // its own head's matrix.
    expect(starts("contiguous")).toEqual([
      [0, 1],
      [2, 3],
      [4, 5],
      [5.5, 6.5],
      [7.5, 8.5],
      [9.5, 10.5],
    ]);
  });

  it("count what crosses once on either side", () => {
    const bytes = 2 * 32 * 128 * 4;
    const { ranks } = simulateRanks(tiny, tapesOf(tiny, policy, "alternating"), round);
    // Rank 0 sends the outputs of blocks 0 and 2 and the gradients of blocks 1 and 3; rank 1 the reverse; twice.
    expect(ranks.map((r) => [r.bytesSent, r.bytesReceived])).toEqual([
      [8 * bytes, 8 * bytes],
      [8 * bytes, 8 * bytes],
    ]);
    expect(ranks.map((r) => [r.busySeconds.send, r.busySeconds.receive])).toEqual([
      [4, 4],
      [4, 4],
    ]);
  });

  it("meet: sends wait for receives, an agreement for all reports, a coefficient for all ranks", () => {
    const [first, second] = tapesOf(tiny, { ...policy, update: "backward", clip: "none" }, "alternating");
    const x = { kind: "x", block: 0, output: 0, microBatch: 0 } as const;
    const exchange = (op: "send" | "receive", peer: number, waits: number[]): Instruction => ({
      op,
      operand: x,
      count: 0,
      peer,
      place: 0,
      bytes: round.rankLink!,
      waits,
    });
    const copy = (bytes: number): Instruction => ({
      op: "copy",
      queue: "in",
      operand: { kind: "param", block: 0 },
      from: 0,
      to: 0,
      at: 0,
      bytes,
      waits: [],
    });
    const compute = (op: "report" | "agree" | "coefficient", waits: number[] = []): Instruction => ({ op, waits });
    const { seconds, ranks } = simulateRanks(
      tiny,
      [
        {
          ...first!,
          instructions: [compute("report"), compute("agree"), exchange("send", 1, []), compute("coefficient", [2])],
        },
        {
          ...second!,
          instructions: [
            copy(400),
            exchange("receive", 0, [0]),
            compute("report", [1]),
            compute("agree"),
            compute("coefficient"),
          ],
        },
      ],
      round,
    );
    // The receive waits for its copy until 4 and the link takes a second; the report of rank 1 ends at 6.
    expect([...ranks[0]!.start]).toEqual([0, 6, 4, 7]);
    expect([...ranks[1]!.start]).toEqual([0, 4, 5, 6, 7]);
    expect(seconds).toBe(8);
    expect(ranks.map((r) => r.bubble)).toEqual([5 / 8, 5 / 8]);
  });

  it("say so where they wait for each other for ever", () => {
    const [first, second] = tapesOf(tiny, policy, "alternating");
    const silent = second!.instructions.map((i) => (i.op === "send" ? { ...i, op: "receive" as const } : i));
    expect(() => simulateRanks(tiny, [first!, { ...second!, instructions: silent }], round)).toThrow(
      /the ranks wait for each other for ever: rank 0 at .*receive 1/,
    );
  });
});

describe("13 billion parameters over two cards", () => {
  // TAPE.md, section 4: breadth-first, contiguous halves do not overlap at all.
  const astro = findModel("astro-13b").graph({ mode: "train", dtype: "bfloat16" });
  const away: Policy = {
    ...policy,
    update: "backward",
    clip: "none",
    state: { storage: "bfloat16", masterWeight: "none", optimizer: "adamw8bit" },
    microBatches: 8,
    dims: { B: 4, T: 512 },
    param: "host",
    optimizer: "host",
    prefetch: 1,
    parts: 4,
  };
  const bubble = (rule: StageRule) =>
    meanBubble(simulateRanks(astro, tapesOf(astro, away, rule), findProfile("rtx4090")));

  it("are nearly always busy with alternating blocks, and half of the time with contiguous ones", () => {
    expect(bubble("alternating")).toBeLessThan(0.03);
    expect(bubble("contiguous")).toBeGreaterThan(0.44);
    expect(bubble("contiguous")).toBeLessThan(0.5);
  });
});
