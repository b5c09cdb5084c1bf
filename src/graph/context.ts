/**
 * Context parallelism in a graph: the tokens of every row are shared out to the ranks of a group, and attention is the
 * only op that looks beyond a rank's own (docs/context.md). All ranks trace, compare and run one graph; what differs
 * between them (which tokens, at which positions, of which documents) comes with the batch.
 */
import { invalidArgument, StromaError } from "../errors.js";
import { dimNames } from "./dims.js";
import { type OpName, opByOverload } from "./schemas.js";
import type { BatchInput, Graph } from "./types.js";

/**
 * ring: keys and values travel round the ranks, any number of heads (Liu et al., arXiv 2310.01889).
 * allToAll: heads are dealt out, each rank attends over whole rows with its own; query heads are a multiple of the ranks
 * (Jacobs et al., arXiv 2309.14509).
 */
export type ContextKind = "ring" | "allToAll";

export interface ContextOptions {
  /** R, of the group that shares a row. 1: rows stay whole, and the graph is the one without. */
  ranks: number;
  kind: ContextKind;
}

/** What a model sees while it is traced or run for a group of more than one rank. */
export interface Context extends ContextOptions {
  /** For the op: a name that stands for the group (contextGroup), or of a group in c10d's registry (eager). */
  readonly group: string;
}

/** The dim that is shared out, by the project's one legend: tokens of a row. */
export const SEQUENCE_DIM = "T";

export const CONTEXT_OPS = {
  ring: "ringAttention",
  allToAll: "allToAllAttention",
} as const satisfies Record<ContextKind, OpName>;

const GROUP = /^context:([1-9]\d{0,8})$/;

/** The group of a graph: a symbol, as every rank's own has another name. The engine puts its session's group in its place. */
export const contextGroup = (ranks: number): string => `context:${ranks}`;

/** R of a symbol; null for any other name. */
export function ranksOfGroup(group: string): number | null {
  const found = GROUP.exec(group);
  return found === null ? null : Number(found[1]);
}

/** Null for one rank. @throws INVALID_ARGUMENT */
export function checkContext(options: ContextOptions | null | undefined): Context | null {
  if (options === null || options === undefined) return null;
  const { ranks, kind } = options;
  if (!Number.isSafeInteger(ranks) || ranks < 1 || ranks > 999_999_999)
    throw invalidArgument("context", "a whole number of ranks of at least 1", ranks, "context.ranks");
  if (!Object.hasOwn(CONTEXT_OPS, kind)) throw invalidArgument("context", '"ring" or "allToAll"', kind, "context.kind");
  return ranks === 1 ? null : { ranks, kind, group: contextGroup(ranks) };
}

/** Over how many ranks a graph's rows are split, and how they attend; null: rows are whole. */
export function contextOf(graph: Graph): ContextOptions | null {
  for (const node of graph.programs.flatMap((p) => p.nodes)) {
    const op = opByOverload(node.op);
    for (const kind of Object.keys(CONTEXT_OPS) as ContextKind[]) {
      if (op !== CONTEXT_OPS[kind]) continue;
      const group = node.args.at(-1);
      const text = group !== undefined && "constant" in group ? group.constant : null;
      const ranks = typeof text === "string" ? ranksOfGroup(text) : null;
      if (ranks !== null && ranks > 1) return { ranks, kind };
    }
  }
  return null;
}

/**
 * Which dim of a batch input holds the tokens of a row; null: the input has none, and every rank gets all of it.
 * @throws GRAPH where tokens stand in more than one dim, or in a size that does not split
 */
export function sequenceDim(input: BatchInput): number | null {
  const dims = input.shape.flatMap((d, i) => (dimNames(d).includes(SEQUENCE_DIM) ? [i] : []));
  if (dims.length === 0) return null;
  if (dims.length === 1 && input.shape[dims[0]!] === SEQUENCE_DIM) return dims[0]!;
  throw new StromaError(
    "GRAPH",
    `[context] batch input ${input.name} is [${input.shape.join(", ")}]: expected ${SEQUENCE_DIM} in one dim and by itself, or in none, so that a row can be shared out to ranks`,
    { input: input.name },
  );
}
