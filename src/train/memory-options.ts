/** How parameters and optimizer state are stored, where they live, and when they change: options and what they exclude. */
import { invalidArgument, StromaError } from "../errors.js";
import { parseSize } from "../plan/budget.js";
import {
  type Clip,
  type MasterWeight,
  type Recompute,
  SCHEDULES,
  type Schedule,
  type StateFormat,
  type UpdateOrder,
} from "../plan/types.js";
import type { SessionOptions } from "./native-session.js";

export interface MemoryOptions {
  /** adamw8bit: moments of matrices in 8 bits (a quarter of their bytes), smaller tensors as before. Default "adamw". */
  optimizer?: StateFormat["optimizer"];
  /**
   * What parameters are stored as. Default `dtype`, "float32". With "bfloat16" and no `dtype`, blocks compute in bfloat16
   * where the processor is fast at it, else in float32 over the same parameters; the start event says which.
   */
  precision?: StateFormat["storage"];
  /**
   * Beside parameters stored in bfloat16. float32: 4 bytes each. split16: the lower halves, 2 bytes. none: updates round
   * stochastically. Default "float32".
   */
  masterWeight?: MasterWeight;
  /** Norm that maxGradNorm is of: of all gradients, or of each block's. Default "global"; "none" without maxGradNorm. */
  clip?: Clip;
  /**
   * When a block is updated. end: after all gradients. backward: after its own, no global clipping. forward: in the next
   * step. Default "end"; with `offload` "forward" where gradients are clipped globally, else "backward".
   */
  update?: UpdateOrder;
  /**
   * resident: everything on the device. auto: the fastest plan that fits the budgets. Default "auto" where a budget or
   * `offload: "auto"` is given, and on a card, alone, unless an option says what auto chooses.
   */
  plan?: "resident" | "auto";
  /**
   * Where parameters and optimizer state live: none: on the device. host or disk: there, a block on the device while it
   * works. auto: as the plan finds best. On device "cpu" the device's memory is the host's: only a disk is elsewhere.
   */
  offload?: "none" | "host" | "disk" | "auto";
  /** Budgets: bytes, or text like "24GB" or "8GiB". Default: what there is; disk for `plan: "auto"`: none. */
  deviceMemory?: number | string;
  hostMemory?: number | string;
  disk?: number | string;
  /** Folder for what a plan keeps on disk while it trains. Default: `outputDir`. */
  diskFolder?: string;
  /**
   * k consecutive layers are one block, so that only every k-th boundary between layers waits for the backward. Layers that
   * share parameters or draw random numbers stay alone. Default 1; `plan: "auto"` chooses.
   */
  layersPerBlock?: number;
}

/** What MemoryOptions are read beside. */
interface Beside {
  device: SessionOptions["device"];
  dtype?: SessionOptions["dtype"];
  order?: Schedule;
  recompute?: Recompute;
  maxGradNorm?: number | null;
}

export interface ResolvedMemory {
  /** null: chosen when training begins (compute-dtype.ts). */
  dtype: SessionOptions["dtype"] | null;
  precision: StateFormat["storage"];
  masterWeight: MasterWeight;
  maxGradNorm: number | null;
  clip: Clip;
  /** null: the plan's choice; `recompute` may be "all" or "selective" all the same. */
  order: Schedule | null;
  recompute: Recompute | null;
  update: UpdateOrder | null;
  /** null: `offload` says all. */
  plan: "resident" | "auto" | null;
  /** True: plan auto because nothing was said. */
  planUnasked: boolean;
  offload: "none" | "host" | "disk" | "auto";
  deviceMemory: number | null;
  hostMemory: number | null;
  disk: number | null;
  diskFolder: string | null;
  /** null: the plan's choice. */
  layersPerBlock: number | null;
}

export const MEMORY_NAMES = [
  ...["optimizer", "precision", "masterWeight", "clip", "update", "plan", "offload"],
  ...["deviceMemory", "hostMemory", "disk", "diskFolder", "layersPerBlock"],
];

