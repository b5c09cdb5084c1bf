/** What a Trainer takes, its defaults, and the arithmetic that the options must agree on. */
import type { DatasetOptions } from "../data/index.js";
import type { Dataset } from "../data/types.js";
import {
  chooseDevice,
  DEVICE_EXPECTS,
  DEVICE_PATTERN,
  type Device,
  type DeviceChoice,
  type DeviceOption,
} from "../device.js";
import { SHARED_HOST, type SharedHostMode } from "../distributed/shared-host.js";
import { TRANSPORTS } from "../distributed/transport.js";
import { invalidArgument, StromaError } from "../errors.js";
import { type AdamWOptions, resolveAdamW } from "../optim/adamw.js";
import { checkSchedule, type LearningRateSchedule, SCHEDULE_KINDS, type ScheduleKind } from "../optim/schedules.js";
import { STAGE_RULES, type StageRule } from "../plan/stages.js";
import type { Recompute, Schedule } from "../plan/types.js";
import type { TrainEvent } from "./events.js";
import { MEMORY_NAMES, type MemoryOptions, type ResolvedMemory, resolveMemory } from "./memory-options.js";
import type { ModelSpec } from "./model-source.js";
import type { RankSpec, SessionOptions, Transport } from "./native-session.js";

export interface TrainerOptions extends MemoryOptions {
  /** A preset's name, `{ config }` of the decoder, or `{ definition, config }` of your own. Required unless resuming. */
  model?: ModelSpec;
  /** What openDataset() takes ("planets", a path), or a Dataset. Required unless resuming. */
  data?: string | DatasetOptions | Dataset;
  /** Optimizer steps. Give steps or epochs; default 1,000 steps. */
  steps?: number;
  /** Passes over the training split. */
  epochs?: number;
  /** Rows of one optimizer step = microBatchSize x gradientAccumulationSteps. Any two give the third. Default 8. */
  batchSize?: number;
  /** Rows that go through the model at once. Default: batchSize / gradientAccumulationSteps. */
  microBatchSize?: number;
  /** Micro-batches whose gradients are summed in a step. Default 1. */
  gradientAccumulationSteps?: number;
  /** Tokens of a row. Default 256. */
  sequenceLength?: number;
  /** Highest learning rate. Default 3e-4. */
  learningRate?: number;
  /** Its course. Default: cosine to a tenth after a warm-up of a twentieth of the steps, at most 100. */
  learningRateSchedule?: LearningRateSchedule | ScheduleKind;
  /** Decoupled weight decay. Default 0.01. */
  weightDecay?: number;
  adamw?: Omit<AdamWOptions, "weightDecay">;
  /** Gradient norm to clip to (`clip` says whose); null: no clipping. Default 1. */
  maxGradNorm?: number | null;
  /** Of parameters, of data order and of every draw in the model: an integer in [0, 2^53). Default 0. */
  seed?: number;
  /** metrics.jsonl, loss.svg and checkpoints/ go here. Default `runs/<model>`. */
  outputDir?: string;
  /** A step event every n steps (and at the first and last); metrics.jsonl has every step. Default 1. */
  logEveryNSteps?: number;
  /** 0: only at the end. Default 500. */
  saveEveryNSteps?: number;
  /** Also after every n passes over the data. 0: no. Default 0. */
  saveEveryNEpochs?: number;
  /** Held-out loss every n steps and at the end. 0: never. Default 0. */
  evalEveryNSteps?: number;
  /** Micro-batches of an evaluation. Default 16. */
  evalMicroBatches?: number;
  /** Text generated for a look every n steps. 0: never. Default 0. */
  sampleEveryNSteps?: number;
  /** What samples begin with. */
  samplePrompts?: string[];
  /** Default 64. */
  sampleTokens?: number;
  /** Checkpoints kept. Default 3. */
  keepLast?: number;
  /**
   * true: from the latest whole checkpoint of outputDir. "auto": the same, or from the start when there is none. Else a
   * path of a checkpoint or run. Options left out are the saved run's; seed, sequenceLength, dtype, precision,
   * masterWeight, optimizer, model and data must be.
   */
  resume?: boolean | string;
  /**
   * auto: the first card that can be used, else the processors; of several ranks the processors. cuda: that card, or an
   * error. sim: a simulated device in host memory, capped at `deviceMemory`: a test instrument. Default "auto".
   */
  device?: DeviceOption;
  /** This process is one rank of several that train one model, each with some of its blocks. Default: alone. */
  ranks?: RankSpec;
  /** Which blocks are whose. Default "alternating"; with `plan: "auto"` the planner's choice. */
  stages?: StageRule;
  /**
   * Ranks that run the same blocks, each on micro-batches of its own, and share their state, a part each (fully sharded
   * data parallel). There are ranks / (shards x replicas) stages. Default 1; with `plan: "auto"` the planner's choice
   * of 1 and all.
   */
  shards?: number;
  /** Groups of `shards` ranks that hold the same state. Default 1; `plan: "auto"` may take one a rank, where each has room. */
  replicas?: number;
  /**
   * Ranks that share every row, each some of its tokens: a divisor of shards x replicas, which it is by default. For rows
   * that no rank holds. sequenceLength is a multiple of 2 x context. Default 1.
   */
  context?: number;
  /** What gradients travel as between ranks that share blocks. Default: float32, as they are summed. */
  reduceDtype?: "float32" | "bfloat16";
  /**
   * Ranks on one machine that share the state of blocks (`shards`) read parameters whose home is the host from memory that
   * they have in common, and send none of them. Default "auto": where that can be and the device has memory of its own.
   */
  sharedHost?: SharedHostMode;
  /** How ranks exchange. Default "nccl" where each has a card of its own and the build has NCCL, else "gloo". */
  transport?: Transport;
  /** What blocks compute in. Default: as `precision` says, "float32". */
  dtype?: SessionOptions["dtype"];
  /** Threads of the engine; 0: all this process may use. Default 0. */
  threads?: number;
  /** Order of the work inside a step; the numbers are the same. Default "breadthFirst"; `plan: "auto"` chooses. */
  order?: Schedule;
  /**
   * Activation recompute: "all" keeps only block boundaries, "selective" also results of matrix products and attention.
   * Default "none"; "all" with `offload`.
   */
  recompute?: Recompute;
  /** A step whose loss is NaN or infinite changes nothing; then end with NON_FINITE, or skip it. Default "stop". */
  nonFinite?: "stop" | "skip";
  /**
   * Profiles one step, counted from 1 (true: the second of this run) into `<outputDir>/profile-<step>`: where memory was and
   * what ran when, beside what the plan predicted. Several ranks: one page of all, which rank 0 writes. Not kept for a
   * resume.
   */
  profileMemory?: boolean | number;
  /** Called at step boundaries with every event; training waits for it. */
  onEvent?: (event: TrainEvent) => void | Promise<void>;
}

