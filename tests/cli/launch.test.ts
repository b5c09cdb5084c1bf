/** The launcher of ranks, as a process, with ranks that train nothing. */
import { mkdtempSync, readFileSync } from "node:fs";
import { availableParallelism } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { describe, expect, it, vi } from "vitest";
import type { RankSpec } from "../../src/distributed/environment.js";
import { nativeOrSkip } from "../support/native.js";
import { jsonLines, nanoConfig, type Running, scratch, start, startScript, stroma } from "./spawn.js";

// Each test starts several processes, one of them several times.
vi.setConfig({ testTimeout: 180_000 });

const SCRIPT = fileURLToPath(new URL("../support/fake-ranks.ts", import.meta.url));
const folder = scratch();

interface Options {
  ranks?: number;
  restart?: number;
  json?: boolean;
  graceMs?: number;
  backoffMs?: number;
}

const launched = (args: readonly string[], options: Options = {}, env: Record<string, string> = {}): Running =>
  startScript(SCRIPT, args, {
    env: {
      OMP_NUM_THREADS: "",
      ...env,
      FAKE_LAUNCH: JSON.stringify(options),
      FAKE_FOLDER: mkdtempSync(join(folder, "ranks-")),
    },
  });

const linesOf = (text: string): string[] => text.split("\n").filter((line) => line !== "");
const pidsOf = (text: string): number[] => [...text.matchAll(/pid (\d+)/g)].map(([, pid]) => Number(pid));
const pids = (n: number) => new RegExp(`(pid \\d+\\n[^]*){${n}}`);

function isRunning(pid: number): boolean {
  try {
    // The state follows the name, which may hold anything, in parentheses.
    return !/\) [ZX] /.test(readFileSync(`/proc/${pid}/stat`, "utf8"));
  } catch {
    return false;
  }
}

async function gone(list: readonly number[], ms: number): Promise<number> {
  const from = performance.now();
  while (list.some(isRunning) && performance.now() - from < ms) await new Promise((resolve) => setTimeout(resolve, 10));
  expect(list.filter(isRunning)).toEqual([]);
  return performance.now() - from;
}

const sleep = (ms: number) => new Promise((resolve) => setTimeout(resolve, ms));

describe("output", () => {
  it("rank 0's as it is; lines of others whole, in order, prefixed, on the stream that they were written to", async () => {
    const { code, stdout, stderr } = await launched(["lines"], { ranks: 3 }).ended;
    expect(code).toBe(0);
    const lines = linesOf(stdout);
    expect(lines).toHaveLength(41);
    expect(lines).toContain('{"rank":0}');
    for (const rank of [1, 2])
      expect(lines.filter((line) => line.startsWith(`[rank ${rank}] `))).toEqual(
        Array.from({ length: 20 }, (_, i) => `[rank ${rank}] ${rank}: first half, second half ${i}`),
      );
    expect(linesOf(stderr).sort()).toEqual([1, 2].map((r) => `[rank ${r}] ${r} on stderr, without an end`));
  });

  it("with --json only rank 0 writes to stdout", async () => {
    const { code, stdout, stderr } = await launched(["lines"], { json: true }).ended;
    expect([code, stdout]).toEqual([0, '{"rank":0}\n']);
    expect(linesOf(stderr)).toHaveLength(21);
  });

  it("while rank 0's view is live, lines of others go through it, and after that to the terminal", async () => {
    const { code, stdout } = await launched(["live"]).ended;
    expect(code).toBe(0);
    expect(linesOf(stdout)).toEqual(["shown: [rank 1] while it is live", "[rank 1] and after it"]);
  });
});

describe("a terminal", () => {
  it("shows its cursor again when the rank that hid it is killed", async () => {
    const { code, stdout } = await launched(["killedLive"], {}, { FAKE_TERMINAL: "1" }).ended;
    expect([code, stdout]).toEqual([137, "\u001b[?25h\n"]);
  });
});

describe("what a rank finds", () => {
  it("torchrun's variables, its share of the cores, the launcher's own variables and arguments", async () => {
    const { stdout } = await launched(["environment", "--flag"], {}, { OWN: "kept" }).ended;
    const found = linesOf(stdout)
      .map((line) => JSON.parse(line.replace("[rank 1] ", "")) as { spec: RankSpec })
      .sort((a, b) => a.spec.rank - b.spec.rank);
    const { port } = found[0]!.spec;
    expect(found).toEqual(
      [0, 1].map((rank) => ({
        spec: {
          ...{ rank, size: 2, localRank: rank, localSize: 2, address: "127.0.0.1", port },
          ...{ store: "host", prefix: "/stroma/attempt_0", launcher: "stroma" },
        },
        OMP_NUM_THREADS: String(Math.max(1, Math.floor(availableParallelism() / 2))),
        OWN: "kept",
        args: ["environment", "--flag"],
      })),
    );
  });

  it("the user's OMP_NUM_THREADS stays; one process alone is no group", async () => {
    const { stdout } = await launched(["environment"], { ranks: 1 }, { OMP_NUM_THREADS: "7" }).ended;
    expect(JSON.parse(stdout)).toEqual({ spec: null, OMP_NUM_THREADS: "7", args: ["environment"] });
  });
});

