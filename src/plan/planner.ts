/** Resident plans: everything stays on the device, and only the order of work and the boundaries' slots are planned. */
import type { Graph } from "../graph/types.js";
import type { Policy } from "./policy.js";
import type { Tape } from "./types.js";
import { writeTape } from "./write-tape.js";

export interface PlanOptions extends Partial<Pick<Policy, "recompute" | "update" | "clip" | "state">> {
  microBatches: number;
  /**
   * depthFirst: each micro-batch through all blocks; few boundaries live. breadthFirst: all micro-batches through one
   * block, then the next; the boundaries of the whole batch live. Default depthFirst.
   */
  schedule?: Policy["schedule"];
}

/**
 * What planResident writes its tape from. Defaults: depthFirst, no recompute, update at the end, one norm for all
 * gradients (update "backward": none), parameters stored in the graph's dtype (bfloat16 with float32 masters), AdamW.
 */
export function residentPolicy(graph: Graph, options: PlanOptions): Policy {
  const dtype = graph.dtype ?? "float32";
  const storage = dtype === "float64" || dtype === "bfloat16" ? dtype : "float32";
  const { update = "end" } = options;
  return {
    schedule: "depthFirst",
    recompute: "none",
    update,
    clip: update === "backward" ? "none" : "global",
    state: { storage, masterWeight: storage === "bfloat16" ? "float32" : "none", optimizer: "adamw" },
    dims: null,
    param: "device",
    optimizer: "device",
    boundary: "slot",
    retained: "device",
    retainedDType: storage === "float64" ? "float64" : "float32",
    prefetch: 0,
    parts: 1,
    ...Object.fromEntries(Object.entries(options).filter(([, value]) => value !== undefined)),
  } as Policy;
}

/** The step's tape. Throws TAPE for a graph that does not train or a count below 1, CONFIG as `writeTape`. */
export const planResident = (graph: Graph, options: PlanOptions): Tape =>
  writeTape(graph, residentPolicy(graph, options)).step;