/** Consecutive skipped steps after which a run ends anyway: parameters do not change, so it would never recover. */
export const MOST_SKIPS = 10;

type Plain = Omit<
  TrainerOptions,
  "model" | "data" | "resume" | "onEvent" | "learningRateSchedule" | "adamw" | "weightDecay"
>;

/** Options with every default filled in; all but model and data plain JSON. */
export interface ResolvedOptions
  extends Required<
      Omit<
        Plain,
        | "steps"
        | "epochs"
        | "outputDir"
        | "device"
        | "ranks"
        | "stages"
        | "shards"
        | "reduceDtype"
        | "transport"
        | keyof MemoryOptions
        | keyof ResolvedMemory
      >
    >,
    ResolvedMemory {
  device: Device;
  /** What was asked for, which a resumed run asks for again; why it became `device`, where that was left to us. */
  deviceAsked: DeviceOption;
  deviceReason: string | null;
  ranks: RankSpec | null;
  stages: StageRule | null;
  shards: number | null;
  reduceDtype: NonNullable<TrainerOptions["reduceDtype"]> | null;
  transport: Transport | null;
  model: ModelSpec;
  data: string | DatasetOptions | Dataset;
  steps: number | null;
  epochs: number | null;
  outputDir: string | null;
  learningRateSchedule: LearningRateSchedule | ScheduleKind | null;
  optimizer: SessionOptions["optimizer"];
}

/** With what training's begin settles: the dtype that blocks compute in. */
export type SettledOptions = ResolvedOptions & { dtype: SessionOptions["dtype"] };

const NAMES = [
  ...["model", "data", "steps", "epochs", "batchSize", "microBatchSize", "gradientAccumulationSteps"],
  ...["sequenceLength", "learningRate", "learningRateSchedule", "weightDecay", "adamw", "maxGradNorm", "seed"],
  ...["outputDir", "logEveryNSteps", "saveEveryNSteps", "saveEveryNEpochs", "evalEveryNSteps", "evalMicroBatches"],
  ...["sampleEveryNSteps", "samplePrompts", "sampleTokens", "keepLast", "resume", "device", "dtype", "threads"],
  ...["ranks", "stages", "shards", "replicas", "context", "reduceDtype", "sharedHost", "transport"],
  ...["order", "recompute", "nonFinite", "profileMemory", "onEvent"],
  ...MEMORY_NAMES,
];

