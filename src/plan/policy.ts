/** What a tape is written from, and which combinations make no sense. */
import { StromaError } from "../errors.js";
import { contextOf } from "../graph/context.js";
import type { Graph } from "../graph/types.js";
import { groupsOf, shardsOf, sharersOf, stageCount } from "./mesh.js";
import { checkStages, isContiguous, stretchesOf } from "./stages.js";
import type {
  Clip,
  GradientDType,
  Recompute,
  RetainedDType,
  Schedule,
  Stages,
  StateFormat,
  UpdateOrder,
} from "./types.js";

export type Space3 = "device" | "host" | "disk";
/** One place for all blocks, or one for each. */
export type Home = Space3 | ((block: number) => Space3);

export interface Policy {
  schedule: Schedule;
  recompute: Recompute;
  update: UpdateOrder;
  clip: Clip;
  state: StateFormat;
  /** At least 1. */
  microBatches: number;
  /** Largest value of every named dim; null: boundaries lie in slots. */
  dims: Record<string, number> | null;
  /** Where parameters live between uses. */
  param: Home;
  /** Where optimizer state and master weights live between uses. */
  optimizer: Home;
  /** Where a boundary or its gradient waits that is not used in the next visit; needs `dims` unless "slot". */
  boundary: "slot" | Space3;
  /** Where gradients wait for the next step, and as what; with update "forward". */
  retained: Home;
  retainedDType: RetainedDType;
  /** How many block visits ahead a block is fetched: 1 or 2; 0: when it is needed. */
  prefetch: number;
  /** A block's copy is cut into so many, spread over the visit before. */
  parts: number;
  /** Blocks over ranks, and which rank's tape is to be written. Absent: one rank. Boundaries then need places. */
  stages?: Stages;
  /** What gradients travel as between the members of a stage. Default: as wide as they are summed. */
  reduceDType?: GradientDType;
}

export const homeOf = (home: Home, block: number): Space3 => (typeof home === "string" ? home : home(block));

/** Throws CONFIG for what contradicts itself, TAPE for a count below 1. */
export function checkPolicy(graph: Graph, policy: Policy): void {
  const { microBatches, update, clip, recompute, boundary, dims, prefetch, parts } = policy;
  const refuse = (why: string) => {
    throw new StromaError("CONFIG", `[plan] ${why}`);
  };
  if (!Number.isSafeInteger(microBatches) || microBatches < 1)
    throw new StromaError("TAPE", `[plan] expected at least 1 micro-batch, got ${microBatches}`);
  if (![0, 1, 2].includes(prefetch)) refuse(`expected prefetch 0, 1 or 2, got ${prefetch}`);
  if (!Number.isSafeInteger(parts) || parts < 1) refuse(`expected at least 1 part a copy, got ${parts}`);
  if (boundary !== "slot" && dims === null)
    refuse(`boundaries on ${boundary} need the largest value of every dim. Give dims, or boundary "slot"`);
  if (policy.stages !== undefined) checkStages(graph, policy.stages);
  if (policy.stages !== undefined && policy.schedule === "oneForwardOneBackward") {
    const interleaved = stretchesOf(policy.stages) !== null;
    if (!interleaved && !isContiguous(graph, policy.stages))
      refuse(
        'schedule "oneForwardOneBackward" is for stages of neighbouring blocks: others would wait for each other for ever. ' +
          'Take stages "contiguous" or "interleaved", or another order',
      );
    const [count, groups] = [stageCount(policy.stages), groupsOf(policy.stages)];
    const each = microBatches / groups;
    if (interleaved && each % count !== 0)
      refuse(
        `${count} interleaved stages take as many micro-batches at a time, and ${each} / ${count} is no whole number. ` +
          `Accumulate over a multiple of ${count * groups}, or take stages "contiguous"`,
      );
  }
  const groups = groupsOf(policy.stages);
  if (groups > microBatches)
    refuse(
      `each of ${groups} ranks of a stage needs a micro-batch of its own, and there are ${microBatches}. ` +
        "Accumulate over more micro-batches, or take fewer shards",
    );
  if (shardsOf(policy.stages) > 1 && policy.schedule !== "breadthFirst" && microBatches % groups !== 0)
    refuse(
      `in order "${policy.schedule}" each micro-batch gathers every block, so all ranks need equally many, and ` +
        `${microBatches} / ${groups} is no whole number. Accumulate over a multiple of ${groups}, or go breadth-first`,
    );
  const [sharers, meant] = [sharersOf(policy.stages), contextOf(graph)?.ranks ?? 1];
  if (policy.stages !== undefined && sharers !== meant)
    refuse(`the graph is for rows that ${meant} ranks share, and in the stages ${sharers} do`);
  if (policy.reduceDType === "float64" && graph.dtype !== "float64")
    refuse(`gradients of a ${graph.dtype} graph are summed in float32: they do not travel as float64`);
  if (policy.stages !== undefined && boundary === "slot")
    refuse('ranks exchange boundaries of a known size. Give dims, and boundary "device", "host" or "disk"');
  if (update === "backward" && clip === "global")
    refuse(
      'update "backward" changes blocks before the global norm is known. Clip by block, or update "forward" or "end"',
    );
  if (recompute !== "none") return;
  // A kept autograd graph holds views of the parameters and inputs that it was made with.
  if (boundary === "host" || boundary === "disk")
    refuse(`kept autograd graphs hold their inputs on the device, not on ${boundary}. Recompute "all"`);
  const away = graph.blocks.findIndex((_, b) => homeOf(policy.param, b) !== "device");
  if (away >= 0)
    refuse(
      `kept autograd graphs hold the parameters of ${graph.blocks[away]!.name} on the device from forward to ` +
        `backward, not on ${homeOf(policy.param, away)}. Recompute "all", or keep parameters on the device`,
    );
}
