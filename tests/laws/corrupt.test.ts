/**
 * Tapes of random graphs and policies, corrupted at random: the checker refuses a corrupted tape, or the tape still leaves
 * the very numbers of the whole one, whatever the adversary does within its waits. And what the planner writes passes.
 *
 * STROMA_CASES: corruptions in all (2,000). STROMA_SEED: where the cases begin. STROMA_STATS=1 prints the tally by kind.
 */
import { describe, expect, it } from "vitest";
import type { Graph } from "../../src/graph/types.js";
import { checkTape } from "../../src/plan/checker.js";
import type { Tape } from "../../src/plan/types.js";
import { type Adversary, Session, stubborn } from "../unit/plan/adversary.js";
import { corruptions, picker, randomCase } from "../unit/plan/corrupt.js";

const CASES = Number(process.env.STROMA_CASES ?? 2_000);
const SEED = Number(process.env.STROMA_SEED ?? 0);
const PER_TAPE = 40;
const kinds = Object.keys(corruptions);

/** Extremes: a queue that always, or never, goes first; copies done at once or as late as can be; and pure chance. */
function adversaries(seed: number): Adversary[] {
  const pick = picker(seed);
  const orders = [
    ["compute", "out", "save", "in", "load"],
    ["in", "load", "out", "save", "compute"],
    ["load", "save", "compute", "in", "out"],
  ];
  return [
    ...orders.flatMap((order) => [stubborn(order, false), stubborn(order, true)]),
    (moves) => pick(moves.length),
    (moves) => pick(moves.length),
  ];
}

const refusal = (graph: Graph, tape: Tape, after: Tape | undefined): string | null => {
  try {
    checkTape(graph, tape, { after });
    return null;
  } catch (error) {
    expect(error).toMatchObject({ code: "TAPE" });
    return (error as Error).message;
  }
};

/** Whether the tapes leave `right` in whatever order; a run that cannot go on does not. */
function isRight(session: Session, tapes: readonly Tape[], right: string, seed: number): boolean {
  for (const adversary of [null, ...adversaries(seed)]) {
    let left: string;
    try {
      left = session.run(tapes, adversary).join("\n");
    } catch {
      return false;
    }
    if (left !== right) return false;
  }
  return true;
}

describe("the checker", () => {
  it(`refuses ${CASES} random corruptions of tapes, or they change no number`, { timeout: 3_600_000 }, () => {
    const tally = new Map(kinds.map((kind) => [kind, { refused: 0, right: 0 }]));
    const missed: string[] = [];
    let harmless = 0;
    let sampled = 0;
    for (let n = 0, seed = SEED; n < CASES; seed++) {
      const { graph, step, flush } = randomCase(seed);
      const session = new Session(graph);
      const played = (a: Tape, b: Tape | null) => (b === null ? [a, a] : [a, a, b]);
      expect(refusal(graph, step, undefined)).toBeNull();
      if (flush !== null) expect(refusal(graph, flush, step)).toBeNull();
      const whole = session.run(played(step, flush), null).join("\n");
      expect(isRight(session, played(step, flush), whole, seed)).toBe(true);

      for (let k = 0; k < PER_TAPE && n < CASES; k++) {
        const pick = picker(seed * 1_000 + k);
        const kind = kinds[pick(kinds.length)]!;
        const target = flush !== null && pick(4) === 0 ? flush : step;
        const corrupt = structuredClone(target);
        const what = corruptions[kind]!(corrupt, pick, graph);
        if (what === null) continue;
        n++;
        // A step's gradients are retained for its flush too.
        const flushed = flush !== null && target === step ? refusal(graph, flush, corrupt) : null;
        const why = refusal(graph, corrupt, corrupt.kind === "flush" ? step : undefined) ?? flushed;
        const tapes = corrupt.kind === "flush" ? played(step, corrupt) : played(corrupt, flush);
        const counts = tally.get(kind)!;
        if (why !== null) {
          counts.refused++;
          // How often it refuses what would have done no harm, by a sample.
          if (pick(20) === 0) {
            sampled++;
            if (isRight(session, tapes, whole, seed)) {
              harmless++;
              if (process.env.STROMA_STATS === "2")
                console.log(`harmless: seed ${seed}, corruption ${k}, ${kind}: ${what}: ${why}`);
            }
          }
        } else if (isRight(session, tapes, whole, seed)) counts.right++;
        else missed.push(`seed ${seed}, corruption ${k}: ${kind}, ${corrupt.kind}: ${what}`);
      }
    }
    if (process.env.STROMA_STATS !== undefined)
      console.log(
        [...tally]
          .map(([kind, { refused, right }]) => `${kind}: ${refused} refused, ${right} accepted and right`)
          .join("\n"),
        `\nof ${sampled} refused ones tried, ${harmless} changed no number`,
      );
    expect(missed).toEqual([]);
    // Of a few cases, not every kind is among them.
    if (CASES >= 2_000) for (const [kind, { refused }] of tally) expect(refused, kind).toBeGreaterThan(0);
  });
});
