/**
 * Sharded data parallel over many cards: how fast a step is and what a card holds, from 1 rank to thousands, without any of
 * them. One representative rank's step is run in time block by block, as PyTorch's FSDP2 does it: weights of a block are
 * gathered while the block before it computes, let go after its forward and gathered again for its backward; gradients are
 * scattered while the next backward computes, and where groups of ranks hold copies of the model then summed over the
 * groups. Three lines run beside each other: the card's arithmetic, collectives of the shard group, and those between copies.
 */
import { StromaError } from "../errors.js";
import type { Graph } from "../graph/types.js";
import { dtypeBytes } from "../graph/value.js";
import type { ClusterProfile } from "./cluster.js";
import { allReduceSeconds, type CollectiveTime, type Group, ringSeconds, slowest } from "./collectives.js";
import { taken } from "./cost-times.js";
import { type Line, play, type Work } from "./scale-play.js";
import { type BlockWork, blockWorks, type ScaleRecompute } from "./scale-work.js";
import type { StateFormat } from "./types.js";

export interface ScaleRequest {
  ranks: number;
  /** Ranks that share one copy of weights and state; the other groups hold copies. A divisor of `ranks`. Default: all. */
  shardGroup?: number;
  /** Sizes of a micro-batch of one rank, e.g. { B: 2, T: 8192 }. */
  dims: Readonly<Record<string, number>>;
  /** Micro-batches of one rank in a step. */
  microBatches: number;
  /** breadthFirst gathers a block for all micro-batches at once, depthFirst for each. */
  order: "breadthFirst" | "depthFirst";
  recompute: ScaleRecompute;
  /** As MachineProfile.compiled. */
  compiled: boolean;
  state: StateFormat;
  /** What gradients are scattered and summed as. */
  reduceDType: "float32" | "bfloat16";
  cluster: ClusterProfile;
}

/** latency: of collectives, beside their bytes. */
export type ScaleBound = "compute" | "memory" | "nodeLink" | "network" | "latency";

export interface ScaleMemory {
  /** Weights as stored, master weights and moments: this rank's part. */
  state: number;
  /** Sums of gradients: this rank's part. */
  gradients: number;
  /** Whole blocks at hand: weights of two, gradients of one and of the one that is being scattered. */
  blocks: number;
  /** Block boundaries and what forwards keep. */
  activations: number;
  workspace: number;
  total: number;
}

export interface ScaleReport {
  ranks: number;
  shardGroup: number;
  order: ScaleRequest["order"];
  recompute: ScaleRecompute;
  seconds: number;
  tokensPerSecond: number;
  tokensPerSecondPerRank: number;
  /** Busy seconds of each line of the slowest rank. */
  busySeconds: Record<Line, number>;
  /** Share of the step in which nothing is computed. */
  waiting: number;
  boundBy: ScaleBound;
  /** Of one rank, recompute included. */
  flops: number;
  /** Sent by one rank. */
  gatheredBytes: number;
  scatteredBytes: number;
  summedBytes: number;
  memory: ScaleMemory;
}

/**
 * Throws CONFIG for a group that does not divide the ranks or counts that are none, SHAPE for a dim without a size, TAPE for
 * a graph that does not train.
 */
export function simulateScale(graph: Graph, request: ScaleRequest): ScaleReport {
  const { ranks, shardGroup = ranks, cluster } = request;
  const step = stepOf(graph, request);
  const played = play(step.works, cluster.collectiveShare);
  const { dims, microBatches } = request;
  const tokens = (dims.B ?? 1) * (dims.T ?? 1) * microBatches;
  const { busySeconds, seconds } = played;
  return {
    ranks,
    shardGroup,
    order: request.order,
    recompute: request.recompute,
    seconds,
    tokensPerSecond: (tokens * ranks) / seconds,
    tokensPerSecondPerRank: tokens / seconds,
    busySeconds,
    waiting: 1 - busySeconds.compute / seconds,
    boundBy: step.boundBy(busySeconds),
    flops: step.flops,
    gatheredBytes: step.sent.gather,
    scatteredBytes: step.sent.scatter,
    summedBytes: step.sent.sum,
    memory: memoryOf(step.blocks, { ...request, shardGroup }, graph),
  };
}

/** The works of a representative rank's step, in order. Throws as `simulateScale`. */
export const worksOf = (graph: Graph, request: ScaleRequest): readonly Work[] => stepOf(graph, request).works;

