/**
 * What a tape does where the ranks of a replica share host memory: the parts of a block's parameters lie there beside each
 * other, each rank fetches the others' straight from there, and no message gathers anything. A part is written by its own
 * rank alone, after its update.
 *
 * Why nobody reads what is being written: with update "backward" or "end" a part is updated with the partial gradients of
 * all ranks, and each sends its own behind its last pass through the block, which is behind its last fetch of it. With
 * update "forward" a part is updated before any rank fetches it, and its rank then says so to the others. Between steps
 * all wait for each other. checkSharedHost (check-shared.ts) proves it of the tapes of all ranks.
 */
import type { Graph } from "../graph/types.js";
import { dtypeBytes } from "../graph/value.js";
import type { BlockLayout } from "./layout.js";
import { rankAt, replicaOf, shardOf, shardsOf, stageOf } from "./mesh.js";
import type { Emitter } from "./sharding.js";
import type { P, Stages, StateFormat } from "./types.js";

/** Bytes of the message that a part has been updated. */
export const WORD = 1;

/** Another shard's part on its way: all of `from` -> `to`. */
export interface SharedFetch {
  shard: number;
  from: P;
  to: P;
  bytes: number;
}

export class SharedHost {
  /** By block: where all its parts lie, and by shard where each does; -1: it has none. */
  private readonly wholes: P[] = [];
  private readonly slabs: P[][] = [];
  /** By block: what was fetched in the storage dtype, and where it goes. */
  private readonly staged: { shard: number; from: P; to: P }[][] = [];
  private readonly own: number;
  private readonly shards: number;

  constructor(
    private readonly graph: Graph,
    private readonly stages: Stages,
    private readonly layouts: readonly BlockLayout[],
    private readonly storage: StateFormat["storage"],
    private readonly emitter: Emitter,
  ) {
    this.own = shardOf(stages);
    this.shards = shardsOf(stages);
  }

  /** Makes room for the parts of a block; that of the rank's own. */
  home(block: number): P {
    const { buffers } = this.emitter;
    const slabs = this.all((k) => this.layouts[block]!.slab(k));
    const bytes = slabs.reduce((sum, { paramBytes }) => sum + paramBytes, 0);
    if (bytes === 0) return -1;
    const whole = buffers.fixed("shared", bytes);
    this.wholes[block] = whole;
    this.slabs[block] = slabs.map(({ at, paramBytes }) => (paramBytes > 0 ? buffers.part(whole, at, paramBytes) : -1));
    return this.slabs[block]![this.own]!;
  }

  /** Undefined: the block's parameters do not lie here. */
  whole(block: number): P | undefined {
    return this.wholes[block];
  }

  /** The rank's own part is cast (`from`, in storage); what is to be fetched of the others, to all of the block (`to`). */
  gather(block: number, from: P, to: P): SharedFetch[] {
    const { emitter, graph, storage } = this;
    const dtype = graph.dtype ?? "float32";
    const itemsize = dtypeBytes(dtype);
    const part = (k: number): P => {
      const { begin, end } = this.layouts[block]!.shard(k).compute;
      return end > begin ? emitter.buffers.part(to, begin * itemsize, (end - begin) * itemsize) : -1;
    };
    if (from >= 0) emitter.emit({ op: "cast", block, from, to: part(this.own), waits: [] });
    this.staged[block] = [];
    return this.others().flatMap((shard) => {
      const slab = this.slabs[block]![shard]!;
      if (slab < 0) return [];
      const { heldBytes: bytes } = this.layouts[block]!.slab(shard);
      const [target, held] = [part(shard), emitter.buffers.part(slab, 0, bytes)];
      if (storage === dtype) return [{ shard, from: held, to: target, bytes }];
      const staging = emitter.buffers.transient("device", bytes, "large");
      this.staged[block]!.push({ shard, from: staging, to: target });
      return [{ shard, from: held, to: staging, bytes }];
    });
  }

  /** What was fetched of a block becomes what its passes compute with. */
  cast(block: number): void {
    for (const { shard, from, to } of this.staged[block]?.splice(0) ?? [])
      this.emitter.emit({ op: "cast", block, from, to, shard, waits: [] });
  }

  /** The rank's own part is home, updated: the others hear it, and it hears the same of theirs. */
  publish(block: number): void {
    const say = (op: "send" | "receive", shard: number, other: number) => {
      const trains = this.layouts[block]!.slab(shard).trainableBytes > 0;
      const peer = rankAt(this.stages, stageOf(this.stages), replicaOf(this.stages) * this.shards + other);
      const operand = { kind: "updated", block, shard, of: 0 } as const;
      if (trains) this.emitter.exchange(op, operand, 0, peer, this.slabs[block]![shard]!, WORD);
    };
    for (const other of this.others()) say("send", this.own, other);
    for (const other of this.others()) say("receive", other, other);
  }

  /** The next one first: no part is everybody's first. */
  private others(): number[] {
    return Array.from({ length: this.shards - 1 }, (_, k) => (this.own + 1 + k) % this.shards);
  }
  private all<T>(of: (shard: number) => T): T[] {
    return Array.from({ length: this.shards }, (_, k) => of(k));
  }
}
