/**
 * Chooses the fastest plan for several devices of one machine that fits: which blocks are on which device or what part of
 * each, and all that `planAuto` chooses. Every device has the budget given; host memory and disk are shared, and hold one
 * copy of the state in all, since a device holds that of its own blocks, or its own parts, only.
 */
import { StromaError } from "../errors.js";
import type { Graph } from "../graph/types.js";
import {
  type Alternative,
  type AutoPlan,
  type PlanReport,
  type PlanRequest,
  planAuto,
  type RankPlan,
  searched,
} from "./auto.js";
import type { PlacementTable } from "./auto-describe.js";
import type { RankTapes } from "./auto-fit.js";
import { showSize } from "./budget.js";
import { passTraffic } from "./context.js";
import { blockLayouts } from "./layout.js";
import { groupsOf, sharersOf, stageOf } from "./mesh.js";
import type { BoundBy } from "./simulate.js";
import { assignStages, hasTies, STAGE_RULES, type StageRule, type Ties } from "./stages.js";

export interface RanksRequest extends PlanRequest {
  /** At least 2. */
  devices: number;
  /** Only this rule. Default: the faster. */
  stages?: StageRule;
  /** Only so many devices to a block's state. Default: the faster of one and all. */
  shards?: number;
  /** Only so many copies of it. Default: the faster of one and, of everything on each device, all. */
  replicas?: number;
  /** Devices that share each row: the graph is of such a context, and dims.T a device's share. Default 1. */
  context?: number;
  /** Devices read parameters that live on the host from memory in common. Default: where they have memory of their own. */
  sharedHost?: boolean;
}

export interface RankReport {
  rank: number;
  blocks: number[];
  placements: PlacementTable;
  peakDeviceBytes: number;
  /** Its part of what all share. */
  peakHostBytes: number;
  peakDiskBytes: number;
  bytesToDevicePerStep: number;
  bytesFromDevicePerStep: number;
  /** Between passes: boundaries, parameters, gradients. */
  bytesSentPerStep: number;
  bytesReceivedPerStep: number;
  /** In passes, to those that share its rows; as many are received. */
  contextBytesPerStep: number;
  /** Share of the step in which it computes nothing. */
  bubble: number;
  boundBy: BoundBy;
}

/** Of all ranks together, but for peakDeviceBytes, which is that of the fullest device. */
export interface RanksReport extends PlanReport {
  devices: number;
  stages: StageRule;
  /** Devices that share the state of a block. */
  shards: number;
  /** Groups of them that hold the same. */
  replicas: number;
  /** Devices that share each row. */
  context: number;
  /** They read parameters from host memory that they have in common. */
  sharedHost: boolean;
  /** By block. */
  stagesOf: number[];
  bytesBetweenDevicesPerStep: number;
  /** Share of all devices' time in which nothing is computed. */
  bubble: number;
  perRank: RankReport[];
}

/** `policy` is that of rank 0: of rank r it is { ...policy, stages: { ...policy.stages, rank: r } }. */
export interface RanksPlan extends AutoPlan {
  report: RanksReport;
}

/** Throws CONFIG for a request that makes no sense or more devices than blocks, TAPE for a graph that does not train. */
export function planRanksAuto(graph: Graph, request: RanksRequest): RanksPlan {
  const { devices } = request;
  const [first, ...others] = rulesTried(graph, request);
  const { search, best, ...how } = first!;
  // A graph of shared rows is none for one device.
  const alone = (request.context ?? 1) > 1 ? null : planAuto(graph, request);
  const plan = search.result();
  const times = (tokensPerSecond: number) => `${(best.tokensPerSecond / tokensPerSecond).toFixed(2)} x slower`;
  const alternatives: Alternative[] = [
    ...others.map(({ best: other, ...otherwise }) => ({
      plan: `${named(otherwise, devices)}: ${other.label}`,
      fits: other.over === null,
      why: other.over?.why ?? slower(otherwise, readsShared(other.written), times(other.tokensPerSecond)),
      peakDeviceBytes: other.peaks?.deviceBytes ?? null,
      peakHostBytes: other.peaks?.hostBytes ?? null,
      predictedTokensPerSecond: other.simulation === null ? null : other.tokensPerSecond,
    })),
    ...(alone === null ? [] : [onOneCard(alone, best.tokensPerSecond, times)]),
    ...plan.report.alternatives,
  ];
  return { ...plan, report: ranksReport(plan, request, devices, how, alternatives) };
}

