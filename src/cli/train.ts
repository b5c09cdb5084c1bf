/** `stroma train`: from the command line and the config file to a Trainer, and its events to a view. */
import { existsSync } from "node:fs";
import { join } from "node:path";
import type { Argv, CommandModule } from "yargs";
import type { DatasetOptions } from "../data/index.js";
import { StromaError } from "../errors.js";
import { modelNames } from "../models/registry.js";
import type { LearningRateSchedule } from "../optim/schedules.js";
import type { TrainEvent } from "../train/events.js";
import { mergeOptions, resolveOptions, type TrainerOptions } from "../train/options.js";
import { readConfigFile } from "./config-file.js";
import { type Context, processContext } from "./context.js";
import { EXIT } from "./errors.js";
import { launchTraining } from "./launch.js";
import { type DistributedPlan, distributedPlan } from "./launch-plan.js";
import { FirstRankView, joinAndTrain, OtherRankView } from "./launch-rank.js";
import { checkOptions, kebab, type TrainFlags, trainOptions, yargsOptions } from "./options.js";
import { makeOutputDir, removeEmpty } from "./output-dir.js";
import { StopSignals } from "./signals.js";
import { didYouMean } from "./suggest.js";
import { isLive, JsonView, LiveView, type Output, PlainView, QuietView, type View } from "./ui/view.js";

/**
 * What the flags mean to a Trainer. Model and data fall back to the embedded example, unless a saved run names them.
 * @throws CONFIG for flags that need another one
 */
export function toTrainerOptions(flags: TrainFlags): TrainerOptions {
  const { config: _config, json: _json, warmupSteps: _warmup, decaySteps: _decay, samplePrompt, ...rest } = flags;
  const {
    template: _template,
    splitKey: _key,
    validationShare: _share,
    packing: _packing,
    onBadSource: _bad,
    ranks: _ranks,
    gpus: _gpus,
    distributed: _distributed,
    restart: _restart,
    rankTimeout: _rankTimeout,
    ...plain
  } = rest;
  const resumes = flags.resume !== undefined && flags.resume !== "auto";
  const named = Object.fromEntries(Object.entries(plain).filter(([name]) => !Object.hasOwn(ALIASES, name)));
  const options: TrainerOptions = {
    ...(resumes ? {} : { model: DEFAULT_MODEL, data: DEFAULT_DATA }),
    ...(named as TrainerOptions),
    ...aliases(flags),
  };
  // Whose checkpoints, where neither the folder nor the model is named: those of a run that named neither.
  if (flags.resume === true && flags.outputDir === undefined && flags.model === undefined)
    options.outputDir = join("runs", DEFAULT_MODEL);
  const data = dataOf(flags, options.data as string | undefined);
  if (data !== undefined) options.data = data;
  const schedule = scheduleOf(flags);
  if (schedule !== undefined) options.learningRateSchedule = schedule;
  if (samplePrompt !== undefined) options.samplePrompts = [samplePrompt];
  return options;
}

/** Switches that stand for a value of another option. */
const ALIASES = {
  use8bitOptimizer: ["optimizer", "adamw8bit"],
  useMixedPrecision: ["precision", "bfloat16"],
  useCpuOffloading: ["offload", "host"],
  useGradientCheckpointing: ["recompute", "all"],
} as const satisfies Partial<Record<keyof TrainFlags, readonly [keyof TrainFlags, string]>>;

/** @throws CONFIG where a switch and the option that it stands for disagree */
function aliases(flags: TrainFlags): TrainerOptions {
  const meant: Record<string, string> = {};
  for (const [name, [option, value]] of Object.entries(ALIASES)) {
    if (flags[name as keyof typeof ALIASES] !== true) continue;
    const given = flags[option];
    if (given !== undefined && given !== value)
      throw new StromaError(
        "CONFIG",
        `[cli] --${kebab(name)} means --${option} ${value}, and --${option} ${given} is given: leave one out`,
      );
    meant[option] = value;
  }
  return meant;
}

/** @throws CONFIG for a name that is neither a preset nor a path, with the preset that was probably meant */
export function checkModelName(name: string): void {
  const presets = modelNames();
  if (presets.includes(name) || existsSync(name)) return;
  throw new StromaError(
    "CONFIG",
    `[model] there is no preset and no folder "${name}"${didYouMean(name, presets) || "."} Presets: ${presets.join(", ")}`,
    { presets },
  );
}

