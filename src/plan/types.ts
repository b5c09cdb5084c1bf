/**
 * The tape: the schedule of one optimizer step as data. The planner writes it, the checker proves it, the cost model
 * times it, the engine (C++) executes it, the profiler draws it.
 *
 * It is a *sequential* program: what its instructions mean does not depend on queues. Queues (compute and the copy
 * engines) run beside each other; `waits` are derived from the hazards between places and never written by hand.
 *
 * Operands
 *   param(b)         what block b owns, as stored: trainable tensors, then frozen ones. Version t after t updates.
 *   state(b)         optimizer state and master weights of b's trainable tensors. Same versions.
 *   compute(b)       param(b) in the graph's dtype, where it is stored in another (written by `cast`) or in shards: then
 *                    of all of them, this rank's by `cast`, the others' as they arrive.
 *   sums(b)          fp32 (fp64) gradient sums of every trainable parameter that b *uses*, over micro-batches 0..m.
 *   partial(b)       with shards: gradient of b's owned parameters by this rank's micro-batches, as wide as what travels.
 *   reduced(b)       with shards: the rank's shard of the gradient by the micro-batches of all ranks of the stage.
 *   retained(b)      gradient of b's owned parameters kept for an update in the next step, in its own dtype.
 * With shards param, state and retained are the rank's own shard. With shared host memory those parts of param whose home
 * is the host lie beside each other where all ranks of a replica read them, and each rank writes its own.
 *   x(b, o, m)       boundary: output o of block b for micro-batch m.
 *   dx(b, o, m)      its gradient.
 * A block may use parameters that an earlier block owns (tied weights): its passes then read several param(owner). Where
 * they are of different stages, the owner's lends what passes read and gets the user's sums; it alone updates.
 */
import type { DType } from "../graph/types.js";

/**
 * depthFirst: each micro-batch through all blocks. breadthFirst: all micro-batches through a block, then the next.
 * oneForwardOneBackward: as depthFirst, but a rank that is s stages before the last lets s forwards run ahead of its
 * backwards, so that contiguous stages all work at once (PipeDream-flush, arXiv 2006.09503; its bubble is
 * (R - 1) / (M + R - 1)). On one rank it is depthFirst. Over interleaved stages, each of v stretches of blocks, it is that
 * of Narayanan et al., arXiv 2104.04473, section 2.2: R micro-batches through one stretch, then through the next; its
 * bubble is v times smaller.
 */
export type Schedule = "depthFirst" | "breadthFirst" | "oneForwardOneBackward";
export const SCHEDULES = ["breadthFirst", "depthFirst", "oneForwardOneBackward"] as const satisfies readonly Schedule[];
/**
 * none: keep each block's autograd graph from forward to backward. all: run the forward again in the backward. selective:
 * keep results that are dear to compute and small to keep, and compute the rest again from them (selective.ts).
 */
export type Recompute = "all" | "none" | "selective";
/**
 * When a block is updated. end: after all backwards, sums of all blocks live until then. backward: right after the
 * block's own last backward; no global clipping. forward: its gradient is retained, and it is updated when the next
 * step's forward (or `flush`) fetches it; exact global clipping.
 */
export type UpdateOrder = "end" | "backward" | "forward";
/** global: one coefficient from all gradients. block: each block by its own norm. none: norms are only reported. */
export type Clip = "none" | "block" | "global";
/** What a gradient is on its way between ranks; float64 in a float64 graph only. */
export type GradientDType = "float32" | "float64" | "bfloat16";
/** What a retained gradient is stored as; dynamic8: the signed 8-bit dynamic map with a float32 absmax for each 256. */
export type RetainedDType = "float32" | "float64" | "bfloat16" | "dynamic8";
export type MasterWeight = "none" | "split16" | "float32";

/**
 * device: the accelerator's memory (plain memory of this process on the CPU). host: pinned memory beside a device.
 * shared: pinned memory that the ranks of a replica, on one machine, have in common: one arena for all of them, with the
 * same offsets. disk: a file. slot: a numbered tensor that libtorch allocates on the device when it is written, of whatever size;
 * `offset` is its number and `bytes` 0. Slots serve resident runs whose micro-batches have sizes of their own.
 */
