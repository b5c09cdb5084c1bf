/** What a Trainer is put together from. The defaults are the real ones; tests of the loop itself bring their own. */
import type { DatasetOptions } from "../data/index.js";
import type { Dataset } from "../data/types.js";
import { chooseDevice } from "../device.js";
import { type TransportFacts, transportFacts } from "../distributed/transport.js";
import { StromaError } from "../errors.js";
import type { ContextOptions } from "../graph/context.js";
import type { BatchInput, Graph } from "../graph/types.js";
import type { ComputeDType } from "./compute-dtype.js";
import { type ModelSpec, type ResolvedModel, resolveModel } from "./model-source.js";
import type { Batch, HostTensor, NativeRanks, NativeSession, RankSpec, SessionOptions } from "./native-session.js";
import type { ChooseDevice, SettledOptions } from "./options.js";
import type { TrainingPlan } from "./plan.js";
import type { Resources } from "./resources.js";

export interface Parts {
  createSession(options: SessionOptions): Promise<NativeSession>;
  joinRanks(spec: RankSpec, signal: AbortSignal): Promise<NativeRanks>;
  transportFacts(o: Pick<SettledOptions, "transport" | "device">): Promise<TransportFacts>;
  libtorchVersion(): Promise<string>;
  openDataset(spec: string | DatasetOptions): Promise<Dataset>;
  resolveModel(spec: ModelSpec): ResolvedModel;
  chooseDevice: ChooseDevice;
  computeDType(device: SessionOptions["device"]): Promise<ComputeDType>;
  resources(options: SettledOptions): Promise<Resources>;
  /** sharesHost: ranks read parameters from host memory that they have in common. */
  plan(graph: Graph, options: SettledOptions, resources: Resources, sharesHost: boolean): Promise<TrainingPlan>;
  context(graph: Graph, options: SettledOptions, resources: Resources): Promise<ContextOptions | null>;
}

/** Loaded when used: reading options or a checkpoint's facts needs neither libtorch nor data sources. */
export const realParts: Parts = {
  createSession: async (options) => (await import("../native.js")).loadAddon().createSession(options),
  joinRanks: async (spec, signal) => (await import("../native.js")).loadAddon().joinRanks(spec, signal),
  transportFacts: async ({ transport, device }) =>
    transportFacts(transport, device, (await import("../native.js")).loadAddon()),
  libtorchVersion: async () => (await import("../native.js")).currentBuild().libtorch.version,
  openDataset: async (spec) => (await import("../data/index.js")).openDataset(spec),
  resolveModel,
  chooseDevice,
  computeDType: async (device) => (await import("./compute-dtype.js")).chooseComputeDType(device),
  resources: async (options) => (await import("./resources.js")).detectResources(options),
  plan: async (graph, options, resources, sharesHost) =>
    (await import("./plan.js")).planTraining(graph, options, resources, sharesHost),
  context: async (graph, options, resources) => (await import("./plan.js")).contextFor(graph, options, resources),
};

/** The tensors that the graph takes, of those that the data has. @throws DATA naming one that is missing */
export function pickInputs(inputs: readonly BatchInput[], tensors: Batch, where: string): Batch {
  const batch: Batch = {};
  for (const { name } of inputs) {
    const tensor = tensors[name];
    if (tensor === undefined)
      throw new StromaError(
        "DATA",
        `[${where}] the model takes "${name}", the data has ${Object.keys(tensors).join(", ")}`,
      );
    batch[name] = tensor;
  }
  return batch;
}

/** Micro-batches, each after the other along their rows: one of the device's of several of the user's. */
export function joinBatches(batches: readonly Batch[]): Batch {
  const [first] = batches;
  if (batches.length === 1) return first!;
  return Object.fromEntries(
    Object.keys(first!).map((name) => [
      name,
      joinRows(
        batches.map((b) => b[name]!),
        name,
      ),
    ]),
  );
}

/** A micro-batch of the same shapes from which nothing is learned: no element of it counts in any loss. */
export function uncounted({ losses }: Pick<Graph, "losses">, batch: Batch): Batch {
  const empty = { ...batch };
  for (const { count } of losses) {
    const { dtype, shape } = batch[count.input]!;
    const elements = shape.reduce((a, b) => a * b, 1);
    const data =
      dtype === "int64"
        ? new BigInt64Array(elements).fill(BigInt(count.ignore))
        : new Int32Array(elements).fill(count.ignore);
    empty[count.input] = { dtype, shape, data };
  }
  return empty;
}

function joinRows(tensors: readonly HostTensor[], name: string): HostTensor {
  const [{ dtype, shape }] = tensors as [HostTensor];
  const row = shape.slice(1).join();
  const other = tensors.find((t) => t.shape.slice(1).join() !== row);
  if (shape.length === 0 || other !== undefined)
    throw new StromaError(
      "DATA",
      `[trainer] micro-batches of "${name}" cannot be joined along their rows: [${shape.join(", ")}] and [${(other?.shape ?? shape).join(", ")}]`,
    );
  const data = Buffer.concat(tensors.map((t) => new Uint8Array(t.data.buffer, t.data.byteOffset, t.data.byteLength)));
  return { dtype, shape: [tensors.reduce((n, t) => n + t.shape[0]!, 0), ...shape.slice(1)], data };
}
