/**
 * Every option of `stroma train`, declared once: the schema, the help, the default and an example. The command line,
 * the config file, their types and `--help` are made of this table; a test freezes the list of its names.
 *
 * Nothing is filled in here: an option that was not given stays away, so that a resumed run keeps its own. The defaults
 * written below are the Trainer's (a test compares them).
 */
import type { Options as YargsOption } from "yargs";
import { z } from "zod";
import { DEVICE_EXPECTS, DEVICE_PATTERN, type DeviceOption } from "../device.js";
import { SHARED_HOST } from "../distributed/shared-host.js";
import { TRANSPORTS } from "../distributed/transport.js";
import { invalidArgument, StromaError } from "../errors.js";
import { SCHEDULE_KINDS } from "../optim/schedules.js";
import { STAGE_RULES } from "../plan/stages.js";
import { SCHEDULES as ORDERS } from "../plan/types.js";
import { MAX_THREADS } from "../train/options.js";

export interface OptionSpec<S extends z.ZodType = z.ZodType> {
  /** Of the value, as a string of the command line or as it stands in a config file. */
  schema: S;
  /** What the schema takes, for the message that refuses a value. */
  expects: string;
  help: string;
  group: string;
  /** As shown in the help; null: none. */
  default: string | number | boolean | null;
  choices?: readonly string[];
  /** A value that works, as typed on a command line. */
  example: string;
  /** A switch: `--json`, `--no-json`. */
  switch?: boolean;
  /** May stand without a value: `--resume`. */
  bare?: boolean;
  /** Of the command line alone: not a key of a config file. */
  commandLineOnly?: boolean;
}