/** chooseDevice, or a test's. */
export type ChooseDevice = (asked: DeviceOption, how: { ranks?: boolean; needsBytes?: number }) => DeviceChoice;

/** Most threads of an engine: with many more OpenMP ends the process where the system has no more of them. */
export const MAX_THREADS = 1024;

/**
 * @param choose what the machine has for a device that is asked for
 * @throws CONFIG for options that are unknown, missing or contradict each other, the arithmetic shown;
 * INVALID_ARGUMENT for a value out of range; NOT_SET_UP for a card without its build or driver
 */
export function resolveOptions(options: TrainerOptions, choose: ChooseDevice = chooseDevice): ResolvedOptions {
  const o = options;
  for (const name of Object.keys(o))
    if (!NAMES.includes(name)) throw config(`unknown option "${name}". There are: ${NAMES.join(", ")}`);
  if (o.model === undefined || o.model === null) throw config("no model given");
  if (o.data === undefined) throw config("no data given");
  if (o.steps !== undefined && o.epochs !== undefined)
    throw config(`steps ${o.steps} and epochs ${o.epochs} are both given; one of them says how long to train`);
  const steps = o.epochs === undefined ? whole(o.steps ?? 1000, "steps", 1) : null;
  const { learningRateSchedule = null } = o;
  if (typeof learningRateSchedule === "string" && !SCHEDULE_KINDS.includes(learningRateSchedule))
    throw invalidArgument(
      "trainer",
      `one of ${SCHEDULE_KINDS.join(", ")}`,
      learningRateSchedule,
      "learningRateSchedule",
    );
  if (learningRateSchedule !== null && typeof learningRateSchedule === "object" && steps !== null)
    checkSchedule(learningRateSchedule, steps);
  const learningRate = o.learningRate ?? 3e-4;
  if (!(learningRate > 0 && Number.isFinite(learningRate)))
    throw invalidArgument("trainer", "a positive number", learningRate, "learningRate");
  const deviceAsked = o.device ?? "auto";
  if (!DEVICE_PATTERN.test(deviceAsked)) throw invalidArgument("trainer", DEVICE_EXPECTS, deviceAsked, "device");
  const { device, why: deviceReason } = choose(deviceAsked, { ranks: (o.ranks ?? null) !== null });
  const shared = resolveShards(o);
  const groups = ((shared.shards ?? 1) * shared.replicas) / shared.context;
  const sampleEveryNSteps = whole(o.sampleEveryNSteps ?? 0, "sampleEveryNSteps", 0);
  const samplePrompts = o.samplePrompts ?? [];
  if (!Array.isArray(samplePrompts) || samplePrompts.some((prompt) => typeof prompt !== "string"))
    throw invalidArgument("trainer", "a list of texts", samplePrompts, "samplePrompts");
  if (sampleEveryNSteps > 0 && samplePrompts.length === 0)
    throw config("sampleEveryNSteps is given without samplePrompts: say what samples begin with");
  return {
    model: o.model,
    data: o.data,
    steps,
    epochs: o.epochs === undefined ? null : whole(o.epochs, "epochs", 1),
    ...resolveBatch(o, groups),
    sequenceLength: whole(o.sequenceLength ?? 256, "sequenceLength", 1),
    learningRate,
    learningRateSchedule,
    optimizer: resolveAdamW({ ...o.adamw, weightDecay: o.weightDecay }, o.optimizer),
    ...resolveMemory({ ...o, device }),
    seed: whole(o.seed ?? 0, "seed", 0),
    outputDir: o.outputDir ?? null,
    logEveryNSteps: whole(o.logEveryNSteps ?? 1, "logEveryNSteps", 1),
    saveEveryNSteps: whole(o.saveEveryNSteps ?? 500, "saveEveryNSteps", 0),
    saveEveryNEpochs: whole(o.saveEveryNEpochs ?? 0, "saveEveryNEpochs", 0),
    evalEveryNSteps: whole(o.evalEveryNSteps ?? 0, "evalEveryNSteps", 0),
    evalMicroBatches: whole(o.evalMicroBatches ?? 16, "evalMicroBatches", 1),
    sampleEveryNSteps,
    samplePrompts,
    sampleTokens: whole(o.sampleTokens ?? 64, "sampleTokens", 1),
    keepLast: whole(o.keepLast ?? 3, "keepLast", 1),
    ...{ device, deviceAsked, deviceReason },
    ranks: o.ranks ?? null,
    stages: o.stages === undefined ? null : oneOf(o.stages, STAGE_RULES, "stages"),
    ...shared,
    sharedHost: oneOf(o.sharedHost ?? "auto", SHARED_HOST, "sharedHost"),
    transport: o.transport === undefined ? null : oneOf(o.transport, TRANSPORTS, "transport"),
    threads: whole(o.threads ?? 0, "threads", 0, MAX_THREADS),
    profileMemory:
      typeof o.profileMemory === "number" ? whole(o.profileMemory, "profileMemory", 1) : (o.profileMemory ?? false),
    nonFinite: oneOf(o.nonFinite ?? "stop", ["stop", "skip"], "nonFinite"),
  };
}

