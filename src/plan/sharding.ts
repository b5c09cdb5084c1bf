/**
 * What a tape does for blocks whose state is cut over the members of a stage: the block is gathered (each member sends its
 * shard, in the graph's dtype, to all others), its gradients are reduced (each member gets all partial gradients of its
 * own shard and adds them in the order of members). A member sends (S - 1) / S of a block's parameters each time that it
 * is gathered and (S - 1) / S of its gradient, and receives as much: the least that is possible (ring all-gathers and
 * reduce-scatters move the same bytes; here they go straight, so that sums have one order).
 *
 * Replicas hold the same shards; what is reduced in each replica is exchanged between them and added in their order.
 */
import type { Graph } from "../graph/types.js";
import { dtypeBytes } from "../graph/value.js";
import type { Buffers } from "./arena.js";
import type { BlockLayout, Range } from "./layout.js";
import { memberOf, rankAt, replicaOf, replicasOf, shardOf, shardsOf, stageOf } from "./mesh.js";
import type { Boundary, GradientDType, Instruction, P, Shard, Stages } from "./types.js";

/** Where what ranks of a stage do with each other's parts is written to. */
export interface Emitter {
  readonly buffers: Buffers;
  emit(i: Instruction): void;
  exchange(
    op: "send" | "receive",
    operand: Boundary | Shard,
    count: number,
    peer: number,
    place: P,
    bytes: number,
  ): void;
}

export class Sharding {
  /** By block: where its reduced gradient is; -1: this shard has nothing that trains. */
  readonly reduced: P[] = [];
  /** What follows once messages of the visits before have arrived. */
  private later: (() => void)[] = [];
  private readonly stage: number;
  private readonly own: number;
  private readonly shards: number;

  constructor(
    private readonly graph: Graph,
    private readonly stages: Stages,
    private readonly layouts: readonly BlockLayout[],
    private readonly wide: "float32" | "float64",
    /** What gradients travel as. */
    private readonly dtype: GradientDType,
    private readonly emitter: Emitter,
  ) {
    this.stage = stageOf(stages);
    this.own = shardOf(stages);
    this.shards = shardsOf(stages);
  }

  /** The rank's own shard (`from`, in storage) and those of others -> all of the block (`whole`, in the graph's dtype). */
  gather(block: number, from: P, whole: P): void {
    const { emitter, own } = this;
    const itemsize = dtypeBytes(this.graph.dtype ?? "float32");
    const ranges = this.ranges(block, "compute");
    const to = this.part(whole, ranges[own]!, itemsize);
    if (to >= 0) emitter.emit({ op: "cast", block, from, to, waits: [] });
    for (const other of this.others(own, this.shards)) {
      const peer = this.peer(replicaOf(this.stages), other);
      if (to >= 0) this.send({ kind: "compute", block, shard: own, of: 0 }, peer, to);
      const place = this.part(whole, ranges[other]!, itemsize);
      if (place >= 0) this.receive({ kind: "compute", block, shard: other, of: 0 }, peer, place);
    }
  }

  /** Gradient sums of this rank, by user -> the shard's gradient of all members, which `then` may use. */
  reduce(block: number, sums: P[], then: () => void): void {
    const { emitter, dtype, own, stages } = this;
    const layout = this.layouts[block]!;
    const bytes = layout.partialBytes(dtype);
    if (bytes === 0) return;
    const inPlace = layout.sumsArePartial && dtype === this.wide && sums.length === 1;
    const partial = inPlace ? sums[0]! : emitter.buffers.transient("device", bytes, "large");
    emitter.emit({ op: "partial", block, sums, to: partial, dtype, waits: [] });
    const itemsize = dtypeBytes(dtype);
    const ranges = this.ranges(block, "partial");
    const member = memberOf(stages);
    const mine = this.part(partial, ranges[own]!, itemsize);
    const parts: P[] = [];
    const { begin, end } = ranges[own]!;
    this.reduced[block] = -1;
    for (const other of this.others(own, this.shards)) {
      const replica = replicaOf(stages);
      const peer = this.peer(replica, other);
      const theirs = this.part(partial, ranges[other]!, itemsize);
      if (theirs >= 0) this.send({ kind: "partial", block, shard: other, of: member }, peer, theirs);
      if (mine < 0) continue;
      parts[other] = emitter.buffers.transient("device", (end - begin) * itemsize, "large");
      this.receive({ kind: "partial", block, shard: own, of: replica * this.shards + other }, peer, parts[other]);
    }
    if (mine < 0) return;
    parts[own] = mine;
    this.later.push(() => {
      this.add(block, parts, dtype, "partial");
      if (replicasOf(stages) === 1) then();
      else this.acrossReplicas(block, then);
    });
  }

  /** Carries out what waited for messages of earlier visits. */
  advance(): void {
    for (const next of this.later.splice(0)) next();
  }
  settle(): void {
    while (this.later.length > 0) this.advance();
  }

  private acrossReplicas(block: number, then: () => void): void {
    const { emitter, stages, own } = this;
    const replica = replicaOf(stages);
    const parts: P[] = [];
    parts[replica] = this.reduced[block]!;
    const { bytes } = emitter.buffers.list[parts[replica]]!;
    for (const other of this.others(replica, replicasOf(stages))) {
      const peer = this.peer(other, own);
      this.send({ kind: "reduced", block, shard: own, of: replica }, peer, parts[replica]);
      parts[other] = emitter.buffers.transient("device", bytes, "large");
      this.receive({ kind: "reduced", block, shard: own, of: other }, peer, parts[other]);
    }
    this.later.push(() => {
      this.add(block, parts, this.wide, "reduced");
      then();
    });
  }

  private add(block: number, parts: P[], dtype: GradientDType, of: "partial" | "reduced"): void {
    const { begin, end } = this.ranges(block, "partial")[this.own]!;
    const to = this.emitter.buffers.transient("device", (end - begin) * dtypeBytes(this.wide), "large");
    this.emitter.emit({ op: "reduce", block, parts, to, dtype, of, waits: [] });
    this.reduced[block] = to;
  }

  private ranges(block: number, what: "compute" | "partial"): Range[] {
    const layout = this.layouts[block]!;
    return Array.from({ length: this.shards }, (_, k) => layout.shard(k)[what]);
  }

  /** The part of a flat buffer that a range of elements takes; -1 for none. */
  private part(p: P, { begin, end }: Range, itemsize: number): P {
    return end > begin ? this.emitter.buffers.part(p, begin * itemsize, (end - begin) * itemsize) : -1;
  }

  /** All others, the next one first: no rank is everybody's first. */
  private others(self: number, count: number): number[] {
    return Array.from({ length: count - 1 }, (_, k) => (self + 1 + k) % count);
  }

  private peer(replica: number, shard: number): number {
    return rankAt(this.stages, this.stage, replica * this.shards + shard);
  }

  private send(operand: Shard, peer: number, place: P): void {
    this.emitter.exchange("send", operand, 0, peer, place, this.emitter.buffers.list[place]!.bytes);
  }
  private receive(operand: Shard, peer: number, place: P): void {
    this.emitter.exchange("receive", operand, 0, peer, place, this.emitter.buffers.list[place]!.bytes);
  }
}