const DEFAULT_MODEL = "tiny";
const DEFAULT_DATA = "planets";

/** The source with the options that are about it; undefined: the saved run's. */
function dataOf(flags: TrainFlags, source: string | undefined): string | DatasetOptions | undefined {
  const { template, splitKey, validationShare, packing, onBadSource } = flags;
  const files = { template, splitKey, onBadSource };
  const given = Object.entries({ ...files, validationShare, packing }).filter(([, value]) => value !== undefined);
  if (given.length === 0) return source;
  const names = given.map(([name]) => `--${kebab(name)}`).join(" and ");
  if (source === undefined)
    throw new StromaError("CONFIG", `[cli] ${names} would change the data of the run that is resumed: say --data too`);
  const foreign = Object.entries(files).find(([, value]) => value !== undefined)?.[0];
  if (source === "planets" && foreign !== undefined)
    throw new StromaError("CONFIG", `[cli] --${kebab(foreign)} is for files; planets are simulated`);
  return { source, ...Object.fromEntries(given) } as DatasetOptions;
}

function scheduleOf({
  learningRateSchedule: named,
  warmupSteps,
  decaySteps,
}: TrainFlags): LearningRateSchedule | LearningRateSchedule["kind"] | undefined {
  if (decaySteps !== undefined && named !== "warmupStableDecay")
    throw new StromaError("CONFIG", "[cli] --decay-steps belongs to --learning-rate-schedule warmupStableDecay");
  if (warmupSteps === undefined && decaySteps === undefined) return named;
  const kind = named ?? "cosine";
  if (kind === "cosine") return { kind, warmupSteps, finalFraction: 0.1 };
  if (kind !== "warmupStableDecay") return { kind, warmupSteps };
  if (warmupSteps === undefined || decaySteps === undefined)
    throw new StromaError(
      "CONFIG",
      "[cli] warmupStableDecay takes --warmup-steps and --decay-steps together, or neither",
    );
  return { kind, warmupSteps, decaySteps };
}

/** The config file under the command line. A batch size on one side replaces those that it may contradict. */
export async function readFlags(argv: Readonly<Record<string, unknown>>): Promise<TrainFlags> {
  const given = checkOptions(trainOptions, argv);
  if (given.config === undefined) return given;
  const file = (await readConfigFile(given.config, trainOptions)) as TrainFlags;
  return mergeOptions(file as TrainerOptions, given as TrainerOptions) as TrainFlags;
}

/** The terminal that a live view would be on; null where there is none. With --json people read stderr. */
export function liveOutput(json: boolean, { out, err }: Context): Output | null {
  if (!json) return isLive(out) ? out : null;
  // Both on one terminal would mix: then the objects are what is asked for.
  return isLive(err) && out.isTTY !== true ? err : null;
}

/** Live on a terminal, lines elsewhere. */
export function chooseView(json: boolean, context: Context): View {
  const { out, err } = context;
  const live = liveOutput(json, context);
  if (!json) return live === null ? new PlainView(out) : new LiveView(live);
  return new JsonView(out, live === null ? new QuietView(err) : new LiveView(live));
}

export interface Finished {
  done: Extract<TrainEvent, { event: "done" }> | null;
  /** Exit status: 130 after Ctrl-C, 143 after SIGTERM; 0 for a run that took all its steps, whatever came in the end. */
  status: number;
}

/** The part of a Trainer that is needed here: tests bring a script of events. */
export interface RunsOnce {
  run(signal?: AbortSignal): AsyncIterable<TrainEvent>;
  /** Known once run() gave its first event. */
  readonly outputDir?: string;
  dispose(): Promise<void>;
}

/** Runs a trainer under Ctrl-C and a view. The trainer is created by `create`, so that a slow start can be cancelled. */
export async function follow(create: () => Promise<RunsOnce>, view: View): Promise<Finished> {
  let done: Finished["done"] = null;
  using signals = new StopSignals(
    (signal) =>
      view.stopping(
        `${signal === "SIGINT" ? "Ctrl-C" : signal}: finishing the step and saving; once more quits at once`,
      ),
    () => view.close(),
  );
  // The reader of a pipe has gone (`stroma train --json | head`): nobody is told, what was learned is kept.
  const readerGone = (error: NodeJS.ErrnoException) => {
    if (error.code === "EPIPE") signals.stop();
  };
  process.stdout.on("error", readerGone);
  let trainer: RunsOnce | undefined;
  try {
    trainer = await create();
    for await (const event of trainer.run(signals.signal)) {
      view.event(event);
      if (event.event === "done") done = event;
    }
  } finally {
    process.stdout.off("error", readerGone);
    view.close();
    await trainer?.dispose();
  }
  return { done, status: done?.reason === "steps" ? EXIT.ok : STATUS_AFTER[signals.received ?? "none"] };
}

