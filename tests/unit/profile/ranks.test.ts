/** Profiles of two ranks side by side, from times by hand. */
import { expect, it } from "vitest";
import type { ProfileDocument, ProfiledInstruction } from "../../../src/profile/document.js";
import { sideBySide, traceOf } from "../../../src/profile/index.js";
import { hiddenMs } from "../../../src/profile/lanes.js";
import { messagesOf } from "../../../src/profile/ranks.js";

type Made = [op: string, startMs: number, endMs: number, peer?: number];
function document(rank: number, beganMs: number, made: Made[], ranks = 2): ProfileDocument {
  const instructions = made.map(([op, startMs, endMs, peer = null]) => ({
    ...{ op, startMs, endMs, peer, operand: peer === null ? null : "boundaries", block: null, microBatch: null },
    ...{ queue: op === "send" || op === "receive" ? op : "compute", bothMs: null, bytes: 0, deviceBytes: {} },
    ...{ predictedStartMs: 0, predictedEndMs: 0, workspaceBytes: null, hostBytes: 0, diskBytes: 0 },
  })) as unknown as ProfiledInstruction[];
  const memory = { timeMs: [], bytes: {}, unusedBytes: [] };
  return {
    model: "m",
    rank: { rank, ranks, beganMs },
    instructions,
    memory,
    summary: {},
  } as unknown as ProfileDocument;
}

// On one clock rank 1 begins 5 ms later: its 10 is rank 0's 15.
const two = () => [
  document(0, 1005, [
    ["forward", 0, 12],
    ["send", 12, 20, 1],
    ["forward", 18, 30],
    ["receive", 0, 40, 1],
    ["coefficient", 30, 45],
  ]),
  document(1, 1010, [
    ["receive", 9, 15, 0],
    ["backward", 15, 30],
    ["send", 31, 35, 0],
  ]),
];

it("a message is on its way from when both ends are there, on one clock", () => {
  const [first, second] = sideBySide(two());
  expect([first!.rank!.beganMs, second!.rank!.beganMs]).toEqual([0, 5]);
  expect(first!.instructions.map((i) => i.bothMs)).toEqual([null, 14, null, 36, null]);
  expect(second!.instructions.map((i) => i.bothMs)).toEqual([9, null, 31]);
  // Rank 0 computes in 18-30 while it sends in 12-20; what waits for all ranks is no computing.
  expect(first!.summary.messages).toEqual({ waitMs: 38, movingMs: 10, hiddenMs: 2 });
  expect(second!.summary.messages).toEqual({ waitMs: 0, movingMs: 10, hiddenMs: 0 });
});

it("a begin that was heard late is no later than what it sent allows", () => {
  const [late, second] = two();
  late!.rank!.beganMs = 1100;
  // What rank 0 sent at 12 had arrived at rank 1's 15.
  expect(sideBySide([late!, second!]).map((d) => d.rank!.beganMs)).toEqual([3, 0]);
  // Rank 2 tells of rank 1, and so of rank 0.
  const three = ["send", "receive"].map((op) => [op, op === "send" ? 10 : 0, 20] as const);
  const chain = [0, 1, 2].map((r) =>
    document(
      r,
      [900, 500, 0][r]!,
      [...(r < 2 ? [[...three[0]!, r + 1] as Made] : []), ...(r > 0 ? [[...three[1]!, r - 1] as Made] : [])],
      3,
    ),
  );
  expect(sideBySide(chain).map((d) => d.rank!.beganMs)).toEqual([20, 10, 0]);
});

it("of time that lies under several others each part counts once", () => {
  const computing = [
    [0, 2],
    [3, 4],
    [4, 9],
  ] as const;
  expect(hiddenMs([[1, 5]], computing)).toBe(3);
  expect(
    hiddenMs(
      [
        [0, 1],
        [2, 3],
        [8, 20],
      ],
      computing,
    ),
  ).toBe(2);
});

it("documents of other ranks, or of ranks that did not exchange this, are refused", () => {
  const [first, second] = two();
  expect(() => sideBySide([second!, first!])).toThrow(/ranks 0 to 1 in order, got those of 1 of 2, 0 of 2/);
  second!.instructions.pop();
  expect(() => messagesOf([first!, second!])).not.toThrow();
  first!.instructions.push(first!.instructions[1]!);
  expect(() => sideBySide([first!, second!])).toThrow(/rank 0 sent 2 messages to rank 1, which received 1/);
});

it("the trace has a process for each rank, a track for each other rank, and arrows from end to end", () => {
  const { traceEvents } = traceOf(...sideBySide(two()));
  const names = traceEvents.filter((e) => e.name === "thread_name").map((e) => [e.pid, e.args.name]);
  expect(names).toEqual([
    [1, "compute"],
    [1, "send: to rank 1"],
    [1, "receive: from rank 1"],
    [1, "collective: with all ranks"],
    [2, "compute"],
    [2, "send: to rank 0"],
    [2, "receive: from rank 0"],
  ]);
  const span = (pid: number, cat: string) => traceEvents.find((e) => e.ph === "X" && e.pid === pid && e.cat === cat)!;
  expect(span(2, "backward").ts).toBe(20_000);
  const arrows = traceEvents.filter((e) => e.ph === "s" || e.ph === "f");
  expect(arrows.map((e) => [e.ph, e.pid, e.id])).toEqual([
    ["s", 1, 0],
    ["f", 2, 0],
    ["s", 2, 1],
    ["f", 1, 1],
  ]);
  for (const e of arrows) {
    const { ts, dur, tid } = span(e.pid, e.ph === "s" ? "send boundaries" : "receive boundaries");
    expect(e.tid).toBe(tid);
    expect(e.ts! >= ts! && e.ts! <= ts! + dur!).toBe(true);
  }
});
