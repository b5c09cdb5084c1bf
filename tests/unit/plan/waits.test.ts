import fc from "fast-check";
import { describe, expect, it } from "vitest";
import type { CopyQueue, Instruction, Place } from "../../../src/plan/types.js";
import { accesses, deriveWaits, queueOf } from "../../../src/plan/waits.js";

const UNIT = 256;

/** Places that overlap in every way, and copies and casts among them. */
const programs = fc
  .array(fc.record({ at: fc.nat(5), length: fc.integer({ min: 1, max: 3 }), space: fc.nat(2) }), {
    minLength: 2,
    maxLength: 8,
  })
  .chain((list) => {
    const places = list.map(
      ({ at, length, space }): Place =>
        space === 2
          ? { space: "slot", offset: at, bytes: 0 }
          : { space: space === 0 ? "device" : "host", offset: at * UNIT, bytes: length * UNIT },
    );
    const p = fc.nat(places.length - 1);
    const copies = fc
      .record({ queue: fc.constantFrom<CopyQueue>("in", "out", "load", "save"), from: p, to: p, part: fc.nat(2) })
      .map(({ queue, from, to, part }): Instruction => {
        const least = Math.min(places[from]!.bytes, places[to]!.bytes);
        const at = Math.max(0, Math.min(part * UNIT, least - UNIT));
        return { op: "copy", queue, operand: { kind: "param", block: 0 }, from, to, at, bytes: UNIT, waits: [] };
      });
    const casts = fc.record({ from: p, to: p }).map((c): Instruction => ({ op: "cast", block: 0, ...c, waits: [] }));
    return fc.tuple(fc.constant(places), fc.array(fc.oneof(copies, copies, casts), { minLength: 2, maxLength: 30 }));
  });

/** Every pair on different queues whose bytes overlap, one of them writing: found by looking at all pairs. */
function hazards(instructions: readonly Instruction[], places: readonly Place[]): [number, number][] {
  const ranges = instructions.map((i) => {
    const list: { space: string; start: number; end: number; writes: boolean }[] = [];
    accesses(i, places, (p, writes, at, bytes) => {
      const { space, offset } = places[p]!;
      const slot = space === "slot";
      list.push({ space, start: slot ? offset : offset + at, end: slot ? offset + 1 : offset + at + bytes, writes });
    });
    return list;
  });
  const clash = (a: number, b: number) =>
    ranges[a]!.some((x) =>
      ranges[b]!.some((y) => x.space === y.space && x.start < y.end && y.start < x.end && (x.writes || y.writes)),
    );
  return instructions.flatMap((later, b) =>
    instructions
      .slice(0, b)
      .flatMap((earlier, a): [number, number][] =>
        queueOf(earlier) !== queueOf(later) && clash(a, b) ? [[a, b]] : [],
      ),
  );
}

/** By position: all positions that have surely completed when it begins. */
function ordered(instructions: readonly Instruction[], waits: readonly number[][]): Set<number>[] {
  const before: Set<number>[] = [];
  for (const [i, instruction] of instructions.entries()) {
    const queue = queueOf(instruction);
    const previous = instructions.findLastIndex((other, j) => j < i && queueOf(other) === queue);
    const all = [...(previous < 0 ? [] : [previous]), ...waits[i]!];
    before.push(new Set(all.flatMap((j) => [j, ...before[j]!])));
  }
  return before;
}

describe("derived waits", () => {
  it("order every hazard, and none of them can be left out", () => {
    let total = 0;
    fc.assert(
      fc.property(programs, ([places, instructions]) => {
        deriveWaits(instructions, places);
        const waits = instructions.map((i) => i.waits);
        const pairs = hazards(instructions, places);
        const open = (w: readonly number[][]) => {
          const before = ordered(instructions, w);
          return pairs.filter(([a, b]) => !before[b]!.has(a));
        };
        expect(open(waits)).toEqual([]);
        for (const [i, list] of waits.entries()) {
          for (const w of list) {
            total++;
            expect(w).toBeLessThan(i);
            expect(queueOf(instructions[w]!)).not.toBe(queueOf(instructions[i]!));
            const without = waits.map((l, j) => (j === i ? l.filter((x) => x !== w) : l));
            expect(open(without)).not.toEqual([]);
          }
        }
      }),
      { numRuns: 400 },
    );
    expect(total).toBeGreaterThan(1000);
  });
});
