/** Random graphs, policies and corruptions of the tapes that the planner writes from them. */
import fc from "fast-check";
import type { Graph } from "../../../src/graph/types.js";
import type { Policy, Space3 } from "../../../src/plan/policy.js";
import type { CopyQueue, Instruction, StateFormat, Tape } from "../../../src/plan/types.js";
import { writeTape } from "../../../src/plan/write-tape.js";
import { randomGraph } from "../../support/random-graph.js";
import { deriveWaits, queueOf } from "./adversary.js";

/** A number in 0..n-1. */
export type Pick = (n: number) => number;

export function picker(seed: number): Pick {
  let state = (seed * 2654435761) >>> 0;
  // mulberry32
  return (n) => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = Math.imul(state ^ (state >>> 15), 1 | state);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) % n;
  };
}

export function randomPolicy(pick: Pick): Policy {
  const of = <T>(...list: T[]): T => list[pick(list.length)]!;
  const home = (): Space3 => of("device", "host", "host", "disk");
  const slots = pick(4) === 0;
  const state = of<StateFormat>(
    { storage: "float32", masterWeight: "none", optimizer: "adamw" },
    { storage: "float32", masterWeight: "none", optimizer: "adamw8bit" },
    { storage: "bfloat16", masterWeight: "split16", optimizer: "adamw" },
    { storage: "bfloat16", masterWeight: "none", optimizer: "adamw" },
  );
  return {
    schedule: of("depthFirst", "breadthFirst", "breadthFirst"),
    recompute: of("all", "selective", "none"),
    update: of("end", "backward", "forward", "forward"),
    clip: of("none", "block", "global"),
    state,
    microBatches: 1 + pick(4),
    dims: slots ? null : { B: of(3, 20, 70) },
    param: home(),
    optimizer: home(),
    boundary: slots ? "slot" : home(),
    retained: home(),
    retainedDType: of("float32", "bfloat16", "dynamic8"),
    prefetch: pick(3),
    parts: 1 + pick(3),
  };
}

export interface Case {
  graph: Graph;
  policy: Policy;
  step: Tape;
  flush: Tape | null;
}

/** The same seed, the same case. */
export function randomCase(seed: number): Case {
  const pick = picker(seed);
  const graph = fc.sample(randomGraph, { numRuns: 1, seed })[0]!;
  for (;;) {
    const policy = randomPolicy(pick);
    try {
      return { graph, policy, ...writeTape(graph, policy) };
    } catch (error) {
      // A policy that contradicts itself; another one.
      if ((error as { code?: string }).code !== "CONFIG") throw error;
    }
  }
}

/** Changes the tape and says what it did, or returns null where it found nothing to change. */
export type Corruption = (tape: Tape, pick: Pick, graph: Graph) => string | null;

type With<K extends string> = Extract<Instruction, Record<K, unknown>>;

function choose<T>(list: readonly T[], pick: Pick): T | null {
  return list.length === 0 ? null : list[pick(list.length)]!;
}

const indices = (tape: Tape, wanted: (i: Instruction) => boolean): number[] =>
  [...tape.instructions.keys()].filter((k) => wanted(tape.instructions[k]!));

/** Puts instructions in a new order of old positions. Waits move along; half of the time they are derived anew. */
function reorder(tape: Tape, order: readonly number[], pick: Pick, graph: Graph): void {
  const position = new Map(order.map((old, now) => [old, now]));
  tape.instructions = order.map((old) => tape.instructions[old]!);
  for (const [now, i] of tape.instructions.entries())
    i.waits = i.waits.flatMap((w) => position.get(w) ?? []).filter((w) => w < now);
  if (pick(2) === 0) deriveWaits(graph, tape);
}

/** Every field of an instruction that names a place. */
function placeFields(i: Instruction): { get: () => number; set: (p: number) => void }[] {
  return Object.entries(i).flatMap(([key, value]) => {
    if (["params", "in", "out", "dOut", "dIn", "grad"].includes(key) || (key === "sums" && Array.isArray(value)))
      return (value as number[]).map((p, k) => ({
        get: () => p,
        set: (q: number) => {
          (value as number[])[k] = q;
        },
      }));
    if (!["from", "to", "param", "state", "sums"].includes(key) || typeof value !== "number") return [];
    const target = i as unknown as Record<string, number>;
    return [
      {
        get: () => value,
        set: (q: number) => {
          target[key] = q;
        },
      },
    ];
  });
}