/** Whether they fit the number of ranks is asked when those are known (plan.ts). */
function resolveShards(o: TrainerOptions): Pick<ResolvedOptions, "shards" | "replicas" | "context" | "reduceDtype"> {
  const context = whole(o.context ?? 1, "context", 1);
  const alone = context > 1 && o.replicas === undefined ? context : null;
  const shards = o.shards === undefined ? alone : whole(o.shards, "shards", 1);
  const replicas = whole(o.replicas ?? 1, "replicas", 1);
  const reduceDtype = o.reduceDtype === undefined ? null : oneOf(o.reduceDtype, ["float32", "bfloat16"], "reduceDtype");
  if (reduceDtype !== null && (shards ?? 1) * replicas === 1)
    throw config("reduceDtype is for ranks that share blocks: give shards or replicas, or leave it out");
  if (((shards ?? 1) * replicas) % context !== 0)
    throw config(
      `context ${context} is no divisor of shards ${shards ?? 1} x replicas ${replicas}, the ranks that add up their gradients`,
    );
  return { shards, replicas, context, reduceDtype };
}

/**
 * @param groups ranks that each need a micro-batch of their own
 * @throws CONFIG showing the product that does not come out
 */
export function resolveBatch(
  o: Pick<TrainerOptions, "batchSize" | "microBatchSize" | "gradientAccumulationSteps">,
  groups = 1,
): {
  batchSize: number;
  microBatchSize: number;
  gradientAccumulationSteps: number;
} {
  for (const name of ["batchSize", "microBatchSize", "gradientAccumulationSteps"] as const)
    if (o[name] !== undefined) whole(o[name], name, 1);
  const { batchSize: batch, microBatchSize: micro, gradientAccumulationSteps: accumulation } = o;
  const resolved = (m: number, a: number) => ({ batchSize: m * a, microBatchSize: m, gradientAccumulationSteps: a });
  if (batch === undefined) {
    if (micro === undefined && accumulation === undefined) return resolved(Math.ceil(8 / groups), groups);
    return resolved(micro ?? 1, accumulation ?? groups);
  }
  if (micro !== undefined && accumulation !== undefined && micro * accumulation !== batch)
    throw config(
      `batchSize ${batch} is not microBatchSize ${micro} x gradientAccumulationSteps ${accumulation} = ${micro * accumulation}. Leave one out`,
    );
  const [name, divisor] =
    micro !== undefined
      ? (["microBatchSize", micro] as const)
      : (["gradientAccumulationSteps", accumulation ?? groups] as const);
  if (batch % divisor !== 0)
    throw config(
      `batchSize ${batch} is not a multiple of ${name} ${divisor}: ${batch} = ${Math.floor(batch / divisor)} x ${divisor} + ${batch % divisor}`,
    );
  return micro !== undefined ? resolved(micro, batch / micro) : resolved(batch / divisor, divisor);
}

/** The course of the learning rate for a run of `steps`. */
export function resolveSchedule(given: ResolvedOptions["learningRateSchedule"], steps: number): LearningRateSchedule {
  const warmupSteps = Math.min(100, Math.floor(steps / 20));
  if (given === null || given === "cosine") return { kind: "cosine", warmupSteps, finalFraction: 0.1 };
  if (given === "constant") return { kind: "constant", warmupSteps };
  if (given === "linear") return { kind: "linear", warmupSteps };
  if (given === "warmupStableDecay")
    return { kind: "warmupStableDecay", warmupSteps, decaySteps: Math.floor(steps / 5) };
  checkSchedule(given, steps);
  return given;
}

