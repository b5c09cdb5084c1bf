/**
 * Law 4, nothing lost: a trainer that saves at every step is killed at random instants, in a chain of lives. After each
 * kill a whole checkpoint is there and no folder that only looks like one; the chain's end equals a run that was never
 * killed, to the bit.
 *
 * STROMA_KILLS sets how many kills each engine takes: `STROMA_KILLS=200 npx vitest run tests/laws/sigkill -t real`.
 */
import { type ChildProcess, execFileSync, spawn } from "node:child_process";
import { copyFileSync, mkdtempSync, rmSync, symlinkSync } from "node:fs";
import { mkdtemp, readdir, readFile, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join, resolve } from "node:path";
import { afterAll, beforeAll, expect, test } from "vitest";
import { FILES } from "../../src/checkpoint/format.js";
import { openCheckpoint, verifyCheckpoint } from "../../src/checkpoint/read.js";
import { Draws } from "../../src/data/planets/philox.js";
import type { TrainEvent } from "../../src/train/events.js";
import { Trainer } from "../../src/train/trainer.js";
import { collect, fakeParts, only, SMALL, stateBytes } from "../support/fake-trainer.js";
import { nativeOrSkip } from "../support/native.js";
import { REAL } from "../support/real-trainer.js";

const SEED = 20;
/** Per engine. A life of the real one takes seconds, so fewer there unless they are asked for. */
const KILLS = { fake: Number(process.env.STROMA_KILLS ?? 100), real: Number(process.env.STROMA_KILLS ?? 10) };
const root = resolve(import.meta.dirname, "../..");

let compiled: string;
let temporary: string;
beforeAll(async () => {
  // Plain JavaScript starts several times faster than what is transpiled at each of the lives.
  execFileSync("mkdir", ["-p", join(root, "build")]);
  compiled = mkdtempSync(join(root, "build", "kill-"));
  copyFileSync(join(root, "package.json"), join(compiled, "package.json"));
  symlinkSync(join(root, "build"), join(compiled, "build"));
  const options =
    "--ignoreConfig --target es2022 --module nodenext --skipLibCheck --types node --noCheck --rootDir .".split(" ");
  const tsc = join(root, "node_modules", "typescript", "bin", "tsc");
  execFileSync(process.execPath, [tsc, ...options, "--outDir", compiled, "tests/support/kill-child.ts"], { cwd: root });
  temporary = await mkdtemp(join(tmpdir(), "stroma-kill-"));
});
afterAll(async () => {
  if (compiled !== undefined) rmSync(compiled, { recursive: true, force: true });
  if (temporary !== undefined) await rm(temporary, { recursive: true, force: true });
});

const sleep = (ms: number): Promise<void> => new Promise((done) => setTimeout(done, ms));
const message = (child: ChildProcess, wanted: string): Promise<void> =>
  new Promise((done, fail) => {
    child.on("message", (m) => m === wanted && done());
    child.on("exit", (code) => fail(new Error(`the trainer ended by itself with code ${code}`)));
  });

/**
 * One life, killed at an instant that `draws` picks, after the event that it waits for (null: from its first breath).
 * Resolves to the last event that it told of.
 */
async function life(
  engine: Engine,
  outputDir: string,
  draws: Draws,
  wait: "start" | "checkpoint" | null,
): Promise<string | null> {
  const script = join(compiled, "tests", "support", "kill-child.js");
  const child = spawn(process.execPath, [script, outputDir, engine], {
    stdio: ["ignore", "ignore", "pipe", "ipc"],
  });
  let errors = "";
  let heard: string | null = null;
  child.on("message", (event) => {
    heard = String(event);
  });
  child.stderr!.on("data", (chunk) => {
    errors += chunk;
  });
  const ended = new Promise<NodeJS.Signals | null>((done) => child.on("exit", (_code, signal) => done(signal)));
  try {
    if (wait !== null) await message(child, wait);
    await sleep(draws.uniform() * (engine === "fake" ? 60 : 150));
  } catch (error) {
    throw new Error(`${(error as Error).message}\n${errors}`);
  } finally {
    child.kill("SIGKILL");
  }
  expect(await ended, errors).toBe("SIGKILL");
  return heard;
}

