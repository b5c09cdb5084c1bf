/** One rank of bench/fsdp2.ts: `tsx shared-rank.ts SETUP.json RANK PORT`. Rank 0 prints a line as bench/fsdp2.py does. */
import { readFileSync } from "node:fs";
import { traceModel } from "../../src/graph/index.js";
import { type DecoderOptions, decoderConfig } from "../../src/models/decoder/config.js";
import { decoder } from "../../src/models/decoder/model.js";
import { loadAddon } from "../../src/native.js";
import { residentPolicy } from "../../src/plan/planner.js";
import type { Policy } from "../../src/plan/policy.js";
import { joinBatches } from "../../src/train/parts.js";
import { decoderBatch, median, openRun } from "./steps.js";

export interface Setup {
  config: DecoderOptions;
  rowTokens: number;
  batch: number;
  /** Of each rank. */
  microBatches: number;
  steps: number;
  warmUp: number;
  ranks: number;
}

export interface Answer {
  secondsPerStep: number;
  seconds: number[];
  losses: number[];
  norms: number[];
  memory: { rank: number; rssBeforeModelBytes: number; peakRssBytes: number }[];
}

const memory = (field: string): number =>
  Number(new RegExp(`^${field}:\\s+(\\d+)`, "m").exec(readFileSync("/proc/self/status", "utf8"))![1]) * 1024;

const [file, rank, port] = process.argv.slice(2) as [string, string, string];
const setup = JSON.parse(readFileSync(file, "utf8")) as Setup;
const addon = loadAddon();
const ranks = await addon.joinRanks({
  ...{ rank: Number(rank), size: setup.ranks, address: "127.0.0.1", port: Number(port), serve: true, prefix: "" },
  ...{ joinSeconds: 60, silenceSeconds: 60 },
});
const graph = traceModel(decoder, decoderConfig(setup.config), { mode: "train", dtype: "float32" });
const microBatches = setup.microBatches * setup.ranks;
const rows = setup.batch / microBatches;
// Rows of bench/fsdp2.py: a rank there has a stretch of them, here every ranks-th micro-batch; their sum is the same.
const batches = Array.from({ length: microBatches }, (_, m) =>
  joinBatches(
    Array.from({ length: rows }, (_, r) =>
      decoderBatch(graph, setup.config.vocabSize, 1, setup.rowTokens, m * rows + r),
    ),
  ),
);
const before = memory("VmRSS");
const policy: Policy = {
  ...residentPolicy(graph, { microBatches, schedule: "breadthFirst" }),
  ...{ dims: { B: rows, T: setup.rowTokens }, prefetch: 1 },
  boundary: "device",
  stages: { rank: ranks.rank, ranks: ranks.size, of: graph.blocks.map(() => 0), shards: ranks.size },
};
const run = await openRun(graph, policy, batches, { device: "cpu", threads: 1, ranks });
const seconds: number[] = [];
const losses: number[] = [];
const norms: number[] = [];
for (let step = 0; step < setup.warmUp + setup.steps; step++) {
  await ranks.gather("");
  const began = performance.now();
  const result = await run.step();
  const slowest = (await ranks.gather(String((performance.now() - began) / 1000))).map(Number);
  losses.push(result.loss);
  norms.push(result.gradNorm);
  if (step >= setup.warmUp) seconds.push(Math.max(...slowest));
}
const mine = { rank: ranks.rank, rssBeforeModelBytes: before, peakRssBytes: memory("VmHWM") };
const all = (await ranks.gather(JSON.stringify(mine))).map((text) => JSON.parse(text) as typeof mine);
await run.session.dispose();
await ranks.leave();
const answer: Answer = { secondsPerStep: median(seconds), seconds, losses, norms, memory: all };
if (ranks.rank === 0) console.log(JSON.stringify(answer));
