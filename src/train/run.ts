/**
 * One run of the training loop. Everything that is not arithmetic hangs on step boundaries here: logging, evaluation,
 * samples, saving, stopping, the learning rate. A step is one call of the engine.
 */
import { dirname, join } from "node:path";
import { replaceFile } from "../checkpoint/files.js";
import type { Checkpoint } from "../checkpoint/read.js";
import type { CheckpointStore } from "../checkpoint/store.js";
import type { BatchStream, DataBatch } from "../data/types.js";
import { monotonicMs } from "../distributed/clock.js";
import { anyRank } from "../distributed/ranks.js";
import { splitBatch } from "../distributed/split-batch.js";
import { StromaError } from "../errors.js";
import { generateMany } from "../generate/generate.js";
import { learningRateAt } from "../optim/schedules.js";
import type { Tape } from "../plan/types.js";
import { evaluateSession } from "./evaluate.js";
import type { EventQueue } from "./event-queue.js";
import type { CheckpointEvent, TrainEvent } from "./events.js";
import { renderLossSvg, thinEvents } from "./loss-svg.js";
import { MetricsFile, readMetrics } from "./metrics.js";
import type { Batch, NativeRanks, StepRequest, StepResult } from "./native-session.js";
import { MOST_SKIPS, resolveSchedule, type SettledOptions, type TrainerOptions } from "./options.js";
import { joinBatches, pickInputs, uncounted } from "./parts.js";
import { Saver } from "./saver.js";
import type { TrainingSession } from "./training-session.js";

/** Micro-batches that tell how full the rows of a data set are. */
const DRY_MICRO_BATCHES = 64;

/** One run over an open session: its counters, its files, its events. */
export class Run {
  #step: number;
  #tokens: number;
  #epochs: number;
  #skips = 0;
  #loss: number | null = null;
  #evaluated: number | null = null;
  #profiled: number | null = null;
  /** The last step, where its number is not one that is shown: the end shows it. */
  #hidden: TrainEvent | null = null;
  #lastSaved: { step: number; path: string } | null = null;
  #metrics: MetricsFile | undefined;
  #stream: BatchStream | undefined;
  #position: DataBatch["position"] | null;
  readonly #saver: Saver;
  /** Of several ranks one writes metrics and pictures. */
  readonly #first: boolean;
  readonly #started = performance.now();
  #boundary = this.#started;

  constructor(
    private readonly open: TrainingSession,
    private readonly options: SettledOptions,
    private readonly dtypeReason: string | null,
    store: CheckpointStore,
    private readonly outputDir: string,
    private readonly resumed: (Checkpoint & { skipped: StromaError[] }) | null,
    private readonly queue: EventQueue<TrainEvent>,
    private readonly onEvent: TrainerOptions["onEvent"],
    private readonly ranks: NativeRanks | null,
  ) {
    this.#first = ranks === null || ranks.rank === 0;
    this.#step = resumed?.state.step ?? 0;
    this.#tokens = resumed?.state.tokens ?? 0;
    this.#position = resumed?.state.data.position ?? null;
    this.#epochs = this.#position?.epoch ?? 0;
    this.#saver = new Saver(open, options, store, async () => this.#metrics?.flush(), ranks);
    if (resumed !== null && dirname(resumed.path) === store.folder)
      this.#lastSaved = { step: resumed.state.step, path: resumed.path };
  }