export const corruptions: Record<string, Corruption> = {
  "drops a wait": (tape, pick) => {
    const at = choose(
      indices(tape, (i) => i.waits.length > 0),
      pick,
    );
    if (at === null) return null;
    const { waits } = tape.instructions[at]!;
    const [gone] = waits.splice(pick(waits.length), 1);
    return `instruction ${at} no longer waits for ${gone}`;
  },
  "weakens a wait": (tape, pick) => {
    const at = choose(
      indices(tape, (i) => i.waits.length > 0),
      pick,
    );
    if (at === null) return null;
    const { waits } = tape.instructions[at]!;
    const k = pick(waits.length);
    const queue = queueOf(tape.instructions[waits[k]!]!);
    const before = indices(tape, (i) => queueOf(i) === queue).filter((w) => w < waits[k]!);
    if (before.length === 0) return null;
    waits[k] = before.at(-1)!;
    return `wait ${k} of instruction ${at} is one earlier`;
  },
  "drops an instruction": (tape, pick, graph) => {
    const gone = pick(tape.instructions.length);
    const order = [...tape.instructions.keys()].filter((k) => k !== gone);
    reorder(tape, order, pick, graph);
    return `instruction ${gone} is gone`;
  },
  "repeats an instruction": (tape, pick, graph) => {
    const k = pick(tape.instructions.length);
    const again = structuredClone(tape.instructions[k]!);
    const order = [...tape.instructions.keys()];
    const at = k + 1 + pick(order.length - k);
    order.splice(at, 0, order.length);
    tape.instructions.push(again);
    reorder(tape, order, pick, graph);
    return `instruction ${k} again at ${at}`;
  },
  "swaps two neighbours": (tape, pick, graph) => {
    const k = pick(Math.max(1, tape.instructions.length - 1));
    const order = [...tape.instructions.keys()];
    if (k + 1 >= order.length) return null;
    [order[k], order[k + 1]] = [order[k + 1]!, order[k]!];
    reorder(tape, order, pick, graph);
    return `instructions ${k} and ${k + 1} swapped`;
  },
  "swaps two micro-batches": (tape, pick, graph) => {
    const a = choose(
      indices(tape, (i) => i.op === "backward" || i.op === "turn" || i.op === "forward"),
      pick,
    );
    if (a === null) return null;
    const one = tape.instructions[a] as With<"microBatch">;
    const b = choose(
      indices(tape, (i) => i.op === one.op && (i as With<"microBatch">).block === one.block && i !== one),
      pick,
    );
    if (b === null) return null;
    if (pick(2) === 0) {
      const other = tape.instructions[b] as With<"microBatch">;
      [one.microBatch, other.microBatch] = [other.microBatch, one.microBatch];
      if ("first" in one && "first" in other) [one.first, other.first] = [other.first, one.first];
      return `micro-batches of instructions ${a} and ${b} exchanged`;
    }
    const order = [...tape.instructions.keys()];
    [order[a], order[b]] = [order[b]!, order[a]!];
    reorder(tape, order, pick, graph);
    return `instructions ${a} and ${b} swapped`;
  },
  "moves an instruction": (tape, pick, graph) => {
    const k = pick(tape.instructions.length);
    const order = [...tape.instructions.keys()];
    order.splice(k, 1);
    // Near, where most of the damage is subtle.
    const at = Math.min(order.length, Math.max(0, k + pick(13) - 6));
    if (at === k) return null;
    order.splice(at, 0, k);
    reorder(tape, order, pick, graph);
    return `instruction ${k} moved to ${at}`;
  },
  "moves a copy earlier": (tape, pick, graph) => {
    const k = choose(
      indices(tape, (i) => i.op === "copy"),
      pick,
    );
    if (k === null || k === 0) return null;
    const order = [...tape.instructions.keys()];
    order.splice(k, 1);
    const at = Math.max(0, k - 1 - pick(4));
    order.splice(at, 0, k);
    reorder(tape, order, pick, graph);
    return `copy ${k} moved to ${at}`;
  },
  "retargets a place": (tape, pick, graph) => {
    const k = pick(tape.instructions.length);
    const field = choose(placeFields(tape.instructions[k]!), pick);
    if (field === null) return null;
    const old = field.get();
    // Mostly to one of the same size, which nothing but its content gives away.
    const alike = [...tape.places.keys()].filter(
      (p) =>
        p !== old &&
        (old < 0 ||
          (tape.places[p]!.bytes === tape.places[old]!.bytes && tape.places[p]!.space === tape.places[old]!.space)),
    );
    const now = alike.length > 0 && pick(4) > 0 ? choose(alike, pick)! : pick(tape.places.length + 1) - 1;
    if (now === old) return null;
    field.set(now);
    if (pick(2) === 0 && now >= 0) deriveWaits(graph, tape);
    return `instruction ${k}: place ${old} became ${now}`;
  },
  "retargets an operand everywhere": (tape, pick, graph) => {
    const old = pick(tape.places.length);
    const alike = [...tape.places.keys()].filter(
      (p) =>
        p !== old &&
        tape.places[p]!.bytes === tape.places[old]!.bytes &&
        tape.places[p]!.space === tape.places[old]!.space,
    );
    const now = choose(alike, pick);
    if (now === null) return null;
    for (const i of tape.instructions) for (const f of placeFields(i)) if (f.get() === old) f.set(now);
    deriveWaits(graph, tape);
    return `place ${old} became ${now} everywhere`;
  },
  "shifts a place": (tape, pick, graph) => {
    const p = choose(
      [...tape.places.keys()].filter((p) => tape.places[p]!.space !== "slot"),
      pick,
    );
    if (p === null) return null;
    const place = tape.places[p]!;
    const unit = place.space === "disk" ? 4096 : [256, 4096][pick(2)]!;
    const by = unit * (pick(4) + 1) * (pick(2) === 0 ? -1 : 1);
    if (place.offset + by < 0) return null;
    // places of one range may stand in the table once only, so all its users move.
    tape.places[p] = { ...place, offset: place.offset + by };
    const { arenas } = tape.placement;
    const arena = `${place.space}Bytes` as keyof typeof arenas;
    if (pick(2) === 0) arenas[arena] = Math.max(arenas[arena] ?? 0, place.offset + by + place.bytes);
    if (pick(2) === 0) deriveWaits(graph, tape);
    return `place ${p} shifted by ${by}`;
  },
  "flips first": (tape, pick) => {
    const k = choose(
      indices(tape, (i) => "first" in i),
      pick,
    );
    if (k === null) return null;
    const i = tape.instructions[k] as With<"first">;
    i.first = !i.first;
    return `first of instruction ${k}`;
  },
  "flips add": (tape, pick) => {
    const k = choose(
      indices(tape, (i) => "add" in i && i.add.length > 0),
      pick,
    );
    if (k === null) return null;
    const { add } = tape.instructions[k] as With<"add">;
    const at = pick(add.length);
    add[at] = !add[at];
    return `add ${at} of instruction ${k}`;
  },
  "changes a copy's range": (tape, pick, graph) => {
    const k = choose(
      indices(tape, (i) => i.op === "copy"),
      pick,
    );
    if (k === null) return null;
    const i = tape.instructions[k] as With<"queue">;
    const unit = i.queue === "load" || i.queue === "save" ? 4096 : 256;
    const by = unit * (pick(2) === 0 ? -1 : 1);
    if (pick(2) === 0) i.at += by;
    else i.bytes += by;
    if (i.at < 0 || i.bytes <= 0) return null;
    if (pick(2) === 0) deriveWaits(graph, tape);
    return `copy ${k} moves ${i.at}..${i.at + i.bytes}`;
  },
  "drops a write-back": (tape, pick, graph) => {
    const k = choose(
      indices(tape, (i) => i.op === "copy" && (["out", "save"] as CopyQueue[]).includes(i.queue)),
      pick,
    );
    if (k === null) return null;
    reorder(
      tape,
      [...tape.instructions.keys()].filter((n) => n !== k),
      pick,
      graph,
    );
    return `write-back ${k} is gone`;
  },
  "changes what is named": (tape, pick) => {
    const k = pick(tape.instructions.length);
    const i = tape.instructions[k]!;
    const blocks = tape.placement.homes.length;
    if (i.op === "copy") {
      const field = choose(
        ["block", "output", "microBatch"].filter((f) => f in i.operand),
        pick,
      )!;
      const operand = i.operand as unknown as Record<string, number>;
      operand[field] = (operand[field]! + 1) % Math.max(2, blocks);
      return `operand of copy ${k}`;
    }
    if (!("block" in i)) return null;
    if ("dtype" in i && pick(2) === 0) {
      i.dtype = i.dtype === "float32" ? "bfloat16" : "float32";
      return `dtype of instruction ${k}`;
    }
    const was = i.block;
    i.block = pick(blocks);
    return i.block === was ? null : `block of instruction ${k}`;
  },
};
