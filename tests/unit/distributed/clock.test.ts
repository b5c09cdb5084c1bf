/** One clock for ranks whose own differ, over gatherings that take their time. */
import { expect, it } from "vitest";
import { agreeOnClock } from "../../../src/distributed/clock.js";
import type { NativeRanks } from "../../../src/train/native-session.js";

/** Time that passes only in gatherings: everyone has heard when the last has spoken, each some time later. */
async function agreed(skews: readonly number[], late: (rank: number, round: number) => number) {
  const at = skews.map(() => 0);
  let waiting: (() => void)[] = [];
  let said: string[] = [];
  let round = 0;
  const gather = (rank: number) => (text: string) =>
    new Promise<string[]>((resolve) => {
      said[rank] = text;
      waiting[rank] = () => {};
      waiting[rank] = (
        (all: string[]) => () =>
          resolve(all)
      )(said);
      if (Object.keys(waiting).length < skews.length) return;
      const last = Math.max(...at);
      for (const r of at.keys()) at[r] = last + late(r, round);
      const everyone = waiting;
      [waiting, said, round] = [[], [], round + 1];
      for (const go of everyone) go();
    });
  return Promise.all(
    skews.map((skew, rank) => {
      const ranks = { rank, size: skews.length, gather: gather(rank) } as unknown as NativeRanks;
      return agreeOnClock(ranks, () => at[rank]! + skew);
    }),
  );
}

it.each([
  ["one that is ahead and one behind", [0, 5e6, -7e5]],
  ["rank 0's own that is the odd one", [-3e8, 0, 0]],
])("%s are found, as far as is claimed", async (_, skews) => {
  const clocks = await agreed(skews, (rank, round) => 0.2 + ((rank * 7 + round * 5) % 4) / 10);
  for (const [rank, { offsetMs, uncertainMs }] of clocks.entries()) {
    expect(uncertainMs).toBeLessThan(0.6);
    expect(Math.abs(offsetMs - (skews[0]! - skews[rank]!))).toBeLessThanOrEqual(uncertainMs);
  }
});

it("the same clock is left alone, however long words are under way", async () => {
  const clocks = await agreed([40, 40, 40], (rank) => (rank === 1 ? 9 : 0.1));
  expect(clocks.map((c) => c.offsetMs)).toEqual([0, 0, 0]);
});