  async all(asked: () => boolean): Promise<void> {
    const { options, open, ranks } = this;
    // All ranks stop at the same boundary.
    const stopping = async (): Promise<boolean> => (ranks === null ? asked() : anyRank(ranks, asked()));
    const metricsPath = join(this.outputDir, "metrics.jsonl");
    if (this.#first) this.#metrics = await MetricsFile.open(metricsPath, this.resumed === null ? null : this.#step);
    this.#stream = await open.dataset.open({
      split: "train",
      sequenceLength: options.sequenceLength,
      microBatchSize: options.microBatchSize,
      seed: options.seed,
      ...(options.epochs === null ? {} : { epochs: options.epochs }),
      ...(this.#position === null ? {} : { position: this.#position }),
    });
    const steps = options.steps ?? (await this.#stepsOfEpochs());
    const schedule = resolveSchedule(options.learningRateSchedule, steps);
    this.#profiled = this.#profiledStep(steps);
    await this.#emit({
      event: "start",
      model: open.model.name,
      parameters: open.graph.parameters.reduce((n, p) => n + p.shape.reduce((a, b) => a * b, 1), 0),
      data: open.dataset.name,
      step: this.#step,
      steps,
      tokensPerStep: options.batchSize * options.sequenceLength,
      schedule: open.plan.facts.order,
      device: options.device,
      deviceReason: options.deviceReason,
      dtype: options.dtype,
      dtypeReason: this.dtypeReason,
      precision: options.precision,
      masterWeight: options.masterWeight,
      optimizer: options.optimizer.kind,
      plan: open.plan.summary,
      resumedFrom: this.resumed?.path ?? null,
    });
    for (const { code, message } of this.resumed?.skipped ?? []) await this.#warn(code, `passed over: ${message}`);
    if (open.planDiffers.length > 0)
      await this.#warn("PLAN", `this plan rounds otherwise than the one before: ${open.planDiffers.join("; ")}`);

