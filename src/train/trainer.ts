/** Trains a model: options, a resume, ranks and the output folder come together here, and run.ts takes the steps. */
import { mkdir, rmdir } from "node:fs/promises";
import { dirname, join, resolve } from "node:path";
import { lockFolder, readJson } from "../checkpoint/files.js";
import { FILES } from "../checkpoint/format.js";
import { type Checkpoint, openCheckpoint, verifyCheckpoint } from "../checkpoint/read.js";
import { CheckpointStore } from "../checkpoint/store.js";
import type { Dataset } from "../data/types.js";
import { fromFirst } from "../distributed/ranks.js";
import { StromaError } from "../errors.js";
import { type GenerateOptions, generateMany, generateText, streamText } from "../generate/generate.js";
import { type EvaluateOptions, type EvaluateResult, evaluateSession } from "./evaluate.js";
import { EventQueue } from "./event-queue.js";
import type { TrainEvent } from "./events.js";
import type { NativeRanks } from "./native-session.js";
import {
  mergeOptions,
  type ResolvedOptions,
  resolveOptions,
  type SettledOptions,
  type TrainerOptions,
} from "./options.js";
import { type Parts, realParts } from "./parts.js";
import { Run } from "./run.js";
import { openTrainingSession, type TrainingSession } from "./training-session.js";

/** Events that may wait for a slow consumer before training waits too. */
const EVENTS_AHEAD = 64;

export class Trainer implements AsyncDisposable {
  readonly #given: TrainerOptions;
  readonly #parts: Parts;
  #options: ResolvedOptions | undefined;
  #outputDir: string | undefined;
  #open: TrainingSession | undefined;
  #running: Promise<void> | undefined;
  #ranks: NativeRanks | undefined;
  #started = false;
  readonly #stopping = new AbortController();
  #disposed = false;

  /**
   * @param parts for tests of the loop: other makers of sessions, data and models
   * @throws CONFIG for options that contradict each other, INVALID_ARGUMENT for a value out of range. With `resume` the
   * options are complete only once the checkpoint is read, so run() throws then.
   */
  constructor(options: TrainerOptions, parts: Partial<Parts> = {}) {
    this.#given = options;
    this.#parts = { ...realParts, ...parts };
    if (options.resume === undefined || options.resume === false)
      this.#options = resolveOptions(options, this.#parts.chooseDevice);
  }

