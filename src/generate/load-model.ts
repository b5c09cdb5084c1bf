/** A trained model for use: from a checkpoint of a run, or from a Hugging Face folder. */
import { stat } from "node:fs/promises";
import { basename, join, resolve } from "node:path";
import { FILES } from "../checkpoint/format.js";
import { loadPretrained } from "../checkpoint/pretrained.js";
import { openCheckpoint, readGraph, restoreSession } from "../checkpoint/read.js";
import { ByteTokenizer } from "../data/tokenizer.js";
import type { Dataset, Tokenizer } from "../data/types.js";
import type { Device, DeviceOption } from "../device.js";
import { invalidArgument, StromaError } from "../errors.js";
import type { DType, Graph } from "../graph/types.js";
import { validateGraph } from "../graph/validate.js";
import { dtypeBytes } from "../graph/value.js";
import { EVAL, type EvaluateOptions, type EvaluateResult, evaluateSession } from "../train/evaluate.js";
import { gate, type Runner } from "../train/gate.js";
import { resolveModel } from "../train/model-source.js";
import type { NativeSession, SessionOptions } from "../train/native-session.js";
import { MAX_THREADS } from "../train/options.js";
import { type Parts, realParts } from "../train/parts.js";
import { contextLength } from "../train/training-session.js";
import { GENERATE, type GenerateOptions, generateMany, generateText, streamText, type TextModel } from "./generate.js";

export interface LoadModelOptions {
  /** auto: the first card that can be used and has room for the model, else the processors. Default "auto". */
  device?: DeviceOption;
  /** Default: the checkpoint's; float32 for a Hugging Face folder. */
  dtype?: SessionOptions["dtype"];
  /** 0: all this process may use. Default 0. */
  threads?: number;
  /** Default: bytes. */
  tokenizer?: Tokenizer;
}

/** Holds native memory: dispose it, or `await using`. */
export class LoadedModel implements AsyncDisposable {
  #disposed = false;
  readonly #requests: Runner;

  /** Use loadModel(). */
  constructor(
    readonly name: string,
    /** Folder of the checkpoint. */
    readonly path: string,
    /** Steps that the checkpoint was trained for; null for a Hugging Face folder. */
    readonly step: number | null,
    readonly tokenizer: Tokenizer,
    private readonly session: NativeSession,
    private readonly graphs: { eval: Graph; generate: Graph },
    /** The length that it was trained with, where known. */
    readonly sequenceLength: number | null,
    /** Where it runs, and why where the caller did not say. */
    readonly device: Device,
    readonly deviceReason: string | null,
  ) {
    this.#requests = gate(session);
  }