function stepOf(graph: Graph, request: ScaleRequest): Step {
  const { ranks, shardGroup = ranks, microBatches } = request;
  for (const [name, n] of Object.entries({ ranks, shardGroup, microBatches }))
    if (!Number.isSafeInteger(n) || n < 1)
      throw new StromaError("CONFIG", `[plan] expected ${name} to be a whole number of at least 1, got ${n}`);
  if (ranks % shardGroup !== 0)
    throw new StromaError("CONFIG", `[plan] ${ranks} ranks cannot be groups of ${shardGroup}: it does not divide them`);
  if (graph.mode !== "train") throw new StromaError("TAPE", `[plan] expected a graph in train mode, got ${graph.mode}`);
  return new Step(blockWorks(graph, request), { ...request, shardGroup }, graph);
}

/** A block's forward, backward or, of a head, both. */
interface Visit {
  block: BlockWork;
  pass: "forward" | "backward" | "turn";
  gathers: boolean;
  /** Of the step's first micro-batches: gradients overwrite their sums. */
  first: boolean;
}

/** The works of a step in order, each line's own; a work waits for others by their position. */
class Step {
  readonly works: Work[] = [];
  readonly sent = { gather: 0, scatter: 0, sum: 0 };
  flops = 0;
  private memorySeconds = 0;
  private readonly latency: Record<Line, number> = { compute: 0, shard: 0, copies: 0 };
  /** Positions of the works that finished a visit. */
  private readonly done: number[] = [];
  private readonly pace: number;
  private readonly shards: Group;
  private readonly copies: Group;
  private readonly computeBytes: number;
  private readonly reduceBytes: number;

  constructor(
    readonly blocks: readonly BlockWork[],
    private readonly request: ScaleRequest & { shardGroup: number },
    graph: Graph,
  ) {
    const { ranks, shardGroup, cluster, microBatches, order, reduceDType } = request;
    this.pace = slowest(ranks, cluster.spread);
    this.shards = { ranks: shardGroup, perNode: Math.min(cluster.perNode, shardGroup) };
    // A rank of each group: those of one node share a copy of the model, or are that many copies.
    this.copies = { ranks: ranks / shardGroup, perNode: Math.max(1, Math.floor(cluster.perNode / shardGroup)) };
    this.computeBytes = dtypeBytes(graph.dtype ?? "float32");
    this.reduceBytes = dtypeBytes(reduceDType);
    const rounds = order === "breadthFirst" ? 1 : microBatches;
    const count = microBatches / rounds;
    const visits = Array.from({ length: rounds }, (_, r) => this.visits(r === 0)).flat();
    // Gathered one visit ahead: before the scattering of what that visit's predecessor makes, since it is needed sooner.
    let ready = this.gather(visits[0]!);
    for (const [v, visit] of visits.entries()) {
      const next = visits[v + 1];
      const here = ready;
      ready = next === undefined ? null : this.gather(next);
      if (here !== null) this.copyOut(visit.block, here);
      this.compute(visit, count);
      if (visit.pass !== "forward") this.reduce(visit.block);
    }
    this.update();
  }

  /** Blocks forward and back. Weights of the block before the heads stay from one to the other. */
  private visits(first: boolean): Visit[] {
    const { blocks } = this;
    const forwards = blocks.map(
      (block): Visit => ({ block, pass: block.turns ? "turn" : "forward", gathers: true, first }),
    );
    const backwards = blocks.flatMap((block, b): Visit[] => {
      const kept = blocks[b + 1]?.turns ?? true;
      return block.turns ? [] : [{ block, pass: "backward", gathers: !kept && block.readsWeightsAgain, first }];
    });
    return [...forwards, ...backwards.reverse()];
  }

  /** Begins with the visit before its own: weights of two blocks are there at a time. Position of the work, if there is any. */
  private gather({ block, gathers }: Visit): number | null {
    const time = ringSeconds(block.elements * this.computeBytes, this.shards, this.request.cluster);
    if (!gathers || time.seconds === 0) return null;
    this.send("shard", time, "gather", this.done.slice(-1));
    return this.works.length - 1;
  }

  /** Out of the collective's buffer into place. */
  private copyOut({ elements }: BlockWork, gathered: number): void {
    const seconds = (2 * elements * this.computeBytes) / this.request.cluster.card.deviceMemory;
    this.add(seconds, [gathered]);
    this.memorySeconds += seconds * this.pace;
  }

  private compute({ block, pass, first }: Visit, count: number): void {
    const cost = block[pass];
    const sums = pass === "forward" ? 0 : block.sum(first) + (count - 1) * block.sum(false);
    const overhead = this.request.cluster.card.instructionSeconds;
    this.add(count * (taken(cost) + overhead) + sums, []);
    this.memorySeconds += (count * cost.memorySeconds + sums) * this.pace;
    this.flops += count * cost.flops;
    this.done.push(this.works.length - 1);
  }

