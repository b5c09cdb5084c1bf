/**
 * Chooses the fastest plan that fits: order of work, time of update, fused micro-batches, and where parameters, optimizer
 * state, retained gradients and boundaries live. Every candidate is a tape that was written, placed and timed; only what
 * cannot fit by its plain sums is left out before.
 *
 * The order in which is asked: first whether everything stays on the device; else breadth-first, with the most micro-batches
 * fused, the most exact retained gradient, whole blocks on the device as far as they help. Coarser means (a lossier
 * gradient, merged blocks, less prefetch) are tried only where finer ones do not fit.
 */
import { StromaError } from "../errors.js";
import type { Graph } from "../graph/types.js";
import { addPlacements, describePlacement, type PlacementTable } from "./auto-describe.js";
import { type Attempt, fitShape, leastOver, type RankTapes, type Shape, saved, waitsForCopies } from "./auto-fit.js";
import { type Budget, showSize, usable } from "./budget.js";
import { CostModel } from "./cost.js";
import { plus } from "./cost-times.js";
import { mergeBlocks } from "./merge-blocks.js";
import { membersOf, stageCount } from "./mesh.js";
import type { MachineProfile } from "./profiles.js";
import type { BoundBy, Simulation, TapePeaks } from "./simulate.js";
import type { RankSimulation } from "./simulate-ranks.js";
import { assignStages, isContiguous, type StageRule, stretchesOf, type Ties } from "./stages.js";
import type { Clip, Recompute, RetainedDType, Schedule, Stages, StateFormat, UpdateOrder } from "./types.js";
import type { Policy, Space3 } from "./write-tape.js";

export interface PlanRequest {
  /** Sizes of one of the user's micro-batches, e.g. { B: 1, T: 512 }. */
  dims: Readonly<Record<string, number>>;
  gradientAccumulationSteps: number;
  state: StateFormat;
  clip: Clip;
  profile: MachineProfile;
  /** All there is; the plan fills what `usable` leaves of it. */
  budget: Budget;
  /** Only plans with it. Default: any. */
  recompute?: Recompute;
  /** Only plans in which so many layers are one block. Default: one; two or four where nothing else fits. */
  layersPerBlock?: number;
  /** The dim that fused micro-batches lengthen. Default "B". */
  batchDim?: string;
  /** The dim that makes tokens of rows. Default "T". */
  tokenDim?: string;
}

export interface Alternative {
  plan: string;
  fits: boolean;
  /** Why it was not taken. */
  why: string;
  peakDeviceBytes: number | null;
  peakHostBytes: number | null;
  predictedTokensPerSecond: number | null;
}

export interface PlanReport {
  fits: boolean;
  order: Schedule;
  update: UpdateOrder;
  /** Rows that pass through a block at once, of how many of the user's micro-batches, and how many such passes a step has. */
  microBatch: { rows: number; fused: number; count: number };
  placements: PlacementTable;
  peakDeviceBytes: number;
  peakHostBytes: number;
  peakDiskBytes: number;
  bytesToDevicePerStep: number;
  bytesFromDevicePerStep: number;
  predictedStepSeconds: number;
  predictedTokensPerSecond: number;
  boundBy: BoundBy;
  alternatives: Alternative[];
}

export interface RankPlan {
  tapes: RankTapes;
  peaks: TapePeaks;
  placements: PlacementTable;
  simulation: RankSimulation;
}

export interface AutoPlan {
  report: PlanReport;
  /** What the tapes are for: the graph given, or the same model in larger blocks. */
  graph: Graph;
  blocksMerged: number;
  policy: Policy;
  /** Of rank 0, as `simulation`; all are in `ranks`, one where there is one device. */
  tapes: RankTapes;
  simulation: Simulation;
  ranks: RankPlan[];
  usable: Budget;
  /** Where nothing fits: bytes that are missing, and what would do. */
  missing: { readonly bytes: number; readonly cure: string } | null;
}

/** Where longer device micro-batches gain nothing more, and where most is gained (TAPE.md, section 4). */
const MOST_TOKENS = 4096;
const ENOUGH_TOKENS = 2048;

