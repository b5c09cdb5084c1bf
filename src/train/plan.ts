/** From a graph and the options of a run to the tapes of its steps: planned, placed and proved before one is executed. */
import { createHash } from "node:crypto";
import { StromaError } from "../errors.js";
import type { ContextOptions } from "../graph/context.js";
import { canonicalJson } from "../graph/hash.js";
import type { Graph } from "../graph/types.js";
import { type AutoPlan, layersMerged, planAuto } from "../plan/auto.js";
import { planForRank } from "../plan/auto-ranks.js";
import { type Budget, showSize, usableOf } from "../plan/budget.js";
import { checkRanks } from "../plan/check-ranks.js";
import { checkTape } from "../plan/checker.js";
import { contextOn } from "../plan/context.js";
import { stateBytes, stateFormats } from "../plan/formats.js";
import { roundUp } from "../plan/layout.js";
import { groupsOf, memberOf, membersOf, stageCount } from "../plan/mesh.js";
import { residentPolicy } from "../plan/planner.js";
import { type TapePeaks, tapePeaks } from "../plan/simulate.js";
import { assignStages, stretchesOf } from "../plan/stages.js";
import type { Placement, RetainedDType, StateFormat, Tape } from "../plan/types.js";
import { type Policy, writeTape } from "../plan/write-tape.js";
import { type Prediction, predictStep } from "../profile/document.js";
import type { SettledOptions } from "./options.js";
import { summarize } from "./plan-summary.js";
import { detectResources, type Resources } from "./resources.js";

export interface StepTapes {
  step: Tape;
  /** With update "forward": carries out what the step left pending. */
  flush: Tape | null;
}

/** What of a plan a checkpoint remembers. */
export interface PlanFacts {
  /** SHA-256 of the tape of a whole step. */
  tapeHash: string;
  order: Tape["schedule"];
  recompute: Tape["recompute"];
  update: Tape["update"];
  clip: Tape["clip"];
  /** The user's micro-batches in one of the device's. */
  fused: number;
  /** The model's blocks in one of the plan's. */
  blocksMerged: number;
  /** null: no gradient is kept for the next step. */
  retainedDType: RetainedDType | null;
  /** Ranks that add up their gradients, and in what dtype those travel; absent: one. */
  members?: string;
}

export interface TrainingPlan {
  /** What the session loads: the graph given, or the same model in larger blocks. */
  graph: Graph;
  placement: Placement;
  facts: PlanFacts;
  /** One line for a person. */
  summary: string;
  /** null where the model has dims that the options do not tell. */
  predicted: Prediction | null;
  /** Of a step that took `tape`. Throws CONFIG where `predicted` is null. */
  predict(tape: Tape): Prediction;
  /** Micro-batches of a step's tape that has `count` to run: ranks that share blocks have one each, or equally many. */
  padded(count: number): number;
  /** Which of the ranks this one is that hold the model among the same stages; one of one without several. */
  share: { member: number; members: number };
  /** For so many of the device's micro-batches, proved; each number is planned once. Throws TAPE. */
  tapes(microBatches: number): StepTapes;
}

export const stateFormat = (o: SettledOptions): StateFormat => ({
  storage: o.precision,
  masterWeight: o.masterWeight,
  optimizer: o.optimizer.kind,
});

/**
 * How ranks share rows: whichever way of attending over them is faster. `graph`: of whole rows. Throws CONFIG where these do
 * not divide.
 */
export function contextFor(graph: Graph, o: SettledOptions, resources = detectResources(o)): ContextOptions | null {
  if (o.context === 1) return null;
  return contextOn(graph, { B: o.microBatchSize, T: o.sequenceLength }, o.context, resources.profile);
}

/**
 * sharesHost: ranks that share the state of blocks read parameters from host memory that they have in common. Throws CONFIG
 * where the model's sizes are not known that a plan needs, OUT_OF_MEMORY for what does not fit, saying by how much and what
 * would do.
 */
