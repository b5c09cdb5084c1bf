import { spawnSync } from "node:child_process";
import {
  cp,
  mkdir,
  mkdtemp,
  readdir,
  readFile,
  readlink,
  rename,
  rm,
  symlink,
  truncate,
  writeFile,
} from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, test } from "vitest";
import { isAlive, lockFolder, processTag } from "../../../src/checkpoint/files.js";
import { decodeState, encodeState } from "../../../src/checkpoint/format.js";
import { openCheckpoint, verifyCheckpoint } from "../../../src/checkpoint/read.js";
import { CheckpointStore } from "../../../src/checkpoint/store.js";
import { writeCheckpoint } from "../../../src/checkpoint/write.js";
import { resolveAdamW } from "../../../src/optim/adamw.js";
import { Trainer } from "../../../src/train/trainer.js";
import { bigramGraph, FakeSession } from "../../support/fake-session.js";
import { collect, fakeParts, only, SMALL, train } from "../../support/fake-trainer.js";

let outputDir: string;
let folder: string;
beforeEach(async () => {
  outputDir = await mkdtemp(join(tmpdir(), "stroma-store-"));
  folder = join(outputDir, "checkpoints");
});
afterEach(() => rm(outputDir, { recursive: true, force: true }));

const threeSaves = () => train({ ...SMALL, steps: 6, outputDir, saveEveryNSteps: 2, keepLast: 9 }, fakeParts());
const at = (step: number, file = ""): string => join(folder, `step-${String(step).padStart(6, "0")}`, file);
/** A process that has ended. */
const deadTag = (): string => `${spawnSync("true").pid}-1`;
const flip = async (path: string, byte: number): Promise<void> => {
  const bytes = await readFile(path);
  bytes[byte < 0 ? bytes.length + byte : byte]! ^= 1;
  await writeFile(path, bytes);
};

describe("a checkpoint folder", () => {
  test("has its files, their sizes and hashes, and the latest link", async () => {
    await threeSaves();
    expect((await readdir(folder)).sort()).toEqual(["latest", "step-000002", "step-000004", "step-000006"]);
    expect(await readlink(join(folder, "latest"))).toBe("step-000006");
    const { state } = await verifyCheckpoint(at(4));
    expect(Object.keys(state.files).sort()).toEqual([
      "config.json",
      "graph.eval.json",
      "graph.generate.json",
      "graph.json",
      "model.safetensors",
      "optimizer.safetensors",
      "trainer.json",
    ]);
    expect(state).toMatchObject({
      step: 4,
      optimizerStep: 4,
      sequence: 2,
      data: { name: "letters", position: { epoch: 0, row: 24 } },
      rng: { seed: 7, step: 4 },
      versions: { node: process.versions.node, libtorch: "none" },
    });
  });

  test("is found by its own name, by latest, by the checkpoints folder and by the run's", async () => {
    await threeSaves();
    for (const [path, step] of [
      [at(2), 2],
      [join(folder, "latest"), 6],
      [folder, 6],
      [outputDir, 6],
    ] as const)
      expect((await openCheckpoint(path)).state.step).toBe(step);
    await expect(openCheckpoint(join(outputDir, "none"))).rejects.toThrow("nothing of that name");
    await mkdir(join(outputDir, "empty"));
    await expect(openCheckpoint(join(outputDir, "empty"))).rejects.toThrow("no checkpoint in it");
  });

  test.each([
    ["model.safetensors", -1],
    ["optimizer.safetensors", 20],
    ["graph.json", 10],
    ["trainer.json", 5],
  ])("with one bit of %s flipped is refused by that file's name", async (file, byte) => {
    await threeSaves();
    await flip(at(6, file), byte);
    await expect(verifyCheckpoint(at(6))).rejects.toThrow(new RegExp(`step-000006/${file}.*hash`));
  });

  test("with a file cut or gone is refused by that file's name", async () => {
    await threeSaves();
    await truncate(at(6, "model.safetensors"), 100);
    await expect(verifyCheckpoint(at(6))).rejects.toThrow(/model\.safetensors: expected \d+ bytes, got 100/);
    await rm(at(4, "optimizer.safetensors"));
    await expect(verifyCheckpoint(at(4))).rejects.toThrow("optimizer.safetensors: it is missing");
  });

  test("whose state was edited by hand, or lists a path elsewhere, is refused", async () => {
    await threeSaves();
    const path = at(6, "state.json");
    const text = await readFile(path, "utf8");
    await writeFile(path, text.replace('"row": 36', '"row": 30'));
    await expect(verifyCheckpoint(at(6))).rejects.toThrow("does not match its own hash");
    const { sha256: _, ...state } = JSON.parse(text);
    state.files["../../x"] = state.files["model.safetensors"];
    await writeFile(path, encodeState(state));
    await expect(verifyCheckpoint(at(6))).rejects.toThrow('"../../x"');
  });

  test("whose JSON is nested without end, or is a pipe, is refused by that file's name", async () => {
    await threeSaves();
    const path = at(6, "state.json");
    await writeFile(path, `{"a":${"[".repeat(100_000)}${"]".repeat(100_000)}}`);
    await expect(verifyCheckpoint(at(6))).rejects.toMatchObject({
      code: "CHECKPOINT",
      message: /state\.json: it is nested/,
    });
    await rm(path);
    spawnSync("mkfifo", [path]);
    await expect(verifyCheckpoint(at(6))).rejects.toThrow(/state\.json: it is not a file/);
  });

  test("of a newer version or another format is refused as such", async () => {
    await threeSaves();
    const { sha256: _, ...state } = JSON.parse(await readFile(at(6, "state.json"), "utf8"));
    expect(() => decodeState({ ...state, version: 3 }, "x")).toThrow("version 3; this release reads 1, 2");
    expect(() => decodeState({ ...state, format: "other" }, "x")).toThrow("stromatolite.checkpoint");
    const bad = JSON.parse(encodeState({ ...state, step: -1 }));
    expect(() => decodeState(bad, "x")).toThrow('"step"');
  });
});

