/**
 * Sharded data parallel against PyTorch FSDP2 (`fully_shard`, bench/fsdp2.py): two processes of one thread each over Gloo, the
 * same decoder, weights, rows and AdamW (theirs fused), in turn. ratio = their seconds a step / ours. Losses must agree.
 * `memory`: peak of the fuller rank over what its process had before the model, theirs / ours.
 *
 *   npm run bench -- fsdp2 [--dim 512] [--layers 8] [--tokens 128] [--batch 8] [--rounds 3] [--json]
 */
import { type ChildProcess, spawn } from "node:child_process";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";
import { writeSafetensors } from "../src/checkpoint/safetensors.js";
import { traceModel } from "../src/graph/index.js";
import { decoderConfig } from "../src/models/decoder/config.js";
import { decoder } from "../src/models/decoder/model.js";
import { residentPolicy } from "../src/plan/planner.js";
import type { HostTensor } from "../src/train/native-session.js";
import { oraclePython } from "../tests/support/python.js";
import type { Answer, Setup } from "./support/shared-rank.js";
import { median, openRun } from "./support/steps.js";

const { values } = parseArgs({
  options: {
    dim: { type: "string", default: "512" },
    layers: { type: "string", default: "8" },
    tokens: { type: "string", default: "128" },
    batch: { type: "string", default: "8" },
    steps: { type: "string", default: "4" },
    rounds: { type: "string", default: "3" },
    json: { type: "boolean", default: false },
  },
});
const [dim, layers, rowTokens, batch, steps, rounds] = [
  values.dim,
  values.layers,
  values.tokens,
  values.batch,
  values.steps,
  values.rounds,
].map(Number) as [number, number, number, number, number, number];
const folder = dirname(fileURLToPath(import.meta.url));
const temporary = mkdtempSync(join(tmpdir(), "stroma-fsdp2-"));
const ranks = 2;
const config = {
  ...{ vocabSize: 2048, dim, layers, heads: dim / 64, kvHeads: 2, headDim: 64, ffn: dim * 3, initStd: 0.02 },
  ...{ tiedEmbeddings: false, ropeTheta: 10_000, normEps: 1e-5 },
};

/** What a program's first line of JSON says. */
function answerOf(children: ChildProcess[]): Promise<Answer> {
  return new Promise((done, fail) => {
    let text = "";
    let running = children.length;
    for (const child of children) {
      child.stdout!.setEncoding("utf8").on("data", (part: string) => {
        text += part;
      });
      child.on("error", fail);
      child.on("exit", (code) => {
        if (code !== 0) fail(new Error(`${child.spawnargs.join(" ")} ended with status ${code}`));
        running--;
        if (running === 0) done(JSON.parse(text.split("\n").find((line) => line.startsWith("{"))!) as Answer);
      });
    }
  });
}

const stdio = ["ignore", "pipe", "inherit"] as const;
const env = { ...process.env, OMP_NUM_THREADS: "1" };

function theirs(setup: string): Promise<Answer> {
  const torchrun = join(dirname(oraclePython()!), "torchrun");
  const args = ["--nproc-per-node", String(ranks), join(folder, "fsdp2.py"), "--setup", setup];
  return answerOf([spawn(torchrun, args, { stdio: [...stdio], env })]);
}

let port = 20_000 + (process.pid % 20_000);
function ours(setup: string): Promise<Answer> {
  port++;
  const program = [import.meta.resolve("tsx"), join(folder, "support", "shared-rank.ts"), setup];
  return answerOf(
    Array.from({ length: ranks }, (_, rank) =>
      spawn(process.execPath, ["--import", ...program, String(rank), String(port)], { stdio: [...stdio], env }),
    ),
  );
}

/** The weights that every rank of ours draws. */
async function weights(): Promise<string> {
  const graph = traceModel(decoder, decoderConfig(config), { mode: "train", dtype: "float32" });
  const run = await openRun(graph, residentPolicy(graph, { microBatches: 1 }), [], { device: "cpu", threads: 1 });
  const tensors: Record<string, HostTensor> = {};
  for (const { kind, name } of await run.session.state())
    if (kind === "param") tensors[name] = await run.session.read(kind, name);
  await run.session.dispose();
  const file = join(temporary, "weights.safetensors");
  await writeSafetensors(file, tensors, { format: "pt" });
  return file;
}

const highest = ({ memory }: Answer): number => Math.max(...memory.map((m) => m.peakRssBytes - m.rssBeforeModelBytes));

try {
  const file = await weights();
  const rows = [];
  // All rows of a rank at once, and one after the other.
  for (const microBatches of [1, batch / ranks]) {
    const setup: Setup & Record<string, unknown> = {
      ...{ config, weights: file, rowTokens, batch, microBatches, steps, warmUp: 1, ranks },
      ...{ threads: 1, seed: 1, learningRate: 1e-4, dtype: "float32", reshard: true },
    };
    const path = join(temporary, `setup-${microBatches}.json`);
    writeFileSync(path, JSON.stringify(setup));
    const [a, b]: [Answer[], Answer[]] = [[], []];
    for (let round = 0; round < rounds; round++) {
      a.push(await ours(path));
      b.push(await theirs(path));
    }
    const apart = Math.max(...a[0]!.losses.map((loss, i) => Math.abs(loss / b[0]!.losses[i]! - 1)));
    if (!(apart < 1e-4)) throw new Error(`losses are ${apart} apart: ${a[0]!.losses} and ${b[0]!.losses}`);
    const seconds = (list: Answer[]) => median(list.flatMap((answer) => answer.seconds));
    const row = {
      microBatches,
      seconds: seconds(a),
      theirSeconds: seconds(b),
      ratio: seconds(b) / seconds(a),
      peakBytes: highest(a[0]!),
      theirPeakBytes: highest(b[0]!),
      memory: highest(b[0]!) / highest(a[0]!),
      lossesApart: apart,
    };
    rows.push(row);
    if (!values.json)
      console.log(
        `${microBatches} micro-batches a rank: ${row.seconds.toFixed(3)} s, FSDP2 ${row.theirSeconds.toFixed(3)} s: ${row.ratio.toFixed(2)}; ` +
          `${(row.peakBytes / 1e6).toFixed(0)} MB beside ${(row.theirPeakBytes / 1e6).toFixed(0)} MB`,
      );
  }
  const { ratio, memory } = rows[0]!;
  console.log(
    JSON.stringify({
      name: "fsdp2",
      ratio,
      unit: "FSDP2's seconds a step / ours",
      aim: 1,
      memory,
      dim,
      layers,
      batch,
      rows,
    }),
  );
} finally {
  rmSync(temporary, { recursive: true, force: true });
}