/** Throws CONFIG for a request that makes no sense, TAPE for a graph that does not train. Takes a few seconds at 13 B. */
export function planAuto(graph: Graph, request: PlanRequest): AutoPlan {
  const { gradientAccumulationSteps: accumulation } = request;
  if (!Number.isSafeInteger(accumulation) || accumulation < 1)
    throw new StromaError(
      "CONFIG",
      `[plan] expected gradientAccumulationSteps to be a whole number of at least 1, got ${accumulation}`,
    );
  return searched(graph, request, null).result();
}

/** `graph` with `size` layers a block. Throws CONFIG for a size above 1 where no two of its blocks can be one. */
export function layersMerged(graph: Graph, size: number): Graph {
  const merged = mergeBlocks(graph, size);
  if (size > 1 && merged === graph)
    throw new StromaError(
      "CONFIG",
      `[plan] ${size} layers a block: no two blocks of ${graph.model} can be one. Blocks merge that run one program one after ` +
        "the other, share no parameter and draw no random numbers (dropout 0)",
    );
  return merged;
}

/** Devices of one machine, which rule gives stages their blocks, how many devices share each, and how many of those there are. */
export interface Spread {
  ranks: number;
  rule: StageRule;
  shards: number;
  /** Groups of `shards` devices that hold the same state. */
  replicas: number;
  /** Of the devices of a stage, those that share each row: dims.T is a device's share. Default 1. */
  context?: number;
  /** They read parameters from host memory that they have in common. */
  sharedHost: boolean;
  /** Default: the rule's. */
  ties?: Ties;
}

/** A stage alone never waits for another. */
const stageCountOf = (spread: Spread): number =>
  spread.ranks === sharing(spread) ? 0.5 : spread.ranks / sharing(spread);

/** Devices that a stage has. */
const sharing = ({ shards, replicas }: Spread): number => shards * replicas;
/** Groups of them with micro-batches of their own. */
const groupsIn = (spread: Spread): number => sharing(spread) / (spread.context ?? 1);

/**
 * Carries out the search of `planAuto`, over several devices where `spread` says so. `quick`: asks only whether something
 * fits, not for what is fastest.
 */
export function searched(graph: Graph, request: PlanRequest, spread: Spread | null, quick = false): Search {
  const { clip, budget, profile, layersPerBlock } = request;
  const whole = layersPerBlock === undefined ? graph : layersMerged(graph, layersPerBlock);
  const limits = usable(budget);
  const search = new Search(graph, request, limits, spread);
  // Ranks that share blocks have a micro-batch each.
  const most = request.gradientAccumulationSteps / (spread === null ? 1 : groupsIn(spread));
  const fused = fusions(request, spread === null ? mostTokens(graph, request) : MOST_TOKENS, spread !== null)
    .filter((k) => k <= most)
    // The fastest, and what needs the least.
    .filter((_, i, { length }) => !quick || i === 0 || i === length - 1);
  if (fused.length === 0)
    throw new StromaError(
      "CONFIG",
      `[plan] ${groupsIn(spread!)} ${(spread!.context ?? 1) > 1 ? "groups of " : ""}ranks that share blocks need a micro-batch each, and a step has ${request.gradientAccumulationSteps}`,
    );
  search.resident(whole, layersPerBlock ?? 1, fused);
  const updates: UpdateOrder[] = clip === "global" ? ["forward"] : ["backward"];
  const kinds: RetainedDType[] = clip === "global" ? retainedDTypes(graph) : ["float32"];
  // On the CPU the device is the host's memory.
  const hosted = profile.device === "cuda" && limits.hostBytes > 0;
  const spaces: Space3[] = [
    "device",
    ...(hosted ? (["host"] as const) : []),
    ...(limits.diskBytes > 0 ? (["disk"] as const) : []),
  ];
  // Merging and the retained dtype cost exactness or flexibility: each only where what is finer does not fit.
  for (const size of layersPerBlock !== undefined ? [layersPerBlock] : quick ? [1, 2] : [1, 2, 4]) {
    const merged = mergeBlocks(graph, size);
    const coarser = size > 1 && (merged === graph || merged.blocks.length === search.blocks || !search.spreads(merged));
    if (layersPerBlock === undefined && coarser) break;
    search.blocks = merged.blocks.length;
    for (const retainedDType of kinds) {
      for (const update of updates) search.streamed(merged, size, update, retainedDType, fused, spaces);
      if (search.best !== null) break;
    }
    if (search.best !== null) break;
  }
  return search;
}

