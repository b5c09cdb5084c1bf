/**
 * Makes one kind of plan fit: writes its tape with everything at its far home, then moves whole blocks between device,
 * host and disk until every budget holds.
 */
import { evaluate } from "../graph/dims.js";
import type { Dim, DType, Graph } from "../graph/types.js";
import { dtypeBytes } from "../graph/value.js";
import type { PlanRequest } from "./auto.js";
import { type Budget, showSize } from "./budget.js";
import { blockLayouts } from "./layout.js";
import { passWorkspace } from "./memory.js";
import { membersOf } from "./mesh.js";
import { keptOf } from "./selective.js";
import { type TapePeaks, tapePeaks } from "./simulate.js";
import { meanBubble, type RanksSimulation, simulateRanks } from "./simulate-ranks.js";
import type { Clip, Recompute, RetainedDType, Schedule, Stages, Tape, UpdateOrder } from "./types.js";
import { type Policy, type Space3, writeTape } from "./write-tape.js";

export interface Shape {
  graph: Graph;
  /** Blocks of the user's graph in one of this one. */
  merged: number;
  schedule: Schedule;
  recompute: Recompute;
  update: UpdateOrder;
  clip: Clip;
  retainedDType: RetainedDType;
  boundary: Space3;
  prefetch: number;
  /** Micro-batches of the user's in one of the device's. */
  fused: number;
  /** Where state lives that is not moved. */
  far: Space3;
  /** Blocks over devices of one machine, each with a budget of its own; host and disk are shared. null: one device. */
  stages: Stages | null;
}

export interface RankTapes {
  step: Tape;
  flush: Tape | null;
}

export interface Attempt {
  shape: Shape;
  label: string;
  /** Null: it fits. */
  over: { space: Space3; bytes: number; why: string } | null;
  /** Refused by its plain sums: no tape was written. */
  lowerBound: boolean;
  written: { policy: Policy; tapes: RankTapes[]; peaks: TapePeaks[] } | null;
  /** Of the device that takes the most, and of all ranks together beside it. */
  peaks: TapePeaks | null;
  simulation: RanksSimulation | null;
}

/** A tape's copies are cut in so many parts: whole ones block boundaries behind them, more gain nothing (TAPE.md). */
const PARTS = 4;
/** Tapes written for one shape at most. */
const TRIES = 8;

type Kind = "param" | "state" | "retained";
type Homes = Record<Kind, Space3[]>;
/** Bytes left; of devices by stage, that of the fullest of it. */
interface Room {
  device: number[];
  host: number;
  disk: number;
}

/** `force`: writes a tape also for what its plain sums refuse. */
export function fitShape(shape: Shape, request: PlanRequest, limits: Budget, force = false): Attempt {
  const attempt: Attempt = {
    shape,
    label: labelOf(shape),
    over: leastOver(shape, request, limits),
    lowerBound: true,
    written: null,
    peaks: null,
    simulation: null,
  };
  if (attempt.over !== null && !force) return attempt;
  return new Fitting(shape, request, limits).run({ ...attempt, lowerBound: false });
}

class Fitting {
  private readonly homes: Homes;
  private readonly bytes: Record<Kind, number[]>;
  private readonly dims: Record<string, number>;
  private readonly ranks: number;
  /** Devices that each have a part of a block's state, all alike. */
  private readonly members: number;

  constructor(
    private readonly shape: Shape,
    private readonly request: PlanRequest,
    private readonly limits: Budget,
  ) {
    const { graph, far, boundary, retainedDType, update } = shape;
    const layouts = blockLayouts(graph, request.state, shape.stages ?? undefined);
    this.bytes = {
      param: layouts.map((l) => l.paramBytes),
      state: layouts.map((l) => l.stateBytes),
      retained: layouts.map((l) => (update === "forward" ? l.retainedBytes(retainedDType) : 0)),
    };
    // A retained gradient lends its bytes to boundaries of its own space.
    this.homes = {
      param: layouts.map(() => far),
      state: layouts.map(() => far),
      retained: layouts.map(() => (boundary === "device" ? "device" : far)),
    };
    this.dims = fusedDims(shape, request);
    this.ranks = ranksOf(shape);
    this.members = membersOf(shape.stages ?? undefined);
  }

