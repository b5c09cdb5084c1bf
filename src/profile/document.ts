/**
 * A profiled step as one document: what ran when on which queue, what memory held, predicted beside measured. It is
 * profile.json; the page and the trace are drawn from it.
 */
import { StromaError } from "../errors.js";
import type { Graph } from "../graph/types.js";
import type { MemoryDevice } from "../plan/memory-gradients.js";
import type { MachineProfile } from "../plan/profiles.js";
import { type Simulation, simulate, type TapePeaks, tapePeaks } from "../plan/simulate.js";
import type { Queue, Tape } from "../plan/types.js";
import { QUEUES, queueOf } from "../plan/waits.js";
import type { StepProfile, StepResult } from "../train/native-session.js";
import { computingOf, hiddenMs, laneOf } from "./lanes.js";
import {
  arenaAllocation,
  HELD_KINDS,
  type HeldKind,
  type Holding,
  heldByInstruction,
  holdings,
  overTime,
  predictedWorkspace,
  SENT_AS,
} from "./timeline.js";

export interface Prediction {
  simulation: Pick<Simulation, "seconds" | "start" | "end" | "busySeconds" | "boundBy">;
  peaks: TapePeaks;
  /** Highest bytes beside arena and slots during each instruction. */
  workspace: Float64Array;
}

/** What the plan expects of a tape. `device`: whose kernels run; `dims`: sizes of a micro-batch, as in `simulate`. */
export function predictStep(
  graph: Graph,
  tape: Tape,
  machine: MachineProfile,
  device: MemoryDevice = machine.device,
  dims: Readonly<Record<string, number>> = tape.dims ?? {},
): Prediction {
  return {
    simulation: simulate(graph, tape, machine, dims),
    peaks: tapePeaks(graph, tape, device, dims),
    workspace: predictedWorkspace(graph, tape, device, dims),
  };
}

export interface ProfileInput {
  graph: Graph;
  /** The tape that ran, and what the session said of it under `profile: true`. */
  tape: Tape;
  profile: StepProfile;
  result: StepResult;
  predicted: Prediction;
  /** Device memory that there is; null or absent: no line is drawn. */
  capBytes?: number | null;
  /** Sizes of a micro-batch, where the tape's own dims are null. */
  dims?: Readonly<Record<string, number>>;
  /** E.g. "sim", "cuda:0"; for the title. */
  device?: string;
  /** Whose rates the prediction used, e.g. "rtx4090". */
  machine?: string;
}

export const MEMORY_KINDS = [...HELD_KINDS, "workspace"] as const;
export type MemoryKind = (typeof MEMORY_KINDS)[number];

export interface ProfiledInstruction {
  op: string;
  /** Of a copy or a message: what it carries. */
  operand: HeldKind | null;
  queue: Queue;
  block: string | null;
  microBatch: number | null;
  /** Of a message: the rank that it goes to or comes from. */
  peer: number | null;
  startMs: number;
  endMs: number;
  predictedStartMs: number;
  predictedEndMs: number;
  /** Of a message, where the other rank is known: when both ends were there. Until then this one waited. */
  bothMs: number | null;
  /** Of a copy or a message. */
  bytes: number;
  /** Held in the device's arena and slots during it, by kind; what stands at 0 is left out. */
  deviceBytes: Partial<Record<HeldKind, number>>;
  /** Compute: beside arena and slots, at the highest while it ran; null for copies. */
  workspaceBytes: number | null;
  predictedWorkspaceBytes: number;
  /** Of the arenas of host and disk, what holds something. */
  hostBytes: number;
  diskBytes: number;
}

export interface Holder {
  kind: MemoryKind;
  /** Null: the block's passes as a whole, or unused bytes of the arena. */
  block: string | null;
  bytes: number;
}

/** Milliseconds of a rank's messages, sent and received, added up. */
export interface MessageTimes {
  /** One end was there before the other. */
  waitMs: number;
  /** Both were, until it had arrived; and of that what passed while this rank computed. */
  movingMs: number;
  hiddenMs: number;
}

export interface ProfileDocument {
  format: "stromatolite.profile";
  version: 1;
  model: string;
  parameters: number;
  device: string | null;
  machine: string | null;
  /** Of several ranks, whose it is, and milliseconds from the first rank's begin of the step to this one's. */
  rank: { rank: number; ranks: number; beganMs: number } | null;
  plan: Pick<Tape, "schedule" | "recompute" | "update" | "clip" | "state" | "microBatches" | "dims">;
  summary: {
    stepMs: number;
    predictedStepMs: number;
    peakDeviceBytes: number;
    predictedPeakDeviceBytes: number;
    capBytes: number | null;
    arenaBytes: Record<"device" | "host" | "disk", number>;
    /** Where device memory was highest: the first such instruction, what it held, largest first, and unused arena. */
    peak: { instruction: number; atMs: number; byKind: Record<MemoryKind, number>; unusedBytes: number; top: Holder[] };
    /** compute: without what waits for all ranks. */
    busyMs: Record<Queue, number>;
    predictedBusyMs: Record<Queue, number>;
    /** Time that copies took, added over the copy queues, and of it what passed while compute was busy. */
    copyMs: number;
    hiddenCopyMs: number;
    bytes: Pick<
      StepResult,
      "bytesToDevice" | "bytesFromDevice" | "bytesLoaded" | "bytesSaved" | "bytesSent" | "bytesReceived"
    >;
    /** Of the document of one of several ranks that were put side by side. */
    messages: MessageTimes | null;
  };
  instructions: ProfiledInstruction[];
  /** Bytes of one kind and block with one life; `from` and `to` are instructions, -1 and their count: beyond the step. */
  holdings: { space: Holding["space"]; kind: HeldKind; block: string; bytes: number; from: number; to: number }[];
  /** Device memory over measured time, by kind; values hold from one time to the next. */
  memory: {
    timeMs: number[];
    bytes: Record<MemoryKind, number[]>;
    /** Of the device's arena: allocated, and nothing in it. */
    unusedBytes: number[];
  };
}