/** Of a device micro-batch. A card that waits to be asked for kernels does more at each asking, up to four times as much. */
function mostTokens(graph: Graph, { dims, state, profile, batchDim = "B", tokenDim = "T" }: PlanRequest): number {
  for (let tokens = MOST_TOKENS; tokens < 4 * MOST_TOKENS; tokens *= 2) {
    const rows = Math.max(1, Math.floor(tokens / (dims[tokenDim] ?? 1)));
    const model = new CostModel(graph, { state, recompute: "none" }, { ...dims, [batchDim]: rows }, profile);
    const { seconds, launchSeconds = 0 } = plus(...graph.blocks.map((_, block) => model.pass(block).backward));
    if (launchSeconds <= seconds) return tokens;
  }
  return 4 * MOST_TOKENS;
}

/** Divisors of the accumulation, most tokens first, from as many as help down to one; `all`: also those of few tokens. */
function fusions(
  { dims, gradientAccumulationSteps, batchDim = "B", tokenDim = "T" }: PlanRequest,
  mostTokens: number,
  all: boolean,
): number[] {
  const tokens = (dims[batchDim] ?? 1) * (dims[tokenDim] ?? 1);
  const divisors: number[] = [];
  for (let k = gradientAccumulationSteps; k >= 1; k--)
    if (gradientAccumulationSteps % k === 0 && (k === 1 || k * tokens <= mostTokens)) divisors.push(k);
  const most = divisors.filter((k) => all || k * tokens >= ENOUGH_TOKENS || k === divisors[0]);
  return [...new Set([...most, 1])];
}

/** Most exact first; a retained fp32 gradient is the sum itself. */
const retainedDTypes = (graph: Graph): RetainedDType[] =>
  graph.dtype === "float64"
    ? ["float64"]
    : graph.dtype === "bfloat16"
      ? ["bfloat16", "dynamic8"]
      : ["float32", "bfloat16", "dynamic8"];

export class Search {
  best: Timed | null = null;
  blocks = 0;
  private answer: Timed | null = null;
  private readonly attempts: Timed[] = [];

  constructor(
    private readonly graph: Graph,
    private readonly request: PlanRequest,
    private readonly limits: Budget,
    private readonly spread: Spread | null,
  ) {}

  /**
   * Everything on the device; depth-first, since nothing is fetched and few boundaries live. Depth-first only one of
   * several devices works at a time: there it is for what fits in no other order.
   */
  resident(graph: Graph, merged: number, fused: readonly number[]): void {
    const stages = this.stages(graph);
    const orders: Schedule[] =
      stages === null
        ? ["depthFirst"]
        : [
            this.spread!.shards === 1 && this.onePerTurn(graph, stages) !== null
              ? "oneForwardOneBackward"
              : "breadthFirst",
            ...(this.spread!.shards === 1 ? (["depthFirst"] as const) : []),
          ];
    for (const schedule of orders) if (this.allResident(graph, merged, schedule, stages, fused)) return;
  }

  private allResident(
    graph: Graph,
    merged: number,
    schedule: Schedule,
    stages: Stages | null,
    fused: readonly number[],
  ): boolean {
    const { clip, recompute: only } = this.request;
    const update: UpdateOrder = "end";
    for (const recompute of only === undefined ? (["none", "selective", "all"] as const) : [only]) {
      let fits = false;
      const unit = stages === null || schedule !== "oneForwardOneBackward" ? 1 : this.onePerTurn(graph, stages)!;
      for (const k of fused) {
        if ((this.request.gradientAccumulationSteps / k) % unit !== 0) continue;
        const attempt = this.try({
          graph,
          merged,
          schedule,
          recompute,
          update,
          clip,
          retainedDType: "float32",
          boundary: "device",
          prefetch: membersOf(stages ?? undefined) > 1 ? 1 : 0,
          fused: k,
          far: "device",
          stages,
        });
        fits ||= attempt.over === null;
        if (fits && schedule !== "oneForwardOneBackward" && this.overlaps(k)) return true;
        if (attempt.lowerBound) break;
      }
      if (fits) return true;
    }
    return false;
  }

