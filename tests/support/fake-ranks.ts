/**
 * A launcher as `stroma train --ranks` is one, whose ranks train nothing: each does what the first argument says, and
 * prints what a test wants to know. FAKE_LAUNCH holds its options.
 */
import { spawn } from "node:child_process";
import { existsSync, mkdirSync, writeFileSync } from "node:fs";
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

const mark = (name: string) => join(process.env.FAKE_FOLDER!, `${attempt}-${name}`);
const say = (name: string) => writeFileSync(mark(name), "");
async function heard(name: string): Promise<void> {
  while (!existsSync(mark(name))) await sleep(10);
}
/** Resolves when every rank has come here: processes start at different speeds. */
async function everyone(): Promise<void> {
  say(`here-${rank}`);
  for (let other = 0; other < Number(process.env.WORLD_SIZE); other++) await heard(`here-${other}`);
}

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
    await everyone();
    if (rank === 1) process.exit(Number(folder));
  },

  async signal() {
    endOn("SIGTERM", 0);
    forever();
    await everyone();
    if (rank === 1) process.kill(process.pid, "SIGSEGV");
  },

  async stubborn() {
    process.on("SIGTERM", () => {});
    forever();
    print(`pid ${process.pid}`);
    await everyone();
    if (rank === 1) process.exit(5);
  },

  interrupted() {
    endOn("SIGINT", 130);
    endOn("SIGTERM", 143);
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

  async killedLive() {
    forever();
    if (rank !== 0) return;
    await tellLauncher({ stroma: "view", live: true });
    await sleep(1000);
    process.kill(process.pid, "SIGKILL");
  },

  /** Rank 0 shows what others write. */
  async live() {
    if (rank === 0) {
      const shown = new Promise<void>((resolve) => {
        onLauncherNote((text) => {
          print(`shown: ${text}`);
          resolve();
        });
      });
      await tellLauncher({ stroma: "view", live: true });
      await sleep(1000); // the launcher has it
      say("live");
      forever();
      await shown;
      await tellLauncher({ stroma: "view", live: false });
      await sleep(1000);
      say("still");
      await heard("written");
      process.exit(0);
    }
    await heard("live");
    print("while it is live");
    await heard("still");
    print("and after it");
    say("written");
  },
};

if (attempt === undefined) {
  process.stdout.isTTY = process.env.FAKE_TERMINAL !== undefined;
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