const STATUS_AFTER = { SIGINT: EXIT.interrupted, SIGTERM: EXIT.terminated, none: EXIT.ok } as const;

/** Of the first of several ranks. */
const deviceOfRanks = ({ gpus, distributed, device }: TrainFlags): TrainerOptions["device"] =>
  gpus !== undefined || distributed === true ? "cuda:0" : device === undefined || device === "auto" ? "cpu" : device;

export const trainCommand: CommandModule<object, Record<string, unknown>> = {
  command: "train",
  describe: "Train a model, or resume a run",
  builder: (y: Argv<object>) =>
    y
      .options(yargsOptions(trainOptions))
      .example("$0 train --steps 400", "the tiny preset on simulated planets")
      .example("$0 train --data stars.csv --epochs 2 --output-dir runs/stars", "a table of your own, twice")
      .example("$0 train --batch-size 32 --micro-batch-size 1", "32 rows a step, one at a time in memory")
      .example(
        "$0 train --optimizer adamw8bit --precision bfloat16 --master-weight none --offload disk",
        "2 + 2 bytes a parameter, on disk while others work",
      )
      .example("$0 train --config train.yaml --seed 7", "options from a file, one of them replaced")
      .example("$0 train --resume --output-dir runs/stars --epochs 4", "go on where it stopped, for longer")
      .example("$0 train --gpus 2 --restart 3", "two cards; after a failure on from the last checkpoint")
      .example("$0 train --json | jq -c 'select(.event==\"eval\")'", "for programs")
      .epilogue(
        "Ctrl-C finishes the step, saves a checkpoint and ends with status 130, SIGTERM likewise with 143. " +
          "A second one, half a second later, quits at once; the last complete checkpoint stays whole.",
      ) as never,
  handler: async (argv) => {
    const context = processContext();
    const flags = await readFlags(argv);
    const json = flags.json === true;
    const plan = distributedPlan(flags, process.env);
    const options = toTrainerOptions(flags);
    if (plan.mode !== "launch" && plan.device !== undefined) options.device = plan.device;
    if (typeof options.model === "string") checkModelName(options.model);
    const first = plan.mode !== "rank" || plan.spec.rank === 0;
    // Told once, not by every rank.
    if (plan.mode === "launch" && flags.resume === undefined)
      resolveOptions({ ...options, device: deviceOfRanks(flags) });
    const makes = first && options.outputDir !== undefined && flags.resume === undefined;
    const made = makes ? await makeOutputDir(options.outputDir!) : [];
    try {
      process.exitCode =
        plan.mode === "launch"
          ? await launchTraining({ ...plan, restart: flags.restart }, json)
          : await trainHere(options, plan, json, first, context);
    } finally {
      await removeEmpty(made);
    }
  },
};

/** In this process, alone or as one of several ranks; its exit status. */
async function trainHere(
  options: TrainerOptions,
  plan: Exclude<DistributedPlan, { mode: "launch" }>,
  json: boolean,
  first: boolean,
  context: Context,
): Promise<number> {
  let trainer: RunsOnce | undefined;
  const view = first
    ? new FirstRankView(chooseView(json, context), liveOutput(json, context) !== null, () => trainer?.outputDir)
    : new OtherRankView(context);
  const { done, status } = await follow(async () => {
    const { Trainer } = await import("../train/trainer.js");
    trainer = plan.mode === "rank" ? await joinAndTrain(options, plan) : new Trainer(options);
    return trainer;
  }, view);
  // Another rank was asked to stop, and this one with it. Schedulers count each of their processes: none is done.
  const withAnother = plan.mode === "rank" && plan.spec.launcher !== "stroma" && done?.reason === "interrupted";
  return status === EXIT.ok && withAnother ? EXIT.terminated : status;
}
