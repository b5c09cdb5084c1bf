/** What each block of a graph is for one rank: seconds of its passes, elements of its weights, bytes that it holds. */
import type { Graph } from "../graph/types.js";
import { CostModel } from "./cost.js";
import { type SizedProgram, sizedProgram } from "./cost-calls.js";
import { type Cost, plus } from "./cost-times.js";
import { passWorkspace } from "./memory.js";
import type { ScaleRequest } from "./scale.js";
import { keptOf } from "./selective.js";
import type { Kept, Recompute } from "./types.js";

/**
 * Beside ours, two of torchtitan's. everySecondProduct ("selective op"): attention and every second product are kept.
 * everySecondLayer ("selective layer" with 2): every second layer computes all again, the others keep all.
 */
export const SCALE_RECOMPUTE = ["none", "selective", "all", "everySecondProduct", "everySecondLayer"] as const;
export type ScaleRecompute = (typeof SCALE_RECOMPUTE)[number];

export interface BlockWork {
  name: string;
  /** Goes forward and back in one: a head. */
  turns: boolean;
  forward: Cost;
  /** What is computed again included. */
  backward: Cost;
  turn: Cost;
  /** Seconds of adding a micro-batch's gradients to their sums. */
  sum(first: boolean): number;
  /** Of every parameter that it uses; of the trainable ones that it owns. */
  elements: number;
  trainable: number;
  readsWeightsAgain: boolean;
  /** Of what it owns, of one whole copy of the model. */
  stateBytes: number;
  updateBytes: number;
  /** Of one micro-batch. */
  boundaryBytes: number;
  keptBytes: number;
  /** Beside what is kept, at the highest. */
  workspaceBytes: number;
}

type WorkRequest = Pick<ScaleRequest, "dims" | "recompute" | "compiled" | "state" | "cluster">;

const known = new WeakMap<Graph, Map<string, BlockWork[]>>();

export function blockWorks(graph: Graph, request: WorkRequest): BlockWork[] {
  const { dims, recompute, compiled, state, cluster } = request;
  const cache = known.get(graph) ?? new Map<string, BlockWork[]>();
  known.set(graph, cache);
  const key = JSON.stringify([dims, recompute, compiled, state, cluster.card]);
  const found = cache.get(key) ?? works(graph, request);
  cache.set(key, found);
  return found;
}

function works(graph: Graph, { dims, recompute, compiled, state, cluster }: WorkRequest): BlockWork[] {
  const card = { ...cluster.card, compiled };
  const modes = new Map<Recompute, { costs: CostModel; kept: Kept | undefined }>();
  const modeOf = (mode: Recompute) => {
    const kept =
      mode !== "selective"
        ? undefined
        : recompute === "everySecondProduct"
          ? everySecondProduct(graph, dims)
          : keptOf(graph, dims);
    const made = modes.get(mode) ?? { kept, costs: new CostModel(graph, { state, recompute: mode, kept }, dims, card) };
    modes.set(mode, made);
    return made;
  };
  const turning = new Set(graph.losses.map((l) => l.block));
  const byName = new Map(graph.parameters.map((p) => [p.name, p.shape.reduce((a, b) => a * b, 1)]));
  return graph.blocks.map((block, b): BlockWork => {
    const mode: Recompute =
      recompute === "everySecondProduct"
        ? "selective"
        : recompute === "everySecondLayer"
          ? b % 2 === 0
            ? "all"
            : "none"
          : recompute;
    const { costs, kept } = modeOf(mode);
    const pass = costs.pass(b);
    const program = sizedProgram(graph, b, dims);
    const layout = costs.layouts[b]!;
    const turns = turning.has(b);
    const memory = passWorkspace(graph, b, dims, { device: card.device, kept });
    const keptBytes = turns || mode === "all" ? 0 : memory.kept;
    const trainable = layout.trainable.reduce((n, e) => n + e, 0);
    return {
      name: block.name,
      turns,
      forward: mode === "all" ? pass.forward : pass.recorded,
      backward: plus(pass.again, pass.backward),
      turn: pass.turn,
      sum: (first) => costs.sum(b, first).seconds,
      elements: block.parameters.reduce((n, name) => n + byName.get(name)!, 0),
      trainable,
      readsWeightsAgain: readsWeights(program),
      stateBytes: layout.paramBytes + layout.stateBytes,
      // The norm reads the sums; the update reads them and reads and writes the rest; gathers read another dtype.
      updateBytes: trainable * 8 + 2 * (layout.trainableBytes + layout.stateBytes) + layout.computeBytes,
      boundaryBytes: program.outputs.reduce((n, id) => n + program.values[id]!.bytes, 0),
      keptBytes,
      workspaceBytes: mode === "all" || turns ? memory.backward : memory.keptBackward - memory.kept,
    };
  });
}

/** Whether a backward needs weights: that of a gather of rows does not. */
function readsWeights({ calls, parameters }: SizedProgram): boolean {
  const ids = new Set(parameters.map((p) => p.id));
  return calls.some((call) => call.savedValues.some((id) => ids.has(id)));
}

/** What `keptOf` keeps, without every second product in order. */
function everySecondProduct(graph: Graph, dims: Readonly<Record<string, number>>): Kept {
  const all = keptOf(graph, dims);
  const without = (list: readonly number[][]) =>
    list.map((ids, p) => {
      const b = graph.blocks.findIndex((block) => block.program === p);
      if (b < 0) return [...ids];
      const products = sizedProgram(graph, b, dims).calls.filter((call) => call.op === "linear");
      const again = new Set(products.flatMap((call, n) => (n % 2 === 1 ? [call.out.id] : [])));
      return ids.filter((id) => !again.has(id));
    });
  return { ...all, values: without(all.values), shapes: without(all.shapes) };
}