  run(attempt: Attempt): Attempt {
    const { limits } = this;
    const seen = new Set<string>();
    let best = attempt;
    for (let tries = 0; tries < TRIES; tries++) {
      const now = this.write(attempt);
      if (best.written === null || (now.over?.bytes ?? 0) < (best.over?.bytes ?? 0)) best = now;
      if (now.over === null) return this.fill(now);
      seen.add(JSON.stringify(this.homes));
      const room: Room = {
        device: this.deviceRoom(now),
        host: limits.hostBytes - now.peaks!.hostBytes,
        disk: limits.diskBytes - now.peaks!.diskBytes,
      };
      const before = sum(room.device) + room.host + room.disk;
      for (const [stage, left] of room.device.entries())
        if (left < 0) this.move("device", -left, ["host", "disk"], room, stage);
      if (room.host < 0) this.move("host", -room.host, ["device", "disk"], room);
      if (seen.has(JSON.stringify(this.homes))) break;
      // Moves change no sum, only what a retained gradient lends: where all together are short, they end in nothing.
      const lent = this.shape.update === "forward" ? (limits.deviceBytes * this.ranks) / 8 : 0;
      if (tries > 0 && before < -lent) break;
    }
    return best;
  }

  private stageOf(block: number): number {
    return this.shape.stages?.of[block] ?? 0;
  }

  private deviceRoom({ written }: Attempt): number[] {
    const left = written!.peaks.map((p) => this.limits.deviceBytes - p.deviceBytes);
    return Array.from({ length: this.ranks / this.members }, (_, stage) =>
      Math.min(...left.slice(stage * this.members, (stage + 1) * this.members)),
    );
  }

  /** Moves blocks away from `from` until `need` bytes are gone, to the first of `to` that has room. `stage`: its blocks. */
  private move(from: Space3, need: number, to: readonly Space3[], room: Room, stage?: number): void {
    let left = need;
    for (const { kind, block } of this.order(from)) {
      if (left <= 0) return;
      const at = this.stageOf(block);
      if (stage !== undefined && at !== stage) continue;
      const bytes = this.bytes[kind][block]!;
      // Host and disk take the parts of all devices of the stage.
      const roomIn = (space: Space3) => (space === "device" ? room.device[at]! : room[space] / this.members);
      // Kept as it is: a param's move to a disk costs two more crossings of the slowest link than state does.
      const target = to.find((space) => roomIn(space) >= bytes && this.may(kind, space));
      if (target === undefined) continue;
      this.homes[kind][block] = target;
      for (const [space, change] of [
        [target, -bytes],
        [from, bytes],
      ] as const) {
        if (space === "device") room.device[at]! += change;
        else room[space] += change * this.members;
      }
      left -= from === "device" ? bytes : bytes * this.members;
    }
  }

  private may(kind: Kind, space: Space3): boolean {
    // Kept graphs hold parameters from forward to backward.
    if (kind === "param" && this.shape.recompute === "none") return space === "device";
    if (space === "host") return this.limits.hostBytes > 0;
    if (space === "disk")
      return this.limits.diskBytes > 0 && (kind === "state" || this.homes.state.every((s) => s !== "host"));
    return true;
  }

  /**
   * What leaves a space first. The device takes parameters first: they cross the link three times a step, state and
   * retained gradients twice. Retained gradients of late blocks leave it first, whose bytes lend themselves the shortest.
   */
  private order(from: Space3): { kind: Kind; block: number }[] {
    const kinds: Kind[] = from === "device" ? ["retained", "state", "param"] : ["param", "state", "retained"];
    return kinds.flatMap((kind) => {
      const here = this.homes[kind].flatMap((space, block) =>
        space === from && this.bytes[kind][block]! > 0 ? [{ kind, block }] : [],
      );
      return from === "device" ? here.reverse() : here;
    });
  }

  /** Where the link makes the device wait, as much as the device still holds. */
  private fill(fitting: Attempt): Attempt {
    const { seconds } = fitting.simulation!;
    if (this.shape.far === "device" || !waitsForCopies(fitting)) return fitting;
    const before = structuredClone(this.homes);
    for (const from of ["host", "disk"] as const) {
      const room = { device: this.deviceRoom(fitting), host: 0, disk: 0 };
      this.move(from, sum(room.device), ["device"], room);
    }
    const filled = this.write(fitting);
    if (filled.over === null && filled.simulation!.seconds < 0.99 * seconds) return filled;
    Object.assign(this.homes, before);
    return fitting;
  }

