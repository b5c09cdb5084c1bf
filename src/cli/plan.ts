/** `stroma plan`: whether a model trains on a machine, where every byte would live, and how fast. Needs no libtorch. */
import type { CommandModule } from "yargs";
import { StromaError } from "../errors.js";
import { findModel, modelNames } from "../models/registry.js";
import { type ProbeReport, probeMachine } from "../native.js";
import { type PlanReport, type PlanRequest, planAuto } from "../plan/auto.js";
import { planRanksAuto } from "../plan/auto-ranks.js";
import { parseSize, showSize } from "../plan/budget.js";
import { contextOn } from "../plan/context.js";
import { stateFormats } from "../plan/formats.js";
import { readMeasured } from "../plan/measured.js";
import { cardProfile, findProfile, type MachineProfile, profileNames } from "../plan/profiles.js";
import { STAGE_RULES, type StageRule } from "../plan/stages.js";
import type { Recompute, StateFormat } from "../plan/types.js";
import { processMemory } from "../train/resources.js";
import { type Way, widestThatFits } from "./plan-format.js";
import { ranksTapeText, ranksText } from "./plan-ranks-report.js";
import { planText, tapeText } from "./plan-report.js";
import { scalePlan } from "./plan-scale.js";

export interface PlanArguments {
  model: string;
  devices: number;
  stages?: StageRule;
  shards?: number;
  replicas?: number;
  context?: number;
  "shared-host"?: "on" | "off";
  "device-memory"?: string;
  "host-memory"?: string;
  disk: string;
  "sequence-length": number;
  "micro-batch-size": number;
  "gradient-accumulation-steps": number;
  optimizer?: "adamw" | "adamw8bit";
  precision?: "float32" | "float64" | "bfloat16";
  "master-weight"?: StateFormat["masterWeight"];
  clip: PlanRequest["clip"];
  recompute?: Recompute;
  "layers-per-block"?: number;
  profile?: string;
  tape?: boolean;
  rank?: number;
  ranks?: string;
  "shard-group"?: number;
  network?: string;
  compiled?: boolean;
  json?: boolean;
}

export const planCommand: CommandModule<object, PlanArguments> = {
  command: "plan",
  describe: "Say whether a model trains in given memory, where every byte lives, and how fast",
  builder: (yargs) =>
    yargs
      .options({
        model: {
          type: "string",
          demandOption: true,
          describe: `A preset (${modelNames().join(", ")}) or a Hugging Face folder or config.json`,
        },
        devices: { type: "number", default: 1, describe: "Cards of this machine, each with --device-memory" },
        stages: {
          choices: STAGE_RULES,
          describe: "Only plans with it: which blocks are on which of several cards. Default: the faster",
        },
        shards: {
          type: "number",
          describe: "Only plans in which so many cards share the state of a block. Default: the faster of 1 and all",
        },
        replicas: {
          type: "number",
          describe:
            "Only plans in which so many groups of cards hold the same state. Default: 1, or all where a card holds everything",
        },
        context: {
          type: "number",
          describe:
            "Cards that share each row: its tokens, and with them the memory of passes, are dealt out. Default: 1",
        },
        "shared-host": {
          choices: ["on", "off"] as const,
          default: "on" as const,
          describe:
            "Cards that share the state of a block read parameters on the host from memory in common; off: send them",
        },
        "device-memory": {
          type: "string",
          describe: "Of the card, e.g. 24GB (1e9 each) or 24GiB (2^30). Default: this machine's",
        },
        "host-memory": { type: "string", describe: "Beside the card, e.g. 64GB. Default: what this process may use" },
        disk: { type: "string", default: "0", describe: "Room on disk for what fits nowhere else, e.g. 200GB" },
        "sequence-length": { type: "number", default: 512, describe: "Tokens T of a row" },
        "micro-batch-size": { type: "number", default: 1, describe: "Rows of a micro-batch" },
        "gradient-accumulation-steps": { type: "number", default: 32, describe: "Micro-batches of a step" },
        optimizer: {
          choices: ["adamw", "adamw8bit"] as const,
          describe: "Default: adamw; adamw8bit, a quarter of its bytes, where that does not fit",
        },
        precision: {
          choices: ["float32", "float64", "bfloat16"] as const,
          describe: "Of parameters and passes. Default: bfloat16 on a card, float32 on a CPU",
        },
        "master-weight": {
          choices: ["none", "split16", "float32"] as const,
          describe:
            "Of bfloat16 parameters; none: updates round stochastically. Default: float32, or less where that does not fit",
        },
        clip: {
          choices: ["none", "block", "global"] as const,
          default: "global" as const,
          describe: "Gradients clipped by the norm of all, of each block, or not",
        },
        recompute: {
          choices: ["all", "none", "selective"] as const,
          describe: "Only plans with it: what a backward computes again. Default: the plan's choice",
        },
        "layers-per-block": {
          type: "number",
          describe: "Only plans in which so many layers are one block. Default: the plan's choice",
        },
        profile: { choices: profileNames(), describe: "Whose speed is predicted. Default: this machine's" },
        tape: { type: "boolean", conflicts: "json", describe: "Also every instruction of the step" },
        rank: {
          type: "number",
          implies: "tape",
          describe: "Of several cards, only the instructions of this one, from 0",
        },
        ranks: {
          type: "string",
          describe:
            "Instead a table: so many cards over machines, weights and state sharded over them, e.g. 8,64 or 8-4096 (doubling); batch sizes are a card's",
        },
        "shard-group": {
          type: "number",
          implies: "ranks",
          describe:
            "Shard over groups of so many, each with a copy of the model. Default: the faster of a machine and all",
        },
        network: {
          type: "string",
          implies: "ranks",
          describe: "Bytes a second of a card's share of the network, each way, e.g. 12.5GB. Default: the profile's",
        },
        compiled: {
          type: "boolean",
          implies: "ranks",
          describe: "Elementwise work runs in compiled kernels, not a kernel for each operator",
        },
        json: { type: "boolean", describe: "One JSON object instead of text" },
      })
      .example("$0 plan --model tiny", "on this machine")
      .example("$0 plan --model astro-13b --device-memory 24GB --host-memory 64GB", "13 billion parameters on one card")
      .example("$0 plan --model astro-13b --devices 2 --device-memory 24GB --host-memory 64GB", "on two cards")
      .example("$0 plan --model 7b --device-memory 24GB --host-memory 32GB --disk 100GB", "with a disk for the rest")
      .example("$0 plan --model 1b --profile a5000 --device-memory 8GiB --tape | less", "read the schedule")
      .example(
        "$0 plan --model 8b --ranks 8-4096 --profile h100 --micro-batch-size 2 --sequence-length 8192 --gradient-accumulation-steps 1",
        "from one machine to 512",
      ),
  handler: (args) => {
    process.stdout.write(plan(args));
  },
};

