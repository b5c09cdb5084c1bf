/** A profile of ranks whose machines' clocks have nothing in common: rank 1 is in a time namespace of its own. */
import { spawnSync } from "node:child_process";
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { expect, test } from "vitest";
import type { ProfileDocument } from "../../src/profile/index.js";
import { messagesOf } from "../../src/profile/ranks.js";
import { nativeOrSkip } from "../support/native.js";
import { startRanks } from "./rank-runs.js";
import { nanoConfig, scratch } from "./spawn.js";

const root = scratch();
/** A day ahead of the others. */
const AHEAD = ["unshare", "--time", "--monotonic", "86400", "--fork"];

function clocksOrSkip(): boolean {
  const { status, stderr, error } = spawnSync(AHEAD[0]!, [...AHEAD.slice(1), "true"], { encoding: "utf8" });
  if (status === 0) return true;
  console.warn(`left out, this system allows no time namespaces: ${(error?.message ?? stderr).trim()}`);
  return false;
}

test.skipIf(!nativeOrSkip() || !clocksOrSkip())(
  "a rank whose clock is a day ahead stands beside the other one",
  { timeout: 120_000 },
  async () => {
    const outputDir = join(root, "ahead");
    const args = ["--config", nanoConfig(root), "--steps", "3", "--profile-memory", "--output-dir", outputDir];
    const runs = await startRanks(args, { ranks: 2, each: (rank) => (rank === 1 ? { under: AHEAD } : {}) });
    for (const run of runs) expect((await run.ended).code, run.text()).toBe(0);
    const documents = [0, 1].map((rank) => {
      const file = join(outputDir, "profile-2", `profile-rank-${rank}.json`);
      return JSON.parse(readFileSync(file, "utf8")) as ProfileDocument;
    });
    const began = documents.map((d) => d.rank!.beganMs);
    expect(Math.min(...began)).toBe(0);
    expect(Math.max(...began)).toBeLessThan(5000);
    const messages = messagesOf(documents);
    expect(messages.length).toBeGreaterThan(0);
    for (const { from, to } of messages) {
      const [sent, got] = [from, to].map((at) => documents[at.rank]!.instructions[at.instruction]!);
      expect(got!.endMs + began[to.rank]! - sent!.startMs - began[from.rank]!).toBeGreaterThan(-0.01);
    }
  },
);
