/**
 * Processes that share host memory: together they hold one copy of the parameters, and nothing of it is left behind when one
 * of them is killed.
 */
import { readdirSync, readFileSync, readlinkSync } from "node:fs";
import { join } from "node:path";
import { describe, expect, test, vi } from "vitest";
import { nativeOrSkip } from "../support/native.js";
import { begun, ranksOf, startRun, until } from "./rank-runs.js";
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
    expect(holders().filter((pid) => pids.includes(Number(pid)))).toEqual([]);
  });
});