export function planTraining(
  graph: Graph,
  given: SettledOptions,
  resources: Resources = detectResources(given),
  sharesHost = false,
): TrainingPlan {
  checkSize(graph);
  const dims = dimsOf(graph, given);
  const options = dims === null || resources.cardBytes === null ? withoutPlanner(given) : given;
  const { policy, graph: planned, merged, fused } = choosePolicy(graph, options, resources, dims, sharesHost);
  const whole = writeTape(planned, policy);
  const placement = roomFor(planned, policy, whole.step.placement, options.epochs !== null);
  const known = new Map<number, StepTapes>();
  const tapes = (microBatches: number): StepTapes => {
    const found = known.get(microBatches);
    if (found !== undefined) return found;
    const written = microBatches === policy.microBatches ? whole : writeTape(planned, { ...policy, microBatches });
    const step = { ...written.step, placement };
    const flush = written.flush === null ? null : { ...written.flush, placement };
    if (policy.stages === undefined) {
      checkTape(planned, step);
      if (flush !== null) checkTape(planned, flush, { after: step });
    } else checkWithOthers(planned, { ...policy, microBatches }, { step, flush });
    // A smaller step, at the end of the data, follows a whole one.
    if (microBatches !== policy.microBatches) checkTape(planned, step, { after: tapes(policy.microBatches).step });
    known.set(microBatches, { step, flush });
    return { step, flush };
  };
  const { step } = tapes(policy.microBatches);
  const sizes = policy.dims ?? dims;
  const predict = (tape: Tape): Prediction => {
    if (sizes === null) throw unknownSizes(graph);
    return predictStep(planned, tape, resources.profile, memoryDevice(options), sizes);
  };
  const predicted = sizes === null ? null : predict(step);
  if (predicted !== null) {
    const kernels = memoryDevice(options);
    const all = policy.stages === undefined ? [] : besides(planned, policy, options);
    const beside = all.map(({ step }) => tapePeaks(planned, step, kernels, sizes!));
    checkBudgets(predicted.peaks, beside, options, resources);
  }
  const members = membersOf(policy.stages);
  const facts: PlanFacts = {
    tapeHash: hashOf(policy.stages === undefined ? step : everyRank(planned, policy).map((t) => t.step)),
    order: step.schedule,
    recompute: step.recompute,
    update: step.update,
    clip: step.clip,
    fused,
    blocksMerged: merged,
    retainedDType: step.update === "forward" ? policy.retainedDType : null,
    ...(members === 1 ? {} : { members: `${members} in ${options.reduceDtype ?? "full precision"}` }),
  };
  const { least, unit } = countsOf(policy);
  const padded = (count: number) => roundUp(Math.max(count, least), unit);
  const guess = resources.guess === null ? "" : ` (${resources.guess})`;
  const summary = summarize(facts, predicted, options, planned, placement) + guess;
  const share = { member: policy.stages === undefined ? 0 : memberOf(policy.stages), members };
  return { graph: planned, placement, facts, summary, predicted, predict, padded, share, tapes };
}

/** A number too many in a config would else be told as a malformed tape: byte offsets are safe integers. */
function checkSize(graph: Graph): void {
  const parameters = graph.parameters.reduce((sum, { shape }) => sum + shape.reduce((n, size) => n * size, 1), 0);
  if (parameters * MOST_STATE_BYTES <= Number.MAX_SAFE_INTEGER) return;
  throw new StromaError(
    "OUT_OF_MEMORY",
    `[plan] ${graph.model} has ${parameters.toPrecision(3)} parameters, more than any machine holds. Look at the sizes in its config`,
  );
}

/** Of one parameter: itself, gradient, two moments and a master, 8 bytes each at most. */
const MOST_STATE_BYTES = 40;

const hashOf = (tapes: unknown): string => createHash("sha256").update(canonicalJson(tapes)).digest("hex");

/** The tapes of all ranks, this one's among them. */
function everyRank(graph: Graph, policy: Policy): StepTapes[] {
  const stages = policy.stages!;
  return Array.from({ length: stages.ranks }, (_, rank) =>
    writeTape(graph, { ...policy, stages: { ...stages, rank } }),
  );
}