const KIND_OF = {
  param: "parameters",
  state: "optimizer",
  retained: "retained",
  x: "boundaries",
  dx: "boundaries",
} as const;
const COPIES: readonly Queue[] = ["in", "out", "load", "save"];
const TOP = 12;
const round = (ms: number): number => Math.round(ms * 1e3) / 1e3;

/**
 * Throws INVALID_ARGUMENT where the profile is not of this tape, NON_FINITE for a step that ran only in part.
 */
export function profileDocument(input: ProfileInput): ProfileDocument {
  const { graph, tape, profile, result, predicted, capBytes = null } = input;
  const { simulation, peaks } = predicted;
  const n = tape.instructions.length;
  const lengths = [profile.startMs.length, simulation.start.length, predicted.workspace.length];
  if (lengths.some((length) => length !== n))
    throw new StromaError(
      "INVALID_ARGUMENT",
      `[profile] expected measured and predicted values for the tape's ${n} instructions, got ${lengths.join(", ")}`,
    );
  if (result.nonFinite !== null)
    throw new StromaError(
      "NON_FINITE",
      "[profile] expected a whole step, got one that ended at a loss that is not finite. Profile another step",
    );
  const list = holdings(graph, tape, input.dims);
  const { startMs, endMs } = profile;
  const { arenas } = tape.placement;
  const arena = arenaAllocation(arenas.deviceBytes);
  const device = heldByInstruction(list, "device", n);
  const slots = heldByInstruction(list, "slot", n);
  const host = heldByInstruction(list, "host", n);
  const disk = heldByInstruction(list, "disk", n);
  const total = (of: Record<HeldKind, Float64Array>, i: number) => HELD_KINDS.reduce((sum, k) => sum + of[k][i]!, 0);
  const beside = (bytes: Float64Array, later: number) =>
    Float64Array.from(tape.instructions, (at, i) => {
      const slot = i + later < n ? total(slots, i + later) : total(slots, i);
      return queueOf(at) === "compute" ? Math.max(0, bytes[i]! - arena - slot) : 0;
    });
  const workspace = { peak: beside(profile.devicePeakBytes, 0), after: beside(profile.deviceBytes, 1) };

  const { stages } = tape;
  const ranks = stages?.ranks ?? 1;
  const instructions = tape.instructions.map((at, i): ProfiledInstruction => {
    const held = HELD_KINDS.map((kind) => [kind, device[kind][i]! + slots[kind][i]!] as const);
    return {
      op: at.op,
      operand: carried(at),
      queue: queueOf(at),
      block: blockName(graph, at),
      microBatch: microBatchOf(at),
      peer: "peer" in at ? at.peer : null,
      startMs: round(startMs[i]!),
      endMs: round(endMs[i]!),
      predictedStartMs: round(simulation.start[i]! * 1e3),
      predictedEndMs: round(simulation.end[i]! * 1e3),
      bothMs: null,
      bytes: "operand" in at ? at.bytes : 0,
      deviceBytes: Object.fromEntries(held.filter(([, bytes]) => bytes > 0)),
      workspaceBytes: queueOf(at) === "compute" ? workspace.peak[i]! : null,
      predictedWorkspaceBytes: predicted.workspace[i]!,
      hostBytes: total(host, i),
      diskBytes: total(disk, i),
    };
  });
  const over = overTime(tape, list, profile, workspace);
  const busyMs = byQueue((queue) =>
    instructions.reduce((sum, at, i) => sum + (laneOf(at, ranks) === queue ? endMs[i]! - startMs[i]! : 0), 0),
  );
  const rank = stages === undefined ? null : { rank: stages.rank, ranks, beganMs: 0 };
  const computing = computingOf({ instructions, rank });
  const hidden = (queue: Queue) =>
    hiddenMs(
      instructions.filter((at) => at.queue === queue).map((at) => [at.startMs, at.endMs]),
      computing,
    );
  return {
    format: "stromatolite.profile",
    version: 1,
    model: graph.model,
    parameters: graph.parameters.reduce((sum, p) => sum + p.shape.reduce((a, b) => a * b, 1), 0),
    device: input.device ?? null,
    machine: input.machine ?? null,
    rank,
    plan: {
      schedule: tape.schedule,
      recompute: tape.recompute,
      update: tape.update,
      clip: tape.clip,
      state: tape.state,
      microBatches: tape.microBatches,
      dims: tape.dims ?? (input.dims === undefined ? null : { ...input.dims }),
    },
    summary: {
      stepMs: result.seconds * 1e3,
      predictedStepMs: simulation.seconds * 1e3,
      peakDeviceBytes: result.peakDeviceBytes,
      predictedPeakDeviceBytes: peaks.deviceBytes,
      capBytes,
      arenaBytes: { device: arenas.deviceBytes, host: arenas.hostBytes, disk: arenas.diskBytes },
      peak: peakOf(input, list, workspace.peak, arena),
      busyMs,
      predictedBusyMs: byQueue((queue) => simulation.busySeconds[queue] * 1e3),
      copyMs: COPIES.reduce((sum, queue) => sum + busyMs[queue], 0),
      hiddenCopyMs: COPIES.reduce((sum, queue) => sum + hidden(queue), 0),
      bytes: {
        bytesToDevice: result.bytesToDevice,
        bytesFromDevice: result.bytesFromDevice,
        bytesLoaded: result.bytesLoaded,
        bytesSaved: result.bytesSaved,
        bytesSent: result.bytesSent,
        bytesReceived: result.bytesReceived,
      },
      messages: null,
    },
    instructions,
    holdings: list.map(({ space, kind, block, bytes, from, to }) => ({
      space,
      kind,
      block: graph.blocks[block]!.name,
      bytes,
      from,
      to,
    })),
    memory: {
      timeMs: Array.from(over.timeMs, round),
      bytes: Object.fromEntries(
        MEMORY_KINDS.map((kind) => [kind, [...(kind === "workspace" ? over.workspace : over.held[kind])]]),
      ) as Record<MemoryKind, number[]>,
      unusedBytes: [...over.unused],
    },
  };
}

