/** How a plan for several cards reads: what each holds, moves and waits for, all together, and why not otherwise. */
import type { RankReport, RanksPlan, RanksRequest } from "../plan/auto-ranks.js";
import { RANK_LINK } from "../plan/profiles.js";
import { BOUND, bar, busyText, gigabytes, heading, notTaken, placementRows, seconds, tapeText } from "./plan-report.js";
import { formatInteger } from "./ui/format.js";

const STAGES = {
  alternating: "neighbouring blocks are on different cards, so that all work at once",
  contiguous: "each card has a stretch of neighbouring blocks, so that the fewest boundaries cross",
  interleaved: "each card has two stretches of neighbouring blocks, so that it waits half as long for the others",
} as const;

function howText({ devices, stages, shards, replicas, context }: RanksPlan["report"]): string {
  const part = context === 1 ? "its part of the batch" : `1/${context} of each row`;
  const each = `${devices} cards, ${shards > 1 ? "sharded" : "replicas"}: each runs all blocks on ${part} and holds`;
  if (shards * replicas === devices && shards > 1)
    return `${each} a part of every block's state${replicas > 1 ? `, ${replicas} times over` : ""}`;
  if (replicas === devices) return `${each} everything`;
  const shared = shards > 1 ? `; ${shards} cards share the state of a block` : "";
  return `${devices} cards, ${stages} stages: ${STAGES[stages]}${shared}${replicas > 1 ? `; ${replicas} groups of them hold the same` : ""}${context > 1 ? `; ${context} cards share each row` : ""}`;
}

export function ranksText(name: string, plan: RanksPlan, request: RanksRequest, notes: readonly string[]): string {
  const { report, usable, ranks } = plan;
  const { budget, profile } = request;
  const device = profile.device === "cpu" ? "memory" : "card";
  const link = profile.rankLink ?? RANK_LINK;
  const percent = (share: number) => `${(share * 100).toFixed(1)} %`;
  const blocks = ({ blocks: b }: RankReport) => `${b.length} blocks`;
  const lines = [
    ...heading(name, plan, request),
    howText(report),
    ...(report.sharedHost
      ? ["parameters on the host lie in memory that the cards share: each fetches whole blocks from there"]
      : []),
    "",
    ...placementRows([
      ...report.perRank.map((r) => ({
        name: `${device} ${r.rank}`,
        bytes: (kind: keyof typeof r.placements) => r.placements[kind].device,
        highest: r.peakDeviceBytes,
      })),
      ...(["host", "disk"] as const)
        .filter((space) => Object.values(report.placements).some((row) => row[space] > 0))
        .map((space) => ({
          name: `${space} in all`,
          bytes: (kind: keyof typeof report.placements) => report.placements[kind][space],
          highest: space === "host" ? report.peakHostBytes : report.peakDiskBytes,
        })),
    ]),
    "",
    ...report.perRank.map((r) =>
      bar(`${device} ${r.rank} `, r.peakDeviceBytes, usable.deviceBytes, budget.deviceBytes),
    ),
    ...(budget.hostBytes > 0 ? [bar("host", report.peakHostBytes, usable.hostBytes, budget.hostBytes)] : []),
    ...(budget.diskBytes > 0 ? [bar("disk", report.peakDiskBytes, usable.diskBytes, budget.diskBytes)] : []),
    "",
    `time      ${seconds(report.predictedStepSeconds)} a step, ${formatInteger(Math.round(report.predictedTokensPerSecond))} tokens/s predicted on ${report.devices} x ${profile.name}; bound by ${BOUND[report.boundBy]}`,
    `bubble    ${percent(report.bubble)} of the cards' time nothing is computed`,
    `between   ${gigabytes(report.bytesBetweenDevicesPerStep)} from card to card a step, at ${gigabytes(link)}/s each way${profile.rankLink === undefined ? " (assumed)" : ""}`,
    ...(report.context > 1
      ? [
          `rows      ${gigabytes(report.perRank.reduce((sum, r) => sum + r.contextBytesPerStep, 0))} more inside passes, of rows that cards share`,
        ]
      : []),
    ...report.perRank.flatMap((r) => [
      `rank ${r.rank}    ${blocks(r)}; ${busyText(ranks[r.rank]!.simulation, report.predictedStepSeconds)}; bubble ${percent(r.bubble)}`,
      `          host ${gigabytes(r.peakHostBytes)}; a step ${gigabytes(r.bytesToDevicePerStep)} to the device, ${gigabytes(r.bytesFromDevicePerStep)} from it, ` +
        `${gigabytes(r.bytesSentPerStep)} sent, ${gigabytes(r.bytesReceivedPerStep)} received`,
    ]),
    ...notes.map((note) => `note      ${note}`),
    ...notTaken(report, `${device} each`),
  ];
  return `${lines.join("\n")}\n`;
}

/** The tapes of all ranks, or of one. Times are those of all running together. */
export function ranksTapeText({ graph, ranks }: RanksPlan, rank: number | undefined): string {
  return ranks
    .flatMap(({ tapes, simulation }, r) =>
      rank === undefined || rank === r ? [`rank ${r}: ${tapeText(graph, tapes.step, simulation)}`] : [],
    )
    .join("\n");
}
