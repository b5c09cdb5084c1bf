/**
 * A rank reads and holds no more of a checkpoint than what is its own: models are trained over ranks because none holds
 * the whole. STROMA_LOAD_WIDTH makes the model wider (1,024: 0.7 GB of state), so that memory can be measured too.
 */
import { join } from "node:path";
import { expect, test, vi } from "vitest";
import type { TrainerOptions } from "../../src/train/options.js";
import { Trainer } from "../../src/train/trainer.js";
import { scratch, startScript } from "../cli/spawn.js";
import { collect } from "../support/fake-trainer.js";
import { nativeOrSkip } from "../support/native.js";
import { REAL } from "../support/real-trainer.js";
import { freePort } from "./rank-case.js";

vi.setConfig({ testTimeout: 300_000 });
const WIDTH = Number(process.env.STROMA_LOAD_WIDTH ?? 192);
/** Node, libtorch and the graphs of evaluation and generation take some memory beside the state. */
const BESIDE = 24e6;

const folder = scratch();
const SCRIPT = new URL("../support/load-child.ts", import.meta.url).pathname;

interface Load {
  share: number;
  largest: number;
  read: number;
  most: number;
  held: number;
}

test.skipIf(!nativeOrSkip()).each([
  ["adamw", 2],
  ["adamw8bit", 2],
  ["adamw", 3],
] as const)("%s: each of %i ranks reads and holds its share alone", async (optimizer, size) => {
  const options = {
    ...REAL,
    ...{
      order: "breadthFirst",
      dtype: "float32",
      optimizer,
      steps: 1,
      batchSize: 1,
      microBatchSize: 1,
      sequenceLength: 96,
    },
    model: { config: { ...REAL.model.config, dim: WIDTH, layers: 6, ffn: 4 * WIDTH } },
    outputDir: join(folder, `${optimizer}-${size}`),
  } satisfies TrainerOptions;
  await using trainer = new Trainer({ ...options, microBatchSize: 1 });
  await collect(trainer);
  const port = await freePort();
  const path = join(options.outputDir, "checkpoints", "step-000001");
  const loads = await Promise.all(
    Array.from({ length: size }, async (_, rank) => {
      const run = startScript(SCRIPT, [path, JSON.stringify(options), String(rank), String(size), String(port)]);
      const { code, stdout, stderr } = await run.ended;
      expect(code, stderr).toBe(0);
      return JSON.parse(stdout) as Load;
    }),
  );
  if (process.env.STROMA_LOAD_WIDTH !== undefined) console.log(optimizer, loads);
  for (const { share, read, most } of loads) {
    // Headers, graphs and what is compiled on the way are the same for all, and small.
    expect(read).toBeLessThan(share + 4e6);
    expect(most).toBeLessThan(1.2 * share + BESIDE);
  }
});