describe("the end", () => {
  it("the first rank that fails gives the status and is named; the others get one SIGTERM", async () => {
    const { code, stdout, stderr } = await launched(["status", "7"], { ranks: 3 }).ended;
    expect(code).toBe(7);
    expect(stderr).toMatch(/^stroma: rank 1 \(process \d+\) ended with status 7; ending the other 2 ranks\n$/);
    expect(linesOf(stdout).sort()).toEqual(["[rank 2] rank 2 got 1 SIGTERM", "rank 0 got 1 SIGTERM"]);
  });

  it("a signal counts 128 and its number", async () => {
    const { code, stderr } = await launched(["signal"]).ended;
    expect(code).toBe(139);
    expect(stderr).toContain("was ended by SIGSEGV; ending the other rank\n");
  });

  it("a rank that does not end is killed after the grace period", async () => {
    const run = launched(["stubborn"], { graceMs: 500 });
    const { code, stdout, stderr } = await run.ended;
    expect(code).toBe(5);
    expect(stderr).toContain("killing what has not ended 0.5 s after it");
    await gone(pidsOf(stdout), 0);
  });

  it("Ctrl-C reaches each rank once, also where it comes twice at once, and nothing is started again", async () => {
    const run = launched(["interrupted"], { ranks: 3, restart: 2 });
    await run.until(pids(3));
    // What npm does beside the terminal.
    run.child.kill("SIGINT");
    await sleep(20);
    run.child.kill("SIGINT");
    const { code, stdout, stderr } = await run.ended;
    expect([code, stderr]).toEqual([130, ""]);
    for (const rank of [0, 1, 2]) expect(stdout).toContain(`rank ${rank} got 1 SIGINT\n`);
  });

  it("SIGTERM asks for a save and an end, and that is no failure", async () => {
    const run = launched(["interrupted"], { restart: 2 });
    await run.until(pids(2));
    run.child.kill("SIGTERM");
    const { code, stdout, stderr } = await run.ended;
    expect([code, stderr]).toEqual([143, ""]);
    for (const rank of [0, 1]) expect(stdout).toContain(`rank ${rank} got 1 SIGTERM\n`);
  });

  it("a second Ctrl-C ends all at once", async () => {
    const run = launched(["deaf"]);
    await run.until(pids(2));
    const ranks = pidsOf(run.output);
    run.child.kill("SIGINT");
    await sleep(600);
    expect(ranks.filter(isRunning)).toEqual(ranks);
    run.child.kill("SIGINT");
    expect((await run.ended).signal).toBe("SIGINT");
    await gone(ranks, 500);
  });

  it("a launcher that is killed leaves nobody behind: not a rank that computes, nor what a rank started", async () => {
    const run = launched(["orphan"], { ranks: 2 });
    await run.until(pids(4));
    await sleep(1000);
    const list = pidsOf(run.output);
    expect(list.filter(isRunning)).toEqual(list);
    run.child.kill("SIGKILL");
    expect(await gone(list, 10_000)).toBeLessThan(2000);
  });

  it("a rank that is killed takes what it started with it, and the others end", async () => {
    const run = launched(["orphan"], { ranks: 2, graceMs: 500 });
    await run.until(pids(4));
    const list = pidsOf(run.output);
    const [first] = /^pid (\d+)/m.exec(run.output)!.slice(1).map(Number); // rank 0: the only one without a prefix
    process.kill(first!, "SIGKILL");
    const { code, stderr } = await run.ended;
    expect(code).toBe(137);
    expect(stderr).toContain("rank 0 (process");
    expect(stderr).toContain("was ended by SIGKILL: often the system, out of memory");
    await gone(list, 500);
  });
});

describe("restarts", () => {
  it("with back-off, from the last checkpoint once there is one, and says so", async () => {
    const run = join(folder, "flaky");
    const { code, stdout, stderr } = await launched(["flaky", run, "--resume", "auto"], {
      restart: 3,
      backoffMs: 300,
      graceMs: 300,
    }).ended;
    expect(code).toBe(0);
    expect(linesOf(stdout)).toEqual([
      "attempt 0: --resume auto",
      "attempt 1: --resume auto",
      `attempt 2: --resume=${run}`,
    ]);
    const said = linesOf(stderr).filter((line) => !line.includes("ended with status 1"));
    expect(said).toEqual([
      "stroma: starting all 2 ranks again in 0.3 s",
      "stroma: attempt 2 of 4: no checkpoint was saved, so from where it began",
      "stroma: starting all 2 ranks again in 0.6 s",
      `stroma: attempt 3 of 4: from the last checkpoint in ${run}`,
    ]);
  });

  it("ends when the restarts are used up, with the last status; a wrong command line is not tried again", async () => {
    const [used, wrong] = await Promise.all([
      launched(["status", "1"], { restart: 1, backoffMs: 10 }).ended,
      launched(["status", "2"], { restart: 1, backoffMs: 10 }).ended,
    ]);
    expect(used.code).toBe(1);
    expect(used.stderr.match(/ended with status 1/g)).toHaveLength(2);
    expect(wrong.code).toBe(2);
    expect(wrong.stderr).toContain("not started again: status 2 says that another try would end the same way");
  });

  it("Ctrl-C while it waits ends it", async () => {
    const run = launched(["status", "1"], { ranks: 2, restart: 1, backoffMs: 100_000 });
    let stderr = "";
    run.child.stderr!.on("data", (text: string) => {
      stderr += text;
    });
    while (!stderr.includes("again in 60 s")) await sleep(50);
    run.child.kill("SIGINT");
    expect((await run.ended).code).toBe(130);
  });
});

