import fc from "fast-check";
import { describe, expect, it } from "vitest";
import { usersOf } from "../../../src/plan/layout.js";
import { residentPolicy } from "../../../src/plan/planner.js";
import { tapePeaks } from "../../../src/plan/simulate.js";
import type { Instruction, Place, Tape } from "../../../src/plan/types.js";
import { writeTape } from "../../../src/plan/write-tape.js";
import {
  HELD_KINDS,
  heldByInstruction,
  holdings,
  overTime,
  predictedWorkspace,
} from "../../../src/profile/timeline.js";
import { randomModel } from "../../support/random-models.js";
import { graphs, policies } from "../plan/random-policies.js";

const dims = { B: 2, T: 3 };

/** Bytes that an instruction reads and writes over, by itself: not through the module under test. */
function touches(i: Instruction, tape: Tape): { reads: [Place, number, number][]; writes: [Place, number, number][] } {
  const all = (list: number[]) =>
    list.filter((p) => p >= 0).map((p): [Place, number, number] => [tape.places[p]!, 0, tape.places[p]!.bytes]);
  switch (i.op) {
    case "forward":
      return { reads: all([...i.params, ...i.in]), writes: all(i.out) };
    case "turn":
    case "backward": {
      const added = i.dIn.filter((_, k) => i.add[k]);
      const over = i.dIn.filter((_, k) => !i.add[k]);
      const sums = [i.sums];
      const more = i.op === "backward" ? i.dOut : [];
      return {
        reads: all([...i.params, ...i.in, ...more, ...added, ...(i.first ? [] : sums)]),
        writes: all([...over, ...(i.first ? sums : [])]),
      };
    }
    case "cast":
      return { reads: all([i.from]), writes: all([i.to]) };
    case "send":
      return { reads: all([i.place]), writes: [] };
    case "receive":
      return { reads: [], writes: all([i.place]) };
    case "report":
    case "agree":
      return { reads: [], writes: [] };
    case "norm":
      return { reads: all(i.sums), writes: [] };
    case "partial":
      return { reads: all(i.sums), writes: all([i.to]) };
    case "reduce":
      return { reads: all(i.parts), writes: all([i.to]) };
    case "pack":
      return { reads: all(i.sums), writes: all([i.to]) };
    case "update":
      return { reads: all([...i.grad, i.param, i.state]), writes: [] };
    case "copy":
      return { reads: [[tape.places[i.from]!, i.at, i.bytes]], writes: [[tape.places[i.to]!, i.at, i.bytes]] };
    case "coefficient":
      return { reads: [], writes: [] };
  }
}

/** Liveness as a compiler computes it, backwards over the program as a loop, for every 4 bytes of an arena. */
function liveBytes(tape: Tape, space: "device" | "host" | "disk"): number[] {
  const n = tape.instructions.length;
  const units = Math.ceil(tape.placement.arenas[`${space}Bytes`] / 4);
  const home = new Uint8Array(units);
  const mark = (marks: Uint8Array, [place, at, bytes]: [Place, number, number], value: number) => {
    if (place.space === space) marks.fill(value, (place.offset + at) / 4, Math.ceil((place.offset + at + bytes) / 4));
  };
  for (const { param, state } of tape.placement.homes)
    for (const p of [param, state]) if (p !== null) mark(home, [p, 0, p.bytes], 1);
  const live = new Uint8Array(units);
  const out = new Array<number>(n).fill(0);
  // The second round starts with what the first found live at the program's beginning.
  for (const round of [1, 2]) {
    for (let i = n - 1; i >= 0; i--) {
      const { reads, writes } = touches(tape.instructions[i]!, tape);
      const during = live.slice();
      for (const range of writes) mark(during, range, 1);
      for (const range of writes) mark(live, range, 0);
      for (const range of reads) mark(live, range, 1);
      if (round === 1) continue;
      let units = 0;
      for (let u = 0; u < live.length; u++) units += home[u]! | live[u]! | during[u]!;
      out[i] = units * 4;
    }
  }
  return out;
}

const sumAt = (columns: Record<string, Float64Array>, i: number) =>
  Object.values(columns).reduce((sum, column) => sum + column[i]!, 0);

