/** The smallest decoder on the real engine: options that every test of training in earnest starts from. */
import type { TrainerOptions } from "../../src/train/options.js";

export const REAL = {
  model: {
    config: { vocabSize: 260, dim: 32, layers: 2, heads: 4, kvHeads: 2, ffn: 48, maxPositions: 128, dropout: 0.1 },
  },
  data: { source: "planets", count: 64, workers: 0 },
  device: "cpu",
  steps: 8,
  batchSize: 6,
  microBatchSize: 2,
  sequenceLength: 96,
  learningRate: 5e-3,
  saveEveryNSteps: 0,
  threads: 1,
  seed: 11,
} satisfies TrainerOptions;