    const last = (): boolean => options.steps !== null && this.#step >= options.steps;
    let stop = await stopping();
    let next = last() || stop ? null : this.#gather();
    let reason: "steps" | "interrupted" = "steps";
    this.#boundary = performance.now();
    while (next !== null) {
      if (stop) {
        reason = "interrupted";
        break;
      }
      const batches = await next;
      if (batches.length === 0) break;
      const more = options.steps === null || this.#step + 1 < options.steps;
      next = more ? this.#gather() : null;
      await this.#take(batches, learningRateAt(schedule, options.learningRate, this.#step, steps), !more);
      stop = await stopping();
    }
    if (next === null && stop && !last()) reason = "interrupted";
    await this.#finish(reason, metricsPath);
  }

  async close(): Promise<void> {
    await this.#saver.abandon();
    await this.#metrics?.close();
    await this.#stream?.close();
  }

  /** The micro-batches of a step, read while the one before runs; fewer at the end of the data. */
  #gather(): Promise<DataBatch[]> {
    const stream = this.#stream!;
    const gathered = (async () => {
      const batches: DataBatch[] = [];
      while (batches.length < this.options.gradientAccumulationSteps) {
        const batch = await stream.next();
        if (batch === null) break;
        batches.push(batch);
      }
      return batches;
    })();
    gathered.catch(() => {}); // it is reported when it is waited for
    return gathered;
  }

  async #take(batches: DataBatch[], learningRate: number, isLast: boolean): Promise<void> {
    const { options, open } = this;
    const { fused } = open.plan.facts;
    const picked = batches.map((b) => pickInputs(open.graph.inputs, b.tensors, "trainer"));
    const microBatches = Array.from({ length: Math.ceil(picked.length / fused) }, (_, i) =>
      joinBatches(picked.slice(i * fused, (i + 1) * fused)),
    );
    for (const blank = open.plan.padded(microBatches.length); microBatches.length < blank; )
      microBatches.push(uncounted(open.graph, microBatches.at(-1)!));
    const shared = this.#shares(microBatches);
    const { step: tape, flush } = open.plan.tapes(microBatches.length);
    const profile = this.#profiled === this.#step + 1;
    const result = await open.session.step({
      tape,
      profile,
      ...(flush === null ? {} : { flush }),
      ...(shared ?? { microBatches }),
      step: this.#step,
      seed: options.seed,
      learningRate,
      maxGradNorm: options.maxGradNorm,
    });
    const began = monotonicMs() - result.seconds * 1e3;
    const tokens = batches.reduce((n, b) => n + b.tokens, 0);
    const at = ++this.#step;
    if (result.nonFinite !== null) {
      const { microBatch, loss } = result.nonFinite;
      if (options.nonFinite === "stop" || ++this.#skips > MOST_SKIPS)
        throw nonFinite(at, microBatch, microBatches.length, loss, this.#skips);
      this.#position = batches.at(-1)!.position;
      await this.#emit({ event: "skip", step: at, microBatch, loss });
    } else {
      this.#skips = 0;
      this.#tokens += tokens;
      this.#position = batches.at(-1)!.position;
      this.#loss = result.loss;
      const now = performance.now();
      const seconds = (now - this.#boundary) / 1000;
      this.#boundary = now;
      const event: TrainEvent = {
        event: "step",
        step: at,
        epoch: batches.at(-1)!.epoch,
        loss: result.loss,
        gradNorm: result.gradNorm,
        learningRate,
        tokens,
        tokensPerSecond: tokens / seconds,
        seconds,
        peakDeviceBytes: result.peakDeviceBytes,
        peakHostBytes: result.peakHostBytes,
        bytesToDevice: result.bytesToDevice,
        bytesFromDevice: result.bytesFromDevice,
        bytesLoaded: result.bytesLoaded,
        bytesSaved: result.bytesSaved,
      };
      this.#metrics?.append(event);
      if (at === 1 || at % options.logEveryNSteps === 0) await this.#show(event);
      else this.#hidden = event;
    }
    if (profile && result.nonFinite === null) await this.#writeProfile(tape, result, began);
    if (result.skippedBlocks.length > 0) {
      const names = result.skippedBlocks.map((b) => open.plan.graph.blocks[b]!.name).join(", ");
      await this.#warn("NON_FINITE", `step ${at} left blocks as they were whose gradient was not finite: ${names}`);
    }
    this.#metrics?.check();
    await this.#atBoundary(at, isLast);
  }

  /** This rank's shares of the rows, and what is counted in all of them; null where rows are whole. */
  #shares(microBatches: Batch[]): Pick<StepRequest, "microBatches" | "counts"> | null {
    const { ranks, context } = this.options;
    if (ranks === null || context === 1) return null;
    const place = { rank: ranks.rank % context, ranks: context };
    const shares = microBatches.map((batch) => splitBatch(this.open.graph, batch, place));
    const counts: Record<string, number> = {};
    for (const share of shares)
      for (const [name, n] of Object.entries(share.counts)) counts[name] = (counts[name] ?? 0) + n;
    return { microBatches: shares.map((s) => s.batch), counts };
  }

  /** Evaluation, samples, saves that are due; saves that have ended. */
  async #atBoundary(step: number, isLast: boolean): Promise<void> {
    const { options } = this;
    const due = (n: number): boolean => n > 0 && step % n === 0;
    if (due(options.evalEveryNSteps)) {
      await this.#evaluate(step);
      this.#boundary = performance.now();
    }
    if (due(options.sampleEveryNSteps)) {
      const texts = await generateMany(this.open.textModel(), options.samplePrompts, {
        maxTokens: options.sampleTokens,
        temperature: 0,
      });
      for (const [i, prompt] of options.samplePrompts.entries())
        await this.#emit({ event: "sample", step, prompt, text: texts[i]! });
      this.#boundary = performance.now();
    }
    const epochs = this.#position!.epoch;
    const newEpoch = epochs > this.#epochs && options.saveEveryNEpochs > 0 && epochs % options.saveEveryNEpochs === 0;
    this.#epochs = epochs;
    await this.#reportSaves(this.#saver.finished());
    if (!isLast && (due(options.saveEveryNSteps) || newEpoch)) await this.#save();
  }

  async #evaluate(step: number): Promise<void> {
    const { options, open, ranks } = this;
    const { sequenceLength, microBatchSize, evalMicroBatches: microBatches } = options;
    const { share } = open.plan;
    const among =
      ranks === null || share.members === 1 ? null : { ...share, gather: (mine: string) => ranks.gather(mine) };
    const how = { sequenceLength, microBatchSize, microBatches };
    const result = await evaluateSession(open.requests, open.evalGraph, open.dataset, how, among);
    this.#evaluated = step;
    await this.#emit({ event: "eval", step, ...result });
  }

  /** Copies the state now; writes it behind the next steps. */
  async #save(): Promise<void> {
    await this.#reportSaves(await this.#saver.settled());
    await this.#saver.begin({ step: this.#step, tokens: this.#tokens, position: this.#position });
  }

  async #reportSaves(events: CheckpointEvent[]): Promise<void> {
    for (const event of events) {
      this.#lastSaved = { step: event.step, path: event.path };
      await this.#emit(event);
    }
  }

  async #finish(reason: "steps" | "interrupted", metricsPath: string): Promise<void> {
    if (this.#hidden !== null) await this.#show(this.#hidden);
    if (this.options.evalEveryNSteps > 0 && reason === "steps" && this.#evaluated !== this.#step)
      await this.#evaluate(this.#step);
    await this.#reportSaves(await this.#saver.settled());
    if (this.#lastSaved?.step !== this.#step) {
      await this.#save();
      await this.#reportSaves(await this.#saver.settled());
    }
    const seconds = (performance.now() - this.#started) / 1000;
    const checkpoint = this.#lastSaved?.path ?? null;
    await this.#metrics?.flush();
    if (this.#first) {
      const events = await thinEvents(readMetrics(metricsPath));
      await replaceFile(join(this.outputDir, "loss.svg"), renderLossSvg(events));
    }
    await this.#emit({ event: "done", step: this.#step, reason, loss: this.#loss, seconds, checkpoint });
    await this.#metrics?.flush();
    // A scheduler may end all ranks where one has ended (srun --kill-on-bad-exit): not before the first has written this.
    await this.ranks?.gather("done");
  }

  /** The step that profileMemory asks for. */
  #profiledStep(steps: number): number | null {
    const { profileMemory } = this.options;
    if (profileMemory === false) return null;
    const step = profileMemory === true ? Math.min(this.#step + 2, steps) : profileMemory;
    if (step <= this.#step || step > steps)
      throw new StromaError(
        "CONFIG",
        `[trainer] profileMemory ${step} is not among the steps ${this.#step + 1} to ${steps} that this run takes`,
      );
    return step;
  }

  /** `began`: of the step, on this process's clock; a moment late, where its end was not heard at once. */
  async #writeProfile(tape: Tape, result: StepResult, began: number): Promise<void> {
    const { graph, predict } = this.open.plan;
    const { writeProfile, writeProfilesOfRanks } = await import("../profile/index.js");
    const predicted = predict(tape);
    const { device, deviceMemory: capBytes, microBatchSize: B, sequenceLength: T } = this.options;
    const input = { graph, tape, profile: result.profile!, result, predicted, capBytes, dims: { B, T }, device };
    const folder = join(this.outputDir, `profile-${this.#step}`);
    const files =
      this.ranks === null
        ? await writeProfile(folder, input)
        : await writeProfilesOfRanks(this.ranks, folder, input, began);
    await this.#emit({
      event: "profile",
      step: this.#step,
      files,
      peakDeviceBytes: result.peakDeviceBytes,
      predictedDeviceBytes: predicted.peaks.deviceBytes,
    });
    this.#boundary = performance.now();
  }

  #warn(code: string, message: string): Promise<void> {
    return this.#emit({ event: "warning", step: this.#step, code, message });
  }

  async #emit(event: TrainEvent): Promise<void> {
    this.#metrics?.append(event);
    await this.#show(event);
  }

  async #show(event: TrainEvent): Promise<void> {
    this.#hidden = null;
    await this.onEvent?.(event);
    await this.queue.push(event);
  }

  /**
   * Total steps of a run in epochs, for the learning rate and the time left (the data itself ends the run): counted in a
   * dry pass; where the data tells its size, the pass is cut short and extrapolated. The same data give the same number.
   */
  async #stepsOfEpochs(): Promise<number> {
    const { sequenceLength, microBatchSize, gradientAccumulationSteps, seed, epochs } = this.options;
    const size = await this.open.dataset.tokensPerEpoch("train");
    await using stream = await this.open.dataset.open({
      split: "train",
      sequenceLength,
      microBatchSize,
      seed,
      epochs: 1,
    });
    let microBatches = 0;
    let tokens = 0;
    for (let batch = await stream.next(); batch !== null; batch = await stream.next()) {
      microBatches++;
      tokens += batch.tokens;
      if (size === null || microBatches < DRY_MICRO_BATCHES || tokens === 0) continue;
      microBatches *= Math.max(1, size / tokens);
      break;
    }
    return Math.max(1, Math.ceil((microBatches * epochs!) / gradientAccumulationSteps));
  }
}

function nonFinite(step: number, microBatch: number, of: number, loss: number, skips: number): StromaError {
  const what = microBatch < 0 ? "the gradient norm" : `the loss of micro-batch ${microBatch} (of ${of}, from 0)`;
  const before = skips > 0 ? ` after ${skips - 1} skipped steps in a row` : "";
  return new StromaError(
    "NON_FINITE",
    `[trainer] step ${step}: ${what} is ${loss}${before}. No parameter was changed. Lower the learning rate, look at that batch, or skip such steps (nonFinite: "skip")`,
    { step, microBatch, loss },
  );
}