describe("what an arena holds", () => {
  it("is at every instruction what backward liveness finds, and never more than the arena", () => {
    fc.assert(
      fc.property(graphs, policies, (graph, policy) => {
        for (const tape of Object.values(writeTape(graph, policy))) {
          if (tape === null) continue;
          const list = holdings(graph, tape, dims);
          for (const space of ["device", "host", "disk"] as const) {
            const held = heldByInstruction(list, space, tape.instructions.length);
            const sums = tape.instructions.map((_, i) => sumAt(held, i));
            expect(sums).toEqual(liveBytes(tape, space));
            expect(Math.max(0, ...sums)).toBeLessThanOrEqual(tape.placement.arenas[`${space}Bytes`]);
          }
        }
      }),
      { numRuns: 15 },
    );
  }, 60_000);

  it("is of the kinds that the layouts say, for a resident tape", () => {
    const { graph } = randomModel(3);
    const tape = writeTape(graph, residentPolicy(graph, { microBatches: 2 })).step;
    const held = heldByInstruction(holdings(graph, tape, dims), "device", tape.instructions.length);
    const homes = (kind: "param" | "state") => tape.placement.homes.reduce((sum, h) => sum + (h[kind]?.bytes ?? 0), 0);
    const last = tape.instructions.length - 1;
    expect(held.parameters[0]).toBe(homes("param"));
    expect(held.optimizer[last]).toBe(homes("state"));
    // Update "end": when the coefficient is known, every sum is held.
    const at = tape.instructions.findIndex((i) => i.op === "coefficient");
    const trains = (b: number) => usersOf(graph, b, () => true).length > 0;
    expect(tape.instructions.filter((i) => i.op === "update").length).toBe(
      graph.blocks.filter((_, b) => trains(b)).length,
    );
    expect(held.sums[at]! + homes("param") + homes("state")).toBe(tape.placement.arenas.deviceBytes);
    for (const kind of HELD_KINDS.filter((k) => k !== "parameters" && k !== "optimizer" && k !== "sums"))
      expect(Math.max(...held[kind])).toBe(0);
  });

  it("with slots and workspaces peaks where the plan's own peak is", () => {
    fc.assert(
      fc.property(graphs, policies, (graph, policy) => {
        const { step } = writeTape(graph, policy);
        const slots = heldByInstruction(holdings(graph, step, dims), "slot", step.instructions.length);
        const workspace = predictedWorkspace(graph, step, "cpu", dims);
        const passes = step.instructions.flatMap((at, i) =>
          at.op === "forward" || at.op === "turn" || at.op === "backward" ? [workspace[i]! + sumAt(slots, i)] : [],
        );
        expect(Math.max(...passes)).toBe(tapePeaks(graph, step, "cpu", dims).workspaceBytes);
      }),
      { numRuns: 25 },
    );
  });
});

describe("memory over time", () => {
  it("follows the clocks of the queues, not the order of the tape", () => {
    const { graph } = randomModel(5);
    const policy = {
      ...residentPolicy(graph, { microBatches: 3, recompute: "all", update: "backward" }),
      schedule: "breadthFirst",
      dims,
      param: "host",
      optimizer: "host",
      boundary: "device",
      prefetch: 1,
      parts: 2,
    } as const;
    const tape = writeTape(graph, policy).step;
    const n = tape.instructions.length;
    const list = holdings(graph, tape, dims);
    // Every instruction takes a millisecond after all that it waits for; the queues run beside each other.
    const free = new Map<string, number>();
    const startMs = new Float64Array(n);
    const endMs = new Float64Array(n);
    for (const [i, at] of tape.instructions.entries()) {
      const queue = at.op === "copy" ? at.queue : "compute";
      startMs[i] = Math.max(free.get(queue) ?? 0, ...at.waits.map((w) => endMs[w]!));
      endMs[i] = startMs[i]! + 1;
      free.set(queue, endMs[i]!);
    }
    const workspace = { peak: new Float64Array(n).fill(1000), after: new Float64Array(n).fill(10) };
    const { timeMs, held, workspace: beside } = overTime(tape, list, { startMs, endMs }, workspace);
    for (const [k, t] of timeMs.entries()) {
      if (k === timeMs.length - 1) break;
      const at = (i: number) => startMs[i]! <= t && t < endMs[i]!;
      let bytes = 0;
      for (const h of list.filter((x) => x.space === "device")) {
        const begins = h.from < 0 ? 0 : startMs[h.from]!;
        const ends = h.to === n ? Number.POSITIVE_INFINITY : Math.max(...h.uses.map((u) => endMs[u]!));
        if (begins <= t && t < ends) bytes += h.bytes;
      }
      expect(sumAt(held, k)).toBe(bytes);
      expect(bytes).toBeLessThanOrEqual(tape.placement.arenas.deviceBytes);
      const computing = tape.instructions.some((x, i) => x.op !== "copy" && at(i));
      const begun = tape.instructions.some((x, i) => x.op !== "copy" && endMs[i]! <= t);
      expect(beside[k]).toBe(computing ? 1000 : begun ? 10 : 0);
    }
    expect(sumAt(held, timeMs.length - 1)).toBe(0);
  });

  it("ends a life with the use that ends last, not the one that stands last", () => {
    const { graph } = randomModel(5);
    const tape = writeTape(graph, residentPolicy(graph, { microBatches: 2 })).step;
    const n = tape.instructions.length;
    const startMs = Float64Array.from({ length: n }, (_, i) => i);
    const endMs = startMs.map((t, i) => (i === 2 ? 9.5 : t + 1));
    const list = [{ space: "device", kind: "sums", block: 0, bytes: 100, from: 1, to: 3, uses: [2, 3] }] as const;
    const none = { peak: new Float64Array(n), after: new Float64Array(n) };
    const { timeMs, held } = overTime(
      tape,
      list.map((h) => ({ ...h, uses: [...h.uses] })),
      { startMs, endMs },
      none,
    );
    expect(timeMs.findIndex((_, k) => held.sums[k] === 100)).toBe(timeMs.indexOf(1));
    expect(held.sums.lastIndexOf(100) + 1).toBe(timeMs.indexOf(9.5));
  });
});