const byQueue = (of: (queue: Queue) => number): Record<Queue, number> =>
  Object.fromEntries(QUEUES.map((queue) => [queue, of(queue)])) as Record<Queue, number>;

function blockName(graph: Graph, at: Tape["instructions"][number]): string | null {
  const block = "operand" in at ? at.operand.block : "block" in at ? at.block : -1;
  return graph.blocks[block]?.name ?? null;
}

function carried(at: Tape["instructions"][number]): HeldKind | null {
  if (at.op === "copy") return KIND_OF[at.operand.kind];
  if (at.op !== "send" && at.op !== "receive") return null;
  const { kind } = at.operand;
  return kind === "x" || kind === "dx" ? KIND_OF[kind] : kind === "updated" ? "parameters" : SENT_AS[kind];
}

function microBatchOf(at: Tape["instructions"][number]): number | null {
  if ("operand" in at) return "microBatch" in at.operand ? at.operand.microBatch : null;
  return "microBatch" in at ? at.microBatch : null;
}

/** What the device held where it held most. In time, not in the tape's order: copies of other queues are under way. */
function peakOf(
  { graph, tape, profile }: ProfileInput,
  list: readonly Holding[],
  workspace: Float64Array,
  arena: number,
): ProfileDocument["summary"]["peak"] {
  const { startMs, endMs, devicePeakBytes } = profile;
  let at = -1;
  for (const [i, instruction] of tape.instructions.entries())
    if (queueOf(instruction) === "compute" && (at < 0 || devicePeakBytes[i]! > devicePeakBytes[at]!)) at = i;
  const n = tape.instructions.length;
  const middle = (startMs[at]! + endMs[at]!) / 2;
  const holders = new Map<string, Holder>();
  const kinds = Object.fromEntries(MEMORY_KINDS.map((kind) => [kind, 0])) as Record<MemoryKind, number>;
  let inArena = 0;
  const hold = (kind: MemoryKind, block: string | null, bytes: number) => {
    if (bytes === 0) return;
    kinds[kind] += bytes;
    const known = holders.get(`${kind} ${block}`);
    if (known === undefined) holders.set(`${kind} ${block}`, { kind, block, bytes });
    else known.bytes += bytes;
  };
  for (const h of list) {
    if (h.space !== "device" && h.space !== "slot") continue;
    const begun = h.from < 0 || (h.space === "slot" ? h.from < at : startMs[h.from]! <= middle);
    const ended = h.to < n && (h.space === "slot" ? h.to < at : !h.uses.some((u) => endMs[u]! > middle));
    if (!begun || ended) continue;
    hold(h.kind, graph.blocks[h.block]!.name, h.bytes);
    if (h.space === "device") inArena += h.bytes;
  }
  hold("workspace", blockName(graph, tape.instructions[at]!), workspace[at]!);
  return {
    instruction: at,
    atMs: round(middle),
    byKind: kinds,
    unusedBytes: arena - inArena,
    top: [...holders.values()].sort((a, b) => b.bytes - a.bytes).slice(0, TOP),
  };
}
