/**
 * What fusing micro-batches brings: 16 micro-batches of 128 tokens as 16 x 1, 8 x 2, 4 x 4 and 2 x 8 on the device, in turn in
 * one run; breadth-first, everything resident. ratio = tokens a second of the fastest / those of 16 x 1.
 *
 *   npm run bench -- fusing [--model 10m] [--tokens 128] [--accumulation 16] [--steps 5] [--json]
 */
import { parseArgs } from "node:util";
import type { DecoderConfig } from "../src/models/decoder/config.js";
import { findModel } from "../src/models/registry.js";
import { decoderBatch, float32State, interleave, median, openRun, type Run } from "./support/steps.js";

const { values } = parseArgs({
  options: {
    model: { type: "string", default: "10m" },
    tokens: { type: "string", default: "128" },
    accumulation: { type: "string", default: "16" },
    steps: { type: "string", default: "5" },
    json: { type: "boolean", default: false },
  },
});
const [T, accumulation] = [Number(values.tokens), Number(values.accumulation)];
const model = findModel(values.model);
const graph = model.graph({ mode: "train", dtype: "float32" });
const { vocabSize } = model.config as DecoderConfig;
const fused = [1, 2, 4, 8].filter((k) => accumulation % k === 0);
const runs: Run[] = [];
for (const k of fused) {
  const microBatches = accumulation / k;
  const batches = Array.from({ length: microBatches }, (_, m) => decoderBatch(graph, vocabSize, k, T, m));
  runs.push(
    await openRun(
      graph,
      {
        schedule: "breadthFirst",
        recompute: "all",
        update: "backward",
        clip: "none",
        state: float32State,
        microBatches,
        dims: { B: k, T },
        param: "device",
        optimizer: "device",
        boundary: "device",
        retained: "device",
        retainedDType: "float32",
        prefetch: 0,
        parts: 1,
      },
      batches,
      { device: "cpu" },
    ),
  );
}
await interleave(runs, Number(values.steps));
const tokensPerSecond = Object.fromEntries(runs.map((r, i) => [fused[i]!, (accumulation * T) / median(r.seconds)]));
const perProcessorSecond = runs.map((r, i) => [fused[i]!, (accumulation * T) / median(r.processorSeconds)] as const);
const result = {
  name: "fusing",
  ratio: Math.max(...Object.values(tokensPerSecond)) / tokensPerSecond[1]!,
  unit: "fastest tokens a second / those with nothing fused",
  model: values.model,
  tokens: T,
  accumulation,
  tokensPerSecond,
  tokensPerProcessorSecond: Object.fromEntries(perProcessorSecond),
  peakDeviceBytes: Object.fromEntries(runs.map((r, i) => [fused[i]!, r.results.at(-1)!.peakDeviceBytes])),
};
for (const { session } of runs) await session.dispose();
if (values.json) console.log(JSON.stringify(result));
else console.dir(result, { depth: null });
process.exit(0);