const onOneCard = (
  { report, missing }: AutoPlan,
  tokensPerSecond: number,
  times: (tokensPerSecond: number) => string,
): Alternative => ({
  plan: "one card",
  fits: report.fits,
  why: report.fits
    ? report.predictedTokensPerSecond > tokensPerSecond
      ? "faster: a step is too small for so many cards"
      : `${times(report.predictedTokensPerSecond)}: one card does all the work`
    : `does not fit by ${showSize(missing!.bytes)}`,
  peakDeviceBytes: report.peakDeviceBytes,
  peakHostBytes: report.peakHostBytes,
  predictedTokensPerSecond: report.predictedTokensPerSecond,
});

/**
 * As `planRanksAuto`, for a trainer that is rank `rank`: its policy and tapes, without the report of alternatives. All ranks
 * find the same plan if their requests, budgets included, are the same. Throws as `planRanksAuto`.
 */
export function planForRank(graph: Graph, request: RanksRequest, rank: number): AutoPlan {
  const plan = rulesTried(graph, request)[0]!.search.result();
  const mine = plan.ranks[rank];
  if (mine === undefined) throw new StromaError("CONFIG", `[plan] there is no rank ${rank} of ${request.devices}`);
  const policy = { ...plan.policy, stages: { ...plan.policy.stages!, rank } };
  return { ...plan, policy, tapes: mine.tapes, simulation: mine.simulation };
}

type Dims = Pick<PlanRequest, "dims" | "batchDim">;

interface How {
  rule: StageRule;
  shards: number;
  replicas: number;
  ties?: Ties;
}

/** Searched in each way, the one to take first. */
function rulesTried(
  graph: Graph,
  { devices, stages, shards, replicas, context = 1, sharedHost, ...request }: RanksRequest,
) {
  if (!Number.isSafeInteger(devices) || devices < 2)
    throw new StromaError("CONFIG", `[plan] expected devices to be a whole number of at least 2, got ${devices}`);
  for (const [count, what] of [
    [shards, `${shards} shards`],
    [replicas, `${replicas} replicas`],
    [(shards ?? 1) * (replicas ?? 1), `${shards} shards x ${replicas} replicas`],
  ] as const)
    if (count !== undefined && (!Number.isSafeInteger(count) || count < 1 || devices % count !== 0))
      throw new StromaError(
        "CONFIG",
        `[plan] ${devices} devices are no whole number of stages of ${what}: ${devices} / ${count}`,
      );
  const rules = stages === undefined ? STAGE_RULES : [stages];
  // Ranks that share rows add up their gradients: they are shards or replicas of a stage.
  const least = (replicas ?? 1) % context === 0 ? 1 : context;
  if (((shards ?? least) * (replicas ?? 1)) % context !== 0 || devices % ((shards ?? least) * (replicas ?? 1)) !== 0)
    throw new StromaError(
      "CONFIG",
      `[plan] context ${context} is no divisor of shards ${shards ?? least} x replicas ${replicas ?? 1}, the devices of a stage, of ${devices} in all`,
    );
  const staged = (of: number, copies: number): How[] => {
    const shared = { shards: of, replicas: copies };
    const each = of * copies;
    const all: How[] = (each === devices ? rules.slice(0, 1) : rules).map((rule) => ({ rule, ...shared }));
    // Breadth-first, two stretches a device are dealt out in turn, too: a tied head may be better off beside the embedding.
    const together = { rule: "interleaved", ...shared, ties: "together" } as const;
    const mayBe = each < devices && rules.includes("interleaved") && canBeTogether(graph, devices / each);
    return mayBe ? [...all, together] : all;
  };
  // All devices at every block, each with rows of its own.
  const may = stages === undefined && request.gradientAccumulationSteps * context >= devices;
  const all = devices / (replicas ?? 1);
  const ways = [
    ...staged(shards ?? least, replicas ?? 1),
    ...(may && shards === undefined && all > least ? staged(all, replicas ?? 1) : []),
    ...(may && shards === undefined && replicas === undefined && holdsAll(graph, request) ? staged(1, devices) : []),
  ];
  const tried = ways.map((how) => {
    const shares = sharedHost ?? request.profile.device !== "cpu";
    const search = searched(graph, request, { ranks: devices, ...how, context, sharedHost: shares });
    return { ...how, search, best: search.chosen() };
  });
  const misfit = ({ best }: (typeof tried)[number]) => best.over?.bytes ?? 0;
  return tried.toSorted((a, b) => misfit(a) - misfit(b) || b.best.tokensPerSecond - a.best.tokensPerSecond);
}

