/**
 * Which rank runs which block. A rank holds the state of its own blocks only, so R ranks need 1/R of it each; what
 * crosses between them are boundaries and their gradients.
 */
import { StromaError } from "../errors.js";
import { programCost } from "../graph/costs.js";
import { evaluate } from "../graph/dims.js";
import type { Graph } from "../graph/types.js";
import { ownersOf } from "./layout.js";
import { membersOf, replicasOf, shardsOf, sharersOf, stageCount } from "./mesh.js";
import type { Stages } from "./types.js";

/**
 * alternating: block b on rank b mod R. Breadth-first, all ranks are busy nearly always (TAPE.md, section 4).
 * contiguous: a stretch of blocks each, as equal in work as they can be. Fewest boundaries cross; breadth-first, ranks
 * wait for each other, so it is for the schedules that keep several micro-batches under way.
 * interleaved: two such stretches each, dealt out in turn: for one forward, one backward with half the bubble.
 */
export type StageRule = "alternating" | "contiguous" | "interleaved";
export const STAGE_RULES = ["alternating", "contiguous", "interleaved"] as const satisfies readonly StageRule[];
/** Stretches of a stage. */
const INTERLEAVED = 2;

/** Whether blocks that share a parameter (tied embeddings) go where the first of them is, or wherever the rule puts them. */
export type Ties = "together" | "apart";

/**
 * By block, one of so many stages. Dealt out in turn, tied blocks go together: nothing of what they share crosses then, and
 * in that order nobody waits. In stretches the last block must not wait for the first stage: they share it across (ties.ts).
 * Throws CONFIG for too many.
 */
export function assignStages(
  graph: Graph,
  ranks: number,
  rule: StageRule = "alternating",
  ties: Ties = rule === "alternating" ? "together" : "apart",
): number[] {
  const blocks = graph.blocks.length;
  const stretches = rule === "interleaved" ? Math.max(1, Math.min(INTERLEAVED, Math.floor(blocks / ranks))) : 1;
  const of =
    rule === "alternating"
      ? graph.blocks.map((_, b) => b % ranks)
      : contiguous(workOf(graph), ranks * stretches).map((stretch) => stretch % ranks);
  for (let b = 0; b < blocks && ties === "together"; b++) {
    const first = tiedTo(graph, b);
    if (first !== null) of[b] = of[first]!;
  }
  checkStages(graph, { rank: 0, ranks, of });
  return of;
}

/** Throws CONFIG for ranks without work. */
export function checkStages(graph: Graph, stages: Stages): void {
  const { rank, ranks, of } = stages;
  const refuse = (why: string) => {
    throw new StromaError("CONFIG", `[plan] ${why}`);
  };
  if (!Number.isSafeInteger(ranks) || ranks < 1) refuse(`expected at least 1 rank, got ${ranks}`);
  if (!Number.isSafeInteger(rank) || rank < 0 || rank >= ranks) refuse(`there is no rank ${rank} of ${ranks}`);
  if (of.length !== graph.blocks.length)
    refuse(`expected a rank for each of ${graph.blocks.length} blocks, got ${of.length}`);
  for (const [what, n] of Object.entries({ shards: shardsOf(stages), replicas: replicasOf(stages) }))
    if (!Number.isSafeInteger(n) || n < 1) refuse(`expected at least 1 of ${what}, got ${n}`);
  const members = membersOf(stages);
  const context = sharersOf(stages);
  if (!Number.isSafeInteger(context) || context < 1 || members % context !== 0)
    refuse(`rows are shared by a divisor of the ${members} ranks (shards x replicas) of a stage, not ${context}`);
  const count = ranks / members;
  if (!Number.isSafeInteger(count))
    refuse(
      `${ranks} ranks are no whole number of stages of ${members} (shards x replicas) each: ${ranks} / ${members}`,
    );
  const one = members === 1 ? "rank" : "stage";
  for (const [b, r] of of.entries()) {
    if (!Number.isSafeInteger(r) || r < 0 || r >= count)
      refuse(`block ${graph.blocks[b]!.name} is on ${one} ${r}, and there are ${count}`);
  }
  for (let r = 0; r < count; r++)
    if (!of.includes(r))
      refuse(`${one} ${r} of ${count} would have no block of ${graph.model}, which has ${of.length}. Take fewer ranks`);
}

/** Whether no forward of a rank needs one of a rank that begins behind it. A loss may lie anywhere. */
export function isContiguous(graph: Graph, { of }: Stages): boolean {
  const losses = new Set(graph.losses.map((l) => l.block));
  const firsts = of.map((rank) => of.indexOf(rank)).filter((_, b) => !losses.has(b));
  return firsts.every((first, i) => i === 0 || first >= firsts[i - 1]!);
}

/**
 * By block, which of its stage's stretches it is in, where stages take their turns 0, 1, ..., R - 1 equally often, more
 * than once; null otherwise.
 */
export function stretchesOf(stages: Stages): number[] | null {
  const { of } = stages;
  const count = stageCount(stages);
  const stretch: number[] = [];
  let [at, stage] = [0, -1];
  for (const next of of) {
    if (next === stage + 1) stage = next;
    else if (next === 0 && stage === count - 1 && count > 1) [at, stage] = [at + 1, 0];
    else if (next !== stage) return null;
    stretch.push(at);
  }
  return at > 0 && stage === count - 1 ? stretch : null;
}

export const hasTies = (graph: Graph): boolean => graph.blocks.some((_, b) => tiedTo(graph, b) !== null);

/** The earlier block whose parameter b uses; null: b stands for itself. */
function tiedTo(graph: Graph, b: number): number | null {
  const [first] = ownersOf(graph, b);
  return first === undefined || first === b ? null : first;
}

/** FLOPs of every block's forward, at sizes of which only the ratios matter. */
function workOf(graph: Graph): number[] {
  const names = graph.inputs.flatMap((i) => i.shape.flatMap((d) => String(d).match(/[A-Za-z_]\w*/g) ?? []));
  const dims = Object.fromEntries(names.map((name) => [name, name === "B" ? 1 : 512]));
  const work = graph.programs.map((p) => evaluate(programCost(p, graph.dtype ?? "float32", []).forwardFlops, dims));
  return graph.blocks.map((b) => Math.max(1, work[b.program]!));
}

/** Cuts a list into `parts` stretches whose largest sum is least. */
function contiguous(work: readonly number[], parts: number): number[] {
  const total = work.reduce((a, b) => a + b, 0);
  let [low, high] = [Math.max(...work), total];
  const cut = (limit: number): number[] => {
    const of: number[] = [];
    let [part, sum] = [0, 0];
    for (const [b, w] of work.entries()) {
      // Every later part must be left a block.
      const mustOpen = work.length - b <= parts - 1 - part;
      if (of.length > 0 && (sum + w > limit || mustOpen)) {
        part++;
        sum = 0;
      }
      sum += w;
      of.push(part);
    }
    return of;
  };
  for (let k = 0; k < 60 && high - low > 1; k++) {
    const middle = (low + high) / 2;
    if (cut(middle).at(-1)! < parts) high = middle;
    else low = middle;
  }
  return cut(high);
}
