/** How training grows with the number of cards: for each number the fastest arrangement that fits. */
import { StromaError } from "../errors.js";
import type { Graph } from "../graph/types.js";
import { usable } from "./budget.js";
import { type ScaleReport, type ScaleRequest, simulateScale } from "./scale.js";
import type { Recompute } from "./types.js";

export interface ScaleTableRequest extends Omit<ScaleRequest, "ranks" | "order" | "recompute"> {
  /** Only arrangements with it. Default: any. */
  recompute?: Recompute;
  /** Of a card: all there is. Default: the cluster's. */
  deviceBytes?: number;
}

export interface ScaleRow extends ScaleReport {
  fits: boolean;
  /** Speed of a rank over that of a rank in the table's first row. */
  efficiency: number;
}

/**
 * A row for each number of ranks: of every recompute, of both orders, and of sharding over all ranks or inside a node the
 * fastest that fits a card; where nothing fits, what takes least. Throws as `simulateScale`.
 */
export function scaleTable(graph: Graph, request: ScaleTableRequest, ranks: readonly number[]): ScaleRow[] {
  const { deviceBytes = request.cluster.cardBytes, recompute: only, ...rest } = request;
  const limit = usable({ deviceBytes, hostBytes: 0, diskBytes: 0 }).deviceBytes;
  const orders = request.microBatches === 1 ? (["breadthFirst"] as const) : (["breadthFirst", "depthFirst"] as const);
  const recomputes = only === undefined ? (["none", "selective", "all"] as const) : [only];
  let first: number | null = null;
  return ranks.map((n): ScaleRow => {
    const reports = groupsOf(n, request).flatMap((shardGroup) =>
      orders.flatMap((order) =>
        recomputes.map((recompute) => simulateScale(graph, { ...rest, ranks: n, shardGroup, order, recompute })),
      ),
    );
    const fitting = reports.filter((r) => r.memory.total <= limit);
    const best =
      fitting.length > 0
        ? fitting.reduce((a, b) => (b.seconds < a.seconds ? b : a))
        : reports.reduce((a, b) => (b.memory.total < a.memory.total ? b : a));
    first ??= best.tokensPerSecondPerRank;
    return { ...best, fits: fitting.length > 0, efficiency: best.tokensPerSecondPerRank / first };
  });
}

/** Over all ranks first: what is as fast with less memory goes before. */
function groupsOf(ranks: number, { shardGroup, cluster }: ScaleTableRequest): number[] {
  if (shardGroup !== undefined) return [shardGroup];
  const { perNode } = cluster;
  return ranks > perNode && ranks % perNode === 0 ? [ranks, perNode] : [ranks];
}

/** "8,64" or "8-4096" (doubling), ascending. Throws CONFIG for anything else. */
export function parseRanks(text: string): number[] {
  const ranks = text.split(",").flatMap((part) => {
    const [, from, to] = /^\s*(\d+)\s*(?:-\s*(\d+)\s*)?$/.exec(part) ?? [];
    if (from === undefined) return [Number.NaN];
    const list = [Number(from)];
    while (to !== undefined && list[0]! > 0 && list.at(-1)! * 2 <= Number(to)) list.push(list.at(-1)! * 2);
    return list;
  });
  if (ranks.some((n) => !Number.isSafeInteger(n) || n < 1 || n > MOST_RANKS))
    throw new StromaError(
      "CONFIG",
      `[plan] expected --ranks to be whole numbers from 1 to ${MOST_RANKS} like 8,64 or 8-4096 (doubling), got ${JSON.stringify(text)}`,
    );
  return [...new Set(ranks)].sort((a, b) => a - b);
}

/** Far beyond what the model of a network has been compared with. */
const MOST_RANKS = 65_536;