/** Whether a device has room for all of the state: a copy each that waits elsewhere would cost more than parts do. */
const holdsAll = (graph: Graph, { state, budget }: PlanRequest): boolean =>
  blockLayouts(graph, state).reduce((sum, block) => sum + block.paramBytes + block.stateBytes, 0) < budget.deviceBytes;

/** Whether blocks that share a parameter leave every one of so many interleaved stages a block. */
function canBeTogether(graph: Graph, stages: number): boolean {
  try {
    return hasTies(graph) && assignStages(graph, stages, "interleaved", "together").length > 0;
  } catch {
    return false;
  }
}

const named = ({ rule, shards, replicas, ties }: How, devices: number): string => {
  if (shards === devices) return "sharded data parallel";
  if (replicas === devices) return "replicas";
  const together = ties === "together" ? " with tied blocks on one card" : "";
  const each = [...(shards > 1 ? [`${shards} shards`] : []), ...(replicas > 1 ? [`${replicas} replicas`] : [])];
  if (shards * replicas === devices) return each.join(" x ");
  return `${rule} stages${each.length > 0 ? ` of ${each.join(" x ")}` : ""}${together}`;
};

const slower = ({ rule, shards, replicas }: How, sharesHost: boolean, by: string): string =>
  replicas > 1 && shards === 1
    ? `${by}: every block's gradients cross between cards`
    : shards > 1
      ? sharesHost
        ? `${by}: every card fetches every block, and its gradients cross between cards`
        : `${by}: every block's parameters and gradients cross between cards`
      : rule !== "alternating"
        ? `${by}: a stretch of blocks waits for the stretch before it`
        : `${by}: every block's output crosses between cards`;

/** Whether parameters lie in host memory that the ranks of a plan share. */
const readsShared = (plan: { ranks: readonly RankPlan[] } | { tapes: readonly RankTapes[] } | null): boolean =>
  plan !== null &&
  ("ranks" in plan ? plan.ranks.map((r) => r.tapes) : plan.tapes).some(
    ({ step }) => step.placement.arenas.sharedBytes !== undefined,
  );

/** What a rank with these blocks sends in its passes of a step. dims: of one of the user's micro-batches. */
function contextBytes({ graph, policy, report }: AutoPlan, dims: Dims, blocks: readonly number[]): number {
  if (sharersOf(policy.stages) === 1) return 0;
  const { rows, count } = report.microBatch;
  const passes = count / groupsOf(policy.stages);
  // What is kept of a forward that runs again includes attention's results.
  const forwards = policy.recompute === "all" ? 2 : 1;
  const { batchDim = "B" } = dims;
  return blocks.reduce((sum, block) => {
    const { forward, backward } = passTraffic(graph, block, { ...dims.dims, [batchDim]: rows });
    return sum + passes * (forwards * forward + backward);
  }, 0);
}

function ranksReport(
  plan: AutoPlan,
  dims: Dims,
  devices: number,
  { rule: stages, shards, replicas }: How,
  alternatives: Alternative[],
): RanksReport {
  const { report, ranks, policy } = plan;
  const { of } = policy.stages!;
  const perRank = ranks.map(({ peaks, placements, simulation }: RankPlan, rank): RankReport => {
    const blocks = of.flatMap((stage, b) => (stage === stageOf(policy.stages!, rank) ? [b] : []));
    return {
      rank,
      blocks,
      placements,
      peakDeviceBytes: peaks.deviceBytes,
      peakHostBytes: peaks.hostBytes,
      peakDiskBytes: peaks.diskBytes,
      bytesToDevicePerStep: simulation.bytesToDevice,
      bytesFromDevicePerStep: simulation.bytesFromDevice,
      bytesSentPerStep: simulation.bytesSent,
      bytesReceivedPerStep: simulation.bytesReceived,
      contextBytesPerStep: contextBytes(plan, dims, blocks),
      bubble: simulation.bubble,
      boundBy: simulation.boundBy,
    };
  });
  return {
    ...report,
    alternatives,
    devices,
    stages,
    shards,
    replicas,
    context: sharersOf(policy.stages),
    sharedHost: readsShared(plan),
    stagesOf: of,
    bytesBetweenDevicesPerStep: perRank.reduce((sum, r) => sum + r.bytesSentPerStep, 0),
    bubble: perRank.reduce((sum, r) => sum + r.bubble, 0) / devices,
    perRank,
  };
}
