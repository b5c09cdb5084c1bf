/** Runs works of several lines in time: each line in order, beside the others, each work after those that it waits for. */

/** compute: the card's arithmetic. shard: collectives of the group that shares a copy of the model. copies: between those. */
export type Line = "compute" | "shard" | "copies";
const LINES: readonly Line[] = ["compute", "shard", "copies"];

export interface Work {
  line: Line;
  seconds: number;
  /** Positions of earlier works. */
  waits: readonly number[];
}

export interface Played {
  seconds: number;
  busySeconds: Record<Line, number>;
  start: Float64Array;
  end: Float64Array;
}

/** `share`: of the card that a collective holds while it runs, by which arithmetic is slower meanwhile. */
export function play(works: readonly Work[], share: number): Played {
  const queues = LINES.map((line) => works.flatMap((w, i) => (w.line === line ? [i] : [])));
  const next = LINES.map(() => 0);
  const left: (number | null)[] = LINES.map(() => null);
  const start = new Float64Array(works.length);
  const end = new Float64Array(works.length).fill(Number.POSITIVE_INFINITY);
  const busySeconds: Record<Line, number> = { compute: 0, shard: 0, copies: 0 };
  let now = 0;
  for (;;) {
    for (const [l, queue] of queues.entries()) {
      const i = queue[next[l]!];
      if (left[l] !== null || i === undefined || works[i]!.waits.some((w) => end[w]! > now)) continue;
      start[i] = now;
      left[l] = works[i]!.seconds;
    }
    const talking = left[1] !== null || left[2] !== null;
    const rate = (l: number) => (l === 0 && talking ? 1 - share : 1);
    const until = left.reduce<number>(
      (t, work, l) => Math.min(t, work === null ? t : work / rate(l)),
      Number.POSITIVE_INFINITY,
    );
    if (until === Number.POSITIVE_INFINITY) return { seconds: now, busySeconds, start, end };
    now += until;
    for (const [l, work] of left.entries()) {
      if (work === null) continue;
      busySeconds[LINES[l]!] += until;
      const rest = work - until * rate(l);
      // What ends together ends at once, whatever a division rounds.
      const i = queues[l]![next[l]!]!;
      left[l] = rest <= 1e-12 * works[i]!.seconds ? null : rest;
      if (left[l] !== null) continue;
      end[i] = now;
      next[l]!++;
    }
  }
}
