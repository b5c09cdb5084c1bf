/**
 * Saves behind the training: a copy at a step boundary, the writing while the next steps run, one at a time. Where memory
 * does not hold the state twice there is no copy, and the next step waits.
 */

import type { CheckpointStore } from "../checkpoint/store.js";
import { type CheckpointContents, type WriteAmong, writeCheckpoint } from "../checkpoint/write.js";
import type { DataPosition } from "../data/types.js";
import { fromFirst } from "../distributed/ranks.js";
import type { CheckpointEvent } from "./events.js";
import type { NativeRanks, StateEntry, StateKind } from "./native-session.js";
import { type SettledOptions, savedOptions } from "./options.js";
import type { TrainingSession } from "./training-session.js";

export class Saver {
  #inFlight: Promise<void> | undefined;
  #failure: { error: unknown } | undefined;
  #finished: CheckpointEvent[] = [];

  constructor(
    private readonly open: TrainingSession,
    private readonly options: SettledOptions,
    private readonly store: CheckpointStore,
    /** What must be on the disk before a checkpoint of that step exists. */
    private readonly beforePublish: () => Promise<void>,
    private readonly ranks: NativeRanks | null = null,
  ) {}

  /** Takes the copy; the write goes on after the promise resolves, where there is one. Call settled() before. */
  async begin(at: { step: number; tokens: number; position: DataPosition | null }): Promise<void> {
    const { open, options } = this;
    const { session, model, dataset } = open;
    const started = performance.now();
    const entries = await session.state();
    const kinds = [...new Set(entries.map((e) => e.kind))] as StateKind[];
    const optimizerStep = await session.optimizerStep();
    const snapshot = await session.snapshot(kinds);
    const among = await this.#among(entries);
    const contents: CheckpointContents = {
      snapshot,
      entries,
      graph: open.graph,
      evalGraph: open.evalGraph,
      generateGraph: open.generateGraph,
      huggingFaceConfig: model.huggingFaceConfig,
      trainer: savedOptions(options, dataset === options.data ? null : (options.data as string), model.spec),
      facts: {
        step: at.step,
        optimizerStep,
        tokens: at.tokens,
        model: model.name,
        dtype: options.dtype,
        storage: options.precision,
        masterWeight: options.masterWeight,
        plan: open.plan.facts,
        optimizer: options.optimizer,
        data: {
          name: dataset.name,
          fingerprint: dataset.fingerprint,
          sequenceLength: options.sequenceLength,
          microBatchSize: options.microBatchSize,
          position: at.position,
        },
        rng: { generator: "philox4x32-10", seed: options.seed, step: at.step },
        versions: open.versions,
      },
    };
    this.#inFlight = writeCheckpoint(this.store, contents, options.keepLast, this.beforePublish, among).then(
      ({ path, bytes }) => {
        const seconds = (performance.now() - started) / 1000;
        this.#finished.push({ event: "checkpoint", step: at.step, path, bytes, seconds });
      },
      (error) => {
        this.#failure = { error };
      },
    );
    // The state is there once: no step may change it before it is written.
    if (!snapshot.copied) await this.#inFlight;
  }

  /** With ranks: the folder that all write into, and what each holds. */
  async #among(entries: readonly StateEntry[]): Promise<WriteAmong | null> {
    const { ranks } = this;
    if (ranks === null || ranks.size === 1) return null;
    const folder = await fromFirst(ranks, ranks.rank === 0 ? await this.store.temporary() : "");
    const texts = await ranks.gather(JSON.stringify(entries));
    const all = texts.map((text) => JSON.parse(text) as StateEntry[]);
    return { rank: ranks.rank, size: ranks.size, folder, all, lost: () => ranks.lost() };
  }

  /** Saves that ended since the last call. @throws what a save failed with */
  finished(): CheckpointEvent[] {
    if (this.#failure !== undefined) {
      const { error } = this.#failure;
      this.#failure = undefined;
      throw error;
    }
    return this.#finished.splice(0);
  }

  /** As finished(), once the save in flight has ended. */
  async settled(): Promise<CheckpointEvent[]> {
    await this.#inFlight;
    this.#inFlight = undefined;
    return this.finished();
  }

  /** After a failure of the run: lets the write end, so that nothing touches the files afterwards. */
  async abandon(): Promise<void> {
    await this.#inFlight;
  }
}