const NUMBER = /^[+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?$/i;
const toNumber = (v: unknown) => (typeof v === "string" && NUMBER.test(v) ? Number(v) : v);
const number = (check: (v: number) => boolean) => z.preprocess(toNumber, z.number().refine(check));
const whole = (least: number) => number((v) => Number.isSafeInteger(v) && v >= least);
const wholeExpects = (least: number) => `a whole number of at least ${least}`;
const text = z.string().min(1);

function declare<S extends z.ZodType>(spec: OptionSpec<S>): OptionSpec<S> {
  return spec;
}

const count = (group: string, least: number, help: string, fallback: number | string | null, example: number) =>
  declare({
    schema: whole(least),
    expects: wholeExpects(least),
    help,
    group,
    default: fallback,
    example: String(example),
  });

/** Bytes, as people write them. */
const size = (help: string, fallback: string | null, example: string) =>
  declare({
    schema: z.union([number((v) => v > 0), z.string().regex(/^\s*\d+(\.\d+)?\s*[kmgt]?i?b?\s*$/i)]),
    expects: "a size like 24GB (1e9 bytes each) or 8GiB (2^30)",
    help,
    group: MEMORY,
    default: fallback,
    example,
  });

const alias = (of: string) =>
  declare({
    schema: z.boolean(),
    expects: "no value",
    help: `The same as ${of}`,
    group: ALIASES,
    default: false,
    example: "",
    switch: true,
  });

function choice<const T extends readonly [string, ...string[]]>(
  group: string,
  values: T,
  help: string,
  fallback: T[number] | (string & {}) | null,
) {
  return declare({
    schema: z.enum(values),
    expects: `one of ${values.join(", ")}`,
    choices: values,
    help,
    group,
    default: fallback,
    example: values[values.length - 1]!,
  });
}

const WHAT = "What to train";
const HOW_LONG = "How long, and in which portions";
const OPTIMIZER = "Optimizer";
const OUTPUT = "Output";
const MACHINE = "Machine";
const MEMORY = "Memory: how state is stored, and where it lives";
const RANKS = "Several ranks: processes that train one model together";
const ALIASES = "By the names of other trainers";
const SCHEDULES = SCHEDULE_KINDS as unknown as readonly ["constant", "linear", "cosine", "warmupStableDecay"];

type Specs = Readonly<Record<string, OptionSpec>>;

/** Meant for under five minutes on two cores: 3,616 tokens a step. */
export const DEMO_STEPS = 700;
export const DEMO_PLANETS = 256;

export const DEFAULT_RANK_TIMEOUT = 30;

export const trainOptions = {
  model: declare({
    schema: z.union([text, z.strictObject({ config: z.record(z.string(), z.unknown()) })]),
    expects: "the name of a preset, or in a config file { config: { … } }",
    help: "Preset (stroma inspect --help lists them)",
    group: WHAT,
    default: "tiny",
    example: "tiny",
  }),
  data: declare({
    schema: text,
    expects: '"planets" or a path',
    help: "planets (simulated, embedded), or a file, a folder, a glob: CSV, Parquet, JSON lines, text",
    group: WHAT,
    default: "planets",
    example: "planets",
  }),
  template: declare({
    schema: text,
    expects: "text with {column} in it",
    help: "How a row of a table becomes text. Default: its text column, else key=value lines",
    group: WHAT,
    default: null,
    example: "{pl_name}: radius {pl_rade:.2}",
  }),
  splitKey: declare({
    schema: text,
    expects: "the name of a column",
    help: "Rows that share its value are never on both sides of the split. Default: the host star where known, else the row",
    group: WHAT,
    default: null,
    example: "hostname",
  }),
  validationShare: declare({
    schema: number((v) => v >= 0 && v < 1),
    expects: "a share in [0, 1)",
    help: "Share of split keys that is held out",
    group: WHAT,
    default: 0.05,
    example: "0.1",
  }),
  packing: choice(
    WHAT,
    ["whole", "split"],
    "A document that does not fit the rest of a row begins a new one (whole), or goes on in the next (split)",
    "whole",
  ),
  onBadSource: choice(WHAT, ["stop", "skip"], "A file that is refused whole ends the run, or is left out", "stop"),
  seed: count(WHAT, 0, "Of the parameters, the order of the data and every draw", 0, 1),
  resume: declare({
    schema: z.union([z.literal(true), text]),
    expects: "nothing, a path of a run or checkpoint, or auto",
    help: "Go on from the latest checkpoint of --output-dir, or from the path given; auto: or from the start where there is none. Options left out are the saved run's",
    group: WHAT,
    default: null,
    example: "auto",
    bare: true,
  }),
  config: declare({
    schema: text,
    expects: "a path",
    help: "A YAML or JSON file with any of these options; the command line goes before it",
    group: WHAT,
    default: null,
    example: "train.yaml",
    commandLineOnly: true,
  }),

  steps: count(HOW_LONG, 1, "Optimizer steps; or say --epochs", 1000, 400),
  epochs: count(HOW_LONG, 1, "Passes over the training split; or say --steps", null, 2),
  batchSize: count(
    HOW_LONG,
    1,
    "Rows of one step = --micro-batch-size x --gradient-accumulation-steps; any two give the third",
    8,
    32,
  ),
  microBatchSize: count(HOW_LONG, 1, "Rows that go through the model at once", "the batch size", 4),
  gradientAccumulationSteps: count(HOW_LONG, 1, "Micro-batches whose gradients are summed in one step", 1, 8),
  sequenceLength: count(HOW_LONG, 1, "Tokens of a row", 256, 512),

  learningRate: declare({
    schema: number((v) => v > 0 && Number.isFinite(v)),
    expects: "a number above 0",
    help: "Highest learning rate",
    group: OPTIMIZER,
    default: 3e-4,
    example: "1e-3",
  }),
  learningRateSchedule: choice(
    OPTIMIZER,
    SCHEDULES,
    "Its course: cosine falls to a tenth, linear and warmupStableDecay to nothing",
    "cosine",
  ),
  warmupSteps: count(
    OPTIMIZER,
    0,
    "Steps in which the learning rate rises linearly",
    "a twentieth of the steps, at most 100",
    50,
  ),
  decaySteps: count(OPTIMIZER, 0, "Length of the fall at the end of warmupStableDecay", "a fifth of the steps", 100),
  weightDecay: declare({
    schema: number((v) => v >= 0 && Number.isFinite(v)),
    expects: "a number of at least 0",
    help: "Decoupled weight decay of matrices (AdamW)",
    group: OPTIMIZER,
    default: 0.01,
    example: "0.1",
  }),
  maxGradNorm: declare({
    schema: z.preprocess((v) => (v === "none" ? null : toNumber(v)), z.number().positive().finite().nullable()),
    expects: "a number above 0, or none",
    help: "Norm that gradients are clipped to (--clip says whose), or none",
    group: OPTIMIZER,
    default: 1,
    example: "0.5",
  }),
  clip: choice(
    OPTIMIZER,
    ["none", "block", "global"],
    "Clip by the norm of all gradients, of each block's, or not",
    "global; none with --max-grad-norm none",
  ),
  optimizer: choice(
    OPTIMIZER,
    ["adamw", "adamw8bit"],
    "adamw8bit keeps the moments of matrices in 8 bits: a quarter of their bytes",
    "adamw",
  ),
  nonFinite: choice(
    OPTIMIZER,
    ["stop", "skip"],
    "A step whose loss is not finite changes no parameter; then the run stops, or skips it",
    "stop",
  ),

  outputDir: declare({
    schema: text,
    expects: "a path",
    help: "metrics.jsonl, loss.svg and checkpoints/ go here",
    group: OUTPUT,
    default: "runs/<model>",
    example: "runs/first",
  }),
  logEveryNSteps: count(OUTPUT, 1, "Show a step every n steps; metrics.jsonl has every one", 1, 10),
  saveEveryNSteps: count(OUTPUT, 0, "Checkpoint every n steps and at the end; 0: only at the end", 500, 100),
  saveEveryNEpochs: count(OUTPUT, 0, "Checkpoint after every n passes over the data; 0: no", 0, 1),
  keepLast: count(OUTPUT, 1, "Checkpoints that are kept", 3, 1),
  evalEveryNSteps: count(OUTPUT, 0, "Held-out loss every n steps and at the end; 0: never", 0, 100),
  evalMicroBatches: count(OUTPUT, 1, "Micro-batches of such an evaluation", 16, 64),
  sampleEveryNSteps: count(OUTPUT, 0, "Generate from --sample-prompt every n steps; 0: never", 0, 100),
  samplePrompt: declare({
    schema: text,
    expects: "text",
    help: "What samples begin with",
    group: OUTPUT,
    default: null,
    example: "synthetic star",
  }),
  sampleTokens: count(OUTPUT, 1, "Most new tokens of a sample", 64, 32),
  profileMemory: declare({
    schema: z.union([z.literal(true), whole(1)]),
    expects: "nothing, or the number of a step",
    help: "Profile a step (the second of this run): profile.html, .json and a trace in profile-<step>/ of the output folder, one page for all ranks",
    group: OUTPUT,
    default: null,
    example: "3",
    bare: true,
  }),
  json: declare({
    schema: z.boolean(),
    expects: "no value",
    help: "One JSON object a line on stdout and nothing else there",
    group: OUTPUT,
    default: false,
    example: "",
    switch: true,
    commandLineOnly: true,
  }),

  device: declare({
    schema: z.string().regex(DEVICE_PATTERN) as unknown as z.ZodType<DeviceOption>,
    expects: DEVICE_EXPECTS,
    help: "auto: the first card that can be used, else cpu. cuda:1: the second card. sim: a test instrument, a simulated card in this machine's memory that ends at --device-memory; it shows what fits, not how fast",
    group: MACHINE,
    default: "auto",
    example: "sim",
  }),
  dtype: choice(MACHINE, ["float32", "float64", "bfloat16"], "What blocks compute in", "as --precision says"),
  threads: declare({
    schema: number((v) => Number.isSafeInteger(v) && v >= 0 && v <= MAX_THREADS),
    expects: `a whole number from 0 to ${MAX_THREADS}`,
    help: "Threads of the engine; 0: all this process may use",
    group: MACHINE,
    default: 0,
    example: "2",
  }),
  precision: choice(
    MEMORY,
    ["float32", "float64", "bfloat16"],
    "What parameters are stored as. Over bfloat16 blocks compute in bfloat16 where the processor is fast at it, else in float32: the first line of a run says which",
    "float32",
  ),
  masterWeight: choice(
    MEMORY,
    ["none", "split16", "float32"],
    "Beside bfloat16 parameters: float32 copies, their lower halves (2 bytes each), or none and updates that round stochastically",
    "none; float32 with --precision bfloat16",
  ),
  plan: choice(
    MEMORY,
    ["resident", "auto"],
    "resident: everything on the device; auto: the fastest plan that fits the sizes below",
    "resident; auto with any of those sizes, and on a card",
  ),
  offload: choice(
    MEMORY,
    ["none", "host", "disk", "auto"],
    "Where parameters and optimizer state live between uses: on the device, in host memory beside it (not with --device cpu, where that is one memory), on disk, or as the plan finds best",
    "none; auto with --plan auto",
  ),
  deviceMemory: size("Of the device; with --device cpu all memory that training takes", "what there is", "8GiB"),
  hostMemory: size("Beside a device that has memory of its own", "what there is", "64GB"),
  disk: size("Room on disk that a plan may fill", "no limit with --offload disk, none with --plan auto", "200GB"),
  diskFolder: declare({
    schema: text,
    expects: "a path",
    help: "Folder for what is kept on disk while training",
    group: MEMORY,
    default: "the output folder",
    example: "/tmp",
  }),
  recompute: choice(
    MEMORY,
    ["all", "none", "selective"],
    "all keeps only block boundaries and computes the rest again; none keeps everything; selective keeps results of matrix products and attention, and computes the cheap rest again",
    "none; all with --offload",
  ),
  layersPerBlock: count(
    MEMORY,
    1,
    "So many layers are one block: fewer boundaries are kept, and more is computed again at a time",
    "1; --plan auto chooses",
    4,
  ),
  update: choice(
    MEMORY,
    ["end", "backward", "forward"],
    "Blocks change after all gradients, each after its own (no global clipping; a norm that is not finite skips that block alone), or in the next step",
    "end; with --offload forward, or backward where no global norm is asked for",
  ),
  order: choice(
    MEMORY,
    ORDERS,
    "Order of the work inside a step; the numbers are the same",
    "breadthFirst; --plan auto chooses",
  ),
  ranks: count(
    RANKS,
    1,
    "Start so many ranks on this machine. Under torchrun, srun or mpirun leave it out: they say it",
    1,
    2,
  ),
  gpus: count(RANKS, 1, "Train on so many cards of this machine, one rank each (cuda:0 and up)", null, 2),
  restart: count(
    RANKS,
    0,
    "After a failure start all ranks again, from the last checkpoint, at most so often; waits 1 s, 2 s, 4 s, … at most 60 s",
    0,
    3,
  ),
  rankTimeout: declare({
    schema: number((v) => v >= 1 && Number.isFinite(v)),
    expects: "a number of seconds of at least 1",
    help: "Seconds of silence after which a rank counts as lost",
    group: RANKS,
    default: DEFAULT_RANK_TIMEOUT,
    example: "60",
  }),
  stages: choice(
    RANKS,
    STAGE_RULES,
    "Which blocks a rank has: dealt out in turn, or with --order oneForwardOneBackward a stretch of neighbours or two",
    "alternating; --plan auto chooses",
  ),
  shards: count(
    RANKS,
    1,
    "So many ranks run the same blocks on micro-batches of their own and share the state, a part each (fully sharded data parallel)",
    "1; --plan auto chooses",
    2,
  ),
  replicas: count(
    RANKS,
    1,
    "So many groups of shards hold the same state: shards inside a machine, replicas across",
    "1; --plan auto may take one a rank",
    2,
  ),
  context: count(
    RANKS,
    1,
    "So many ranks share every row, each some of its tokens, and attend over all of them: for rows that no rank holds (shards are as many, unless said)",
    1,
    2,
  ),
  reduceDtype: choice(
    RANKS,
    ["float32", "bfloat16"],
    "What gradients travel as between ranks that share blocks; as they are summed, unless said",
    null,
  ),
  sharedHost: choice(
    RANKS,
    SHARED_HOST,
    "Ranks that share the state of blocks read parameters that live on the host from memory that they have in common, and send none",
    "auto; on one machine, where the device has memory of its own",
  ),
  transport: choice(
    RANKS,
    TRANSPORTS,
    "How ranks exchange: from card to card, or through the host",
    "nccl where each rank has a card of its own, else gloo",
  ),
  distributed: alias("--gpus with all cards of this machine"),
  use8bitOptimizer: alias("--optimizer adamw8bit"),
  useMixedPrecision: alias("--precision bfloat16"),
  useCpuOffloading: alias("--offload host"),
  useGradientCheckpointing: alias("--recompute all"),
} as const satisfies Record<string, OptionSpec>;

/** Checked values of the options that were given. */
export type Flags<S extends Specs> = { [K in keyof S]?: z.output<S[K]["schema"]> };
export type TrainFlags = Flags<typeof trainOptions>;

const { device, threads, json, data } = trainOptions;
const FROM = "Model";
const checkpoint = declare({
  schema: text,
  expects: "a path",
  help: "Folder of a run (its newest checkpoint), of one checkpoint, or a Hugging Face model",
  group: FROM,
  default: null,
  example: "runs/tiny",
});

export const evalOptions = {
  checkpoint,
  data: { ...data, group: FROM, default: "what the run trained on" },
  sequenceLength: { ...trainOptions.sequenceLength, group: FROM, default: "the run's" },
  microBatchSize: { ...trainOptions.microBatchSize, group: FROM, default: 8 },
  microBatches: count(FROM, 1, "End after so many micro-batches. Default: the whole held-out split", null, 64),
  device,
  threads,
  json,
} as const satisfies Specs;

const TEXT = "Text";
export const generateOptions = {
  checkpoint,
  prompt: declare({
    schema: z.string(),
    expects: "text, or - for stdin",
    help: "What to go on from; - reads stdin",
    group: TEXT,
    default: null,
    example: "synthetic star",
  }),
  maxTokens: count(TEXT, 1, "Most new tokens", 256, 64),
  temperature: declare({
    schema: number((v) => v >= 0 && Number.isFinite(v)),
    expects: "a number of at least 0",
    help: "0: the likeliest token always",
    group: TEXT,
    default: 1,
    example: "0.7",
  }),
  topK: count(TEXT, 0, "Draw among the k likeliest; 0: all", 0, 40),
  topP: declare({
    schema: number((v) => v > 0 && v <= 1),
    expects: "a probability in (0, 1]",
    help: "Draw among the likeliest that together have this probability",
    group: TEXT,
    default: 1,
    example: "0.9",
  }),
  seed: count(TEXT, 0, "Of the draws", 0, 1),
  device,
  threads,
  json,
} as const satisfies Specs;

export const demoOptions = {
  steps: count(HOW_LONG, 1, "Optimizer steps", DEMO_STEPS, 50),
  outputDir: { ...trainOptions.outputDir, default: "runs/planets-<n>, the next that is free" },
  planets: count(HOW_LONG, 1, "Unseen planets that the score is of", DEMO_PLANETS, 64),
  threads,
  json,
} as const satisfies Specs;

export const kebab = (name: string): string => name.replace(/[A-Z]|\d+/g, (c) => `-${c.toLowerCase()}`);
export const camel = (name: string): string => name.replace(/-([a-z0-9])/g, (_, c: string) => c.toUpperCase());

/** The table as yargs takes it. */
export function yargsOptions(specs: Specs): Record<string, YargsOption> {
  return Object.fromEntries(
    Object.entries(specs).map(([name, spec]) => [
      kebab(name),
      {
        describe: describe(spec),
        group: `${spec.group}:`,
        ...(spec.switch ? { boolean: true } : { string: true, requiresArg: !spec.bare }),
      } satisfies YargsOption,
    ]),
  );
}

/** The help with the choices and the default: yargs shows a default only where it fills it in. */
function describe({ help, choices, default: fallback }: OptionSpec): string {
  const notes = [
    ...(choices === undefined ? [] : [`[${choices.join("|")}]`]),
    ...(fallback === null || fallback === false ? [] : [`[default: ${fallback}]`]),
  ];
  return [help, ...notes].join(" ");
}

/** @throws INVALID_ARGUMENT naming the flag (or key), what it takes, what it got and an example */
export function checkOption(specs: Specs, name: string, value: unknown, where: string): unknown {
  const spec = specs[name]!;
  const cure =
    `For example: --${kebab(name)} ${/\s/.test(spec.example) ? `"${spec.example}"` : spec.example}`.trimEnd();
  if (Array.isArray(value))
    throw invalidArgument("options", "one value", `${value.length} values: ${value.join(", ")}`, where, "Give it once");
  const checked = spec.schema.safeParse(spec.bare && value === "" ? true : value);
  if (!checked.success) throw invalidArgument("options", spec.expects, value, where, cure);
  return checked.data;
}

/** Checks what yargs parsed; only what was given is in the result. */
export function checkOptions<S extends Specs>(specs: S, argv: Readonly<Record<string, unknown>>): Flags<S> {
  const given: Record<string, unknown> = {};
  for (const name of Object.keys(specs)) {
    const value = argv[name];
    if (value !== undefined) given[name] = checkOption(specs, name, value, `--${kebab(name)}`);
  }
  return given as Flags<S>;
}

/** @throws CONFIG when the option was not given */
export function required<T>(value: T | undefined, specs: Specs, name: string): T {
  if (value === undefined)
    throw new StromaError(
      "CONFIG",
      `[cli] --${kebab(name)} is needed, for example: --${kebab(name)} ${specs[name]!.example}`,
    );
  return value;
}
