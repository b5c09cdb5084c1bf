/** How a plan reads: a table of where every byte lives, bars for card and host, time, and why not otherwise. */
import type { Graph } from "../graph/types.js";
import type { AutoPlan, PlanReport, PlanRequest } from "../plan/auto.js";
import { PLACED_KINDS, type PlacedKind } from "../plan/auto-describe.js";
import { showSize } from "../plan/budget.js";
import type { Simulation } from "../plan/simulate.js";
import type { Instruction, P, Tape } from "../plan/types.js";
import { queueOf } from "../plan/waits.js";
import { formatDuration, formatInteger } from "./ui/format.js";

const WORDS: Readonly<Record<PlacedKind, string>> = {
  parameters: "parameters",
  optimizer: "optimizer state",
  retained: "retained gradients",
  boundaries: "block boundaries",
  slabs: "blocks in flight, gradient sums",
  workspace: "workspace of a pass",
};

/** A table's and a bar's sizes; nothing is a dash. */
export const gigabytes = (bytes: number): string => (bytes === 0 ? "-" : showSize(bytes));
export const seconds = (s: number): string => (s < 1 ? `${(s * 1e3).toPrecision(3)} ms` : formatDuration(s));

const BAR = 40;

export function bar(name: string, used: number, usable: number, given: number): string {
  const cells = Math.min(BAR, Math.round((used / given) * BAR));
  const end = Math.min(BAR, Math.round((usable / given) * BAR));
  const free = "·".repeat(Math.max(0, end - cells));
  const kept = "x".repeat(Math.max(0, BAR - Math.max(cells, end)));
  const over = used > usable ? `, ${gigabytes(used - usable)} too much` : "";
  return `${name.padEnd(7)}[${"#".repeat(cells)}${free}${kept}] ${gigabytes(used)} of ${gigabytes(usable)} usable (${gigabytes(given)})${over}`;
}

/** The whole answer for people. */
export function planText(name: string, plan: AutoPlan, request: PlanRequest, notes: readonly string[]): string {
  const { report, simulation, usable } = plan;
  const { budget, profile } = request;
  const device = profile.device === "cpu" ? "memory" : "card";
  const parameters = elements(plan);
  const lines = [
    ...heading(name, plan, request),
    ...placements(plan, device),
    "",
    bar(device, report.peakDeviceBytes, usable.deviceBytes, budget.deviceBytes),
    ...(budget.hostBytes > 0 ? [bar("host", report.peakHostBytes, usable.hostBytes, budget.hostBytes)] : []),
    ...(budget.diskBytes > 0 ? [bar("disk", report.peakDiskBytes, usable.diskBytes, budget.diskBytes)] : []),
    "",
    `time      ${seconds(report.predictedStepSeconds)} a step, ${formatInteger(Math.round(report.predictedTokensPerSecond))} tokens/s predicted on ${profile.name}; bound by ${BOUND[report.boundBy]}`,
    `busy      ${busyText(simulation, report.predictedStepSeconds)}`,
    ...(simulation.bytesToDevice + simulation.bytesFromDevice > 0
      ? [
          `traffic   ${gigabytes(report.bytesToDevicePerStep)} to the device and ${gigabytes(report.bytesFromDevicePerStep)} from it a step; ` +
            `parameters and state: ${(simulation.stateBytesToDevice / parameters).toFixed(2)} and ${(simulation.stateBytesFromDevice / parameters).toFixed(2)} bytes a parameter`,
        ]
      : []),
    ...(simulation.bytesLoaded + simulation.bytesSaved > 0
      ? [`disk      ${gigabytes(simulation.bytesLoaded)} read and ${gigabytes(simulation.bytesSaved)} written a step`]
      : []),
    ...notes.map((note) => `note      ${note}`),
  ];
  return `${[...lines, ...notTaken(report, device)].join("\n")}\n`;
}

const elements = ({ graph }: AutoPlan): number =>
  graph.parameters.reduce((n, p) => n + p.shape.reduce((a, b) => a * b, 1), 0);