describe("resuming beside damage", () => {
  test("passes over a damaged latest one with a warning, if an older one is whole", async () => {
    await threeSaves();
    await flip(at(6, "model.safetensors"), -3);
    await truncate(at(4, "state.json"), 50);
    const events = await train({ resume: true, outputDir, steps: 7 }, fakeParts());
    expect(only(events, "start")[0]).toMatchObject({ step: 2, resumedFrom: at(2) });
    const warnings = only(events, "warning").map((e) => e.message);
    expect(warnings).toHaveLength(2);
    expect(warnings.join()).toContain("step-000006/model.safetensors");
    expect(warnings.join()).toContain("step-000004/state.json");
  });

  test("is refused with every reason when none is whole", async () => {
    await threeSaves();
    for (const step of [2, 4, 6]) await flip(at(step, "optimizer.safetensors"), -3);
    const run = train({ resume: true, outputDir }, fakeParts());
    await expect(run).rejects.toMatchObject({ code: "CHECKPOINT" });
    await expect(run).rejects.toThrow(/none of the 3[\s\S]*step-000006[\s\S]*step-000004[\s\S]*step-000002/);
  });

  test("by a path names the damaged one and takes no other", async () => {
    await threeSaves();
    await flip(at(6, "model.safetensors"), -3);
    await expect(train({ resume: at(6), outputDir }, fakeParts())).rejects.toThrow("step-000006/model.safetensors");
  });

  test("reads tensors of the wrong shape or of another model as such, with hashes that agree", async () => {
    await threeSaves();
    const parts = fakeParts({}, 17);
    await expect(train({ resume: at(6), outputDir }, parts)).rejects.toThrow("bigram.weight");
  });
});

describe("what a killed writer leaves", () => {
  test("is removed once its process is dead, and stays while it lives", async () => {
    await threeSaves();
    const dead = join(folder, `.tmp-${deadTag()}-1`);
    const alive = join(folder, `.tmp-${processTag()}-99`);
    await cp(at(6), dead, { recursive: true });
    await mkdir(alive);
    await new CheckpointStore(outputDir).prepare();
    expect((await readdir(folder)).filter((n) => n.startsWith("."))).toEqual([`.tmp-${processTag()}-99`]);
  });

  test("in the middle of replacing a checkpoint of the same step is put back", async () => {
    await threeSaves();
    await rename(at(6), join(folder, ".old-step-000006"));
    await new CheckpointStore(outputDir).prepare();
    expect((await openCheckpoint(outputDir)).state.step).toBe(6);
    await cp(at(6), join(folder, ".old-step-000006"), { recursive: true });
    await new CheckpointStore(outputDir).prepare();
    expect((await readdir(folder)).sort()).toEqual(["latest", "step-000002", "step-000004", "step-000006"]);
  });

  test("as a lock is taken over; a live process's lock is not", async () => {
    const unlock = await lockFolder(outputDir);
    await expect(lockFolder(outputDir)).rejects.toMatchObject({ code: "BUSY" });
    await unlock();
    for (const text of ["", '{"process":', JSON.stringify({ process: deadTag(), boot: "other" })]) {
      await writeFile(join(outputDir, ".lock"), text);
      await (await lockFolder(outputDir))();
    }
  });

  test("an id that another process got since is not taken for the old one", () => {
    expect(isAlive(processTag())).toBe(true);
    expect(isAlive(`${process.pid}-1`)).toBe(false);
    expect(isAlive(deadTag())).toBe(false);
    expect(isAlive("x")).toBe(false);
  });
});

