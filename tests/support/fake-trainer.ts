/** Trainers over the fake session and the letters: for the loop's laws, in milliseconds. */
import { join } from "node:path";
import { findProfile } from "../../src/plan/profiles.js";
import type { Tape } from "../../src/plan/types.js";
import type { TrainEvent } from "../../src/train/events.js";
import type { NativeSession } from "../../src/train/native-session.js";
import type { TrainerOptions } from "../../src/train/options.js";
import type { Parts } from "../../src/train/parts.js";
import { Trainer } from "../../src/train/trainer.js";
import { LETTERS, letters } from "./fake-data.js";
import { bigramGraph, type FakeFaults, FakeSession } from "./fake-session.js";

export interface FakeParts extends Parts {
  sessions: FakeSession[];
}

export function fakeParts(faults: FakeFaults = {}, vocabulary = LETTERS.length): FakeParts {
  const sessions: FakeSession[] = [];
  return {
    sessions,
    createSession: async (options) => {
      const session = new FakeSession(options, faults);
      sessions.push(session);
      return session;
    },
    joinRanks: async () => {
      throw new Error("the fakes train alone");
    },
    transportFacts: async () => {
      throw new Error("the fakes train alone");
    },
    libtorchVersion: async () => "none",
    openDataset: async (spec) => letters({ name: String(spec) }),
    resolveModel: (spec) => ({
      name: "bigram",
      spec: spec as string,
      graph: (mode) => bigramGraph(vocabulary, mode),
      huggingFaceConfig: { model_type: "bigram" },
    }),
    chooseDevice: (asked) => ({ device: asked === "auto" || asked === "cuda" ? "cpu" : asked, why: null }),
    computeDType: async () => ({ dtype: "float32", why: "nothing is computed here" }),
    resources: async () => ({ cardBytes: null, memoryBytes: 1e12, profile: findProfile("cpu"), guess: null }),
    context: async () => null,
    plan: async (graph, o) => {
      const placement = { arenas: { deviceBytes: 0, hostBytes: 0, diskBytes: 0 }, homes: [] };
      const tape = (microBatches: number): Tape => ({
        format: "stromatolite.tape",
        version: 2,
        kind: "step",
        schedule: o.order ?? "breadthFirst",
        recompute: "none",
        update: "end",
        clip: o.clip,
        state: { storage: "float32", masterWeight: "none", optimizer: "adamw" },
        microBatches,
        dims: null,
        placement,
        slots: 0,
        places: [],
        instructions: [],
      });
      return {
        graph,
        placement,
        facts: {
          ...{ tapeHash: "0", order: "breadthFirst", recompute: "none", update: "end", clip: o.clip },
          ...{ fused: 1, blocksMerged: 1, retainedDType: null },
        },
        summary: "a fake",
        predicted: null,
        predict: () => {
          throw new Error("nothing is predicted here");
        },
        padded: (count) => count,
        share: { member: 0, members: 1 },
        tapes: (microBatches) => ({ step: tape(microBatches), flush: null }),
      };
    },
  };
}

/** Small and quick; losses fall. */
export const SMALL = {
  model: "bigram",
  data: "letters",
  steps: 20,
  batchSize: 6,
  microBatchSize: 2,
  sequenceLength: 12,
  learningRate: 0.05,
  saveEveryNSteps: 0,
  seed: 7,
} satisfies TrainerOptions;

export async function collect(trainer: Trainer, signal?: AbortSignal): Promise<TrainEvent[]> {
  const events: TrainEvent[] = [];
  for await (const event of trainer.run(signal)) events.push(event);
  return events;
}

export const only = <K extends TrainEvent["event"]>(
  events: TrainEvent[],
  kind: K,
): Extract<TrainEvent, { event: K }>[] =>
  events.filter((e): e is Extract<TrainEvent, { event: K }> => e.event === kind);

/** Runs to the end and returns its events; the session is closed. */
export async function train(options: TrainerOptions, parts: Partial<Parts>): Promise<TrainEvent[]> {
  await using trainer = new Trainer(options, parts);
  return await collect(trainer);
}

/** Every number that a session holds, for comparing to the bit. */
export async function stateBytes(session: NativeSession): Promise<Record<string, string>> {
  const result: Record<string, string> = {};
  for (const { kind, name } of await session.state()) {
    if (kind === "step") continue;
    const { data } = await session.read(kind, name);
    result[`${kind} ${name}`] = Buffer.from(data.buffer, data.byteOffset, data.byteLength).toString("base64");
  }
  result.optimizerStep = String(await session.optimizerStep());
  return result;
}

export const checkpointsOf = (outputDir: string): string => join(outputDir, "checkpoints");
