/**
 * A launcher as `stroma train --ranks` is one, whose ranks train nothing: each does what the first argument says, and
 * prints what a test wants to know. FAKE_LAUNCH holds its options.
 */
import { spawn } from "node:child_process";
import { mkdirSync } from "node:fs";
import { join } from "node:path";
import { launchTraining } from "../../src/cli/launch.js";
import { rankFromEnvironment } from "../../src/distributed/environment.js";
import type { LaunchOptions } from "../../src/distributed/launch.js";
import { followLauncher, onLauncherNote, tellLauncher } from "../../src/distributed/lifeline.js";

const [scenario, folder = ""] = process.argv.slice(2);
const attempt = process.env.STROMA_ATTEMPT;
const rank = rankFromEnvironment()?.rank ?? 0;
const sleep = (ms: number) => new Promise<void>((resolve) => setTimeout(resolve, ms));
const forever = () => setInterval(() => {}, 1000);
const print = (text: string) => process.stdout.write(`${text}\n`);

/** Counts a signal for a while after the first one, then ends. */
function endOn(signal: "SIGINT" | "SIGTERM", status: number): void {
  let count = 0;
  process.on(signal, () => {
    if (++count > 1) return;
    setTimeout(() => {
      print(`rank ${rank} got ${count} ${signal}`);
      process.exit(status);
    }, 300);
  });
}

const SCENARIOS: Record<string, () => unknown> = {
  async lines() {
    if (rank === 0) return print(JSON.stringify({ rank: 0 }));
    for (let i = 0; i < 20; i++) {
      process.stdout.write(`${rank}: first half, `);
      await sleep(5);
      process.stdout.write(`second half ${i}\n`);
    }
    process.stderr.write(`${rank} on stderr, without an end`);
  },

  environment() {
    const { OMP_NUM_THREADS, OWN } = process.env;
    print(JSON.stringify({ spec: rankFromEnvironment(), OMP_NUM_THREADS, OWN, args: process.argv.slice(2) }));
  },

  async status() {
    endOn("SIGTERM", 0);
    forever();
    if (rank === 1) setTimeout(() => process.exit(Number(folder)), 300);
  },

  signal() {
    endOn("SIGTERM", 0);
    forever();
    if (rank === 1) setTimeout(() => process.kill(process.pid, "SIGSEGV"), 300);
  },

  stubborn() {
    process.on("SIGTERM", () => {});
    forever();
    print(`pid ${process.pid}`);
    if (rank === 1) setTimeout(() => process.exit(5), 300);
  },

  interrupted() {
    endOn("SIGINT", 130);
    endOn("SIGTERM", 0);
    print(`pid ${process.pid}`);
    forever();
  },

  deaf() {
    process.on("SIGINT", () => {});
    print(`pid ${process.pid}`);
    forever();
  },

  /** With a process of its own. Rank 1's event loop stands still from then on. */
  async orphan() {
    const child = spawn("sleep", ["300"], { stdio: "ignore" });
    await new Promise((resolve) => process.stdout.write(`pid ${process.pid}\npid ${child.pid}\n`, resolve));
    await sleep(rank === 1 ? 200 : 0);
    if (rank === 1) Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0);
    forever();
  },

  /** Ends with 1 twice, first without and then with a checkpoint; then well. */
  async flaky() {
    if (rank !== 0) return attempt === "2" ? null : forever();
    print(`attempt ${attempt}: ${process.argv.slice(4).join(" ")}`);
    if (attempt === "2") return process.exit(0);
    await tellLauncher({ stroma: "run", folder });
    await sleep(200);
    if (attempt === "1") mkdirSync(join(folder, "checkpoints", "step-000007"), { recursive: true });
    process.exit(1);
  },

  /** Rank 0 shows what others write. */
  async live() {
    if (rank === 0) {
      onLauncherNote((text) => print(`shown: ${text}`));
      await tellLauncher({ stroma: "view", live: true });
      await sleep(1500);
      await tellLauncher({ stroma: "view", live: false });
    } else {
      await sleep(700);
      print("while it is live");
      await sleep(4000);
      print("and after it");
    }
  },
};

if (attempt === undefined) {
  const {
    ranks = 2,
    restart = 0,
    json = false,
    ...overrides
  } = JSON.parse(process.env.FAKE_LAUNCH ?? "{}") as {
    ranks?: number;
    restart?: number;
    json?: boolean;
  } & Partial<LaunchOptions>;
  process.exitCode = await launchTraining({ ranks, restart }, json, overrides);
} else {
  followLauncher();
  await SCENARIOS[scenario!]!();
}