export type Space = "device" | "host" | "shared" | "disk" | "slot";
export interface Place {
  space: Space;
  /** Bytes from the start of the space's arena: a multiple of 256; of 4,096 on disk and for what is moved to or from it. */
  offset: number;
  bytes: number;
}
/** Index into Tape.places; -1: no operand. */
export type P = number;

/** in: host (or shared) to device. out: device to host (or shared). load: disk to host. save: host to disk. */
export type CopyQueue = "in" | "out" | "load" | "save";
/** send, receive: to and from other ranks. */
export type Queue = "compute" | CopyQueue | "send" | "receive";

/**
 * Blocks, micro-batches and rows over ranks. A stage is `shards` x `replicas` ranks (1 x 1: one) that run the same blocks
 * and add up their gradients: each on micro-batches of its own, which `context` neighbours share, a part of each row for
 * one. State is cut over `shards` ranks and the same on `replicas` of them. Rank = (stage x replicas + replica) x shards +
 * shard, so that shards are neighbours on a machine.
 */
export interface Stages {
  /** Whose tape this is. */
  rank: number;
  ranks: number;
  /** By block: its stage. */
  of: number[];
  /** Default 1. */
  shards?: number;
  /** Default 1. */
  replicas?: number;
  /** Ranks that share rows: a divisor of shards x replicas. The graph is then one of a context. Default 1. */
  context?: number;
  /**
   * The ranks of every replica are on one machine, and parts of parameters whose home is the host lie in memory that they
   * share: a rank fetches all parts of a block from there instead of receiving them. Ranks that share memory begin a step
   * when all of them have ended the one before.
   */
  sharedHost?: true;
}

export interface Boundary {
  kind: "x" | "dx";
  block: number;
  output: number;
  microBatch: number;
}
/** `shard`: another rank's part of param, in shared host memory; absent: the rank's own. */
export type Operand = { kind: "param" | "state" | "retained"; block: number; shard?: number } | Boundary;
/**
 * What stages exchange that use one parameter (tied embeddings), once a step: what passes read of the owner's parameters,
 * compute(block) or, where there is none, param(block); and the sums of another stage's block that uses them, which go
 * back to the owner. A member of a stage has to do with the same member of the other.
 */
export type Tied = { kind: "param" | "compute" | "sums"; block: number };
/**
 * What ranks of one stage exchange: a shard of compute(block); a shard of a rank's own gradient (`of`: the member of the
 * stage whose it is); a shard of the gradient summed over the shards' ranks (`of`: the replica). updated: the word that
 * its owner has updated a shard in shared host memory: one byte travels, and what is received is what lies there.
 */
export type Shard = { kind: "compute" | "partial" | "reduced" | "updated"; block: number; shard: number; of: number };

/**
 * Positions of instructions on *other* queues that must have completed before this one begins. Instructions of one
 * queue run in order. All point backwards.
 */
interface Waiting {
  waits: number[];
}