  private write(attempt: Attempt): Attempt {
    const { shape, request, limits } = this;
    const homes = structuredClone(this.homes);
    const policy: Policy = {
      schedule: shape.schedule,
      recompute: shape.recompute,
      update: shape.update,
      clip: shape.clip,
      state: request.state,
      microBatches: request.gradientAccumulationSteps / shape.fused,
      dims: this.dims,
      param: (b) => homes.param[b]!,
      optimizer: (b) => homes.state[b]!,
      boundary: shape.boundary,
      retained: (b) => homes.retained[b]!,
      retainedDType: shape.retainedDType,
      prefetch: shape.prefetch,
      parts: PARTS,
      ...(shape.stages === null ? {} : { stages: shape.stages }),
    };
    const tapes = writeRanks(shape.graph, policy);
    const peaks = tapes.map(({ step }) => tapePeaks(shape.graph, step, request.profile.device));
    const simulation = simulateRanks(
      shape.graph,
      tapes.map((t) => t.step),
      request.profile,
    );
    const together = jointPeaks(peaks);
    const written = { policy, tapes, peaks };
    return { ...attempt, written, peaks: together, simulation, over: excess(together, limits) };
  }
}

/** Whether a device stands still, and its copies, not other devices, may be why. */
export function waitsForCopies({ simulation }: Attempt): boolean {
  if (meanBubble(simulation!) <= 0.02) return false;
  const { ranks } = simulation!;
  return (
    ranks.length === 1 || ranks.some(({ busySeconds: b }) => Math.max(b.in, b.out, b.load, b.save) > b.compute / 2)
  );
}

/** The tapes of every rank of a policy; one without stages. */
export function writeRanks(graph: Graph, policy: Policy): RankTapes[] {
  const { stages } = policy;
  if (stages === undefined) return [writeTape(graph, policy)];
  return Array.from({ length: stages.ranks }, (_, rank) =>
    writeTape(graph, { ...policy, stages: { ...stages, rank } }),
  );
}

/** Of ranks on one machine: the device that takes the most, host and disk of all together. */
function jointPeaks(peaks: readonly TapePeaks[]): TapePeaks {
  const fullest = peaks.reduce((most, p) => (p.deviceBytes > most.deviceBytes ? p : most));
  return { ...fullest, hostBytes: sum(peaks.map((p) => p.hostBytes)), diskBytes: sum(peaks.map((p) => p.diskBytes)) };
}

const sum = (list: readonly number[]): number => list.reduce((a, b) => a + b, 0);
const ranksOf = ({ stages }: Shape): number => stages?.ranks ?? 1;

function excess(peaks: TapePeaks, limits: Budget): Attempt["over"] {
  const over = (["device", "host", "disk"] as const)
    .map((space) => ({ space, bytes: peaks[`${space}Bytes`] - limits[`${space}Bytes`] }))
    .filter(({ bytes }) => bytes > 0)
    .sort((a, b) => b.bytes - a.bytes);
  if (over.length === 0) return null;
  const { space } = over[0]!;
  const bytes = over.reduce((sum, o) => sum + o.bytes, 0);
  const parts = over.map(
    (o) => `${showSize(peaks[`${o.space}Bytes`])} on the ${o.space} of ${showSize(limits[`${o.space}Bytes`])}`,
  );
  return { space, bytes, why: `does not fit by ${showSize(bytes)}: ${parts.join(", ")} usable` };
}