/** What is planned, and whether it fits how. */
export function heading(name: string, plan: AutoPlan, request: PlanRequest): string[] {
  const { report } = plan;
  const { state, dims, gradientAccumulationSteps, clip } = request;
  const tokens = (dims.B ?? 1) * gradientAccumulationSteps * (dims.T ?? 1);
  const master = state.masterWeight === "none" ? "" : `, ${state.masterWeight} master weights`;
  return [
    `${name}: ${formatInteger(elements(plan))} parameters in ${state.storage}${master}, ${state.optimizer}, clip ${clip}`,
    `a step: ${gradientAccumulationSteps} micro-batches of ${dims.B} x ${dims.T} tokens, ${formatInteger(tokens)} in all`,
    "",
    report.fits
      ? `It fits. ${howText(plan)}`
      : `It does not fit: ${gigabytes(plan.missing!.bytes)} are missing. ${plan.missing!.cure}.`,
    ...(report.fits ? [] : [`The nearest: ${howText(plan)}`]),
    "",
  ];
}

export function notTaken({ alternatives }: PlanReport, device: string): string[] {
  if (alternatives.length === 0) return [];
  const lines = ["", "Not taken:"];
  for (const { plan: what, why, peakDeviceBytes, predictedTokensPerSecond, fits } of alternatives) {
    const facts = fits
      ? ` (${gigabytes(peakDeviceBytes!)} ${device}, ${formatInteger(Math.round(predictedTokensPerSecond!))} tokens/s)`
      : "";
    lines.push(`  ${what}`, `      ${why}${facts}`);
  }
  return lines;
}

export const BOUND = {
  compute: "arithmetic",
  memory: "the device's memory",
  hostToDevice: "the link to the device",
  deviceToHost: "the link from the device",
  disk: "the disk",
  rankLink: "the link between cards",
} as const;

function howText({ report, policy, blocksMerged, graph }: AutoPlan): string {
  const { order, update, microBatch } = report;
  const how = {
    breadthFirst: "The whole batch passes through a block before the next is fetched",
    depthFirst: "Each micro-batch passes through all blocks",
    oneForwardOneBackward: "Each micro-batch passes through all blocks, several on different cards at once",
  }[order];
  const fused = microBatch.fused > 1 ? `, ${microBatch.fused} micro-batches at once` : "";
  const updated = {
    end: "updated after all backwards",
    backward: "updated right after its last backward",
    forward: `updated in the next step's forward, its gradient kept as ${policy.retainedDType} until the global norm is known`,
  }[update];
  const merged = blocksMerged > 1 ? ` ${blocksMerged} layers make a block (${graph.blocks.length} blocks).` : "";
  const recompute = {
    all: "Forwards run again in the backward.",
    none: "Autograd graphs are kept.",
    selective: "Forwards run again in the backward, but for results of products and attention, which are kept.",
  }[policy.recompute];
  return `${how} (${order})${fused}; a block is ${updated}. ${recompute}${merged}`;
}

function placements(plan: AutoPlan, device: string): string[] {
  const { placements: table, peakDeviceBytes, peakHostBytes, peakDiskBytes } = plan.report;
  const total = { device: peakDeviceBytes, host: peakHostBytes, disk: peakDiskBytes };
  const spaces = (["device", "host", "disk"] as const).filter(
    (s) => s === "device" || PLACED_KINDS.some((k) => table[k][s] > 0),
  );
  return placementRows(
    spaces.map((s) => ({
      name: s === "device" ? device : s,
      bytes: (kind) => table[kind][s],
      highest: total[s],
    })),
  );
}

interface Column {
  name: string;
  bytes: (kind: PlacedKind) => number;
  highest: number;
}

/** A table of kinds by where they are; a kind that is nowhere has no row. */
export function placementRows(columns: readonly Column[]): string[] {
  const row = (name: string, cells: string[]) => `${name.padEnd(32)}${cells.map((c) => c.padStart(13)).join("")}`;
  return [
    row(
      "where",
      columns.map((c) => c.name),
    ),
    ...PLACED_KINDS.filter((k) => columns.some((c) => c.bytes(k) > 0)).map((k) =>
      row(
        WORDS[k],
        columns.map((c) => gigabytes(c.bytes(k))),
      ),
    ),
    row(
      "highest",
      columns.map((c) => gigabytes(c.highest)),
    ),
  ];
}

