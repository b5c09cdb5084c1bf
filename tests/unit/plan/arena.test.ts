import fc from "fast-check";
import { describe, expect, it } from "vitest";
import { Buffers } from "../../../src/plan/arena.js";

const PAGE = 4096;
const POSITIONS = 60;

/** First and last use, pages, and what kind of buffer. */
const lives = fc.array(
  fc
    .record({
      ends: fc.tuple(fc.nat(POSITIONS - 1), fc.nat(POSITIONS - 1)),
      pages: fc.integer({ min: 1, max: 9 }),
      size: fc.constantFrom<"large" | "small">("large", "small"),
    })
    .map(({ ends, pages, size }) => ({ first: Math.min(...ends), last: Math.max(...ends), bytes: pages * PAGE, size })),
  { minLength: 1, maxLength: 60 },
);
type Life = { first: number; last: number; bytes: number };

/** Most bytes alive at once: no placement needs less. */
const least = (list: readonly Life[]): number =>
  Math.max(
    ...[...Array(POSITIONS).keys()].map((t) =>
      list.reduce((sum, l) => sum + (l.first <= t && t <= l.last ? l.bytes : 0), 0),
    ),
  );

function placed(buffers: Buffers, list: readonly (Life & { size: "large" | "small" })[]): number[] {
  const ids = list.map((l) => buffers.transient("device", l.bytes, l.size));
  for (const [i, { first, last }] of list.entries()) {
    buffers.touch(ids[i]!, first);
    buffers.touch(ids[i]!, last);
  }
  return ids;
}

const together = (a: Life, b: Life): boolean => a.first <= b.last && b.first <= a.last;

describe("the arena", () => {
  it("lets no two buffers that live at once share bytes, nor leave the arena", () => {
    fc.assert(
      fc.property(lives, fc.integer({ min: 1, max: 5 }), (list, pages) => {
        const buffers = new Buffers();
        const home = buffers.fixed("device", pages * PAGE);
        const ids = placed(buffers, list);
        const { device } = buffers.place(POSITIONS);
        const all = [{ first: 0, last: POSITIONS, bytes: pages * PAGE }, ...list];
        const offsets = [home, ...ids].map((p) => buffers.list[p]!.offset);
        for (const [i, a] of all.entries()) {
          expect(offsets[i]! + a.bytes).toBeLessThanOrEqual(device);
          for (const [j, b] of all.entries()) {
            if (i === j || !together(a, b)) continue;
            expect(offsets[i]! + a.bytes <= offsets[j]! || offsets[j]! + b.bytes <= offsets[i]!).toBe(true);
          }
        }
      }),
      { numRuns: 500 },
    );
  });

  it("needs no more than what lives at once where all are of one size", () => {
    fc.assert(
      fc.property(lives, (list) => {
        for (const size of ["large", "small"] as const) {
          const same = list.map((l) => ({ ...l, bytes: PAGE, size }));
          // Large ones of one size go in order of time, as small ones do.
          const buffers = new Buffers();
          placed(buffers, same);
          expect(buffers.place(POSITIONS).device).toBe(least(same));
        }
      }),
      { numRuns: 300 },
    );
  });

  it("lends a fixed buffer's bytes to what begins after it opens and ends before it closes", () => {
    const inside = (first: number, last: number): boolean => {
      const buffers = new Buffers();
      const home = buffers.fixed("device", 2 * PAGE);
      buffers.lend(home, 10, 20);
      placed(buffers, [{ first, last, bytes: PAGE, size: "small" }]);
      return buffers.place(POSITIONS).device === 2 * PAGE;
    };
    expect(inside(11, 19)).toBe(true);
    expect(inside(10, 19)).toBe(false);
    expect(inside(11, 20)).toBe(false);
  });

  it("lends the narrowest window, so that wide ones stay for long lives", () => {
    const buffers = new Buffers();
    for (const [opens, closes] of [
      [0, 50],
      [10, 40],
    ] as const)
      buffers.lend(buffers.fixed("device", PAGE), opens, closes);
    placed(buffers, [
      { first: 1, last: 45, bytes: PAGE, size: "small" },
      { first: 15, last: 35, bytes: PAGE, size: "small" },
    ]);
    expect(buffers.place(POSITIONS).device).toBe(2 * PAGE);
  });

  it("numbers slots by dtype and shape, as few as live at once", () => {
    fc.assert(
      fc.property(lives, (list) => {
        const buffers = new Buffers();
        const keys = ["float32 B,4", "float32 B,8"];
        const same = list.map((l, i) => ({ ...l, bytes: 1, key: keys[i % 2]! }));
        for (const { first, last, key } of same) {
          const p = buffers.transient("slot", 0, "small", key);
          buffers.touch(p, first);
          buffers.touch(p, last);
        }
        const most = keys.map((key) => least(same.filter((l) => l.key === key)));
        expect(buffers.place(POSITIONS).slot).toBe(most.reduce((n, m) => n + Math.max(0, m), 0));
      }),
      { numRuns: 300 },
    );
  });
});
