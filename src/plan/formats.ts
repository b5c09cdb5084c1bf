/** Formats of parameters and optimizer state: which are tried where a person left them open. */
import type { Graph } from "../graph/types.js";
import { blockLayouts } from "./layout.js";
import type { StateFormat } from "./types.js";

const MASTERS = ["float32", "split16", "none"] as const;
const OPTIMIZERS = ["adamw", "adamw8bit"] as const;

/**
 * From the widest to the leanest. Of bfloat16, in bytes of a matrix's element: float32 master weights and moments (14);
 * moments in 8 bits and split16, which holds the same weights (6); without master weights (4), where updates round
 * stochastically. What is given is kept, and all of the rest tried.
 * @param storage of parameters, where it is not given; after float32 bfloat16 is tried then
 */
export function stateFormats(given: Partial<StateFormat>, storage: StateFormat["storage"]): StateFormat[] {
  const first = given.storage ?? storage;
  const either = given.masterWeight !== undefined || given.optimizer !== undefined;
  return [first, ...(given.storage === undefined && first === "float32" ? (["bfloat16"] as const) : [])].flatMap(
    (s) => {
      const possible = s === "bfloat16" ? MASTERS : (["none"] as const);
      const masters = given.masterWeight === undefined ? possible : [given.masterWeight];
      const all = (given.optimizer === undefined ? OPTIMIZERS : [given.optimizer]).flatMap((optimizer) =>
        masters.map((masterWeight): StateFormat => ({ storage: s, masterWeight, optimizer })),
      );
      // With float32 moments and no master weights the finer half would be what is spent on.
      return either || s !== "bfloat16"
        ? all
        : all.filter((f) => (f.masterWeight === "float32") === (f.optimizer === "adamw"));
    },
  );
}

/** Bytes of parameters, master weights and optimizer state: what no plan can do without, wherever they live. */
export const stateBytes = (graph: Graph, state: StateFormat): number =>
  blockLayouts(graph, state).reduce((sum, { paramBytes, stateBytes }) => sum + paramBytes + stateBytes, 0);
