/** A model loaded for training: session, graphs, tapes; restored from a checkpoint or drawn from the seed. */
import { createRequire } from "node:module";
import { type Checkpoint, readGraph, restoreSession } from "../checkpoint/read.js";
import type { Dataset } from "../data/types.js";
import { agreeOn, agreeOnDevice } from "../distributed/ranks.js";
import { agreeOnSharedHost, machineFacts } from "../distributed/shared-host.js";
import { agreeOnTransport } from "../distributed/transport.js";
import { StromaError } from "../errors.js";
import { GENERATE, type TextModel } from "../generate/generate.js";
import { canonicalJson, graphHash } from "../graph/hash.js";
import type { Graph } from "../graph/types.js";
import { EVAL } from "./evaluate.js";
import { gate, type Runner } from "./gate.js";
import type { ResolvedModel } from "./model-source.js";
import type { NativeRanks, NativeSession, SessionOptions } from "./native-session.js";
import type { SettledOptions } from "./options.js";
import type { Parts } from "./parts.js";
import { planDifferences, type TrainingPlan } from "./plan.js";
import { agreeOnResources } from "./resources.js";

export interface TrainingSession {
  session: NativeSession;
  /** The same, for requests: they wait in line. */
  requests: Runner;
  model: ResolvedModel;
  dataset: Dataset;
  /** The user's; the engine may train the same model in larger blocks, or over shared rows (plan.graph). */
  graph: Graph;
  plan: TrainingPlan;
  /** How this plan rounds otherwise than the one that a resumed run was saved under; none: to the bit. */
  planDiffers: string[];
  evalGraph: Graph;
  generateGraph: Graph;
  versions: { stromatolite: string; libtorch: string; node: string };
  textModel(): TextModel;
}

/**
 * @throws CHECKPOINT when the checkpoint is of another model, data, seed or dtype, naming each difference; what tracing
 * and the engine throw
 */
export async function openTrainingSession(
  options: SettledOptions,
  outputDir: string,
  model: ResolvedModel,
  dataset: Dataset,
  resumed: Checkpoint | null,
  parts: Parts,
  ranks: NativeRanks | null = null,
): Promise<TrainingSession> {
  if (ranks === null && options.transport !== null)
    throw new StromaError(
      "CONFIG",
      `[trainer] transport "${options.transport}" is how several ranks exchange, and this is one alone: leave it out`,
    );
  // First: on another kind of device the plan differs too, and that would be the less clear reason.
  if (ranks !== null) await agreeOnDevice(ranks, options);
  const graph = model.graph("train", options.dtype);
  const evalGraph = model.graph("eval", options.dtype);
  const generateGraph = model.graph("generate", options.dtype);
  if (resumed !== null) await checkSame(resumed, graph, dataset, options);
  const detected = await parts.resources(options);
  const resources = ranks === null ? detected : await agreeOnResources(ranks, detected);
  const context = await parts.context(graph, options, resources);
  // Attention over the shares of rows is another program; the model, its parameters and its checkpoints are the same.
  const trained = context === null ? graph : model.graph("train", options.dtype, context);
  const sharesHost = await sharedHostOf(options, ranks);
  const plan = await parts.plan(trained, options, resources, sharesHost);
  if (options.sharedHost === "on" && plan.placement.arenas.sharedBytes === undefined)
    throw new StromaError(
      "CONFIG",
      `[trainer] sharedHost "on": no parameters live in host memory. Say offload "host", or leave sharedHost out`,
    );
  const versions = {
    stromatolite: packageVersion(),
    libtorch: await parts.libtorchVersion(),
    node: process.versions.node,
  };
  if (ranks !== null)
    await agreeOn(ranks, {
      ...versions,
      model: graphHash(graph),
      plan: plan.facts.tapeHash,
      data: dataset.fingerprint,
      step: resumed?.state.step ?? 0,
      ...shared(options),
    });
  const session = await parts.createSession({
    ...sessionOptions(options, outputDir),
    ...(ranks === null ? {} : { ranks, transport: await agreeOnTransport(ranks, await parts.transportFacts(options)) }),
  });
  try {
    await session.load(plan.graph, plan.placement);
    if (resumed === null) await session.initialize(options.seed);
    else await restoreSession(session, resumed, { optimizer: true, part: ranks !== null });
    await session.attach(EVAL, evalGraph);
    await session.attach(GENERATE, generateGraph);
    const requests = gate(session);
    const then = resumed?.state.plan ?? null;
    return {
      session,
      requests,
      model,
      dataset,
      graph,
      plan,
      planDiffers: then === null ? [] : planDifferences(then, plan.facts),
      evalGraph,
      generateGraph,
      versions,
      textModel: () => ({
        session: requests,
        graph: generateGraph,
        tokenizer: dataset.tokenizer,
        contextLength: contextLength(generateGraph),
      }),
    };
  } catch (error) {
    await session.dispose();
    throw error;
  }
}