/** What a checkpoint stores of the options: enough to go on without naming them again. */
export function savedOptions(
  o: ResolvedOptions,
  dataSpec: string | DatasetOptions | null,
  modelSpec: unknown,
): Record<string, unknown> {
  const {
    optimizer,
    model: _model,
    data: _data,
    outputDir: _outputDir,
    profileMemory: _profile,
    ranks: _ranks,
    transport: _transport,
    device: _device,
    deviceReason: _reason,
    deviceAsked: device,
    sharedHost: _sharedHost,
    planUnasked,
    ...kept
  } = o;
  const { steps, epochs, maxGradNorm, ...rest } = kept;
  // What a card left to the planner is left to whatever goes on.
  if (planUnasked) for (const name of ["plan", "offload"] as const) delete (rest as Partial<typeof rest>)[name];
  const { kind, weightDecay, ...adamw } = optimizer;
  const plain = Object.fromEntries(Object.entries(rest).filter(([, value]) => value !== null));
  return {
    format: "stromatolite.trainer",
    version: 1,
    options: {
      ...plain,
      device,
      maxGradNorm,
      optimizer: kind,
      ...(steps === null ? {} : { steps }),
      ...(epochs === null ? {} : { epochs }),
      learningRateSchedule: o.learningRateSchedule ?? undefined,
      weightDecay,
      adamw,
      ...(modelSpec === null ? {} : { model: modelSpec }),
      ...(dataSpec === null ? {} : { data: dataSpec }),
    },
  };
}

/** Saved options with the given ones over them. What is given replaces what of the saved it may contradict. */
export function mergeOptions(saved: TrainerOptions, given: TrainerOptions): TrainerOptions {
  const defined = Object.fromEntries(
    Object.entries(given).filter(([, value]) => value !== undefined),
  ) as TrainerOptions;
  const base = { ...saved };
  if (defined.steps !== undefined || defined.epochs !== undefined) {
    delete base.steps;
    delete base.epochs;
  }
  const { batchSize, microBatchSize, gradientAccumulationSteps } = defined;
  if (batchSize !== undefined || microBatchSize !== undefined || gradientAccumulationSteps !== undefined) {
    delete base.batchSize;
    delete base.gradientAccumulationSteps;
    if (batchSize !== undefined && gradientAccumulationSteps !== undefined) delete base.microBatchSize;
  }
  // Where state lives and in which order work is done are one decision: a new one does not inherit half of the old.
  if (WHERE.some((name) => defined[name] !== undefined))
    for (const name of [...WHERE, "order", "recompute", "update", "layersPerBlock"] as const) delete base[name];
  if (defined.clip !== undefined && (defined.clip === "none") !== (base.maxGradNorm === null)) delete base.maxGradNorm;
  if (defined.maxGradNorm !== undefined && (defined.maxGradNorm === null) !== (base.clip === "none")) delete base.clip;
  if (defined.precision !== undefined && defined.precision !== base.precision) {
    delete base.dtype;
    delete base.masterWeight;
  }
  // Ranks that are another number share blocks in another way, or not at all.
  const members = (base.shards ?? 1) * (base.replicas ?? 1);
  const shares = ["shards", "replicas", "context", "reduceDtype"] as const;
  if (shares.some((name) => defined[name] !== undefined) || (defined.ranks?.size ?? 1) % members !== 0)
    for (const name of shares) delete base[name];
  return { ...base, ...defined };
}

const WHERE = ["plan", "offload", "deviceMemory", "hostMemory", "disk", "diskFolder", "device"] as const;

function whole(value: unknown, name: string, least: number, most = Number.MAX_SAFE_INTEGER): number {
  if (!Number.isSafeInteger(value) || (value as number) < least || (value as number) > most)
    throw invalidArgument(
      "trainer",
      most === Number.MAX_SAFE_INTEGER ? `a whole number >= ${least}` : `a whole number from ${least} to ${most}`,
      value,
      name,
    );
  return value as number;
}

function oneOf<T extends string>(value: T, allowed: readonly T[], name: string): T {
  if (!allowed.includes(value)) throw invalidArgument("trainer", `one of ${allowed.join(", ")}`, value, name);
  return value;
}

function config(message: string): StromaError {
  return new StromaError("CONFIG", `[trainer] ${message}`);
}
