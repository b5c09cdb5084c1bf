/**
 * Processes that share host memory: together they hold one copy of the parameters, and nothing of it is left behind when one
 * of them is killed.
 */
import { spawnSync } from "node:child_process";
import { readdirSync, readFileSync, readlinkSync } from "node:fs";
import { join } from "node:path";
import { describe, expect, test, vi } from "vitest";
import { nativeOrSkip } from "../support/native.js";
import { begun, lossesOf, ranksOf, startRanks, startRun, until } from "./rank-runs.js";
import { nanoConfig, scratch } from "./spawn.js";

const native = nativeOrSkip();
vi.setConfig({ testTimeout: 200_000 });
const root = scratch();

/** Of one process, in bytes: what it maps of the shared memory, what of that is there, and its part where several map it. */
function mapped(pid: number): { size: number; rss: number; pss: number } | null {
  const found = /memfd:stroma[^\n]*\nSize: +(\d+) kB[\s\S]*?Rss: +(\d+) kB\nPss: +(\d+) kB/.exec(
    readFileSync(`/proc/${pid}/smaps`, "utf8"),
  );
  if (found === null) return null;
  const [size, rss, pss] = found.slice(1).map((kB) => Number(kB) * 1024) as [number, number, number];
  return { size, rss, pss };
}

/** Processes that map or hold open such memory. */
const holders = (): string[] =>
  readdirSync("/proc").filter((name) => {
    if (!/^\d+$/.test(name)) return false;
    try {
      if (readFileSync(`/proc/${name}/maps`, "utf8").includes("memfd:stroma")) return true;
      return readdirSync(`/proc/${name}/fd`).some((fd) =>
        readlinkSync(`/proc/${name}/fd/${fd}`).includes("memfd:stroma"),
      );
    } catch {
      return false;
    }
  });

/** A process namespace of its own, as a container has. */
const APART = ["unshare", "--pid", "--fork", "--mount-proc"] as const;
const mayUnshare = spawnSync(APART[0], [...APART.slice(1), "true"]).status === 0;

describe.skipIf(!native)("processes that share host memory", () => {
  test.each([2, 3])("%i hold one copy together, and leave nothing when one is killed", async (ranks) => {
    const outputDir = join(root, `shared-${ranks}`);
    const run = startRun([
      ...["--config", nanoConfig(root), "--steps", "1000000", "--output-dir", outputDir],
      ...["--ranks", String(ranks), "--shards", String(ranks), "--device", "sim", "--offload", "host"],
      ...["--gradient-accumulation-steps", String(ranks), "--micro-batch-size", "2"],
    ]);
    await begun(run);
    const pids = [...ranksOf(outputDir).values()];
    expect(pids, run.text()).toHaveLength(ranks);
    const parts = pids.map((pid) => mapped(pid)!);
    const { size } = parts[0]!;
    expect(size).toBeGreaterThan(0);
    expect(parts.map((p) => p.size)).toEqual(parts.map(() => size));
    // All that one of them sees is there once.
    const pss = parts.reduce((sum, p) => sum + p.pss, 0);
    expect(Math.max(...parts.map((p) => p.rss))).toBeGreaterThan(0.9 * size);
    expect(pss).toBeLessThan(1.02 * size + 4096 * ranks);
    // Without a name anywhere, and without a descriptor.
    expect(readdirSync("/dev/shm").filter((name) => name.includes("stroma"))).toEqual([]);
    process.kill(pids.at(-1)!, "SIGKILL");
    expect((await run.ended).code, run.text()).not.toBe(0);
    await until(() => ranksOf(outputDir).size === 0, 30, run.text);
    // Nobody who has mapped it is left, so the kernel has freed it.
    expect(holders().filter((pid) => pids.includes(Number(pid)))).toEqual([]);
  });

  test.skipIf(!mayUnshare)("in two containers send what they cannot share, or say so", async () => {
    const args = (name: string, ...more: string[]) => [
      ...["--config", nanoConfig(root), "--steps", "3", "--output-dir", join(root, name), "--shards", "2"],
      ...["--device", "sim", "--offload", "host", "--micro-batch-size", "2", ...more],
    ];
    const each = (rank: number) => (rank === 1 ? { under: APART } : {});
    const apart = await startRanks(args("apart"), { ranks: 2, each });
    for (const run of apart) expect((await run.ended).code, run.text()).toBe(0);
    const together = await startRanks(args("together", "--shared-host", "on"), { ranks: 2 });
    for (const run of together) expect((await run.ended).code, run.text()).toBe(0);
    expect(together[0]!.text()).toContain("parameters where its ranks share it");
    expect(apart[0]!.text()).not.toContain("parameters where its ranks share it");
    expect(await lossesOf(join(root, "apart"))).toEqual(await lossesOf(join(root, "together")));
    const asked = await startRanks(args("asked", "--shared-host", "on"), { ranks: 2, each });
    for (const run of asked) {
      expect((await run.ended).code, run.text()).not.toBe(0);
      expect(run.text()).toContain("ranks 0 and 1 share the state of a block and are in two containers");
    }
  });
});
