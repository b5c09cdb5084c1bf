/**
 * Chooses the fastest plan for several devices of one machine that fits: which blocks are on which device, and all that
 * `planAuto` chooses. Every device has the budget given; host memory and disk are shared, and hold one copy of the state
 * in all, since a device holds that of its own blocks only.
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
import type { BoundBy } from "./simulate.js";
import { STAGE_RULES, type StageRule } from "./stages.js";

export interface RanksRequest extends PlanRequest {
  /** At least 2. */
  devices: number;
  /** Only this rule. Default: the faster. */
  stages?: StageRule;
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
  bytesSentPerStep: number;
  bytesReceivedPerStep: number;
  /** Share of the step in which it computes nothing. */
  bubble: number;
  boundBy: BoundBy;
}

/** Of all ranks together, but for peakDeviceBytes, which is that of the fullest device. */
export interface RanksReport extends PlanReport {
  devices: number;
  stages: StageRule;
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
  if (!Number.isSafeInteger(devices) || devices < 2)
    throw new StromaError("CONFIG", `[plan] expected devices to be a whole number of at least 2, got ${devices}`);
  const alone = planAuto(graph, request);
  const rules = request.stages === undefined ? STAGE_RULES : [request.stages];
  const tried = rules.map((rule) => {
    const search = searched(graph, request, { ranks: devices, rule });
    return { rule, search, best: search.chosen() };
  });
  const [first, ...others] = tried.toSorted(
    (a, b) =>
      Number(a.best.over !== null) - Number(b.best.over !== null) || b.best.tokensPerSecond - a.best.tokensPerSecond,
  );
  const { rule, search, best } = first!;
  const plan = search.result();
  const times = (tokensPerSecond: number) => `${(best.tokensPerSecond / tokensPerSecond).toFixed(2)} x slower`;
  const alternatives: Alternative[] = [
    ...others.map(({ rule, best: other }) => ({
      plan: `${rule} stages: ${other.label}`,
      fits: other.over === null,
      why: other.over?.why ?? slowerStages(rule, times(other.tokensPerSecond)),
      peakDeviceBytes: other.peaks?.deviceBytes ?? null,
      peakHostBytes: other.peaks?.hostBytes ?? null,
      predictedTokensPerSecond: other.simulation === null ? null : other.tokensPerSecond,
    })),
    {
      plan: "one card",
      fits: alone.report.fits,
      why: alone.report.fits
        ? alone.report.predictedTokensPerSecond > best.tokensPerSecond
          ? "faster: a step is too small for so many cards"
          : `${times(alone.report.predictedTokensPerSecond)}: one card does all the work`
        : `does not fit: ${alone.missing!.cure}`,
      peakDeviceBytes: alone.report.peakDeviceBytes,
      peakHostBytes: alone.report.peakHostBytes,
      predictedTokensPerSecond: alone.report.predictedTokensPerSecond,
    },
    {
      plan: "data-parallel: every card runs all blocks on its part of the batch",
      fits: false,
      why: "not yet: ranks exchange boundaries, not gradients",
      peakDeviceBytes: null,
      peakHostBytes: null,
      predictedTokensPerSecond: null,
    },
    ...plan.report.alternatives,
  ];
  return { ...plan, report: ranksReport(plan, devices, rule, alternatives) };
}

const slowerStages = (rule: StageRule, by: string): string =>
  rule === "contiguous"
    ? `${by}: a stretch of blocks waits for the stretch before it`
    : `${by}: every block's output crosses between cards`;

function ranksReport(
  { report, ranks, policy }: AutoPlan,
  devices: number,
  stages: StageRule,
  alternatives: Alternative[],
): RanksReport {
  const { of } = policy.stages!;
  const perRank = ranks.map(({ peaks, placements, simulation }: RankPlan, rank): RankReport => {
    const blocks = of.flatMap((r, b) => (r === rank ? [b] : []));
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
      bubble: simulation.bubble,
      boundBy: simulation.boundBy,
    };
  });
  return {
    ...report,
    alternatives,
    devices,
    stages,
    stagesOf: of,
    bytesBetweenDevicesPerStep: perRank.reduce((sum, r) => sum + r.bytesSentPerStep, 0),
    bubble: perRank.reduce((sum, r) => sum + r.bubble, 0) / devices,
    perRank,
  };
}