describe("stroma train", () => {
  const rank = { RANK: "0", WORLD_SIZE: "2", LOCAL_RANK: "0", LOCAL_WORLD_SIZE: "2" };
  const store = { MASTER_ADDR: "127.0.0.1", MASTER_PORT: "29999" };

  it.each<[string[], Record<string, string>, string]>([
    [["--ranks", "3"], { ...rank, ...store }, "3 is not 2. Leave --ranks out"],
    [[], rank, "missing are MASTER_ADDR, MASTER_PORT"],
    [["--ranks", "2", "--steps", "5", "--epochs", "1"], {}, "steps 5 and epochs 1 are both given"],
    [["--ranks", "0"], {}, 'expected a whole number of at least 1, got "0", at --ranks. For example: --ranks 2'],
  ])("%j under %j says once what is wrong", async (args, env, message) => {
    const { code, stdout, stderr } = await stroma(["train", ...args], { env, cwd: folder });
    expect([code, stdout]).toEqual([2, ""]);
    expect(stderr).toContain(message);
    expect(linesOf(stderr)).toHaveLength(1);
  });

  it("with --json a rank other than 0 writes its failure to stderr", async () => {
    const env = { ...rank, RANK: "1", LOCAL_RANK: "1", ...store };
    const { code, stdout, stderr } = await stroma(["train", "--json", "--ranks", "3"], { env, cwd: folder });
    expect([code, stdout]).toEqual([2, ""]);
    expect(JSON.parse(stderr)).toMatchObject({ event: "error", code: "CONFIG" });
  });
});

/** The ranks of a launcher; the compiler of the sources may run beside them. */
function ranksOf({ child }: Running): number[] {
  const children = readFileSync(`/proc/${child.pid}/task/${child.pid}/children`, "utf8").trim().split(" ");
  return children.filter((pid) => readFileSync(`/proc/${pid}/cmdline`, "utf8").includes("train")).map(Number);
}

describe.skipIf(!nativeOrSkip())("training", () => {
  it("by two ranks takes the steps of one, to the bit", async () => {
    const steps = async (name: string, ...more: string[]) => {
      const output = ["--output-dir", join(folder, name), "--json"];
      const { code, stdout, stderr } = await stroma([
        ...["train", "--config", nanoConfig(folder), "--steps", "5", ...output, ...more],
      ]);
      expect([code, stderr]).toEqual([0, ""]);
      return jsonLines(stdout)
        .filter((line) => line.event === "step")
        .map(({ step, loss, gradNorm, tokens }) => ({ step, loss, gradNorm, tokens }));
    };
    const one = await steps("one");
    expect(one).toHaveLength(5);
    expect(await steps("two", "--ranks", "2")).toEqual(one);
  });

  it.each([1, 2])("by %i: killed, it goes on from the checkpoint, and ends on Ctrl-C as any run", async (n) => {
    const out = join(folder, `killed-${n}`);
    const run = start([
      ...["train", "--config", nanoConfig(folder), "--steps", "1000000", "--save-every-n-steps", "5"],
      ...["--ranks", String(n), "--restart", "1", "--json", "--output-dir", out],
    ]);
    await run.until(/"event":"checkpoint"/);
    const ranks = ranksOf(run);
    expect(ranks).toHaveLength(n);
    process.kill(ranks.at(-1)!, "SIGKILL");
    await run.until(/"resumedFrom":".*"event":"step"/s);
    run.child.kill("SIGINT");
    const { code, stdout, stderr } = await run.ended;
    expect(code).toBe(130);
    const [first, second] = jsonLines(stdout).filter((line) => line.event === "start");
    expect(first).toMatchObject({ step: 0, resumedFrom: null });
    expect(second!.step).toBeGreaterThanOrEqual(5);
    expect(stderr).toMatch(n === 1 ? /^stroma: the run \(process/m : /^stroma: rank 1 \(process/m);
    expect(stderr).toContain(`attempt 2 of 2: from the last checkpoint in ${out}\n`);
  });
});