/** @throws CONFIG for what contradicts itself, saying why; INVALID_ARGUMENT for a value out of range */
export function resolveMemory(o: MemoryOptions & Beside): ResolvedMemory {
  const sizes = {
    deviceMemory: size(o.deviceMemory, "deviceMemory"),
    hostMemory: size(o.hostMemory, "hostMemory"),
    disk: size(o.disk, "disk"),
  };
  const where = places(o, sizes);
  const clipping = clips(o);
  const layersPerBlock = layers(o.layersPerBlock) ?? (where.plan === "auto" ? null : 1);
  return { ...numbers(o), ...clipping, ...schedule(o, where, clipping.clip), ...where, ...sizes, layersPerBlock };
}

function layers(given: number | undefined): number | null {
  if (given === undefined) return null;
  if (!Number.isSafeInteger(given) || given < 1)
    throw invalidArgument("trainer", "a whole number of at least 1", given, "layersPerBlock");
  return given;
}

function numbers(o: MemoryOptions & Beside): Pick<ResolvedMemory, "dtype" | "precision" | "masterWeight"> {
  const FLOATING = ["float32", "float64", "bfloat16"] as const;
  const given = { precision: one(o.precision, FLOATING, "precision"), dtype: one(o.dtype, FLOATING, "dtype") };
  const precision = given.precision ?? given.dtype ?? "float32";
  const dtype = given.dtype ?? (precision === "bfloat16" ? null : precision);
  if (dtype !== null && dtype !== precision && !(precision === "bfloat16" && dtype === "float32"))
    throw config(
      `precision ${precision} does not go with dtype ${dtype}: parameters are stored as blocks compute, or in bfloat16 ` +
        `under float32${dtype === "bfloat16" ? ". precision bfloat16 with masterWeight float32 keeps float32 weights" : ""}`,
    );
  const stored = precision === "bfloat16" ? "float32" : "none";
  const masterWeight = one(o.masterWeight, ["none", "split16", "float32"] as const, "masterWeight") ?? stored;
  if (masterWeight !== "none" && precision !== "bfloat16")
    throw config(`masterWeight ${masterWeight} is for parameters stored in bfloat16, not ${precision}`);
  return { dtype, precision, masterWeight };
}

function clips(o: MemoryOptions & Beside): Pick<ResolvedMemory, "clip" | "maxGradNorm"> {
  const given = one(o.clip, ["none", "block", "global"] as const, "clip");
  if (given === "none" && typeof o.maxGradNorm === "number")
    throw config(`clip none and maxGradNorm ${o.maxGradNorm} are both given: leave one out`);
  if (given !== undefined && given !== "none" && o.maxGradNorm === null)
    throw config(`clip ${given} without a maxGradNorm to clip to`);
  const maxGradNorm = given === "none" ? null : o.maxGradNorm === undefined ? 1 : o.maxGradNorm;
  if (maxGradNorm !== null && !(maxGradNorm > 0 && Number.isFinite(maxGradNorm)))
    throw invalidArgument("trainer", "a positive number or null", maxGradNorm, "maxGradNorm");
  return { maxGradNorm, clip: maxGradNorm === null ? "none" : (given ?? "global") };
}

