/** Two ranks with a card each: NCCL moves what Gloo moves, and a rank that waits for one that failed ends. */
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, describe, expect, it } from "vitest";
import { assignStages } from "../../src/plan/stages.js";
import { writeTape } from "../../src/plan/write-tape.js";
import type { SessionOptions } from "../../src/train/native-session.js";
import { nativeOrSkip } from "../support/native.js";
import { random } from "../support/random-models.js";
import { contextCase, distance, stepShared, summed } from "./context-case.js";
import { lawCase } from "./offload-case.js";
import { joinAll, trainRanks } from "./rank-case.js";
import { differences, randomPolicy, sessionOptions } from "./trial.js";

const native = nativeOrSkip();
const folder = mkdtempSync(join(tmpdir(), "stroma-nccl-"));
afterAll(() => rmSync(folder, { recursive: true, force: true }));

/** Why there is nothing to try; null: two cards and NCCL. */
function missing(): string | null {
  if (native === null) return "no addon";
  if (native.ncclVersion() === null) return "this build has no NCCL";
  try {
    return native.busAddress(0) === native.busAddress(1) ? "one card" : null;
  } catch (error) {
    return (error as Error).message;
  }
}
const why = missing();
if (why !== null) console.warn(`left out, two cards and NCCL are needed: ${why}`);

const onCards = (transport: "nccl" | "gloo") => ({
  ...native!,
  createSession: (options: SessionOptions) =>
    native!.createSession({ ...options, device: `cuda:${options.ranks!.rank}`, transport }),
});

describe.skipIf(why !== null)("two ranks with a card each", () => {
  it("hold the same after the same steps over NCCL and over Gloo, to the bit", { timeout: 300_000 }, async () => {
    const ranks = await joinAll(native!, 2);
    for (let seed = 1; seed <= 8; seed++) {
      const c = lawCase(seed);
      const policy = { ...randomPolicy(random(seed), c), boundary: "device" as const };
      const of = assignStages(c.graph, 2, "contiguous");
      const options = sessionOptions(c, { device: "cuda:0", diskFolder: folder, threads: 1 });
      const run = (transport: "nccl" | "gloo") => trainRanks(onCards(transport), ranks, options, c, policy, { of });
      const [gloo, nccl] = [await run("gloo"), await run("nccl")];
      expect(differences(nccl, gloo), `seed ${seed}: ${c.label}`).toEqual([]);
      expect(nccl.sent, `seed ${seed}`).toEqual(nccl.planned);
    }
    await Promise.all(ranks.map((r) => r.leave()));
  });

  it("pass rows around over NCCL as over Gloo, to the bit", { timeout: 300_000 }, async () => {
    const ranks = await joinAll(native!, 2);
    for (let seed = 1; seed <= 8; seed++) {
      const c = contextCase(seed, 2, "float32");
      const gloo = await stepShared(onCards("gloo"), ranks, c);
      const nccl = await stepShared(onCards("nccl"), ranks, c);
      expect(distance(summed(nccl), summed(gloo)), c.label).toBe(0);
    }
    await Promise.all(ranks.map((r) => r.leave()));
  });

  it("end when the other fails", { timeout: 60_000 }, async () => {
    const ranks = await joinAll(native!, 2);
    const c = lawCase(1);
    const of = assignStages(c.graph, 2, "contiguous");
    const policy = { ...randomPolicy(random(1), c), boundary: "device" as const };
    const { step } = writeTape(c.graph, { ...policy, stages: { rank: 0, ranks: 2, of } });
    const options = sessionOptions(c, { device: "cuda:0", diskFolder: folder, threads: 1 });
    const session = onCards("nccl").createSession({ ...options, ranks: ranks[0]! });
    await session.load(c.graph, step.placement);
    await session.initialize(7);
    const waits = session.step({ tape: step, ...c.steps[0]! });
    setTimeout(() => ranks[1]!.fail("planted"), 500);
    await expect(waits).rejects.toThrow(/rank 1 .* failed: planted/);
    await session.dispose();
    await Promise.all(ranks.map((r) => r.leave()));
  });
});