  /** The text that follows `prompt`. @throws INVALID_ARGUMENT, ABORTED, DISPOSED */
  async generate(prompt: string, options: GenerateOptions = {}): Promise<string> {
    return generateText(this.#text(), prompt, options);
  }

  /** As generate(), piece by piece. */
  async *stream(prompt: string, options: GenerateOptions = {}): AsyncGenerator<string, void, void> {
    yield* streamText(this.#text(), prompt, options);
  }

  /** As generate(), for many prompts; those of equal length run together. */
  async generateMany(prompts: readonly string[], options: GenerateOptions = {}): Promise<string[]> {
    return generateMany(this.#text(), prompts, options);
  }

  /** Loss and bits per byte over the validation split. Default: rows of the trained length, 8 at a time, all of them. */
  async evaluate(dataset: Dataset, options: Partial<EvaluateOptions> = {}): Promise<EvaluateResult> {
    this.#text();
    const { sequenceLength = this.sequenceLength ?? 256, microBatchSize = 8, ...rest } = options;
    return evaluateSession(this.#requests, this.graphs.eval, dataset, { sequenceLength, microBatchSize, ...rest });
  }

  async dispose(): Promise<void> {
    this.#disposed = true;
    await this.session.dispose();
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.dispose();
  }

  #text(): TextModel {
    if (this.#disposed) throw new StromaError("DISPOSED", "[model] used after dispose()");
    const { generate: graph } = this.graphs;
    return { session: this.#requests, graph, tokenizer: this.tokenizer, contextLength: contextLength(graph) };
  }
}

/**
 * @param path a checkpoint, a run's folder (its latest whole checkpoint), or a Hugging Face folder
 * @throws CHECKPOINT for what is missing, damaged or of another model; INVALID_ARGUMENT for threads out of range;
 * NOT_SET_UP without the addon
 */
export async function loadModel(
  path: string,
  options: LoadModelOptions = {},
  parts: Partial<Parts> = {},
): Promise<LoadedModel> {
  const { createSession, chooseDevice } = { ...realParts, ...parts };
  const { threads = 0, tokenizer = new ByteTokenizer() } = options;
  if (!Number.isSafeInteger(threads) || threads < 0 || threads > MAX_THREADS)
    throw invalidArgument("model", `a whole number from 0 to ${MAX_THREADS}`, threads, "threads");
  const open = async (
    dtype: SessionOptions["dtype"],
    storage: SessionOptions["storage"],
    graphs: Record<"train" | "eval" | "generate", Graph>,
  ) => {
    // The optimizer's numbers are never used: frozen parameters have no state.
    const { device, why } = chooseDevice(options.device ?? "auto", {
      needsBytes: bytesOf(graphs.train, storage ?? dtype),
    });
    const optimizer = { kind: "adamw", beta1: 0.9, beta2: 0.95, epsilon: 1e-8, weightDecay: 0 } as const;
    const session = await createSession({ device, dtype, storage, threads, optimizer });
    try {
      await session.load(frozen(graphs.train));
      await session.attach(EVAL, graphs.eval);
      await session.attach(GENERATE, graphs.generate);
      return { session, device, why };
    } catch (error) {
      await session.dispose();
      throw error;
    }
  };
  const fill = async (session: NativeSession, work: Promise<void>): Promise<void> => {
    try {
      await work;
    } catch (error) {
      await session.dispose();
      throw error;
    }
  };
  if (await isHuggingFace(path)) {
    const dtype = options.dtype ?? "float32";
    const model = resolveModel(resolve(path));
    const graphs = {
      train: model.graph("train", dtype),
      eval: model.graph("eval", dtype),
      generate: model.graph("generate", dtype),
    };
    const { session, device, why } = await open(dtype, dtype, graphs);
    await fill(session, loadPretrained(session, graphs.train, path));
    return new LoadedModel(basename(resolve(path)), path, null, tokenizer, session, graphs, null, device, why);
  }
  const checkpoint = await openCheckpoint(path);
  const { state } = checkpoint;
  const dtype = options.dtype ?? state.dtype;
  if (dtype !== state.dtype)
    throw new StromaError(
      "CONFIG",
      `[model] the checkpoint computes in ${state.dtype}, its graphs were traced for that; got dtype ${dtype}`,
    );
  const graphs = {
    train: await readGraph(checkpoint),
    eval: await readGraph(checkpoint, FILES.evalGraph),
    generate: await readGraph(checkpoint, FILES.generateGraph),
  };
  for (const graph of Object.values(graphs)) validateGraph(graph);
  const { session, device, why } = await open(dtype, state.storage, graphs);
  await fill(session, restoreSession(session, checkpoint, { optimizer: false }));
  return new LoadedModel(
    state.model,
    checkpoint.path,
    state.step,
    tokenizer,
    session,
    graphs,
    state.data.sequenceLength,
    device,
    why,
  );
}

/** Of the parameters as they are stored. */
const bytesOf = (graph: Graph, storage: DType): number =>
  graph.parameters.reduce((sum, { shape }) => sum + shape.reduce((n, size) => n * size, dtypeBytes(storage)), 0);

/** The same graph with no parameter to train: the engine then keeps neither gradients nor optimizer state. */
function frozen(graph: Graph): Graph {
  return { ...graph, parameters: graph.parameters.map((p) => ({ ...p, trainable: false })) };
}

async function isHuggingFace(path: string): Promise<boolean> {
  const has = async (file: string): Promise<boolean> =>
    (await stat(join(path, file)).catch(() => null))?.isFile() ?? false;
  return (await has(FILES.config)) && !(await has(FILES.state));
}