test("a latest that is a plain file, as on file systems without links, is read too", async () => {
  await threeSaves();
  await rm(join(folder, "latest"));
  await writeFile(join(folder, "latest"), "step-000004\n");
  expect((await openCheckpoint(join(folder, "latest"))).state.step).toBe(4);
  await rm(join(folder, "latest"));
  await symlink("step-000002", join(folder, "latest"));
  expect((await openCheckpoint(join(folder, "latest"))).state.step).toBe(2);
});

test("a save of a step that is there already replaces it, and the older run's saves do not count as later", async () => {
  await threeSaves();
  await train({ resume: at(2), steps: 4, learningRate: 0.01 }, fakeParts());
  expect((await readdir(folder)).sort()).toEqual(["latest", "step-000002", "step-000004", "step-000006"]);
  const found = await openCheckpoint(outputDir);
  expect([found.state.step, found.state.sequence]).toEqual([4, 4]);
  expect(await readlink(join(folder, "latest"))).toBe("step-000004");
});

test("a checkpoint of version 1 still opens and trains on", async () => {
  await threeSaves();
  const file = at(6, "state.json");
  const { sha256: _, storage, masterWeight, plan, ...old } = JSON.parse(await readFile(file, "utf8"));
  expect([storage, masterWeight, typeof plan.tapeHash]).toEqual(["float32", "none", "string"]);
  await writeFile(file, encodeState({ ...old, version: 1 }));
  const { state } = await openCheckpoint(outputDir);
  expect(state).toMatchObject({ version: 2, step: 6, storage: "float32", masterWeight: "none", plan: null });
  const events = await train({ resume: true, outputDir, steps: 8 }, fakeParts());
  expect(only(events, "start")[0]).toMatchObject({ step: 6 });
  await writeFile(file, encodeState({ ...old, version: 2 }));
  await expect(verifyCheckpoint(at(6))).rejects.toThrow('"storage" is missing');
});

test("what must be on the disk first is awaited before the checkpoint has its name", async () => {
  const session = new FakeSession({ device: "cpu", dtype: "float32", threads: 1, optimizer: resolveAdamW() });
  const graph = bigramGraph(4);
  await session.load(graph);
  const store = new CheckpointStore(outputDir);
  await store.prepare();
  const contents = {
    snapshot: await session.snapshot(["param", "exp_avg", "exp_avg_sq", "step"]),
    entries: await session.state(),
    graph,
    evalGraph: null,
    generateGraph: null,
    huggingFaceConfig: null,
    trainer: {},
    facts: {
      ...{
        step: 1,
        optimizerStep: 0,
        tokens: 0,
        model: "bigram",
        dtype: "float32" as const,
        storage: "float32" as const,
        masterWeight: "none" as const,
        plan: null,
        optimizer: resolveAdamW(),
      },
      data: { name: "d", fingerprint: "f", sequenceLength: 1, microBatchSize: 1, position: null },
      rng: { generator: "philox4x32-10" as const, seed: 0, step: 1 },
      versions: { stromatolite: "0", libtorch: "0", node: "0" },
    },
  };
  let during: string[] = [];
  const { path } = await writeCheckpoint(store, contents, 1, async () => {
    await new Promise((resolve) => setTimeout(resolve, 5));
    during = await readdir(folder);
  });
  expect(during).toEqual([expect.stringMatching(/^\.tmp-/)]);
  expect((await readdir(folder)).sort()).toEqual(["latest", "step-000001"]);
  expect((await verifyCheckpoint(path)).state.step).toBe(1);
  expect(session.openSnapshots).toBe(0);
});

test("a disk that is full is DISK_FULL, and the checkpoint before it still loads", async (context) => {
  const script = `mount -t tmpfs -o size=256k tmpfs "$0" && exec "$1" --import tsx tests/support/full-disk.ts "$0"`;
  const mounted = spawnSync("unshare", ["-rm", "sh", "-c", `mount -t tmpfs -o size=64k tmpfs "$0"`, outputDir]);
  if (mounted.status !== 0) return context.skip("no file system can be mounted here (unshare -rm)");
  const run = spawnSync("unshare", ["-rm", "sh", "-c", script, outputDir, process.execPath], { encoding: "utf8" });
  const report = JSON.parse(run.stdout.trim().split("\n").at(-1) ?? "null");
  expect(report).toMatchObject({ code: "DISK_FULL", leftovers: [], removed: true });
  expect(report.message).toContain("Free space");
  expect(report.steps).toBeGreaterThan(0);
  expect(report.resumedAt).toBe(report.steps);
}, 60_000);

test("collects nothing else", async () => {
  await using trainer = new Trainer({ ...SMALL, steps: 1, outputDir }, fakeParts());
  await collect(trainer);
  expect((await readdir(outputDir)).sort()).toEqual(["checkpoints", "loss.svg", "metrics.jsonl"]);
});