function places(
  o: MemoryOptions & Beside,
  budgets: Pick<ResolvedMemory, "deviceMemory" | "hostMemory" | "disk">,
): Pick<ResolvedMemory, "plan" | "planUnasked" | "offload" | "diskFolder"> {
  const plan = one(o.plan, ["resident", "auto"] as const, "plan");
  const offload = one(o.offload, ["none", "host", "disk", "auto"] as const, "offload");
  const { device, diskFolder = null } = o;
  if (plan === "resident" && offload !== undefined && offload !== "none")
    throw config(`plan resident keeps everything on the device, offload ${offload} does not: leave one out`);
  if (plan === "auto" && (offload === "host" || offload === "disk"))
    throw config(`offload ${offload} says where everything lives, plan auto chooses it: leave one out`);
  const budget = Object.values(budgets).some((bytes) => bytes !== null);
  const planUnasked = plan === undefined && offload === undefined && !budget && leavesAll(o);
  const auto = plan === "auto" || budget || planUnasked;
  const chosen = plan === "resident" ? "none" : (offload ?? (auto ? "auto" : "none"));
  if (device === "cpu" && chosen === "host")
    throw config(
      "offload host moves state out of a device's memory, and on device cpu that is the host's. Offload to a disk, or " +
        "try it on device sim",
    );
  if (device === "cpu" && budgets.hostMemory !== null)
    throw config("on device cpu there is one memory: deviceMemory is all of it, hostMemory does not apply");
  const disk = chosen === "disk" || (chosen === "auto" && budgets.disk !== null);
  if (chosen === "none" && budgets.hostMemory !== null)
    throw config("hostMemory is for what does not stay on the device, and offload none keeps everything there");
  if (!disk && budgets.disk !== null) throw config(`disk is given, and offload ${chosen} keeps nothing on one`);
  if (!disk && diskFolder !== null)
    throw config(`diskFolder is given, and nothing goes to disk: say offload disk, or disk with its size`);
  const all = chosen === "auto" ? "auto" : chosen === "none" ? (plan ?? "resident") : null;
  return { plan: all, planUnasked, offload: chosen, diskFolder };
}

/** On a card, or on one of several, with nothing said of what a plan chooses. */
const leavesAll = (o: MemoryOptions & Beside): boolean =>
  o.device.startsWith("cuda") &&
  o.diskFolder === undefined &&
  o.layersPerBlock === undefined &&
  o.order === undefined &&
  o.update === undefined &&
  o.recompute !== "none";

function schedule(
  o: MemoryOptions & Beside,
  { plan, offload }: Pick<ResolvedMemory, "plan" | "offload">,
  clip: Clip,
): Pick<ResolvedMemory, "order" | "recompute" | "update"> {
  const order = one(o.order, SCHEDULES, "order") ?? null;
  const recompute = one(o.recompute, ["all", "none", "selective"] as const, "recompute") ?? null;
  const update = one(o.update, ["end", "backward", "forward"] as const, "update") ?? null;
  if (update === "backward" && clip === "global")
    throw config(
      "update backward changes blocks before the norm of all gradients is known. Say clip block, or clip none",
    );
  if (plan === "auto") {
    const fixed = Object.entries({ order, update, recompute: recompute === "none" ? recompute : null });
    const named = fixed.find(([, value]) => value !== null);
    if (named !== undefined)
      throw config(`${named[0]} ${named[1]} is given, and plan auto chooses it: leave one out, or say plan resident`);
    return { order, recompute, update };
  }
  if (plan === "resident")
    return { order: order ?? "breadthFirst", recompute: recompute ?? "none", update: update ?? "end" };
  if (recompute === "none")
    throw config(`recompute none holds parameters on the device, offload ${offload} takes them away between passes`);
  const later = clip === "global" ? "forward" : "backward";
  return { order: order ?? "breadthFirst", recompute: recompute ?? "all", update: update ?? later };
}

function size(given: number | string | undefined, name: string): number | null {
  if (given === undefined) return null;
  const bytes = parseSize(given, name);
  if (bytes < 1) throw invalidArgument("trainer", "a size above 0", given, name);
  return bytes;
}

function one<T extends string>(value: T | undefined, allowed: readonly T[], name: string): T | undefined {
  if (value !== undefined && !allowed.includes(value))
    throw invalidArgument("trainer", `one of ${allowed.join(", ")}`, value, name);
  return value;
}

function config(message: string): StromaError {
  return new StromaError("CONFIG", `[trainer] ${message}`);
}