  /** Micro-batches that one forward, one backward takes at a time; null: it is not for these stages. */
  private onePerTurn(graph: Graph, stages: Stages): number | null {
    const { rule } = this.spread!;
    // Asked for where blocks are not sharded: replicas, or groups of them that share rows.
    const groups = groupsIn(this.spread!);
    if (rule === "interleaved" && stretchesOf(stages) !== null) return stageCount(stages) * groups;
    return rule !== "alternating" && isContiguous(graph, stages) ? groups : null;
  }

  private stages(graph: Graph): Stages | null {
    if (this.spread === null) return null;
    const { ranks, rule, shards, replicas, context = 1, sharedHost, ties } = this.spread;
    const of = assignStages(graph, ranks / sharing(this.spread), rule, ties);
    const host = sharedHost && shards > 1 ? ({ sharedHost } as const) : {};
    const copies = replicas > 1 ? { replicas } : {};
    const rows = context > 1 ? { context } : {};
    return { rank: 0, ranks, of, ...(sharing(this.spread) > 1 ? { shards, ...copies, ...rows, ...host } : {}) };
  }

  /** Whether every device has a block of it. */
  spreads(graph: Graph): boolean {
    try {
      this.stages(graph);
      return true;
    } catch (error) {
      if (error instanceof StromaError && error.code === "CONFIG") return false;
      throw error;
    }
  }

  /**
   * Whether so many fused leave the devices enough micro-batches to work at once on: a boundary is back after a pass and a
   * way, as long as a pass at the most, on each device, and until then there is work.
   */
  private overlaps(fused: number): boolean {
    const { gradientAccumulationSteps: all } = this.request;
    return this.spread === null || all / fused >= Math.min(all, groupsIn(this.spread) * 2 * stageCountOf(this.spread));
  }

  streamed(
    graph: Graph,
    merged: number,
    update: UpdateOrder,
    retainedDType: RetainedDType,
    fused: readonly number[],
    spaces: readonly Space3[],
  ): void {
    const { clip, recompute: only } = this.request;
    // A kept graph holds parameters on the device.
    if (only === "none") return;
    const far: Space3 = spaces.includes("host") ? "host" : "device";
    const common = {
      graph,
      merged,
      schedule: "breadthFirst",
      recompute: only ?? "all",
      update,
      clip,
      retainedDType,
      far,
      stages: this.stages(graph),
    } as const;
    // What its plain sums refuse with nothing fused is refused however else it is arranged.
    const least: Shape = { ...common, boundary: spaces.at(-1)!, prefetch: 0, fused: 1 };
    if (leastOver(least, this.request, this.limits) !== null) {
      this.try(least);
      return;
    }
    // By boundaries' home, what a shape lacked: a smaller one is tried only where it may save as much.
    const lacking = new Map<Space3, { shape: Shape; bytes: number }>();
    for (const prefetch of [1, 0]) {
      for (const k of fused) {
        let fits = false;
        for (const boundary of spaces) {
          const shape: Shape = { ...common, boundary, prefetch, fused: k };
          // A disk is for what the memories do not hold.
          if (boundary === "disk" && fits) continue;
          const known = lacking.get(boundary);
          if (known !== undefined && saved(known.shape, shape, this.request) < known.bytes) continue;
          const attempt = this.try(shape);
          if (attempt.over === null) {
            fits = true;
            this.earlier(attempt);
            if (only === undefined) this.try({ ...shape, recompute: "selective" });
          } else if (known === undefined || attempt.over.bytes < known.bytes)
            lacking.set(boundary, { shape, bytes: attempt.over.bytes });
        }
        const enough = this.spread !== null || k * this.tokens() >= Math.min(ENOUGH_TOKENS, fused[0]! * this.tokens());
        if (fits && enough && this.overlaps(k)) return;
      }
      if (this.best !== null) return;
    }
  }

