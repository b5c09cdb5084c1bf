/**
 * `stroma selftest memory`: what saves memory, each on a small model through the real trainer and engine, and checked for
 * what it claims. On a card all of it runs there; without one, what a card's memory is needed for runs on the simulated one.
 */
import { mkdtemp, readFile, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import type { CommandModule } from "yargs";
import { FILES } from "../checkpoint/format.js";
import { openCheckpoint } from "../checkpoint/read.js";
import { readSafetensorsHeader } from "../checkpoint/safetensors.js";
import { chooseDevice, DEVICE_EXPECTS, DEVICE_PATTERN, type Device, type DeviceOption } from "../device.js";
import { invalidArgument, StromaError } from "../errors.js";
import type { ProfileEvent, StepEvent, TrainEvent } from "../train/events.js";
import type { NativeSession } from "../train/native-session.js";
import type { TrainerOptions } from "../train/options.js";
import { realParts } from "../train/parts.js";
import { Trainer } from "../train/trainer.js";
import { EXIT } from "./errors.js";
import { readFlags, toTrainerOptions } from "./train.js";
import { formatBytes } from "./ui/format.js";

export interface SelftestCheck {
  name: string;
  ok: boolean;
  detail: string;
  seconds: number;
}

export interface SelftestReport {
  ok: boolean;
  device: string;
  checks: SelftestCheck[];
}

interface Arguments {
  what: "memory";
  device: string;
  json?: boolean;
}

export const selftestCommand: CommandModule<object, Arguments> = {
  command: "selftest <what>",
  describe: "Train small models with every means that saves memory, and check what each claims",
  builder: (yargs) =>
    yargs
      .positional("what", { choices: ["memory"] as const, demandOption: true, describe: "What is tried" })
      .options({
        device: {
          type: "string",
          default: "auto",
          describe:
            "auto: the first card that can be used, else cpu, where offloading is tried on a simulated card; cuda:1",
        },
        json: { type: "boolean", describe: "One JSON object instead of lines" },
      })
      .example("$0 selftest memory", "six checks; status 0 when all hold"),
  handler: async ({ device, json }) => {
    const say = (check: SelftestCheck) =>
      json || process.stdout.write(`${check.ok ? "ok    " : "FAILED"} ${check.name.padEnd(22)} ${check.detail}\n`);
    if (!DEVICE_PATTERN.test(device)) throw invalidArgument("selftest", DEVICE_EXPECTS, device, "--device");
    const choice = chooseDevice(device as DeviceOption);
    if (!json) process.stdout.write(`on ${choice.device}${choice.why === null ? "" : ` (${choice.why})`}\n`);
    const report = await selftestMemory(choice.device, say);
    if (json) process.stdout.write(`${JSON.stringify(report)}\n`);
    process.exitCode = report.ok ? EXIT.ok : EXIT.failed;
  },
};

/** Throws NOT_SET_UP without the addon; a check that fails is in the report. */
export async function selftestMemory(
  device: Device = "cpu",
  onCheck: (check: SelftestCheck) => void = () => {},
): Promise<SelftestReport> {
  const folder = await mkdtemp(join(tmpdir(), "stroma-selftest-"));
  const checks: SelftestCheck[] = [];
  try {
    const bench = new Bench(folder, device);
    for (const [name, check] of CHECKS) {
      const began = performance.now();
      const result = await check(bench).catch((error: unknown) => {
        if (error instanceof StromaError && error.code === "NOT_SET_UP") throw error;
        return { ok: false, detail: (error as Error).message };
      });
      checks.push({ name, ...result, seconds: (performance.now() - began) / 1000 });
      onCheck(checks.at(-1)!);
    }
  } finally {
    await rm(folder, { recursive: true, force: true });
  }
  return { ok: checks.every((c) => c.ok), device, checks };
}

/**
 * On a card a model whose state is large against what libraries hold there, and against the allocator's 20 MB pieces.
 */
const ON_A_CARD: TrainerOptions = {
  model: { config: { vocabSize: 260, dim: 512, layers: 6, heads: 8, kvHeads: 4, ffn: 1024, maxPositions: 256 } },
  sequenceLength: 256,
  learningRate: 1e-3,
  // Else a card's plan is the planner's choice, which may make one micro-batch of several.
  order: "breadthFirst",
};
/** Up to a megabyte of each large block of a card's allocator lies idle: of a peak of 100 MB more than a twentieth may. */
const IDLE_ON_A_CARD = 8 * 2 ** 20;

const BASE: TrainerOptions = {
  model: { config: { vocabSize: 260, dim: 64, layers: 4, heads: 4, kvHeads: 2, ffn: 128, maxPositions: 64 } },
  data: { source: "planets", count: 64, workers: 0 },
  steps: 6,
  batchSize: 4,
  microBatchSize: 2,
  sequenceLength: 64,
  learningRate: 5e-3,
  saveEveryNSteps: 0,
  threads: 1,
  seed: 1,
};

interface Trained {
  steps: StepEvent[];
  events: TrainEvent[];
  outputDir: string;
  /** Bytes of checkpointed tensors by kind of state. */
  bytes: Record<string, number>;
  hashes: (string | undefined)[];
  /** Of the last step's sums of one matrix. */
  gradientDType: string;
  peak: number;
}

/** Trains in folders of its own; the plain run is shared. */
class Bench {
  private runs = 0;
  private plainRun: Promise<Trained> | undefined;

  constructor(
    readonly folder: string,
    readonly device: Device,
  ) {}

  get onCard(): boolean {
    return this.device.startsWith("cuda");
  }
  /** A device with a memory of its own. */
  get apart(): Device {
    return this.onCard ? this.device : "sim";
  }
  get offloaded(): TrainerOptions {
    return { device: this.apart, offload: "host", recompute: "all" };
  }

  plain(): Promise<Trained> {
    this.plainRun ??= this.train({});
    return this.plainRun;
  }

  async train(extra: TrainerOptions): Promise<Trained> {
    const outputDir = extra.outputDir ?? join(this.folder, `run-${this.runs++}`);
    let session: NativeSession | undefined;
    const createSession: typeof realParts.createSession = async (options) => {
      session = await realParts.createSession(options);
      return session;
    };
    const own = { device: this.device, ...(this.onCard ? ON_A_CARD : {}) };
    const base = extra.resume === undefined ? { ...BASE, ...own } : {};
    await using trainer = new Trainer({ ...base, ...extra, outputDir }, { createSession });
    const events: TrainEvent[] = [];
    for await (const event of trainer.run()) events.push(event);
    const steps = events.filter((e) => e.event === "step");
    // Update "end" leaves the sums where they were.
    const kept = extra.offload === undefined && extra.resume === undefined;
    const gradientDType = kept ? (await session!.gradient((await matrices(session!))[0]!)).dtype : "";
    const { path, state } = await openCheckpoint(outputDir);
    return {
      events,
      steps,
      outputDir,
      bytes: await bytesByKind(path),
      hashes: [FILES.model, FILES.optimizer].map((file) => state.files[file]?.sha256),
      gradientDType,
      peak: Math.max(...steps.map((s) => s.peakDeviceBytes)),
    };
  }
}

const matrices = async (session: NativeSession): Promise<string[]> =>
  (await session.state()).filter((e) => e.kind === "param" && e.shape.length === 2).map((e) => e.name);

async function bytesByKind(checkpoint: string): Promise<Record<string, number>> {
  const bytes: Record<string, number> = {};
  for (const file of [FILES.model, FILES.optimizer]) {
    const { entries } = await readSafetensorsHeader(join(checkpoint, file));
    for (const [name, entry] of entries) {
      const kind = file === FILES.model ? "param" : name.slice(0, name.indexOf("."));
      bytes[kind] = (bytes[kind] ?? 0) + entry.bytes;
    }
  }
  return bytes;
}

const MOMENTS = ["exp_avg", "exp_avg_sq", "state1", "state2", "absmax1", "absmax2"];
const moments = ({ bytes }: Trained): number => MOMENTS.reduce((sum, kind) => sum + (bytes[kind] ?? 0), 0);
const first = ({ steps }: Trained): number => steps[0]!.loss;
const last = ({ steps }: Trained): number => steps.at(-1)!.loss;
const falls = (run: Trained): boolean => last(run) < 0.97 * first(run);
const course = (run: Trained): string => `loss ${first(run).toFixed(3)} to ${last(run).toFixed(3)}`;

type Result = Pick<SelftestCheck, "ok" | "detail">;

const CHECKS: readonly [name: string, check: (bench: Bench) => Promise<Result>][] = [
  [
    "8bit optimizer",
    async (bench) => {
      const [plain, run] = [await bench.plain(), await bench.train({ optimizer: "adamw8bit" })];
      const share = moments(run) / moments(plain);
      // Of 8 bytes a matrix keeps 2 and two float32 scales for 256; what has under 4,096 elements keeps all.
      const ok = share > 0.25 && share < 0.33 && falls(run) && falls(plain);
      return { ok, detail: `moments take ${share.toFixed(3)} of float32's bytes, ${course(run)}` };
    },
  ],
  [
    "gradient accumulation",
    async (bench) => {
      const parts = await bench.train({ microBatchSize: 1, steps: 3 });
      const whole = await bench.train({ microBatchSize: 4, steps: 3 });
      const apart = (key: "loss" | "gradNorm") =>
        Math.max(...parts.steps.map((s, i) => Math.abs(s[key] / whole.steps[i]![key] - 1)));
      const worst = Math.max(apart("loss"), apart("gradNorm"));
      // Other orders of summation in float32, three updates of at most 5e-3 apart.
      return { ok: worst < 1e-3, detail: `4 x 1 and 1 x 4 rows differ by ${worst.toExponential(1)} at most, relative` };
    },
  ],
  [
    "cpu offloading",
    async (bench) => {
      const resident = await bench.train({ device: bench.apart, plan: "resident", steps: 3 });
      const deviceMemory = Math.floor(0.8 * resident.peak);
      const run = await bench.train({ ...bench.offloaded, deviceMemory, steps: 3 });
      const same = run.hashes.every((hash, i) => hash !== undefined && hash === resident.hashes[i]);
      const moved = run.steps.every((s) => s.bytesToDevice > 0 && s.bytesFromDevice > 0);
      const apart = Math.max(...run.steps.map((s, i) => Math.abs(s.loss / resident.steps[i]!.loss - 1)));
      // Some of a card's kernels add in an order that is not always the same.
      const close = same || (bench.onCard && apart < 1e-4);
      return {
        ok: close && moved && run.peak < resident.peak && run.peak <= deviceMemory,
        detail:
          `${same ? "the same bits as resident" : `other bits than resident (losses ${apart.toExponential(1)} apart at most)`}; device peak ${formatBytes(run.peak)} of a cap of ` +
          `${formatBytes(deviceMemory)}, resident ${formatBytes(resident.peak)}`,
      };
    },
  ],
  [
    "memory profiling",
    async (bench) => {
      const run = await bench.train({ ...bench.offloaded, steps: 2, profileMemory: 2 });
      const event = run.events.find((e): e is ProfileEvent => e.event === "profile")!;
      const document = JSON.parse(await readFile(event.files[0]!, "utf8")) as { instructions: { endMs: number }[] };
      const off = event.predictedDeviceBytes / event.peakDeviceBytes - 1;
      const bytesOff = Math.abs(event.predictedDeviceBytes - event.peakDeviceBytes);
      const within = Math.max(0.05 * event.peakDeviceBytes, bench.onCard ? IDLE_ON_A_CARD : 0);
      const ended = document.instructions.filter((i) => i.endMs > 0).length;
      return {
        ok: bytesOff <= within && ended > 0 && ended === document.instructions.length,
        detail:
          `predicted device peak ${(100 * off).toFixed(1)} % off the measured ${formatBytes(event.peakDeviceBytes)}, ` +
          `${ended} of ${document.instructions.length} instructions timed`,
      };
    },
  ],
  [
    "mixed precision",
    async (bench) => {
      const [plain, run] = [await bench.plain(), await bench.train({ precision: "bfloat16" })];
      const share = run.bytes.param! / plain.bytes.param!;
      return {
        ok: share === 0.5 && run.gradientDType === "float32" && falls(run),
        detail: `parameters take ${share} of float32's bytes, gradients sum in ${run.gradientDType}, ${course(run)}`,
      };
    },
  ],
  [
    "config integration",
    async (bench) => {
      const config = join(bench.folder, "train.yaml");
      await writeFile(config, yaml(bench));
      const outputDir = join(bench.folder, "configured");
      const run = await bench.train(toTrainerOptions(await readFlags({ config, outputDir })));
      const start = run.events.find((e) => e.event === "start")!;
      const resumed = await bench.train({ resume: true, steps: 4, outputDir });
      const again = resumed.events.find((e) => e.event === "start")!;
      const kept = (e: typeof start) => [e.optimizer, e.precision, e.masterWeight, e.device].join(" ");
      const ok =
        kept(start) === `adamw8bit bfloat16 none ${bench.apart}` &&
        kept(again) === kept(start) &&
        run.steps.length === 2 &&
        again.step === 2 &&
        resumed.steps.at(-1)!.step === 4 &&
        run.events.some((e) => e.event === "profile");
      return {
        ok,
        detail: `${kept(start)}: 2 steps from YAML, resumed after ${again.step}, ended at ${resumed.steps.at(-1)?.step}`,
      };
    },
  ],
];

const yaml = (bench: Bench): string =>
  `model: {config: {vocabSize: 260, dim: 64, layers: 2, heads: 4, kvHeads: 2, ffn: 128, maxPositions: 64}}
data: planets
steps: 2
batch-size: 4
gradient-accumulation-steps: 2
sequence-length: 64
device: ${bench.apart}
device-memory: ${bench.onCard ? "1GB" : "64MB"}
host-memory: 1GB
use-8bit-optimizer: true
use-mixed-precision: true
master-weight: none
use-cpu-offloading: true
use-gradient-checkpointing: true
clip: block
update: forward
profile-memory: 2
threads: 1
`;