/** Shares of a step of `seconds`, by queue. */
export function busyText({ busySeconds }: Simulation, seconds: number): string {
  const share = (s: number) => `${Math.round((s / seconds) * 100)} %`;
  const queues = [
    ["compute", busySeconds.compute],
    ["to the device", busySeconds.in],
    ["from the device", busySeconds.out],
    ["disk reads", busySeconds.load],
    ["disk writes", busySeconds.save],
    ["sending", busySeconds.send],
    ["receiving", busySeconds.receive],
  ] as const;
  return queues
    .filter(([, s]) => s > 0)
    .map(([name, s]) => `${name} ${share(s)}`)
    .join(", ");
}

/** The tape, an instruction a line: position, milliseconds, queue, what, from and to where, after what. */
export function tapeText(graph: Graph, step: Tape, { start, end }: Simulation): string {
  const lines = [
    `${step.instructions.length} instructions, ${step.places.length} places; d: device, h: host, f: disk, s: slot; @ offset`,
    "",
  ];
  for (const [i, at] of step.instructions.entries()) {
    const queue = queueOf(at);
    const waits = at.waits.length > 0 ? `  after ${at.waits.join(", ")}` : "";
    lines.push(
      `${String(i).padStart(6)} ${(start[i]! * 1e3).toFixed(1).padStart(10)} ${((end[i]! - start[i]!) * 1e3).toFixed(1).padStart(8)} ms  ${queue.padEnd(8)}${what(graph, step, at)}${waits}`,
    );
  }
  return `${lines.join("\n")}\n`;
}

function what(graph: Graph, tape: Tape, i: Instruction): string {
  const at = (p: P) => placeText(tape, p);
  const list = (ps: readonly P[]) =>
    ps
      .filter((p) => p >= 0)
      .map(at)
      .join(" ");
  const block = (b: number) => graph.blocks[b]!.name;
  switch (i.op) {
    case "forward":
      return `forward ${block(i.block)} #${i.microBatch}  ${list([...i.params, ...i.in])} -> ${list(i.out)}`;
    case "turn":
      return `turn ${block(i.block)} #${i.microBatch}  ${list([...i.params, ...i.in])} -> ${list(i.dIn)}, sums ${at(i.sums)}`;
    case "backward":
      return `backward ${block(i.block)} #${i.microBatch}  ${list([...i.params, ...i.in, ...i.dOut])} -> ${list(i.dIn)}, sums ${at(i.sums)}`;
    case "cast":
      return `cast ${block(i.block)}  ${at(i.from)} -> ${at(i.to)}`;
    case "norm":
      return `norm ${block(i.block)}  ${list(i.sums)}`;
    case "partial":
      return `partial gradient of ${block(i.block)} as ${i.dtype}  ${list(i.sums)} -> ${at(i.to)}`;
    case "reduce":
      return `reduce ${block(i.block)}  ${list(i.parts)} -> ${at(i.to)}`;
    case "report":
    case "agree":
    case "coefficient":
      return i.op;
    case "send":
    case "receive": {
      const { kind, block: b } = i.operand;
      const which =
        "shard" in i.operand
          ? ` shard ${i.operand.shard}`
          : "microBatch" in i.operand
            ? ` #${i.operand.microBatch}`
            : ", shared";
      return `${kind} of ${block(b)}${which}  ${at(i.place)} ${i.op === "send" ? "to" : "from"} rank ${i.peer}  ${gigabytes(i.bytes)}`;
    }
    case "pack":
      return `pack ${block(i.block)} as ${i.dtype}  ${list(i.sums)} -> ${at(i.to)}`;
    case "update":
      return `update ${block(i.block)} from ${i.from}  ${list(i.grad)} -> ${list([i.param, i.state])}`;
    case "copy": {
      const { kind, block: b } = i.operand;
      const which = "microBatch" in i.operand ? ` #${i.operand.microBatch}` : "";
      return `${kind} of ${block(b)}${which}  ${at(i.from)} -> ${at(i.to)}  ${gigabytes(i.bytes)} at ${i.at}`;
    }
  }
}

function placeText(tape: Tape, p: P): string {
  if (p < 0) return "none";
  const { space, offset } = tape.places[p]!;
  return `${{ device: "d", host: "h", shared: "m", disk: "f", slot: "s" }[space]}@${offset}`;
}
