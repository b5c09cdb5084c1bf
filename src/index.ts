/**
 * The whole public API. Importing it loads nothing native: libtorch comes with the first tensor, session or training
 * step, and without it those throw NOT_SET_UP.
 */

// Checkpoints
export { type CheckpointState, FILES as CHECKPOINT_FILES } from "./checkpoint/format.js";
export { loadPretrained } from "./checkpoint/pretrained.js";
export { type Checkpoint, openCheckpoint, verifyCheckpoint } from "./checkpoint/read.js";
export {
  readSafetensorsHeader,
  readTensor,
  type SafetensorsHeader,
  type TensorEntry,
  writeSafetensors,
} from "./checkpoint/safetensors.js";
// Data
export {
  ByteTokenizer,
  type DatasetOptions,
  gzipBitsPerByte,
  openDataset,
  type PlanetRecord,
  type PlanetScore,
  planetPrompt,
  planetText,
  type ScoreOptions,
  scorePlanets,
  simulatePlanet,
  type TextDataset,
} from "./data/index.js";
export type * from "./data/types.js";
// Training
export type { Device, DeviceOption } from "./device.js";
export { type ErrorCode, StromaError } from "./errors.js";
export type { GenerateOptions } from "./generate/generate.js";
export { type LoadedModel, type LoadModelOptions, loadModel } from "./generate/load-model.js";
export type { SamplingOptions } from "./generate/sample.js";
// Models: a function over a scope, traced into a graph. `graph.ops` takes symbolic values and tensors alike.
export * as graph from "./graph/index.js";
export { type BlockScope, type ModelDefinition, type ModelScope, model } from "./graph/model.js";
export { traceModel } from "./graph/trace.js";
export type * from "./graph/types.js";
export type { DecoderConfig, DecoderOptions } from "./models/decoder/config.js";
export { decoderConfig } from "./models/decoder/config.js";
export { fromHuggingFace, toHuggingFace } from "./models/decoder/huggingface.js";
export { decoder } from "./models/decoder/model.js";
export { decoderPresets } from "./models/decoder/presets.js";
export { findModel, modelNames } from "./models/registry.js";
export * as nn from "./nn/index.js";
export { ADAMW_DEFAULTS, type AdamWOptions } from "./optim/adamw.js";
export { type LearningRateSchedule, learningRateAt, type ScheduleKind } from "./optim/schedules.js";
// The engine itself, for those who schedule their own steps
export { type AutoPlan, type PlanReport, type PlanRequest, planAuto } from "./plan/auto.js";
export { planForRank, planRanksAuto, type RanksPlan, type RanksReport, type RanksRequest } from "./plan/auto-ranks.js";
export { type CheckOptions, checkTape } from "./plan/checker.js";
export { type PlanOptions, planResident } from "./plan/planner.js";
export { findProfile, type MachineProfile, profileNames } from "./plan/profiles.js";
export { type Simulation, simulate, tapePeaks } from "./plan/simulate.js";
export type * from "./plan/types.js";
export { type Home, type Policy, writeTape } from "./plan/write-tape.js";
// Tensors: every operator of the dispatcher
export * from "./tensor/index.js";
export type { EvaluateOptions, EvaluateResult } from "./train/evaluate.js";
export type * from "./train/events.js";
export { renderLossSvg } from "./train/loss-svg.js";
export { readMetrics } from "./train/metrics.js";
export type { ModelSpec } from "./train/model-source.js";
export type * from "./train/native-session.js";
export type { TrainerOptions } from "./train/options.js";
export { Trainer } from "./train/trainer.js";