/** Of the other ranks on this one's machine. */
function besides(graph: Graph, policy: Policy, { ranks }: SettledOptions): StepTapes[] {
  const { rank, size, localSize = size } = ranks!;
  const machine = (r: number) => Math.floor(r / localSize);
  return everyRank(graph, policy).filter((_, r) => r !== rank && machine(r) === machine(rank));
}

/** Whose kernels run. */
const memoryDevice = ({ device }: SettledOptions): "cuda" | "cpu" => (device.startsWith("cuda") ? "cuda" : "cpu");

function checkWithOthers(graph: Graph, policy: Policy, mine: StepTapes): void {
  const all = everyRank(graph, policy);
  all[policy.stages!.rank] = mine;
  const flushes = all.flatMap(({ flush }) => (flush === null ? [] : [flush]));
  checkRanks(
    graph,
    all.map((t) => t.step),
    flushes.length > 0 ? flushes : undefined,
  );
}

interface Chosen {
  policy: Policy;
  graph: Graph;
  merged: number;
  fused: number;
}

/** Nobody asked for the planner, and what it goes by is not told: everything is tried on the card. */
const withoutPlanner = (o: SettledOptions): SettledOptions =>
  o.planUnasked
    ? {
        ...o,
        plan: "resident",
        offload: "none",
        order: "breadthFirst",
        recompute: o.recompute ?? "none",
        update: "end",
      }
    : o;

function choosePolicy(
  graph: Graph,
  o: SettledOptions,
  resources: Resources,
  dims: Record<string, number> | null,
  sharesHost: boolean,
): Chosen {
  checkMembers(o);
  const merged = o.layersPerBlock ?? 1;
  const alone = { graph: layersMerged(graph, merged), merged, fused: 1 };
  const resident = residentPolicy(alone.graph, {
    microBatches: o.gradientAccumulationSteps,
    schedule: o.order ?? (o.ranks === null ? undefined : "breadthFirst"),
    recompute: o.recompute ?? undefined,
    update: o.update ?? undefined,
    clip: o.clip,
    state: stateFormat(o),
  });
  if (o.ranks !== null) return amongRanks(graph, { ...alone, policy: resident }, o, resources, dims, sharesHost);
  if (o.plan === "resident") return { ...alone, policy: resident };
  if (dims === null) throw unknownSizes(graph);
  if (o.plan === null) return { ...alone, policy: streamed(resident, o.offload as "host" | "disk", o, dims) };
  const found = searchPlan(graph, o, resources, dims);
  if (found !== null) {
    const { policy, graph: planned, blocksMerged: merged, report } = found;
    return { policy, graph: planned, merged, fused: report.microBatch.fused };
  }
  // On a CPU the planner knows memory alone; beyond it everything lives on the disk.
  const recompute = o.recompute ?? "all";
  const policy: Policy = { ...resident, recompute, update: o.clip === "global" ? "forward" : "backward" };
  return { ...alone, policy: streamed(policy, "disk", o, dims) };
}

/** @throws CONFIG showing the quotient that does not come out */
function checkMembers({ ranks, shards: asked, replicas }: SettledOptions): void {
  const shards = asked ?? 1;
  const members = shards * replicas;
  const among = `shards ${shards} x replicas ${replicas}`;
  if (ranks === null && members > 1)
    throw config(
      `${among} are for a run over several ranks, and this process trains alone. Start it with --ranks or --gpus`,
    );
  if (ranks !== null && ranks.size % members !== 0)
    throw config(`${ranks.size} ranks are no whole number of stages of ${among}: ${ranks.size} / ${members}`);
}

const config = (why: string): StromaError => new StromaError("CONFIG", `[plan] ${why}`);