/** The command's whole output. Throws CONFIG for an unknown model or a size that is none. */
export function plan(args: PlanArguments, machine: ProbeReport | null = probeMachine()): string {
  for (const name of [
    "devices",
    "sequence-length",
    "micro-batch-size",
    "gradient-accumulation-steps",
    "layers-per-block",
    "shard-group",
    "context",
  ] as const)
    if (args[name] !== undefined && (!Number.isSafeInteger(args[name]) || args[name] < 1))
      throw new StromaError(
        "CONFIG",
        `[plan] expected --${name} to be a whole number of at least 1, got ${args[name]}`,
      );
  const found = findModel(args.model);
  if (args.ranks !== undefined) return scalePlan(found, args);
  for (const name of ["shard-group", "network", "compiled"] as const)
    if (args[name] !== undefined) throw new StromaError("CONFIG", `[plan] --${name} is for --ranks`);
  const { devices, stages, shards, replicas, context = 1, rank } = args;
  const lone = (["stages", "shards", "replicas", "context", "rank"] as const).find((name) => args[name] !== undefined);
  if (devices === 1 && lone !== undefined)
    throw new StromaError("CONFIG", `[plan] --${lone} is for --devices 2 or more`);
  if (rank !== undefined && (!Number.isSafeInteger(rank) || rank < 0 || rank >= devices))
    throw new StromaError("CONFIG", `[plan] expected --rank to be one of 0 to ${devices - 1}, got ${rank}`);
  const notes: string[] = [];
  const profile = profileFor(args, machine, notes);
  const budget = budgetFor(args, profile, machine);
  const rows = { B: args["micro-batch-size"], T: args["sequence-length"] };
  const sharedHost = args["shared-host"] !== "off" && profile.device !== "cpu";
  const tape = (text: () => string) => (args.tape ? `\n${text()}` : "");
  const sharing = (context: number): Way => ({
    graph(dtype) {
      const graph = found.graph({ mode: "train", dtype });
      if (context === 1) return graph;
      return found.graph({ mode: "train", dtype, context: contextOn(graph, rows, context, profile) });
    },
    planned(graph, state) {
      const request: PlanRequest = {
        dims: { ...rows, T: rows.T / context },
        gradientAccumulationSteps: args["gradient-accumulation-steps"],
        ...{ state, profile, budget, clip: args.clip, recompute: args.recompute },
        layersPerBlock: args["layers-per-block"],
      };
      if (devices === 1) {
        const result = planAuto(graph, request);
        const { graph: merged, tapes, simulation } = result;
        const text = () =>
          planText(found.name, result, request, notes) + tape(() => tapeText(merged, tapes.step, simulation));
        return { result, text };
      }
      const spread = { ...request, devices, stages, shards, replicas, context, sharedHost };
      const result = planRanksAuto(graph, spread);
      const whole = { ...spread, dims: rows };
      return {
        result,
        text: () => ranksText(found.name, result, whole, notes) + tape(() => ranksTapeText(result, rank)),
      };
    },
  });
  const room = devices * budget.deviceBytes + budget.hostBytes + budget.diskBytes;
  const wish = { storage: args.precision, masterWeight: args["master-weight"], optimizer: args.optimizer };
  const formats = stateFormats(wish, profile.device === "cuda" ? "bfloat16" : "float32");
  const { result, text, state } = widestThatFits(sharing(context), formats, room, args.clip, notes);
  const { report, missing } = result;
  const { storage: precision, masterWeight, optimizer } = state;
  if (args.json) {
    const lacks = missing === null ? {} : { missing: { bytes: missing.bytes, cure: missing.cure } };
    return `${JSON.stringify({ precision, masterWeight, optimizer, ...report, ...lacks })}\n`;
  }
  if (devices > 1) notes.push(...contextNotes(context, state, report, args, sharing));
  if (devices > 1 && profile.device === "cpu") notes.push("speed is that of ranks which have as many cores each");
  return text();
}