  /** Where the device waits, fetching two visits ahead may hide it. */
  private earlier(attempt: Attempt): void {
    const { shape } = attempt;
    if (shape.prefetch === 1 && shape.far !== "device" && waitsForCopies(attempt)) this.try({ ...shape, prefetch: 2 });
  }

  private tokens(): number {
    const { dims, batchDim = "B", tokenDim = "T" } = this.request;
    return (dims[batchDim] ?? 1) * (dims[tokenDim] ?? 1);
  }
  private try(shape: Shape): Attempt {
    const attempt = this.timed(fitShape(shape, this.request, this.limits));
    this.attempts.push(attempt);
    if (attempt.over === null && (this.best === null || this.isBetter(attempt, this.best))) this.best = attempt;
    return attempt;
  }

  /** Faster by more than a hundredth; else the one with less on the card, or of several which fills no budget as far. */
  private isBetter(a: Timed, b: Timed): boolean {
    const gain = a.tokensPerSecond / b.tokensPerSecond - 1;
    if (Math.abs(gain) > 0.01) return gain > 0;
    if (this.spread === null) return a.peaks!.deviceBytes < b.peaks!.deviceBytes;
    return this.fullness(a.peaks!) < this.fullness(b.peaks!);
  }

  private fullness(peaks: TapePeaks): number {
    const keys = ["deviceBytes", "hostBytes", "diskBytes"] as const;
    return Math.max(...keys.map((key) => (peaks[key] === 0 ? 0 : peaks[key] / this.limits[key])));
  }

  private timed(attempt: Attempt): Timed {
    const tokens = this.tokens() * (this.spread?.context ?? 1) * this.request.gradientAccumulationSteps;
    return { ...attempt, tokensPerSecond: attempt.simulation === null ? 0 : tokens / attempt.simulation.seconds };
  }

  /** The best; where nothing fits what lacks least, which tried again as such may fit after all. */
  chosen(): Timed {
    this.answer ??= this.best ?? this.nearest();
    return this.answer;
  }

  result(): AutoPlan {
    const chosen = this.chosen();
    const { shape, peaks, written, simulation } = chosen;
    const { dims, batchDim = "B", gradientAccumulationSteps } = this.request;
    const ranks = written!.tapes.map(
      (tapes, r): RankPlan => ({
        tapes,
        peaks: written!.peaks[r]!,
        placements: describePlacement(tapes.step, written!.peaks[r]!),
        simulation: simulation!.ranks[r]!,
      }),
    );
    const total = (of: (s: Simulation) => number) => ranks.reduce((sum, r) => sum + of(r.simulation), 0);
    const busiest = ranks.reduce((a, b) => (b.simulation.bubble < a.simulation.bubble ? b : a));
    const report: PlanReport = {
      fits: chosen.over === null,
      order: shape.schedule,
      update: shape.update,
      microBatch: {
        rows: (dims[batchDim] ?? 1) * shape.fused,
        fused: shape.fused,
        count: gradientAccumulationSteps / shape.fused,
      },
      placements: addPlacements(ranks.map((r) => r.placements)),
      peakDeviceBytes: peaks!.deviceBytes,
      peakHostBytes: peaks!.hostBytes,
      peakDiskBytes: peaks!.diskBytes,
      bytesToDevicePerStep: total((s) => s.bytesToDevice),
      bytesFromDevicePerStep: total((s) => s.bytesFromDevice),
      predictedStepSeconds: simulation!.seconds,
      predictedTokensPerSecond: chosen.tokensPerSecond,
      boundBy: busiest.simulation.boundBy,
      alternatives: this.alternatives(chosen),
    };
    return {
      report,
      graph: shape.graph,
      blocksMerged: shape.merged,
      policy: written!.policy,
      tapes: ranks[0]!.tapes,
      simulation: ranks[0]!.simulation,
      ranks,
      usable: this.limits,
      missing:
        chosen.over === null
          ? null
          : lacking(chosen.over.bytes, () => cureFor(this.graph, this.request, this.spread, chosen)),
    };
  }