/** `params[i]`: where the parameters of the i-th of `ownersOf(graph, block)` are, in the graph's dtype. */
export type Instruction = Waiting &
  (
    | { op: "forward"; block: number; microBatch: number; params: P[]; in: P[]; out: P[]; keep: boolean }
    /** A block whose outputs are losses only: forward and backward in one. */
    | {
        op: "turn";
        block: number;
        microBatch: number;
        params: P[];
        in: P[];
        dIn: P[];
        add: boolean[];
        sums: P;
        first: boolean;
      }
    /**
     * dOut, x -> parameter gradients into sums (first: overwrite, else add), input gradients into dIn (add[i]: add to
     * what the place holds, else overwrite). Runs the forward again unless the forward's `keep` held its graph; where it
     * held dear results, without computing those.
     */
    | {
        op: "backward";
        block: number;
        microBatch: number;
        params: P[];
        in: P[];
        dOut: P[];
        dIn: P[];
        add: boolean[];
        sums: P;
        first: boolean;
      }
    /** param(block), or another `shard` of it, -> compute(block), in the graph's dtype. */
    | { op: "cast"; block: number; from: P; to: P; shard?: number }
    /**
     * The sums of block's owned parameters: `sums[i]` are those of the i-th of `usersOf(graph, block)`. Tied uses are
     * added once, here, into the first user's. Writes the block's partial norms.
     */
    | { op: "norm"; block: number; sums: P[] }
    /**
     * With shards: sums, as norm's -> partial(block). Tied uses are added here; what no micro-batch reached is zero. `to`
     * may be the very place of the sums.
     */
    | { op: "partial"; block: number; sums: P[]; to: P; dtype: GradientDType }
    /**
     * With shards: parts, by member of the stage (or, of what is reduced already, by replica) and added in this order ->
     * reduced(block), in fp32 (fp64).
     */
    | { op: "reduce"; block: number; parts: P[]; to: P; dtype: GradientDType; of: "partial" | "reduced" }
    /**
     * With ranks and update on backward. report: tells the others, after the last forward or turn, whether all went well
     * here; waits for nobody. agree: before the first update, hears the same of all, and carries on as they do.
     */
    | { op: "report" | "agree" }
    /**
     * All partial norms and losses, of all ranks -> the record of step t: optimizer step, learning rate, coefficient,
     * skip.
     */
    | { op: "coefficient" }
    /** sums (after norm) -> retained(block). */
    | { op: "pack"; block: number; sums: P[]; to: P; dtype: RetainedDType }
    /**
     * param, state: version t -> t + 1, in place. from "sums": by this step's gradient, grad as `norm`'s sums. from
     * "retained": by the gradient that the step before retained, and its closed record; grad is [retained]. Does
     * nothing where no update is pending (the first step, or after a flush).
     */
    | { op: "update"; block: number; param: P; state: P; grad: P[]; from: "sums" | "retained"; dtype: RetainedDType }
    /**
     * bytes [at, at + bytes) of `from` -> the same range of `to`; the operand is said for the profile and for errors.
     */
    | { op: "copy"; queue: CopyQueue; operand: Operand; from: P; to: P; at: number; bytes: number }
    /**
     * From one rank to another: the first `bytes` of the place. The k-th send from A to B meets the k-th receive of B
     * from A. `count`: contributions that a boundary's gradient holds on the way; 0 for all else.
     */
    | { op: "send" | "receive"; operand: Boundary | Shard | Tied; count: number; peer: number; place: P; bytes: number }
  );

export interface Arenas {
  deviceBytes: number;
  hostBytes: number;
  diskBytes: number;
  /** With shared host memory. */
  sharedBytes?: number;
}

/** Where the state of every block lives between steps; the same in every tape of a session. */
export interface Placement {
  arenas: Arenas;
  /** By block; null where the block (with shards: this one) has no parameter, state: none that is trainable. */
  homes: {
    param: Place | null;
    state: Place | null;
    /** Where the parts of all shards lie one behind the other (BlockLayout.slab); param is one of them, if any. */
    shared?: Place;
  }[];
  /** With ranks. */
  stages?: Stages;
}

/** How parameters and optimizer state are stored: what layout.ts turns into bytes. */
export interface StateFormat {
  /** dtype of param(b). */
  storage: Extract<DType, "float32" | "float64" | "bfloat16">;
  masterWeight: MasterWeight;
  optimizer: "adamw" | "adamw8bit";
}

/**
 * With recompute "selective": what a forward with `keep` leaves to its backward. Ids of values by program of the graph,
 * ascending, each the result of a call. `values`: what its kernels returned is kept and handed over in the backward in
 * their stead. `shapes`: nothing in the backward reads it, so that its shape is handed over, filled with not-a-number.
 */
export interface Kept {
  values: number[][];
  shapes: number[][];
  /** For operators of these calls, as in Node.op: the dispatcher's operators below autograd whose results they are. */
  kernels: Record<string, string[]>;
}

export interface Tape {
  format: "stromatolite.tape";
  version: 2;
  /** step: one optimizer step. flush: carries out what a step with update "forward" left pending. */
  kind: "step" | "flush";
  schedule: Schedule;
  recompute: Recompute;
  update: UpdateOrder;
  clip: Clip;
  state: StateFormat;
  /** 0 in a flush. */
  microBatches: number;
  /** Absent: one rank runs everything. */
  stages?: Stages;
  /** Largest value of every named dim that the places allow for; null: boundaries lie in slots, any size goes. */
  dims: Record<string, number> | null;
  placement: Placement;
  slots: number;
  /** Of a step with recompute "selective". */
  kept?: Kept;
  places: Place[];
  instructions: Instruction[];
}