/** What ranks that share the state of a block do with host memory. */
async function sharedHostOf({ sharedHost, device, shards, plan }: SettledOptions, ranks: NativeRanks | null) {
  if (ranks !== null)
    // The planner's choice is of one and all.
    return agreeOnSharedHost(ranks, machineFacts(sharedHost, device), shards ?? (plan === "auto" ? ranks.size : 1));
  if (sharedHost !== "on") return false;
  throw new StromaError(
    "CONFIG",
    '[trainer] sharedHost "on" is for several ranks, and this is one alone: leave it out',
  );
}

function sessionOptions(options: SettledOptions, outputDir: string): SessionOptions {
  const { device, dtype, precision: storage, masterWeight, threads, optimizer, deviceMemory } = options;
  return {
    ...{ device, dtype, storage, masterWeight, threads, optimizer },
    diskFolder: options.diskFolder ?? outputDir,
    ...(device === "sim"
      ? { sim: { memoryBytes: deviceMemory, hostToDevice: null, deviceToHost: null, adversary: null } }
      : {}),
    // The card ends there for this process, so that what a plan says is what it gets.
    ...(device.startsWith("cuda") && deviceMemory !== null ? { deviceMemory } : {}),
  };
}

/** What of the options all ranks must have alike. */
function shared(o: SettledOptions): Record<string, unknown> {
  const { dtype, precision, masterWeight, optimizer, seed, learningRate, learningRateSchedule, maxGradNorm } = o;
  const { steps, epochs, saveEveryNSteps, saveEveryNEpochs, evalEveryNSteps, evalMicroBatches } = o;
  const { sampleEveryNSteps, samplePrompts, sampleTokens, nonFinite, profileMemory } = o;
  return {
    ...{ dtype, precision, masterWeight, optimizer, seed, learningRate, learningRateSchedule, maxGradNorm },
    ...{ steps, epochs, saveEveryNSteps, saveEveryNEpochs, evalEveryNSteps, evalMicroBatches },
    ...{ sampleEveryNSteps, samplePrompts, sampleTokens, nonFinite, profileMemory },
  };
}

/** Rows longer than the model's positions were never trained. */
export function contextLength(graph: Graph): number | null {
  const most = (graph.config as { maxPositions?: unknown } | null)?.maxPositions;
  return typeof most === "number" ? most : null;
}

/** What must be as it was for the run to go on to the bit. */
async function checkSame(resumed: Checkpoint, graph: Graph, dataset: Dataset, options: SettledOptions): Promise<void> {
  const { state } = resumed;
  const saved = await readGraph(resumed);
  const differs: string[] = [];
  const same = (what: string, then: unknown, now: unknown): void => {
    if (then !== now) differs.push(`${what}: the checkpoint has ${String(then)}, this run ${String(now)}`);
  };
  same("model", saved.model, graph.model);
  if (state.graphHash !== graphHash(graph)) {
    const shapes = (g: Graph) => new Map(g.parameters.map((p) => [p.name, p.shape.join(" x ")]));
    const then = shapes(saved);
    const now = shapes(graph);
    for (const name of new Set([...then.keys(), ...now.keys()])) same(name, then.get(name), now.get(name));
    if (differs.length === 0)
      differs.push(
        canonicalJson(saved.config) === canonicalJson(graph.config)
          ? "model: its layers were other operators when it was saved, parameters and config agree: resume with the version of stromatolite that saved it"
          : "model: its config differs, parameters agree",
      );
  }
  same("data", state.data.fingerprint === dataset.fingerprint ? dataset.name : state.data.name, dataset.name);
  if (state.data.name === dataset.name) same("data's fingerprint", state.data.fingerprint, dataset.fingerprint);
  same("seed", state.rng.seed, options.seed);
  same("sequenceLength", state.data.sequenceLength, options.sequenceLength);
  same("dtype", state.dtype, options.dtype);
  same("precision", state.storage, options.precision);
  same("masterWeight", state.masterWeight, options.masterWeight);
  same("optimizer", state.optimizer.kind, options.optimizer.kind);
  for (const key of ["beta1", "beta2", "epsilon"] as const) same(key, state.optimizer[key], options.optimizer[key]);
  if (differs.length > 0)
    throw new StromaError(
      "CHECKPOINT",
      `[trainer] cannot resume from ${resumed.path}:\n  ${differs.slice(0, 20).join("\n  ")}${differs.length > 20 ? `\n  and ${differs.length - 20} more` : ""}`,
      { path: resumed.path, differs },
    );
}

function packageVersion(): string {
  return (createRequire(import.meta.url)("../../package.json") as { version: string }).version;
}