  private reduce({ trainable }: BlockWork): void {
    const { cluster } = this.request;
    const bytes = trainable * this.reduceBytes;
    if (bytes === 0) return;
    const scatter = ringSeconds(bytes, this.shards, cluster);
    let ready = [this.done.at(-1)!];
    if (scatter.seconds > 0) {
      this.send("shard", scatter, "scatter", ready);
      ready = [this.works.length - 1];
    }
    const sum = allReduceSeconds(bytes / this.shards.ranks, this.copies, cluster);
    // What crosses machines in both is one wire.
    const oneWire = this.shards.ranks > cluster.perNode;
    if (sum.seconds > 0) this.send(oneWire ? "shard" : "copies", sum, "sum", ready);
  }

  /** After all gradients: the global norm, then the update of this rank's part. */
  private update(): void {
    const { cluster, shardGroup } = this.request;
    const all = this.works.flatMap((w, i) => (w.line === "compute" ? [] : [i]));
    const norm = allReduceSeconds(4, { ranks: shardGroup, perNode: this.shards.perNode }, cluster);
    const lastOf = (line: Line) => all.findLast((i) => this.works[i]!.line === line);
    let ready = (["shard", "copies"] as const).flatMap((line) => lastOf(line) ?? []);
    if (norm.seconds > 0) {
      this.send("shard", { ...norm, bytes: 0 }, "sum", [...ready, this.done.at(-1)!]);
      ready = [this.works.length - 1];
    }
    const bytes = this.blocks.reduce((n, b) => n + b.updateBytes, 0) / shardGroup;
    this.add(bytes / cluster.card.deviceMemory, ready);
    this.memorySeconds += this.works.at(-1)!.seconds;
  }

  private send(
    line: Line,
    { seconds, latency, bytes }: CollectiveTime,
    what: keyof Step["sent"],
    waits: number[],
  ): void {
    this.works.push({ line, seconds, waits });
    this.latency[line] += latency;
    this.sent[what] += bytes;
  }

  private add(seconds: number, waits: number[]): void {
    this.works.push({ line: "compute", seconds: seconds * this.pace, waits });
  }

  /** The busiest line; arithmetic is bound by memory where most of it moves bytes, a wire by what takes most of its time. */
  boundBy(busy: Readonly<Record<Line, number>>): ScaleBound {
    const { cluster, shardGroup } = this.request;
    const line = (["compute", "shard", "copies"] as const).reduce((a, b) => (busy[b] > busy[a] ? b : a));
    if (line === "compute") return this.memorySeconds > busy.compute / 2 ? "memory" : "compute";
    if (this.latency[line] > busy[line] / 2) return "latency";
    return line === "shard" && shardGroup <= cluster.perNode ? "nodeLink" : "network";
  }
}

function memoryOf(
  blocks: readonly BlockWork[],
  request: ScaleRequest & { shardGroup: number },
  graph: Graph,
): ScaleMemory {
  const { shardGroup, microBatches, order, reduceDType } = request;
  const sum = (of: (b: BlockWork) => number) => blocks.reduce((n, b) => n + of(b), 0);
  const most = (of: (b: BlockWork, next: BlockWork | undefined) => number) =>
    blocks.reduce((n, b, i) => Math.max(n, of(b, blocks[i + 1])), 0);
  const wide = dtypeBytes(graph.dtype ?? "float32");
  const live = order === "breadthFirst" ? microBatches : 1;
  const state = sum((b) => b.stateBytes) / shardGroup;
  const gradients = (sum((b) => b.trainable) * 4) / shardGroup;
  // Alone a rank sums gradients where they lie, and its weights are whole anyway.
  const blocksBytes =
    shardGroup === 1
      ? most((b) => b.elements * wide)
      : most((b, next) => (b.elements + (next?.elements ?? 0)) * wide) +
        most(
          (b, next) =>
            b.trainable * (wide + dtypeBytes(reduceDType)) + (next?.trainable ?? 0) * dtypeBytes(reduceDType),
        );
  const activations = live * sum((b) => b.boundaryBytes + b.keptBytes);
  const workspace = most((b) => b.workspaceBytes);
  return {
    state,
    gradients,
    blocks: blocksBytes,
    activations,
    workspace,
    total: state + gradients + blocksBytes + activations + workspace,
  };
}