/** With rows shared: what whole ones would give. Where whole rows do not fit: the sharing that would. */
function contextNotes(
  context: number,
  state: StateFormat,
  { fits, predictedTokensPerSecond }: PlanReport,
  { devices, shards, replicas, ...args }: PlanArguments,
  sharing: (context: number) => Way,
): string[] {
  const tried = (ranks: number): PlanReport => {
    const way = sharing(ranks);
    return way.planned(way.graph(state.storage), state).result.report;
  };
  if (context > 1) {
    const whole = tried(1);
    if (!whole.fits) return ["whole rows do not fit"];
    const by = predictedTokensPerSecond / whole.predictedTokensPerSecond;
    return [
      `whole rows fit, too, with ${showSize(whole.peakDeviceBytes)} a card: this is ${by.toFixed(2)} x their speed`,
    ];
  }
  if (fits || shards !== undefined || replicas !== undefined) return [];
  const may = (ranks: number) => devices % ranks === 0 && args["sequence-length"] % (2 * ranks) === 0;
  const found = [2, 4, 8, 16].find((ranks) => ranks <= devices && may(ranks) && tried(ranks).fits);
  return found === undefined ? [] : [`it fits with --context ${found}: ${found} cards share each row`];
}

function profileFor(args: PlanArguments, machine: ProbeReport | null, notes: string[]): MachineProfile {
  if (args.profile !== undefined) return findProfile(args.profile);
  const card = machine?.gpus[0];
  if (card === undefined && args["device-memory"] === undefined) {
    const own = readMeasured();
    if (own === null)
      notes.push("these processors have not been measured: speed is a guess; stroma doctor --measure times them");
    return own ?? findProfile("cpu");
  }
  if (card === undefined) {
    notes.push("no card is here: speed is that of an RTX 4090 (--profile names another)");
    return findProfile("rtx4090");
  }
  const measured = readMeasured(card.name);
  if (measured !== null) return measured;
  const { profile, guess } = cardProfile(card.name);
  if (guess !== null) notes.push(`${guess}; --profile names another`);
  return profile;
}

/** Given sizes, else this machine's: the card's memory, and what the cgroup leaves of the host's. */
function budgetFor(args: PlanArguments, profile: MachineProfile, machine: ProbeReport | null): PlanRequest["budget"] {
  const memory = processMemory(machine);
  const given = (name: "device-memory" | "host-memory" | "disk") =>
    args[name] === undefined ? undefined : parseSize(args[name], `--${name}`);
  const diskBytes = given("disk")!;
  // On a CPU the device is the process's memory, and there is nothing beside it.
  if (profile.device === "cpu")
    return { deviceBytes: given("device-memory") ?? memory / args.devices, hostBytes: 0, diskBytes };
  const deviceBytes = given("device-memory") ?? machine?.gpus[0]?.memoryBytes;
  if (deviceBytes === undefined)
    throw new StromaError(
      "CONFIG",
      "[plan] no card is here whose memory could be read. Say --device-memory, e.g. 24GB",
    );
  return { deviceBytes, hostBytes: given("host-memory") ?? memory, diskBytes };
}