/** A plan over ranks: as asked, or the planner's, which every rank finds alike. */
function amongRanks(
  graph: Graph,
  { policy: resident, ...alone }: Chosen,
  o: SettledOptions,
  resources: Resources,
  dims: Record<string, number> | null,
  sharesHost: boolean,
): Chosen {
  if (dims === null) throw unknownSizes(graph);
  const { rank, size: ranks } = o.ranks!;
  const { replicas } = o;
  const shards = o.shards ?? 1;
  const of = assignStages(alone.graph, ranks / (shards * replicas), o.stages ?? "alternating");
  const shared = { shards, replicas };
  const rows = o.context > 1 ? { context: o.context } : {};
  const host = sharesHost && shards > 1 ? ({ sharedHost: true } as const) : {};
  const stages = { rank, ranks, of, ...(shards * replicas > 1 ? shared : {}), ...rows, ...host };
  const reduced = o.reduceDtype === null ? {} : { reduceDType: o.reduceDtype };
  const asked = (policy: Policy): Chosen => ({ ...alone, policy: { ...policy, stages, ...reduced } });
  if (o.plan === null) return asked(streamed(resident, o.offload as "host" | "disk", o, dims));
  // Boundaries have places, since both ends of a link must know their size.
  if (o.plan === "resident" || ranks === 1) return asked({ ...resident, boundary: "device", dims });
  const budget = budgetOf(o, resources);
  const request = {
    dims,
    gradientAccumulationSteps: o.gradientAccumulationSteps,
    state: stateFormat(o),
    clip: o.clip,
    profile: resources.profile,
    budget: o.device === "cpu" ? { ...budget, diskBytes: 0 } : budget,
    devices: ranks,
    stages: o.stages ?? undefined,
    // What is not said is the planner's to choose.
    shards: o.shards ?? undefined,
    replicas: replicas > 1 ? replicas : undefined,
    context: o.context,
    sharedHost: sharesHost,
    recompute: o.recompute ?? undefined,
    layersPerBlock: o.layersPerBlock ?? undefined,
  };
  const found = planForRank(graph, request, rank);
  if (found.report.fits) {
    const { policy, graph: planned, blocksMerged: merged, report } = found;
    return { policy: { ...policy, ...reduced }, graph: planned, merged, fused: report.microBatch.fused };
  }
  if (o.device !== "cpu" || budget.diskBytes === 0) {
    const { bytes, cure } = found.missing!;
    const leaner = leanerFormat(graph, o, (state) => planForRank(graph, { ...request, state }, rank).report.fits);
    throw outOfMemory(`over ${ranks} ranks, ${showSize(bytes)} are missing. ${cure}${leaner}`);
  }
  const update = o.clip === "global" ? "forward" : "backward";
  return asked(streamed({ ...resident, recompute: "all", update }, "disk", o, dims));
}

/** Everything at home in one place, a block on the device while it works. */
const streamed = (base: Policy, home: "host" | "disk", o: SettledOptions, dims: Record<string, number>): Policy => ({
  ...base,
  dims,
  param: home,
  optimizer: home,
  boundary: o.device === "cpu" ? "device" : "host",
  retained: home,
  prefetch: 1,
  parts: 4,
});

/** The planner's answer; null where it finds none and a disk is there for the rest. */
function searchPlan(
  graph: Graph,
  o: SettledOptions,
  resources: Resources,
  dims: Record<string, number>,
): AutoPlan | null {
  const budget = budgetOf(o, resources);
  const limit = budget.deviceBytes;
  for (let tries = 0; ; tries++) {
    const request = {
      dims,
      gradientAccumulationSteps: o.gradientAccumulationSteps,
      state: stateFormat(o),
      clip: o.clip,
      recompute: o.recompute ?? undefined,
      layersPerBlock: o.layersPerBlock ?? undefined,
      profile: resources.profile,
      budget: o.device === "cpu" ? { ...budget, diskBytes: 0 } : budget,
    };
    const found = planAuto(graph, request);
    if (!found.report.fits) {
      if (o.device === "cpu" && budget.diskBytes > 0) return null;
      const leaner = leanerFormat(graph, o, (state) => planAuto(graph, { ...request, state }).report.fits);
      throw outOfMemory(`${showSize(found.missing!.bytes)} are missing. ${found.missing!.cure}${leaner}`);
    }
    if (o.device !== "sim") return found;
    // A simulated device has a card's link and a processor's kernels, which take other workspaces than a card's.
    const over = tapePeaks(found.graph, found.tapes.step, "cpu").deviceBytes - limit;
    if (over <= 0 || tries === 4) return found;
    budget.deviceBytes -= over * 1.1;
  }
}

