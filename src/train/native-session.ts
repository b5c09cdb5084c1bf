/**
 * The engine as the binding shows it: types only. One Session owns a model's state and one native thread; every method
 * that works returns a promise and never blocks the event loop. `native.ts` is the only importer of the addon.
 */
import type { DType, Graph } from "../graph/types.js";
import type { MasterWeight, Placement, Tape } from "../plan/types.js";

/** A tensor of a batch: the bytes are copied at the crossing. */
export interface HostTensor {
  dtype: DType;
  shape: number[];
  /** Little-endian elements, row-major; any typed array or Buffer whose byteLength fits. */
  data: ArrayBufferView;
}
export type Batch = Record<string, HostTensor>;

/**
 * A CPU-backed device for tests and plans: its memory ends at a cap, copies to and from it take their time, and an
 * adversary may make every copy as late and in as odd an order as the tape's waits allow, its target full of NaN until
 * then. It shows races and what fits; it is no GPU.
 */
export interface SimDeviceOptions {
  /** An allocation beyond it fails as on a card; null: no cap. */
  memoryBytes: number | null;
  /** Bytes a second of each copy queue; null: as fast as memory is. */
  hostToDevice: number | null;
  deviceToHost: number | null;
  /** Seed of the adversary; null: none, copies run on threads of their own. */
  adversary: number | null;
}

/** nccl: from card to card. gloo: through the hosts' memory. */
export type Transport = "nccl" | "gloo";

export interface SessionOptions {
  /** cpu: the device is this process's memory. sim: the same behind a SimDevice. */
  device: "cpu" | "sim" | `cuda:${number}`;
  /** dtype that blocks compute with: the graph's. */
  dtype: "float32" | "float64" | "bfloat16";
  /** How parameters are stored. Default dtype. */
  storage?: "float32" | "float64" | "bfloat16";
  /** Of parameters stored in bfloat16. none: updates round stochastically. Default float32. */
  masterWeight?: MasterWeight;
  /** Threads of the engine's intra-op pool; 0: all this process may use. */
  threads: number;
  optimizer: {
    kind: "adamw" | "adamw8bit";
    beta1: number;
    beta2: number;
    epsilon: number;
    weightDecay: number;
  };
  /** Bytes of a CUDA device's memory that may be used: imitates a smaller card. Default: all. */
  deviceMemory?: number;
  /** The others that train the same model; tapes then have stages. From joinRanks; left by its owner after dispose(). */
  ranks?: NativeRanks;
  /**
   * How what tapes send and receive travels; all ranks alike. "nccl" is for CUDA devices, no two of them one card, and a
   * build with NCCL. Default "gloo".
   */
  transport?: Transport;
  /**
   * Ranks that share every row with this one, by their place in it (splitBatch), this one among them: the group of a graph
   * that was traced with as many. load() waits for all of them.
   */
  context?: number[];
  /** With device "sim". */
  sim?: SimDeviceOptions;
  /** Folder for state and boundaries that a tape places on disk; the files in it are removed at the end. */
  diskFolder?: string;
}

/** Where ranks meet, and which of them this one is. */
export interface RankSpec {
  rank: number;
  size: number;
  /** Of the store that all meet at: a host name or address. */
  address: string;
  port: number;
  /** Rank 0 serves the store. False: something else does already (torchrun's agent). */
  serve: boolean;
  /** Before every key, so that several runs may share a store. */
  prefix: string;
  /** How long to wait for the others. */
  joinSeconds: number;
  /** How long another may be silent before it counts as lost; at least 1. */
  silenceSeconds: number;
  /** Ranks on this machine, which share its memory; default: all. */
  localSize?: number;
}

export interface NativeRanks {
  readonly rank: number;
  readonly size: number;
  /** Everyone's text, by rank. Collective: every rank calls it, in one order. */
  gather(mine: string): Promise<string[]>;
  /**
   * Name in c10d's registry of a process group over these ranks, this one among them, by their place: what an operator
   * of this process takes as its group, until this rank leaves. The first call of each list waits for all of its ranks.
   */
  group(members: number[]): Promise<string>;
  /** Tells the others why this rank ends; whatever any rank waits for then rejects with RANKS. */
  fail(why: string): void;
  /** Why a wait would fail now; null: all ranks are there. Never waits. */
  lost(): string | null;
  /** The last call of a rank for which all went well. */
  leave(): Promise<void>;
  /** Bytes of boundaries since joining. */
  counts(): { sentBytes: number; receivedBytes: number };
}

export interface StepRequest {
  tape: Tape;
  /** The plan's flush tape, where the tape's update is "forward". */
  flush?: Tape;
  microBatches: Batch[];
  /**
   * By loss term: how many elements its mean is over. Default: what is counted in microBatches. With a context those are
   * shares of rows, and this is the sum of splitBatch's counts.
   */
  counts?: Record<string, number>;
  /** 0-based count of optimizer steps taken before this one. Adam's bias correction uses its own stored count. */
  step: number;
  seed: number;
  learningRate: number;
  /** Norm to clip to, of all gradients or of each block's as the tape says; null: no clipping (the norm is still reported). */
  maxGradNorm: number | null;
  /** Also say what each instruction did. */
  profile?: boolean;
}

