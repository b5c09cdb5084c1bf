/**
 * Laws 1, 2 (in part), 3 and 6 over random models and random plans: wherever state and boundaries are placed, whatever
 * the order of the update and however late copies complete, parameters, moments and norms are those of the plain
 * resident run, to the bit; and what was copied is what the tape says, to the byte.
 *
 * STROMA_CASES and STROMA_SEED set how many cases and which; `npm run laws` does so. A failing case names its seed.
 */
import { mkdtempSync, readdirSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, describe, expect, it } from "vitest";
import { checkTape } from "../../src/plan/checker.js";
import { residentPolicy } from "../../src/plan/planner.js";
import type { CopyQueue, Tape } from "../../src/plan/types.js";
import { type Policy, writeTape } from "../../src/plan/write-tape.js";
import type { SessionOptions } from "../../src/train/native-session.js";
import { nativeOrSkip } from "../support/native.js";
import { random } from "../support/random-models.js";
import { type LawCase, lawCase, type Outcome, trainCase } from "./offload-case.js";

const native = nativeOrSkip();
const cases = Number(process.env.STROMA_CASES ?? 300);
const firstSeed = Number(process.env.STROMA_SEED ?? 1);
const folder = mkdtempSync(join(tmpdir(), "stroma-laws-"));
afterAll(() => rmSync(folder, { recursive: true, force: true }));

const pick = <T>(next: () => number, choices: readonly T[]): T => choices[Math.floor(next() * choices.length)]!;

/** A plan of any kind for the case, with the same arithmetic as its resident one. */
function randomPolicy(next: () => number, c: LawCase): Policy {
  const home = (): Policy["param"] => {
    if (next() < 0.6) return pick(next, ["device", "host", "disk"] as const);
    const list = Array.from({ length: 5 }, () => pick(next, ["device", "host", "disk"] as const));
    return (b: number) => list[b % list.length]!;
  };
  const recompute = next() < 0.75 ? "all" : "none";
  const update = c.clip === "global" ? pick(next, ["end", "forward"] as const) : pick(next, ["end", "backward", "forward"] as const);
  return {
    schedule: pick(next, ["breadthFirst", "breadthFirst", "depthFirst"] as const),
    recompute,
    update,
    clip: c.clip,
    state: c.state,
    microBatches: c.microBatches,
    dims: c.dims,
    param: recompute === "none" ? "device" : home(),
    optimizer: home(),
    boundary: pick(next, recompute === "none" ? (["slot", "device"] as const) : (["slot", "device", "host", "disk"] as const)),
    retained: home(),
    // Lossless, so that the numbers may be equal: what is packed smaller is another rounding by nature.
    retainedDType: c.dtype === "float64" ? "float64" : "float32",
    prefetch: Math.floor(next() * 3),
    parts: 1 + Math.floor(next() * 4),
  };
}

const QUEUES = { in: "bytesToDevice", out: "bytesFromDevice", load: "bytesLoaded", save: "bytesSaved" } as const;
const plannedBytes = (tape: Tape, queue: CopyQueue) =>
  tape.instructions.reduce((sum, i) => sum + (i.op === "copy" && i.queue === queue ? i.bytes : 0), 0);

describe.skipIf(!native)("any plan gives the same numbers", () => {
  it(`holds over ${cases} random models, plans and interleavings`, async () => {
    const live = () => native!.createSession(options({}, "cpu")).stats().liveBytes;
    const options = (extra: Partial<SessionOptions>, device: "cpu" | "sim" = "sim"): SessionOptions => ({
      device,
      dtype: "float32",
      threads: 2,
      optimizer: { kind: "adamw", beta1: 0.9, beta2: 0.95, epsilon: 1e-8, weightDecay: 0.1 },
      ...extra,
    });
    let before = 0;
    for (let i = 0; i < cases; i++) {
      const seed = firstSeed + i;
      const c = lawCase(seed);
      const next = random(seed * 7919 + 13);
      const policy = randomPolicy(next, c);
      const resident = writeTape(c.graph, residentPolicy(c.graph, { microBatches: c.microBatches, clip: c.clip, state: c.state })).step;
      const plan = writeTape(c.graph, policy);
      const where = `seed ${seed}: ${c.label}; ${JSON.stringify({ ...policy, param: show(c, policy.param), optimizer: show(c, policy.optimizer), retained: show(c, policy.retained), dims: undefined })}`;
      checkTape(c.graph, plan.step);
      if (plan.flush !== null) checkTape(c.graph, plan.flush, { after: plan.step });
      const common = { dtype: c.dtype, storage: c.state.storage, masterWeight: c.state.masterWeight };
      const optimizer = { ...options({}).optimizer, kind: c.state.optimizer };
      const plain = await trainCase(native!, options({ ...common, optimizer }, "cpu"), c, { step: resident, flush: null });
      const adversary = next() < 0.6 ? seed : null;
      const other = await trainCase(
        native!,
        options({
          ...common,
          optimizer,
          diskFolder: folder,
          sim: { memoryBytes: null, hostToDevice: next() < 0.2 ? 2e8 : null, deviceToHost: null, adversary },
        }),
        c,
        plan,
      );
      expect(equal(other, plain), where).toEqual([]);
      for (const result of other.results)
        for (const [queue, field] of Object.entries(QUEUES))
          expect(result[field], `${where}: ${field}`).toBe(plannedBytes(plan.step, queue as CopyQueue));
      if (i === 5) before = live();
    }
    // Law 6: what sessions took is back, on the disk too.
    if (cases > 10) expect(live()).toBeLessThanOrEqual(before + 4096);
    expect(readdirSync(folder)).toEqual([]);
  }, 1_200_000);
});

function show(c: LawCase, home: Policy["param"]): string {
  return typeof home === "string" ? home : c.graph.blocks.map((_, b) => home(b)).join(" ");
}

/** What differs, by name. */
function equal(a: Outcome, b: Outcome): string[] {
  const differing = [...b.state].filter(([key, data]) => a.state.get(key) !== data).map(([key]) => key);
  if (a.state.size !== b.state.size) differing.push(`${a.state.size} tensors of state for ${b.state.size}`);
  for (const [i, r] of b.results.entries())
    if (!Object.is(a.results[i]!.gradNorm, r.gradNorm)) differing.push(`norm of step ${i}: ${a.results[i]!.gradNorm} for ${r.gradNorm}`);
  return differing;
}