/** For the end of a refusal: the widest leaner format of state, of the same parameters, with which the training fits. */
function leanerFormat(graph: Graph, o: SettledOptions, fits: (state: StateFormat) => boolean): string {
  const now = stateFormat(o);
  const leaner = stateFormats({ storage: o.precision }, o.precision).filter(
    (format) => stateBytes(graph, format) < stateBytes(graph, now),
  );
  const found = leaner.find(fits);
  if (found === undefined) return "";
  const words = [
    ...(found.masterWeight === now.masterWeight ? [] : [`masterWeight ${found.masterWeight}`]),
    ...(found.optimizer === now.optimizer ? [] : [`optimizer ${found.optimizer}`]),
  ];
  return `. As it is, it fits with ${words.join(" and ")}`;
}

/** As given, else as detected: all there is, of which the planner leaves a margin. */
function budgetOf(o: SettledOptions, r: Resources): Budget {
  const { localSize, machines } = machinesOf(o);
  const diskBytes = o.offload === "none" ? 0 : (o.disk ?? 0);
  if (o.device === "cpu")
    return { deviceBytes: (o.deviceMemory ?? r.memoryBytes) / localSize, hostBytes: 0, diskBytes };
  if (o.device === "sim") {
    // Device and host are parts of one memory.
    const share = r.memoryBytes / localSize;
    const deviceBytes = o.deviceMemory ?? Math.max(0, share - (o.hostMemory ?? 0) / localSize);
    const hostBytes = o.hostMemory ?? Math.max(0, share - deviceBytes) * localSize;
    return { deviceBytes, hostBytes: o.offload === "none" ? 0 : hostBytes * machines, diskBytes };
  }
  const deviceBytes = o.deviceMemory ?? r.cardBytes;
  if (deviceBytes === null)
    throw config(`how much memory ${o.device} has is not told here: say it with deviceMemory, or plan resident`);
  const hostBytes = o.offload === "none" ? 0 : (o.hostMemory ?? r.memoryBytes) * machines;
  return { deviceBytes, hostBytes, diskBytes };
}

function machinesOf({ ranks }: SettledOptions): { localSize: number; machines: number } {
  const { size = 1, localSize = size } = ranks ?? {};
  return { localSize, machines: Math.ceil(size / localSize) };
}

/**
 * Given sizes are kept to the byte; of what was detected, a margin is left (budget.ts).
 * @param beside of the other ranks on this machine, which have one memory with this one
 */
