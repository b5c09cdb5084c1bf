/**
 * Training curves of the ways to store parameters and moments: the same small model, data, order and draws, only the
 * storage differs. Held-out loss (nats a token) after so many steps, and how far the last training losses are apart.
 *
 *   npm run bench -- curves [--steps 2000] [--seeds 1] [--modes "bfloat16 alone"] [--json]
 *
 * --modes: only those whose name holds the text.
 */
import { parseArgs } from "node:util";
import { openDataset } from "../src/data/index.js";
import { traceModel } from "../src/graph/index.js";
import { decoderConfig } from "../src/models/decoder/config.js";
import { decoder } from "../src/models/decoder/model.js";
import { loadAddon } from "../src/native.js";
import { learningRateAt } from "../src/optim/schedules.js";
import { residentPolicy } from "../src/plan/planner.js";
import type { StateFormat } from "../src/plan/types.js";
import { writeTape } from "../src/plan/write-tape.js";
import { EVAL, evaluateSession } from "../src/train/evaluate.js";
import { pickInputs } from "../src/train/parts.js";

const { values } = parseArgs({
  options: {
    steps: { type: "string", default: "2000" },
    seeds: { type: "string", default: "1" },
    modes: { type: "string", default: "" },
    json: { type: "boolean", default: false },
  },
});
const steps = Number(values.steps);
const say = (text: string) => values.json || console.log(text);
const config = decoderConfig({
  vocabSize: 260,
  dim: 96,
  layers: 3,
  heads: 4,
  kvHeads: 2,
  ffn: 256,
  tiedEmbeddings: true,
});
const graph = traceModel(decoder, config, { mode: "train", dtype: "float32" });
const evalGraph = traceModel(decoder, config, { mode: "eval", dtype: "float32" });
const sequenceLength = 256;
const microBatchSize = 2;
const modes: Record<string, StateFormat> = {
  "float32, adamw": { storage: "float32", masterWeight: "none", optimizer: "adamw" },
  "float32, adamw8bit": { storage: "float32", masterWeight: "none", optimizer: "adamw8bit" },
  "bfloat16 + float32 master, adamw": { storage: "bfloat16", masterWeight: "float32", optimizer: "adamw" },
  "bfloat16 + split16, adamw": { storage: "bfloat16", masterWeight: "split16", optimizer: "adamw" },
  "bfloat16 alone, adamw": { storage: "bfloat16", masterWeight: "none", optimizer: "adamw" },
  "bfloat16 alone, adamw8bit": { storage: "bfloat16", masterWeight: "none", optimizer: "adamw8bit" },
};
const chosen = Object.entries(modes).filter(([mode]) => mode.includes(values.modes));
if (chosen.length === 0)
  throw new Error(`no mode holds ${JSON.stringify(values.modes)}: ${Object.keys(modes).join("; ")}`);
const marks = [0.25, 0.5, 1].map((share) => Math.round(steps * share));
const rows: { mode: string; seed: number; heldOut: number[]; stateBytes: number }[] = [];
const dataset = await openDataset("planets");
for (let seed = 1; seed <= Number(values.seeds); seed++) {
  for (const [mode, state] of chosen) {
    const session = loadAddon().createSession({
      device: "cpu",
      dtype: "float32",
      storage: state.storage,
      masterWeight: state.masterWeight,
      threads: 0,
      optimizer: { kind: state.optimizer, beta1: 0.9, beta2: 0.95, epsilon: 1e-8, weightDecay: 0.1 },
    });
    const { step: tape } = writeTape(graph, residentPolicy(graph, { microBatches: 1, state }));
    await session.load(graph, tape.placement);
    await session.initialize(seed);
    await session.attach(EVAL, evalGraph);
    const stream = await dataset.open({ split: "train", sequenceLength, microBatchSize, seed });
    const heldOut: number[] = [];
    for (let step = 0; step < steps; step++) {
      const batch = await stream.next();
      if (batch === null) throw new Error("the data ended");
      const r = await session.step({
        tape,
        microBatches: [pickInputs(graph.inputs, batch.tensors, "curves")],
        step,
        seed,
        learningRate: learningRateAt({ kind: "cosine", warmupSteps: 100, finalFraction: 0.1 }, 2e-3, step, steps),
        maxGradNorm: 1,
      });
      if (r.nonFinite !== null) throw new Error(`${mode}: not finite at step ${step}`);
      if (marks.includes(step + 1)) {
        const options = { sequenceLength, microBatchSize: 8, seed: 5, microBatches: 12 };
        heldOut.push((await evaluateSession(session, evalGraph, dataset, options)).loss);
      }
    }
    rows.push({ mode, seed, heldOut, stateBytes: session.stats().stateBytes });
    say(
      `${mode.padEnd(34)} seed ${seed}  ${heldOut.map((l) => l.toFixed(4)).join("  ")}  state ${session.stats().stateBytes} bytes`,
    );
    await stream[Symbol.asyncDispose]();
    await session.dispose();
  }
}
const of = (mode: string) => rows.filter((r) => r.mode === mode).map((r) => r.heldOut.at(-1)!);
const mean = (list: number[]) => list.reduce((a, b) => a + b, 0) / list.length;
const [narrow, wide] = [of("bfloat16 alone, adamw8bit"), of("float32, adamw")];
const ratio = narrow.length > 0 && wide.length > 0 ? mean(narrow) / mean(wide) : null;
console.log(
  JSON.stringify({
    name: "curves",
    ratio,
    unit: "held-out loss, bfloat16 alone with 8-bit AdamW / float32",
    steps,
    marks,
    rows,
  }),
);
process.exit(0);