/** Where a kill fell, read off what it left aside; where nothing was left, off the last event that was heard. */
async function phaseOf(folder: string, names: readonly string[], heard: string | null): Promise<string> {
  const aside = names.filter((name) => name.startsWith(".tmp-"));
  if (aside.length > 0) {
    const files = (await Promise.all(aside.map((name) => readdir(join(folder, name))))).flat();
    if (files.length === 0) return "a folder just made, or just emptied";
    if (files.includes(FILES.state)) return "every file there, before or after its name";
    if (!files.includes(FILES.model)) return "removing an old checkpoint";
    if (files.length === 1) return `in ${FILES.model}`;
    return files.length === 2 && files.includes(FILES.optimizer) ? `in ${FILES.optimizer}` : "in the JSON files";
  }
  if (names.some((name) => name.startsWith("latest.tmp-"))) return "pointing latest";
  if (heard === null) return "starting or restoring";
  return heard === "checkpoint" ? "after a save" : "in a step";
}

type Engine = "fake" | "real";
const engines: [Engine, number][] = [["fake", KILLS.fake]];
if (nativeOrSkip() !== null) engines.push(["real", KILLS.real]);

test.each(engines)(
  "the %s engine: %i kills leave a whole checkpoint each time, and the end is the same to the bit",
  async (engine, kills) => {
    const outputDir = await mkdtemp(join(temporary, "run-"));
    const draws = new Draws(SEED, 0, 0);
    let step = 0;
    let cut = 0;
    let progress = 0;
    const seen = new Set<string>();
    const phases = new Map<string, number>();
    for (let kill = 0; kill < kills; kill++) {
      const wait = kill === 0 || draws.uniform() < 0.45 ? "checkpoint" : draws.uniform() < 0.85 ? "start" : null;
      const heard = await life(engine, outputDir, draws, wait);
      progress += wait === "checkpoint" ? 1 : 0;
      const names = await readdir(join(outputDir, "checkpoints"));
      // What an earlier life left aside says nothing of this kill.
      const fresh = names.filter((name) => !seen.has(name));
      for (const name of names) seen.add(name);
      const phase = await phaseOf(join(outputDir, "checkpoints"), fresh, heard);
      phases.set(phase, (phases.get(phase) ?? 0) + 1);
      cut += fresh.some((n) => n.startsWith(".tmp-")) ? 1 : 0;
      for (const name of names.filter((n) => n.startsWith("step-")))
        await verifyCheckpoint(join(outputDir, "checkpoints", name));
      const { state, skipped } = await openCheckpoint(outputDir);
      expect(skipped).toEqual([]);
      expect(state.step).toBeGreaterThanOrEqual(step);
      step = state.step;
    }
    // Otherwise the kills fell where nothing was being written, and proved little.
    expect(cut).toBeGreaterThan(kills / 10);
    expect(step).toBeGreaterThanOrEqual(progress);

    const steps = step + 3;
    const resumed = fakeParts();
    const calm = fakeParts();
    const [theirs, ours] = engine === "fake" ? [resumed, calm] : [{}, {}];
    await using last = new Trainer({ resume: true, outputDir, steps, saveEveryNSteps: 0 }, theirs);
    await collect(last);
    const lines = (await readFile(join(outputDir, "metrics.jsonl"), "utf8")).trim().split("\n");
    const killed = lines.map((line) => JSON.parse(line) as TrainEvent);

    const constant = { learningRateSchedule: { kind: "constant" } } as const;
    const options = { ...(engine === "fake" ? SMALL : REAL), ...constant, steps, outputDir: join(outputDir, "whole") };
    await using whole = new Trainer(options, ours);
    const events = await collect(whole);
    expect(only(killed, "step").map((e) => [e.step, e.loss])).toEqual(
      only(events, "step").map((e) => [e.step, e.loss]),
    );
    const files = async (dir: string) => {
      const { state } = await openCheckpoint(dir);
      return [state.files["model.safetensors"], state.files["optimizer.safetensors"], state.data.position];
    };
    expect(await files(outputDir)).toEqual(await files(options.outputDir));
    if (engine === "fake") expect(await stateBytes(resumed.sessions[0]!)).toEqual(await stateBytes(calm.sessions[0]!));
    const where = [...phases].sort((a, b) => b[1] - a[1]).map(([phase, n]) => `${n} ${phase}`);
    console.log(
      `${engine}: ${kills} kills over ${step} steps; ${cut} fell while a checkpoint was being written or removed: ${where.join("; ")}`,
    );
  },
  600_000 + 10_000 * Math.max(KILLS.fake, KILLS.real),
);
