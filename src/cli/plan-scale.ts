/** `stroma plan --ranks`: a table of how training grows with the number of cards over machines. */
import { StromaError } from "../errors.js";
import type { RegisteredModel } from "../models/registry.js";
import { parseSize } from "../plan/budget.js";
import { clusterNames, findCluster } from "../plan/cluster.js";
import type { ScaleBound } from "../plan/scale.js";
import { parseRanks, type ScaleRow, scaleTable } from "../plan/scale-table.js";
import type { StateFormat } from "../plan/types.js";
import type { PlanArguments } from "./plan.js";
import { gigabytes, seconds } from "./plan-report.js";
import { formatInteger } from "./ui/format.js";

const BOUND: Readonly<Record<ScaleBound, string>> = {
  compute: "arithmetic",
  memory: "the card's memory",
  nodeLink: "the link between cards",
  network: "the network",
  latency: "collectives' latency",
};

/** The command's whole output. Throws CONFIG for flags that are for one machine, or cards of which no links are known. */
export function scalePlan(model: RegisteredModel, args: PlanArguments): string {
  for (const [name, given] of [
    ["devices", args.devices !== 1],
    ["stages", args.stages !== undefined],
    ["rank", args.rank !== undefined],
    ["tape", args.tape === true],
    ["layers-per-block", args["layers-per-block"] !== undefined],
    ["host-memory", args["host-memory"] !== undefined],
    ["disk", args.disk !== "0"],
    ["clip", args.clip !== "global"],
  ] as const)
    if (given)
      throw new StromaError(
        "CONFIG",
        `[plan] --${name} is for the cards of one machine, and --ranks for many machines: leave one of them out`,
      );
  const found = findCluster(args.profile ?? DEFAULT);
  const network = args.network === undefined ? found.network : parseSize(args.network, "--network");
  const cluster = { ...found, network };
  const deviceBytes =
    args["device-memory"] === undefined ? cluster.cardBytes : parseSize(args["device-memory"], "--device-memory");
  const precision = args.precision ?? "bfloat16";
  const masterWeight = args["master-weight"] ?? (precision === "bfloat16" ? "float32" : "none");
  const state: StateFormat = { storage: precision, masterWeight, optimizer: args.optimizer ?? "adamw" };
  const graph = model.graph({ mode: "train", dtype: precision });
  const dims = { B: args["micro-batch-size"], T: args["sequence-length"] };
  const microBatches = args["gradient-accumulation-steps"];
  const compiled = args.compiled ?? false;
  const rows = scaleTable(
    graph,
    {
      shardGroup: args["shard-group"],
      dims,
      microBatches,
      recompute: args.recompute,
      compiled,
      state,
      reduceDType: "float32",
      cluster,
      deviceBytes,
    },
    parseRanks(args.ranks!),
  );
  const parameters = graph.parameters.reduce((n, p) => n + p.shape.reduce((a, b) => a * b, 1), 0);
  if (args.json)
    return `${JSON.stringify({ model: model.name, parameters, state, dims, microBatches, compiled, deviceBytes, cluster, rows })}\n`;
  const master = masterWeight === "none" ? "" : `, ${masterWeight} master weights`;
  const lines = [
    `${model.name}: ${formatInteger(parameters)} parameters in ${precision}${master}, ${state.optimizer}, weights and state sharded`,
    `a card's step: ${microBatches} micro-batches of ${dims.B} x ${dims.T} tokens; gradients travel as float32`,
    `${cluster.name} cards of ${gigabytes(deviceBytes)}, ${cluster.perNode} a machine; ${gigabytes(cluster.nodeLink)}/s between cards of a machine, ` +
      `${gigabytes(network)}/s of network a card, each way; elementwise work ${compiled ? "in compiled kernels" : "a kernel for each operator"}`,
    "",
    ...table(rows),
    "",
    "Predicted, not measured; docs/scale.md compares such predictions with published runs.",
    ...(args.profile === undefined
      ? [`Cards are ${DEFAULT}s: --profile names others (${clusterNames().join(", ")}).`]
      : []),
  ];
  return `${lines.join("\n")}\n`;
}

const DEFAULT = "h100";

const percent = (share: number): string => `${(share * 100).toFixed(share > 0.995 ? 0 : 1)} %`;

const COLUMNS: readonly [string, (row: ScaleRow) => string][] = [
  ["cards", (r) => formatInteger(r.ranks)],
  ["sharded over", (r) => formatInteger(r.shardGroup)],
  ["recompute", (r) => r.recompute],
  ["order", (r) => r.order],
  ["a card holds", (r) => gigabytes(r.memory.total)],
  ["step", (r) => (r.seconds < 1 ? seconds(r.seconds) : `${r.seconds.toPrecision(3)} s`)],
  ["tokens/s a card", (r) => formatInteger(Math.round(r.tokensPerSecondPerRank))],
  ["tokens/s", (r) => formatInteger(Math.round(r.tokensPerSecond))],
  ["of the first", (r) => percent(r.efficiency)],
  ["waits", (r) => percent(r.waiting)],
  ["bound by", (r) => (r.fits ? BOUND[r.boundBy] : "does not fit")],
];

function table(rows: readonly ScaleRow[]): string[] {
  const cells = [COLUMNS.map(([head]) => head), ...rows.map((row) => COLUMNS.map(([, cell]) => cell(row)))];
  const widths = COLUMNS.map((_, c) => Math.max(...cells.map((line) => line[c]!.length)));
  return cells.map((line) =>
    line
      .map((cell, c) => (c === COLUMNS.length - 1 ? cell : cell.padStart(widths[c]!)))
      .join("  ")
      .trimEnd(),
  );
}