/** By instruction of the tape. Milliseconds from the step's start; bytes live on the device and host after it. */
export interface StepProfile {
  startMs: Float64Array;
  endMs: Float64Array;
  /** Arena and what libtorch holds for the block's passes. */
  deviceBytes: Float64Array;
  /** Highest while it ran. */
  devicePeakBytes: Float64Array;
  hostBytes: Float64Array;
}

export interface StepResult {
  /** Loss terms, each summed over micro-batches and already divided by its global count. */
  losses: Record<string, number>;
  /** Weighted sum of the terms. */
  loss: number;
  /** Weighted loss sum / count of every micro-batch by itself. */
  microBatchLosses: number[];
  counts: Record<string, number>;
  gradNorm: number;
  /** Not null: parameters are untouched; the first micro-batch whose loss was not finite (-1: the norm was not). */
  nonFinite: { microBatch: number; loss: number } | null;
  seconds: number;
  /** Bytes that the step's copies moved. */
  bytesToDevice: number;
  bytesFromDevice: number;
  bytesLoaded: number;
  bytesSaved: number;
  /** Boundaries to and from other ranks. */
  bytesSent: number;
  bytesReceived: number;
  /** Update "backward": blocks left as they were because their gradient was not finite. */
  skippedBlocks: number[];
  profile?: StepProfile;
  peakDeviceBytes: number;
  /** Times that a card's driver was asked for memory; after a first step of the same shapes it should be none. */
  newDeviceSegments: number;
  /** Live boundary slots, kept graphs, gradients and states at their highest, as counted by the engine. */
  peakHostBytes: number;
}

/** Names in a Session: parameter names as in the graph; kinds of state spelled as in PyTorch. */
/** step: int64 scalar, the updates that this parameter has seen (one that no batch touched lags behind). */
export type StateKind =
  | "param"
  | "master"
  /** int16: the lower halves of fp32 weights whose upper halves are the bfloat16 param (masterWeight "split16"). */
  | "low"
  | "exp_avg"
  | "exp_avg_sq"
  /** 8-bit moments and their scales under the names of bitsandbytes. */
  | "state1"
  | "state2"
  | "absmax1"
  | "absmax2"
  | "step";

export interface StateEntry {
  kind: StateKind;
  name: string;
  dtype: DType;
  /** Of the whole tensor. */
  shape: number[];
  /** What the session holds of it: `bytes` from byte `begin` on; with shards often a part, which reads as flat. */
  begin: number;
  bytes: number;
}

/** Byte range of a file <-> one state tensor. dtype is the file's; the engine converts. */
export interface FileEntry {
  kind: StateKind;
  name: string;
  dtype: DType;
  offset: number;
  bytes: number;
}

export interface NativeSnapshot {
  /** False: memory does not hold the state twice; no step may be taken before everything is written. */
  readonly copied: boolean;
  /** Writes `header`, then the tensors at their offsets, then fsync. Leaves no partial file behind on failure. */
  write(path: string, header: Uint8Array, entries: FileEntry[]): Promise<{ bytes: number; sha256: string }>;
  /**
   * The same into a file that several ranks write, each its own ranges (`header`: of one of them, else empty); what is
   * there stays. The bytes written.
   */
  writeParts(path: string, header: Uint8Array, entries: FileEntry[]): Promise<number>;
  dispose(): void;
}

export interface NativeSession {
  /**
   * The graph that trains: makes room for its state where `placement` says; default: all on the device, as
   * planResident's tapes have it. Parameters are undefined until initialize() or readFile().
   */
  load(graph: Graph, placement?: Placement): Promise<void>;
  /** Another graph over the same parameters by name (mode eval or generate). */
  attach(name: string, graph: Graph): Promise<void>;
  /** Draws every parameter from (seed, name) by its Init; zeroes optimizer state. */
  initialize(seed: number): Promise<void>;
  step(request: StepRequest): Promise<StepResult>;
  /**
   * Carries out the updates that the last step left pending (update "forward"). Happens by itself before anything looks
   * at the state: run, read, write, state, snapshot, readFile.
   */
  flush(): Promise<void>;
  /** Runs an attached graph forward; outputs by name, copied out. */
  run(
    name: string,
    batch: Batch,
    options?: { seed?: number; counts?: Record<string, number> },
  ): Promise<Record<string, HostTensor>>;
  /** Gradients of the last step before clipping, for tests: sums of the parameter. */
  gradient(name: string): Promise<HostTensor>;
  read(kind: StateKind, name: string): Promise<HostTensor>;
  write(kind: StateKind, name: string, tensor: HostTensor): Promise<void>;
  state(): Promise<StateEntry[]>;
  /** The highest `step` of any parameter. */
  optimizerStep(): Promise<number>;
  /** Sets every parameter's `step`. */
  setOptimizerStep(step: number): Promise<void>;
  snapshot(kinds: StateKind[]): Promise<NativeSnapshot>;
  /** Reads byte ranges of a file straight into state, in parallel; checks bounds against the file's size. */
  readFile(path: string, entries: FileEntry[]): Promise<void>;
  /** Stops the step in flight between two instructions, before anything was updated; else lets it end. */
  cancel(): void;
  /** Ends the thread and returns all memory. Pending promises reject with DISPOSED. */
  dispose(): Promise<void>;
  /** liveBytes: host bytes of all tensors of the process; cachedBytes: freed ones kept for reuse. */
  stats(): { queued: number; stateBytes: number; liveBytes: number; cachedBytes: number };
}
