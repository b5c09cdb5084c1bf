/**
 * Runs a tape in time: every queue takes its instructions in order, each begins when its queue is free and all that it
 * waits for has completed. No device, no data.
 */
import type { Graph } from "../graph/types.js";
import { type Cost, CostModel } from "./cost.js";
import { passWorkspace } from "./memory.js";
import type { MachineProfile } from "./profiles.js";
import { slotBytes } from "./slots.js";
import type { Queue, Tape } from "./types.js";
import { lineOf, queueOf } from "./waits.js";

export type BoundBy = "compute" | "memory" | "hostToDevice" | "deviceToHost" | "disk" | "rankLink";

export interface Simulation {
  seconds: number;
  /** send, receive: of all peers together. */
  busySeconds: Record<Queue, number>;
  /** What a faster one of would shorten the step. memory: that of the device, in sums, updates and elementwise work. */
  boundBy: BoundBy;
  flops: number;
  bytesToDevice: number;
  bytesFromDevice: number;
  bytesLoaded: number;
  bytesSaved: number;
  /** To and from other ranks. */
  bytesSent: number;
  bytesReceived: number;
  /** Of the bytes to and from the device, those of parameters and optimizer state. */
  stateBytesToDevice: number;
  stateBytesFromDevice: number;
  /** By instruction. */
  start: Float64Array;
  end: Float64Array;
}

/** `dims`: sizes of a micro-batch, for a tape whose boundaries lie in slots. Throws SHAPE where one is missing. */
export function simulate(
  graph: Graph,
  tape: Tape,
  profile: MachineProfile,
  dims: Readonly<Record<string, number>> = tape.dims ?? {},
): Simulation {
  const costs = new CostModel(graph, tape, dims, profile);
  const tally = new Tally(tape);
  /** By line: when what is on it has completed. */
  const free: number[] = [];
  for (const [i, at] of tape.instructions.entries()) {
    const line = lineOf(at);
    const cost = costs.of(at);
    let from = free[line] ?? 0;
    for (const w of at.waits) from = Math.max(from, tally.end[w]!);
    free[line] = tally.add(i, from, from + cost.seconds, cost);
  }
  return tally.result();
}

/** What a tape's instructions add up to, whoever says when each began. */
export class Tally {
  readonly start: Float64Array;
  readonly end: Float64Array;
  private readonly busy: Record<Queue, number> = { compute: 0, in: 0, out: 0, load: 0, save: 0, send: 0, receive: 0 };
  private readonly bytes = { ...this.busy };
  private readonly stateBytes = { ...this.busy };
  private memorySeconds = 0;
  private flops = 0;

  constructor(private readonly tape: Tape) {
    this.start = new Float64Array(tape.instructions.length);
    this.end = new Float64Array(tape.instructions.length);
  }

  /** Returns `end`. */
  add(at: number, start: number, end: number, cost: Cost): number {
    const i = this.tape.instructions[at]!;
    const queue = queueOf(i);
    this.start[at] = start;
    this.end[at] = end;
    this.busy[queue] += cost.seconds;
    this.memorySeconds += cost.memorySeconds;
    this.flops += cost.flops;
    if (i.op === "copy" || i.op === "send" || i.op === "receive") this.bytes[queue] += i.bytes;
    if (i.op === "copy" && (i.operand.kind === "param" || i.operand.kind === "state"))
      this.stateBytes[queue] += i.bytes;
    return end;
  }

  result(): Simulation {
    const { busy, bytes, stateBytes, flops, start, end } = this;
    return {
      seconds: end.reduce((most, e) => Math.max(most, e), 0),
      busySeconds: busy,
      boundBy: boundBy(busy, this.memorySeconds),
      flops,
      bytesToDevice: bytes.in,
      bytesFromDevice: bytes.out,
      bytesLoaded: bytes.load,
      bytesSaved: bytes.save,
      bytesSent: bytes.send,
      bytesReceived: bytes.receive,
      stateBytesToDevice: stateBytes.in,
      stateBytesFromDevice: stateBytes.out,
      start,
      end,
    };
  }
}

/** The busiest queue; compute is bound by memory where most of it moves bytes. */
function boundBy(busy: Record<Queue, number>, memorySeconds: number): BoundBy {
  const disk = Math.max(busy.load, busy.save);
  const between = Math.max(busy.send, busy.receive);
  const most = Math.max(busy.compute, busy.in, busy.out, disk, between);
  if (most === busy.compute) return memorySeconds > busy.compute / 2 ? "memory" : "compute";
  if (most === between) return "rankLink";
  return most === busy.in ? "hostToDevice" : most === busy.out ? "deviceToHost" : "disk";
}

export interface TapePeaks {
  /** Arena, slots and what libtorch holds, at the highest. */
  deviceBytes: number;
  /** Of what ranks share, the rank's own part. */
  hostBytes: number;
  diskBytes: number;
  /** Of deviceBytes: the arena; and of what is beside it, the highest. */
  arenaBytes: number;
  workspaceBytes: number;
}

/** Bytes of shared host memory that are the rank's own part. */
export const sharedPart = ({ placement }: Tape): number =>
  placement.homes.reduce((sum, { param }) => sum + (param?.space === "shared" ? param.bytes : 0), 0);

/** Bytes that carrying out a tape takes. `dims` as in `simulate`. */
export function tapePeaks(
  graph: Graph,
  tape: Tape,
  device: "cpu" | "cuda",
  dims: Readonly<Record<string, number>> = tape.dims ?? {},
): TapePeaks {
  const slots = slotBytes(graph, tape, dims);
  const { arenas } = tape.placement;
  let [kept, workspaceBytes] = [0, 0];
  for (const [i, at] of tape.instructions.entries()) {
    if (at.op !== "forward" && at.op !== "turn" && at.op !== "backward") continue;
    const pass = passWorkspace(graph, at.block, dims, { device, kept: tape.kept });
    const beside = kept + slots[i]!;
    if (at.op === "forward") {
      workspaceBytes = Math.max(workspaceBytes, beside + (at.keep ? pass.keepingForward : pass.forward));
      if (at.keep) kept += pass.kept;
    } else if (at.op === "backward" && tape.recompute !== "all") {
      workspaceBytes = Math.max(workspaceBytes, beside + pass.keptBackward - pass.kept);
      kept -= pass.kept;
    } else workspaceBytes = Math.max(workspaceBytes, beside + pass.backward);
  }
  return {
    deviceBytes: arenas.deviceBytes + workspaceBytes,
    hostBytes: arenas.hostBytes + sharedPart(tape),
    diskBytes: arenas.diskBytes,
    arenaBytes: arenas.deviceBytes,
    workspaceBytes,
  };
}