  /** Where metrics.jsonl, loss.svg and checkpoints/ are; known once run() gave its first event. */
  get outputDir(): string {
    if (this.#outputDir === undefined)
      throw new StromaError("INVALID_ARGUMENT", "[trainer] outputDir is known once run() has begun");
    return this.#outputDir;
  }

  /**
   * Trains; once per Trainer. A consumer that falls behind by 64 events makes training wait; none is lost. Leaving the
   * loop early is stop().
   * @param signal aborting it is stop(): the step ends, a checkpoint is saved, the last event is `done`
   * @throws NON_FINITE, DISK_FULL, CHECKPOINT, DATA, SHAPE, NATIVE, OUT_OF_MEMORY: after the events before it
   */
  async *run(signal?: AbortSignal): AsyncGenerator<TrainEvent, void, void> {
    if (this.#disposed) throw new StromaError("DISPOSED", "[trainer] run() after dispose()");
    if (this.#started)
      throw new StromaError("BUSY", "[trainer] run() was called before. Make another Trainer with resume");
    this.#started = true;
    const queue = new EventQueue<TrainEvent>(EVENTS_AHEAD);
    const stop = (): void => this.stop();
    if (signal?.aborted) stop();
    signal?.addEventListener("abort", stop, { once: true });
    this.#running = this.#train(queue).then(
      () => queue.end(),
      (error) => queue.end(error),
    );
    try {
      yield* queue;
    } finally {
      this.stop();
      queue.leave();
      signal?.removeEventListener("abort", stop);
      await this.#running;
    }
  }

  /** Ends the run after the step in flight, with a checkpoint. */
  stop(): void {
    this.#stopping.abort();
  }

  /** The text that follows `prompt`, by the parameters as they are; also while training. */
  async generate(prompt: string, options: GenerateOptions = {}): Promise<string> {
    return generateText(this.#alone("generate").textModel(), prompt, options);
  }

  /** As generate(), piece by piece. */
  async *stream(prompt: string, options: GenerateOptions = {}): AsyncGenerator<string, void, void> {
    yield* streamText(this.#alone("stream").textModel(), prompt, options);
  }

  /** As generate(), for many prompts at once. */
  async generateMany(prompts: readonly string[], options: GenerateOptions = {}): Promise<string[]> {
    return generateMany(this.#alone("generateMany").textModel(), prompts, options);
  }

  /** Held-out loss by the parameters as they are; also while training. */
  async evaluate(options: Partial<EvaluateOptions> = {}): Promise<EvaluateResult> {
    const { requests, evalGraph, dataset } = this.#alone("evaluate");
    const { sequenceLength, microBatchSize } = this.#options!;
    return evaluateSession(requests, evalGraph, dataset, { sequenceLength, microBatchSize, ...options });
  }

  /** Stops a run in flight (it saves), then returns all memory. */
  async dispose(): Promise<void> {
    this.#disposed = true;
    this.stop();
    await this.#running;
    await this.#open?.session.dispose();
    this.#open = undefined;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.dispose();
  }

  /** What one rank asks of a model that several hold would wait for the others for ever. */
  #alone(method: string): TrainingSession {
    if ((this.#ranks?.size ?? 1) > 1)
      throw new StromaError(
        "RANKS",
        `[trainer] ${method}() needs the blocks of all ranks. Use evalEveryNSteps and sampleEveryNSteps, or a checkpoint`,
      );
    return this.#session();
  }

  #session(): TrainingSession {
    if (this.#disposed) throw new StromaError("DISPOSED", "[trainer] used after dispose()");
    if (this.#open === undefined)
      throw new StromaError("INVALID_ARGUMENT", "[trainer] the model is there once run() gave its first event");
    return this.#open;
  }

  /** Joins the other ranks, and tells them should this one fail. */
  async #train(queue: EventQueue<TrainEvent>): Promise<void> {
    const spec = this.#given.ranks;
    if (spec === undefined) return this.#trainAmong(queue, null);
    let ranks: NativeRanks;
    try {
      ranks = await this.#parts.joinRanks(spec, this.#stopping.signal);
    } catch (error) {
      // Nothing was begun, and who asked need not wait for ranks that may never come.
      if (this.#stopping.signal.aborted) return;
      throw error;
    }
    this.#ranks = ranks;
    try {
      await this.#trainAmong(queue, ranks);
    } catch (error) {
      ranks.fail((error as Error).message);
      throw error;
    } finally {
      // The session's thread may still wait for others: it is told, and ends, before the ranks go.
      await this.#open?.session.dispose();
      await ranks.leave();
    }
  }

  async #trainAmong(queue: EventQueue<TrainEvent>, ranks: NativeRanks | null): Promise<void> {
    const first = ranks === null || ranks.rank === 0;
    const resumed = await this.#findResumeAmong(ranks);
    const saved = resumed === null ? {} : await readSavedOptions(resumed);
    const { resume: _resume, ...given } = this.#given;
    this.#options ??= resolveOptions(mergeOptions(saved, given), this.#parts.chooseDevice);
    const { options, reason } = await this.#settle(this.#options);
    const model = this.#parts.resolveModel(options.model);
    const outputDir = resolve(options.outputDir ?? (resumed === null ? join("runs", model.name) : runOf(resumed)));
    this.#outputDir = outputDir;
    const made = (await mkdir(outputDir, { recursive: true })) !== undefined;
    // One writer of the folder: rank 0, which gives others' parts their places.
    const unlock = first ? await lockFolder(outputDir) : async () => {};
    const store = new CheckpointStore(outputDir);
    try {
      if (first) await store.prepare();
      if (first && resumed === null) await refuseToMix(store);
      const dataset = isDataset(options.data) ? options.data : await this.#parts.openDataset(options.data);
      const open = await openTrainingSession(options, outputDir, model, dataset, resumed, this.#parts, ranks);
      this.#open = open;
      const run = new Run(open, options, reason, store, outputDir, resumed, queue, this.#given.onEvent, ranks);
      try {
        await run.all(() => this.#stopping.signal.aborted);
      } finally {
        await run.close();
      }
    } finally {
      await unlock();
      // A run that was refused leaves no folders behind.
      if (first) for (const folder of [store.folder, ...(made ? [outputDir] : [])]) await rmdir(folder).catch(() => {});
    }
  }

  /** The dtype that blocks compute in, where the options leave it to the machine, and why. */
  async #settle(options: ResolvedOptions): Promise<{ options: SettledOptions; reason: string | null }> {
    const { dtype } = options;
    if (dtype !== null) return { options: { ...options, dtype }, reason: null };
    const chosen = await this.#parts.computeDType(options.device);
    return { options: { ...options, dtype: chosen.dtype }, reason: chosen.why };
  }

  /** Rank 0 looks, and checks every hash; the others take the one that it found. */
  async #findResumeAmong(ranks: NativeRanks | null): Promise<(Checkpoint & { skipped: StromaError[] }) | null> {
    if (ranks === null) return this.#findResume();
    const found = ranks.rank === 0 ? await this.#findResume() : null;
    const path = await fromFirst(ranks, found?.path ?? "");
    if (path === "") return null;
    return found ?? { ...(await verifyCheckpoint(path, { hashes: false })), skipped: [] };
  }

  async #findResume(): Promise<(Checkpoint & { skipped: StromaError[] }) | null> {
    const { resume, outputDir, model } = this.#given;
    if (resume === undefined || resume === false) return null;
    if (typeof resume === "string" && resume !== "auto") return openCheckpoint(resume);
    const folder = outputDir ?? (model === undefined ? undefined : join("runs", this.#parts.resolveModel(model).name));
    if (folder === undefined)
      throw new StromaError("CONFIG", `[trainer] resume: ${String(resume)} needs outputDir, to know whose checkpoints`);
    const found = await new CheckpointStore(folder).latest();
    if (found !== null) return { ...found.checkpoint, skipped: found.skipped };
    if (resume === "auto") return null;
    throw new StromaError(
      "CHECKPOINT",
      `[trainer] nothing to resume: no checkpoint in ${folder}. Train without resume first`,
      {
        path: folder,
      },
    );
  }
}

async function readSavedOptions(checkpoint: Checkpoint): Promise<TrainerOptions> {
  const file = join(checkpoint.path, FILES.trainer);
  const saved = await readJson(file);
  if (
    saved.format !== "stromatolite.trainer" ||
    saved.version !== 1 ||
    typeof saved.options !== "object" ||
    saved.options === null
  )
    throw new StromaError("CHECKPOINT", `[trainer] ${file}: expected the trainer's options, version 1`, { path: file });
  return saved.options as TrainerOptions;
}

/** The output folder that a checkpoint lies in. */
const runOf = (checkpoint: Checkpoint): string => dirname(dirname(checkpoint.path));

/** A new run would remove an older run's checkpoints one by one, and its metrics at once. */
async function refuseToMix(store: CheckpointStore): Promise<void> {
  const listed = await store.list();
  if (listed.length > 0)
    throw new StromaError(
      "CONFIG",
      `[trainer] ${dirname(store.folder)} holds ${listed.length} checkpoint(s) of an earlier run, the latest of step ${listed[0]!.step}. Resume it, or give another outputDir`,
      { path: store.folder },
    );
}

function isDataset(data: ResolvedOptions["data"]): data is Dataset {
  return typeof data === "object" && typeof (data as Dataset).open === "function";
}
