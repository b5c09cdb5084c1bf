/** One clock for what several ranks measure. */
import type { NativeRanks } from "../train/native-session.js";

/** Milliseconds of CLOCK_MONOTONIC, which every process of a machine reads alike, the engine too. */
export const monotonicMs = (): number => Number(process.hrtime.bigint()) / 1e6;

export interface CommonClock {
  /** What this rank's milliseconds lack of rank 0's: 0 where the two cannot be told apart, as on one machine. */
  offsetMs: number;
  /** By how much that may be wrong. */
  uncertainMs: number;
}

/** The first brings the ranks to one moment; of the others the quickest counts. */
const ROUNDS = 8;

/**
 * What everyone says in a gathering was said before anyone has heard all of it: each round bounds the offset to both
 * sides. Collective.
 * @param now the clock, in milliseconds
 */
export async function agreeOnClock(ranks: NativeRanks, now: () => number = monotonicMs): Promise<CommonClock> {
  let [low, high] = [Number.NEGATIVE_INFINITY, Number.POSITIVE_INFINITY];
  let [said, heard] = [0, 0];
  for (let round = 0; round <= ROUNDS; round++) {
    const saying = now();
    const first = (await ranks.gather(`${saying} ${heard}`))[0]!.split(" ").map(Number) as [number, number];
    // What rank 0 heard of the round before comes with this one.
    if (round > 0) high = Math.min(high, first[1] - said);
    [said, heard] = [saying, now()];
    low = Math.max(low, first[0] - heard);
  }
  const offsetMs = low <= 0 && high >= 0 ? 0 : (low + high) / 2;
  return { offsetMs, uncertainMs: Math.max(high - offsetMs, offsetMs - low) };
}