/** What a shape takes at the least, in all places together; null where that fits. */
export function leastOver(shape: Shape, request: PlanRequest, limits: Budget): Attempt["over"] {
  const { graph, far, update, schedule, recompute, retainedDType } = shape;
  const layouts = blockLayouts(graph, request.state, shape.stages ?? undefined);
  const members = membersOf(shape.stages ?? undefined);
  const dims = fusedDims(shape, request);
  const count = schedule === "breadthFirst" ? request.gradientAccumulationSteps / shape.fused : 1;
  const consumed = new Set(
    graph.blocks.flatMap((b) => b.inputs.flatMap((s) => ("block" in s ? [`${s.block}:${s.output}`] : []))),
  );
  let [state, boundaries, kept, retained] = [0, 0, 0, 0];
  // By stage: what each of its devices has once at a time.
  const sums: number[] = Array(ranksOf(shape) / members).fill(0);
  const workspace = [...sums];
  for (const [b, block] of graph.blocks.entries()) {
    const layout = layouts[b]!;
    const rank = shape.stages?.of[b] ?? 0;
    state += members * (layout.paramBytes + layout.stateBytes);
    // At the end each rank has its part of all, and before it the whole of one at a time.
    const held = layout.sumsBytes / members;
    sums[rank] = update === "end" ? sums[rank]! + held : Math.max(sums[rank]!, layout.sumsBytes);
    retained += update === "forward" ? members * layout.retainedBytes(retainedDType) : 0;
    for (const [o, output] of graph.programs[block.program]!.outputs.entries()) {
      if (!consumed.has(`${b}:${o}`)) continue;
      boundaries += outputBytes(output, dims) * count;
    }
    const selected = recompute === "selective" ? keptOf(graph, dims) : undefined;
    const pass = passWorkspace(graph, b, dims, { device: request.profile.device, kept: selected });
    workspace[rank] = Math.max(workspace[rank]!, pass.backward);
    if (recompute !== "all" && b < graph.blocks.length - 1) kept += pass.kept * count;
  }
  const { hostBytes, diskBytes } = limits;
  const deviceBytes = limits.deviceBytes * ranksOf(shape);
  const all = far === "device" ? deviceBytes : deviceBytes + hostBytes + diskBytes;
  const once = members * (sum(sums) + sum(workspace));
  const needed = state + once + kept + Math.max(boundaries, retained);
  if (needed <= all) return null;
  const parts = [
    `${showSize(state)} of parameters and optimizer state`,
    `${showSize(members * sum(sums))} of gradient sums`,
    retained > boundaries ? `${showSize(retained)} of retained gradients` : `${showSize(boundaries)} of boundaries`,
    ...(kept > 0 ? [`${showSize(kept)} of kept ${recompute === "none" ? "graphs" : "results"}`] : []),
  ];
  const where = far === "device" ? "of device memory" : "in all";
  return {
    space: far === "device" ? "device" : "host",
    bytes: needed - all,
    why: `does not fit by ${showSize(needed - all)}: ${parts.join(", ")}, and ${showSize(all)} ${where} is usable`,
  };
}

/** Device bytes that shape `b` may need less than `a` does, at the most. */
export function saved(a: Shape, b: Shape, request: PlanRequest): number {
  const workspace = (s: Shape) => {
    const passes = s.graph.blocks.map((_, i) =>
      passWorkspace(s.graph, i, fusedDims(s, request), { device: request.profile.device }),
    );
    return Math.max(...passes.map((p) => p.backward));
  };
  const slabs = blockLayouts(a.graph, request.state).map(
    (l) => l.paramBytes + l.stateBytes + (a.update === "forward" ? l.retainedBytes(a.retainedDType) : 0),
  );
  const outputs = a.graph.blocks.map((block) =>
    a.graph.programs[block.program]!.outputs.reduce((sum, o) => sum + outputBytes(o, fusedDims(a, request)), 0),
  );
  // Beside the workspace, some ten boundaries are under way.
  const ring = 10 * Math.max(...outputs) * (1 - b.fused / a.fused);
  return workspace(a) - workspace(b) + Math.max(0, a.prefetch - b.prefetch) * Math.max(...slabs) + ring;
}

const outputBytes = (o: { dtype: DType; shape: Dim[] }, dims: Readonly<Record<string, number>>): number =>
  o.shape.reduce<number>((n, d) => n * evaluate(d, dims), 1) * dtypeBytes(o.dtype);

function fusedDims({ fused }: Shape, { dims, batchDim = "B" }: PlanRequest): Record<string, number> {
  return { ...dims, [batchDim]: (dims[batchDim] ?? 1) * fused };
}

function labelOf(s: Shape): string {
  const retained = s.update === "forward" ? `, gradients retained as ${s.retainedDType}` : "";
  const graphs = { none: "graphs kept", selective: "dear results kept", all: "recompute" }[s.recompute];
  return [
    s.far === "device" ? "all on the device" : `boundaries on the ${s.boundary}`,
    { breadthFirst: "breadth-first", depthFirst: "depth-first", oneForwardOneBackward: "one forward, one backward" }[
      s.schedule
    ],
    `update ${s.update}${retained}`,
    `${s.fused} fused`,
    ...(s.far === "device" || s.recompute !== "all" ? [graphs] : []),
    ...(s.far === "device" ? [] : [`prefetch ${s.prefetch}`]),
    ...(s.merged > 1 ? [`${s.merged} layers a block`] : []),
  ].join(", ");
}