function checkBudgets(mine: TapePeaks, beside: readonly TapePeaks[], o: SettledOptions, r: Resources): void {
  const { deviceBytes, hostBytes, diskBytes } = mine;
  const less =
    "Smaller micro-batches, shorter rows, precision bfloat16 or optimizer adamw8bit take less" +
    (o.offload === "none" ? ", and offload or plan auto takes state away" : "");
  const given = (what: string, bytes: number, of: number | null): void => {
    if (of !== null && bytes > of)
      throw outOfMemory(`the plan takes ${showSize(bytes)} of ${what}, ${showSize(of)} are given. ${less}`);
  };
  const detected = (what: string, bytes: number, kind: "deviceBytes" | "hostBytes", of: number, say: string): void => {
    const { bytes: most, left } = usableOf(of, kind);
    if (bytes > most)
      throw outOfMemory(
        `the plan takes ${showSize(bytes)} of ${what}, and of ${showSize(of)} ${showSize(most)} can be planned with ` +
          `(${showSize(left)} are left for the rest). ${less}${say}`,
      );
  };
  // On a CPU staging for a disk is the same memory.
  const cpu = o.device === "cpu";
  given("device memory", cpu ? deviceBytes + hostBytes : deviceBytes, o.deviceMemory);
  given("host memory", hostBytes, o.hostMemory);
  given("disk", diskBytes, o.disk);
  const onCard = o.device.startsWith("cuda");
  if (onCard && o.deviceMemory === null && r.cardBytes !== null)
    detected(`${o.device}'s free memory`, deviceBytes, "deviceBytes", r.cardBytes, "");
  if (cpu ? o.deviceMemory !== null : onCard && o.hostMemory !== null) return;
  const here = beside.length > 0 ? `this machine's memory in its ${beside.length + 1} ranks` : "this machine's memory";
  const taken = [mine, ...beside].reduce((sum, p) => sum + p.hostBytes + (onCard ? 0 : p.deviceBytes), 0);
  detected(here, taken, "hostBytes", r.memoryBytes, cpu ? "; deviceMemory says how much may be taken" : "");
}

const outOfMemory = (why: string) => new StromaError("OUT_OF_MEMORY", `[plan] the training does not fit: ${why}`);

const unknownSizes = (graph: Graph) =>
  new StromaError(
    "CONFIG",
    `[plan] ${graph.model} takes inputs of other dims than B and T, so their sizes are not known. Say plan resident, without a profile`,
  );

/** Sizes of one micro-batch of the user's, of a rank's share of it; null where the model has inputs of other dims. */
function dimsOf(graph: Graph, o: SettledOptions): Record<string, number> | null {
  const dims: Record<string, number> = { B: o.microBatchSize, T: o.sequenceLength / o.context };
  const names = graph.inputs.flatMap((input) => input.shape.flatMap((d) => String(d).match(/[A-Za-z_]\w*/g) ?? []));
  return names.every((name) => Object.hasOwn(dims, name)) ? dims : null;
}

/**
 * The placement that serves every number of micro-batches: homes are the same for all, arenas the largest. At the end of
 * the data a step may have any smaller number.
 */
function roomFor(graph: Graph, policy: Policy, whole: Placement, smaller: boolean): Placement {
  if (!smaller || policy.dims === null) return whole;
  const arenas = { ...whole.arenas };
  const { least, unit } = countsOf(policy);
  for (let microBatches = least; microBatches < policy.microBatches; microBatches += unit) {
    const { placement } = writeTape(graph, { ...policy, microBatches }).step;
    for (const key of ["deviceBytes", "hostBytes", "diskBytes"] as const)
      arenas[key] = Math.max(arenas[key], placement.arenas[key]);
  }
  return { ...whole, arenas };
}

/** Micro-batches that a step takes at the least, and in multiples of what. */
function countsOf({ schedule, stages }: Policy): { least: number; unit: number } {
  const least = groupsOf(stages);
  if (schedule === "breadthFirst" || stages === undefined) return { least, unit: 1 };
  const turns = schedule === "oneForwardOneBackward" && stretchesOf(stages) !== null ? stageCount(stages) : 1;
  return { least: least * turns, unit: least * turns };
}

/** How a resumed run's plan gives other roundings or draws than the one it was saved under, in words. */
export function planDifferences(then: PlanFacts, now: PlanFacts): string[] {
  const exact = (d: RetainedDType | null) => (d === null || d === "float32" || d === "float64" ? "exactly" : d);
  const pairs: [string, string | number, string | number][] = [
    ["micro-batches at once", then.fused, now.fused],
    ["layers a block", then.blocksMerged, now.blocksMerged],
    ["clip", then.clip, now.clip],
    ["gradients retained", exact(then.retainedDType), exact(now.retainedDType)],
    ["ranks that share gradients", then.members ?? 1, now.members ?? 1],
  ];
  return pairs.filter(([, a, b]) => a !== b).map(([what, a, b]) => `${what}: ${a} before, ${b} now`);
}