  /** Where nothing fits: what lacks least, written all the same. */
  private nearest(): Timed {
    const least = this.attempts.toSorted((a, b) => a.over!.bytes - b.over!.bytes)[0]!;
    return least.written === null ? this.timed(fitShape(least.shape, this.request, this.limits, true)) : least;
  }

  /** The best of each kind: those that fit first, then by what they lack. */
  private alternatives(chosen: Timed): Alternative[] {
    const kinds = new Map<string, Timed>();
    const rank = (a: Timed) => (a.over === null ? -a.tokensPerSecond : a.over.bytes);
    for (const a of this.attempts) {
      const { far, schedule, recompute, boundary, retainedDType, merged } = a.shape;
      const key = [far, schedule, recompute, boundary, retainedDType, merged].join();
      const known = kinds.get(key);
      if (a !== chosen && a.label !== chosen.label && (known === undefined || rank(a) < rank(known))) kinds.set(key, a);
    }
    return [...kinds.values()]
      .sort((a, b) => Number(a.over !== null) - Number(b.over !== null) || rank(a) - rank(b))
      .map((a) => ({
        plan: a.label,
        fits: a.over === null,
        why: a.over === null ? slower(a, chosen) : a.over.why,
        peakDeviceBytes: a.peaks?.deviceBytes ?? null,
        peakHostBytes: a.peaks?.hostBytes ?? null,
        predictedTokensPerSecond: a.simulation === null ? null : a.tokensPerSecond,
      }));
  }
}

export type Timed = Attempt & { tokensPerSecond: number };

function slower(a: Timed, chosen: Timed): string {
  const share = 1 - a.tokensPerSecond / chosen.tokensPerSecond;
  if (share > 0.005) return `${(share * 100).toFixed(1)} % slower`;
  const more = a.peaks!.deviceBytes - chosen.peaks!.deviceBytes;
  return more > 0 ? `no faster, and ${showSize(more)} more on the device` : "no faster by more than a hundredth";
}

/** The cure takes as long as the plan did: it is searched when it is read. */
function lacking(bytes: number, search: () => string): { readonly bytes: number; readonly cure: string } {
  let found: string | undefined;
  return {
    bytes,
    get cure() {
      found ??= search();
      return found;
    },
  };
}

const ENDLESS = 1e18;

/** The nearest change of a budget, planned again: it does fit. */
function cureFor(graph: Graph, request: PlanRequest, spread: Spread | null, { over }: Attempt): string {
  const { budget, profile } = request;
  const kinds = [
    ...(profile.device === "cuda" ? [{ key: "hostBytes", words: "host memory in all" } as const] : []),
    { key: "diskBytes", words: "disk" } as const,
    { key: "deviceBytes", words: `device memory ${spread === null ? "in all" : "each"}` } as const,
  ];
  const fits = (more: Partial<Budget>): boolean =>
    searched(graph, { ...request, budget: { ...budget, ...more } }, spread, true).best !== null;
  const cures: string[] = [];
  let elsewhere: boolean | null = null;
  for (const { key, words } of kinds) {
    // Of a pass that no device holds, room elsewhere takes nothing away.
    if (key !== "deviceBytes" && elsewhere === false) continue;
    for (const factor of cures.length < 2 ? [1.05, 1.6] : []) {
      // In whole gigabytes, or hundredths of what is small.
      const wanted = budget[key] + over!.bytes * factor;
      const unit = wanted > 1e10 ? 1e9 : 10 ** (Math.floor(Math.log10(wanted)) - 1);
      const bytes = Math.ceil(wanted / unit) * unit;
      if (!fits({ [key]: bytes })) {
        if (key !== "deviceBytes") elsewhere ??= fits({ [key]: ENDLESS });
        if (elsewhere === false && key !== "deviceBytes") break;
        continue;
      }
      cures.push(`${showSize(bytes)} of ${words}`);
      break;
    }
  }
  return cures.length > 0
    ? `It fits with ${cures.join(", or with ")}`
    : "Shorter sequences or fewer micro-batches need less";
}
