/**
 * Several ranks as a user runs them, and what happens when one is lost: the others end within seconds and name it, the
 * last checkpoint is whole, and any number of ranks goes on from it. STROMA_KILLS sets how many are killed.
 */
import { existsSync, readFileSync } from "node:fs";
import { mkdtemp, readdir, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { openCheckpoint, verifyCheckpoint } from "../../src/checkpoint/read.js";
import { Draws } from "../../src/data/planets/philox.js";
import { nativeOrSkip } from "../support/native.js";
import { type Running, start } from "./spawn.js";

const native = nativeOrSkip();
const KILLS = Number(process.env.STROMA_KILLS ?? 4);
const SEED = 31;
let root: string;
beforeAll(async () => {
  root = await mkdtemp(join(tmpdir(), "stroma-cli-ranks-"));
});
afterAll(() => rm(root, { recursive: true, force: true }));

const ARGS = ["--batch-size", "4", "--micro-batch-size", "1", "--sequence-length", "64", "--learning-rate", "0.001"];

interface Run {
  child: Running["child"];
  text(): string;
  ended: Promise<{ status: number | null }>;
}
function train(outputDir: string, more: string[]): Run {
  const running = start(["train", ...ARGS, "--output-dir", outputDir, ...more]);
  let text = "";
  for (const stream of [running.child.stdout!, running.child.stderr!])
    stream.on("data", (chunk) => {
      text += chunk;
    });
  return { child: running.child, text: () => text, ended: running.ended.then(({ code }) => ({ status: code })) };
}

/** Processes of a run by their rank, from the environment that the launcher gave them. */
async function ranksOf(outputDir: string): Promise<Map<number, number>> {
  const found = new Map<number, number>();
  for (const name of await readdir("/proc")) {
    if (!/^\d+$/.test(name)) continue;
    try {
      if (!readFileSync(`/proc/${name}/cmdline`, "utf8").includes(outputDir)) continue;
      const rank = /(?:^|\0)RANK=(\d+)/.exec(readFileSync(`/proc/${name}/environ`, "utf8"))?.[1];
      if (rank !== undefined) found.set(Number(rank), Number(name));
    } catch {
      // It has ended meanwhile.
    }
  }
  return found;
}
async function until(what: () => boolean | Promise<boolean>, seconds: number): Promise<void> {
  const end = Date.now() + seconds * 1000;
  while (!(await what())) {
    if (Date.now() > end) throw new Error(`waited ${seconds} s in vain`);
    await new Promise((done) => setTimeout(done, 50));
  }
}

describe.skipIf(!native)("stroma train --ranks", () => {
  test("trains, and one rank goes on from it", { timeout: 120_000 }, async () => {
    const outputDir = join(root, "plain");
    const many = train(outputDir, ["--ranks", "2", "--steps", "3"]);
    expect(await many.ended, many.text()).toMatchObject({ status: 0 });
    expect(many.text()).toMatch(/step 3\/3/);
    expect(many.text()).toMatch(/rank 0 of 2/);
    const one = train(outputDir, ["--resume", "--steps", "5"]);
    expect(await one.ended, one.text()).toMatchObject({ status: 0 });
    expect((await openCheckpoint(outputDir)).state.step).toBe(5);
  });

  test(`survives ${KILLS} kills of a rank at any instant`, { timeout: 60_000 + KILLS * 60_000 }, async () => {
    const outputDir = join(root, "killed");
    const draws = new Draws(SEED, 0, 0);
    for (let kill = 0; kill < KILLS; kill++) {
      const ranks = 2 + (kill % 2);
      const run = train(outputDir, [
        ...["--ranks", String(ranks), "--steps", "100000", "--save-every-n-steps", "1", "--resume", "auto"],
        ...["--rank-timeout", "5"],
      ]);
      await until(() => /step +\d+/.test(run.text()) || run.child.exitCode !== null, 60);
      await new Promise((done) => setTimeout(done, draws.uniform() * 1500));
      const victims = await ranksOf(outputDir);
      const rank = Math.floor(draws.uniform() * ranks);
      const victim = victims.get(rank);
      expect(victim, `${run.text()}\nranks ${[...victims.keys()]}`).toBeDefined();
      process.kill(victim!, "SIGKILL");
      const at = Date.now();
      const { status } = await run.ended;
      expect(Date.now() - at, run.text()).toBeLessThan(20_000);
      expect(status, run.text()).toBe(137);
      expect(run.text()).toContain(`rank ${rank}`);
      await until(async () => (await ranksOf(outputDir)).size === 0, 5);
      if (existsSync(join(outputDir, "checkpoints", "latest"))) {
        const { path } = await openCheckpoint(outputDir);
        await verifyCheckpoint(path);
      }
    }
    const last = train(outputDir, ["--resume", "auto", "--steps", "100000", "--ranks", "2"]);
    await until(() => /resumed from/.test(last.text()) && /step +\d+\/.*tokens/.test(last.text()), 60);
    last.child.kill("SIGINT");
    expect(await last.ended, last.text()).toMatchObject({ status: 130 });
    await verifyCheckpoint((await openCheckpoint(outputDir)).path);
  });

  test("ends when a rank is frozen, naming it", { timeout: 90_000 }, async () => {
    const outputDir = join(root, "frozen");
    const run = train(outputDir, ["--ranks", "2", "--steps", "100000", "--rank-timeout", "3"]);
    await until(() => /step +\d+/.test(run.text()) || run.child.exitCode !== null, 60);
    const victim = (await ranksOf(outputDir)).get(1)!;
    process.kill(victim, "SIGSTOP");
    const at = Date.now();
    expect((await run.ended).status, run.text()).not.toBe(0);
    expect(Date.now() - at).toBeLessThan(25_000);
    expect(run.text()).toMatch(/rank 1 \(.*\) has been silent for 3 s/);
    await until(async () => (await ranksOf(outputDir)).size === 0, 5);
  });
});
