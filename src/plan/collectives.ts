/** How long collectives take over cards of several machines, and what the slowest of many cards costs. */
import type { ClusterProfile } from "./cluster.js";

/** Ranks that take part, and how many of them share a node. */
export interface Group {
  ranks: number;
  perNode: number;
}

export interface CollectiveTime {
  seconds: number;
  /** Of those, what is waited for beside the bytes. */
  latency: number;
  /** Sent by each rank. */
  bytes: number;
}

const nothing: CollectiveTime = { seconds: 0, latency: 0, bytes: 0 };
const nodesOf = ({ ranks, perNode }: Group): number => Math.ceil(ranks / perNode);

/** Bytes a second of a ring through each card: a node's cards drive a ring each, so that all their networks carry. */
function ringBandwidth(group: Group, { nodeLink, network }: ClusterProfile): number {
  if (nodesOf(group) === 1) return nodeLink;
  return Math.min(group.perNode === 1 ? Number.POSITIVE_INFINITY : nodeLink, network * group.perNode);
}

/**
 * An all-gather or a reduce-scatter of `bytes` in all, by a ring: (R - 1) / R of them pass through each rank, in R - 1 steps
 * of which one leaves each node but the last (NCCL's model, src/graph/tuning.cc).
 */
export function ringSeconds(bytes: number, group: Group, cluster: ClusterProfile): CollectiveTime {
  const { ranks } = group;
  if (ranks === 1) return nothing;
  const between = nodesOf(group) - 1;
  const latency =
    cluster.launchSeconds + (ranks - 1 - between) * cluster.nodeStepSeconds + between * cluster.networkStepSeconds;
  const sent = (bytes * (ranks - 1)) / ranks;
  return { seconds: latency + sent / ringBandwidth(group, cluster), latency, bytes: sent };
}

/** An all-reduce: a ring twice around, with the steps of a tree where those are fewer (NCCL takes the faster). */
export function allReduceSeconds(bytes: number, group: Group, cluster: ClusterProfile): CollectiveTime {
  const { ranks, perNode } = group;
  if (ranks === 1) return nothing;
  const nodes = nodesOf(group);
  const inside = Math.min(perNode, ranks) - 1;
  const latency =
    cluster.launchSeconds +
    2 * inside * cluster.nodeStepSeconds +
    2 * Math.min(nodes - 1, Math.ceil(Math.log2(nodes))) * cluster.networkStepSeconds;
  const sent = (2 * bytes * (ranks - 1)) / ranks;
  return { seconds: latency + sent / ringBandwidth(group, cluster), latency, bytes: sent };
}

/** How much longer than the mean the slowest of `ranks` cards takes: `spread` times the highest of so many normal draws. */
export const slowest = (ranks: number, spread: number): number => 1 + spread * highestOf(ranks);

/** Expected highest of n standard normal draws (Blom, 1958): the quantile of (n - 3/8) / (n + 1/4). */
export function highestOf(n: number): number {
  if (n <= 1) return 0;
  const p = (n - 0.375) / (n + 0.25);
  // Abramowitz and Stegun 26.2.23: within 4.5e-4.
  const t = Math.sqrt(-2 * Math.log(1 - p));
  return t - (2.515517 + t * (0.802853 + t * 0.010328)) / (1 + t * (1.432788 + t * (0.189269 + t * 0.001308)));
}
