/** Tapes of ranks that share host memory: proved together, whole blocks fetched and none sent, refused when wrong. */
import fc from "fast-check";
import { describe, expect, it } from "vitest";
import { StromaError } from "../../../src/errors.js";
import type { Graph } from "../../../src/graph/types.js";
import { findModel } from "../../../src/models/registry.js";
import { checkRanks } from "../../../src/plan/check-ranks.js";
import { blockLayouts } from "../../../src/plan/layout.js";
import { residentPolicy } from "../../../src/plan/planner.js";
import type { Policy } from "../../../src/plan/policy.js";
import { assignStages } from "../../../src/plan/stages.js";
import type { Instruction, Stages, StateFormat, Tape, UpdateOrder } from "../../../src/plan/types.js";
import { writeTape } from "../../../src/plan/write-tape.js";
import { resolveModel } from "../../../src/train/model-source.js";
import { random } from "../../support/random-models.js";
import { graphs, policies } from "./random-policies.js";

type Of<K extends Instruction["op"]> = Extract<Instruction, { op: K }>;
type Mesh = Omit<Stages, "rank" | "of">;

const meshes = fc.constantFrom<Mesh & { stages: number }>(
  { ranks: 2, shards: 2, replicas: 1, stages: 1 },
  { ranks: 3, shards: 3, replicas: 1, stages: 1 },
  { ranks: 4, shards: 4, replicas: 1, stages: 1 },
  { ranks: 4, shards: 2, replicas: 2, stages: 1 },
  { ranks: 4, shards: 2, replicas: 1, stages: 2 },
);

interface Tapes {
  steps: Tape[];
  flushes: Tape[];
}

function tapesOf(graph: Graph, policy: Policy, stages: Omit<Stages, "rank">, shared = true): Tapes {
  const how = shared ? ({ sharedHost: true } as const) : {};
  const plans = Array.from({ length: stages.ranks }, (_, rank) =>
    structuredClone(writeTape(graph, { ...policy, stages: { ...stages, ...how, rank } })),
  );
  return { steps: plans.map((p) => p.step), flushes: plans.flatMap((p) => (p.flush === null ? [] : [p.flush])) };
}

const prove = (graph: Graph, { steps, flushes }: Tapes): void =>
  checkRanks(graph, steps, flushes.length > 0 ? flushes : undefined);

function proves(graph: Graph, tapes: Tapes): boolean {
  try {
    prove(graph, tapes);
    return true;
  } catch {
    return false;
  }
}

const bytes = (tape: Tape, wanted: (i: Instruction) => boolean): number =>
  tape.instructions.reduce((n, i) => n + ("bytes" in i && wanted(i) ? i.bytes : 0), 0);
const isFetch = (i: Instruction): i is Of<"copy"> => i.op === "copy" && i.queue === "in" && i.operand.kind === "param";

const tiny = resolveModel("tiny").graph("train", "float32");
const FORMATS: Record<string, StateFormat> = {
  float32: { storage: "float32", masterWeight: "none", optimizer: "adamw" },
  "bfloat16 beside float32": { storage: "bfloat16", masterWeight: "float32", optimizer: "adamw8bit" },
};
const policy = (update: UpdateOrder, state = FORMATS.float32!): Policy => ({
  ...residentPolicy(tiny, { microBatches: 4, schedule: "breadthFirst", update, recompute: "all", state }),
  boundary: "device",
  dims: { B: 2, T: 16 },
  param: "host",
  optimizer: "host",
  retained: "host",
  prefetch: 1,
});
const among = (shards: number, replicas = 1): Omit<Stages, "rank"> => ({
  ranks: shards * replicas,
  of: tiny.blocks.map(() => 0),
  shards,
  replicas,
});

describe("tapes over shared host memory", () => {
  it("are accepted for any graph, policy and mesh", { timeout: 120_000 }, () => {
    let tried = 0;
    fc.assert(
      fc.property(graphs, policies, meshes, fc.boolean(), (graph, drawn, { stages, ...mesh }, hosted) => {
        let of: number[];
        try {
          of = assignStages(graph, stages);
        } catch {
          return;
        }
        const members = mesh.shards! * mesh.replicas!;
        const ragged = Math.max(drawn.microBatches, members);
        const all: Policy = {
          ...drawn,
          param: hosted && drawn.recompute !== "none" ? "host" : drawn.param,
          boundary: drawn.boundary === "slot" ? "device" : drawn.boundary,
          microBatches: drawn.schedule === "breadthFirst" ? ragged : members * Math.min(2, drawn.microBatches),
        };
        const tapes = tapesOf(graph, all, { ...mesh, of });
        try {
          prove(graph, tapes);
        } catch (error) {
          // Where several losses and stages update on backward, ranks may wait for each other however they gather.
          if (proves(graph, tapesOf(graph, all, { ...mesh, of }, false))) throw error;
        }
        tried += tapes.steps.some((t) => t.placement.arenas.sharedBytes !== undefined) ? 1 : 0;
      }),
      { numRuns: 50, seed: 11 },
    );
    expect(tried).toBeGreaterThan(20);
  });

  it.each(Object.keys(FORMATS))("fetch whole blocks and send none of them, in %s", (name) => {
    const state = FORMATS[name]!;
    for (const S of [2, 3, 4])
      for (const update of ["end", "backward", "forward"] as const) {
        const { steps } = tapesOf(tiny, policy(update, state), among(S));
        const gathered = Array.from({ length: S }, (_, rank) =>
          writeTape(tiny, { ...policy(update, state), stages: { ...among(S), rank } }),
        );
        for (const [rank, tape] of steps.entries()) {
          expect(bytes(tape, (i) => i.op === "send" && i.operand.kind === "compute")).toBe(0);
          // What crosses between ranks are gradients, and a word where the others wait for an update.
          const words = tape.instructions.filter((i) => i.op === "send" && isWord(i)).length;
          const trained = blockLayouts(tiny, state, { ...among(S), rank }).filter((l) => l.trainableBytes > 0).length;
          expect(words).toBe(update === "forward" ? (S - 1) * trained : 0);
          const sent = bytes(tape, (i) => i.op === "send") - words;
          expect(sent).toBe(bytes(gathered[rank]!.step, (i) => i.op === "send" && i.operand.kind === "partial"));
          // The others' parts come as often as they would be sent.
          const others = bytes(tape, (i) => isFetch(i) && "shard" in i.operand);
          const received = bytes(gathered[rank]!.step, (i) => i.op === "receive" && i.operand.kind === "compute");
          expect(others).toBe((received * (state.storage === "bfloat16" ? 2 : 4)) / 4);
          const own = bytes(tape, (i) => isFetch(i) && !("shard" in i.operand));
          expect(own).toBe(bytes(gathered[rank]!.step, isFetch));
        }
        if (update !== "backward") continue;
        // Once for each time that passes come to the block: the embedding is the head's too, and the last layer goes back right
        // after the head. An update finds its part still there, but for that layer's.
        const last = tiny.blocks.length - 2;
        const visits = tiny.blocks.map((_, b) => (b === 0 ? 3 : b < last ? 2 : 1));
        for (const [rank, tape] of steps.entries()) {
          const visited = blockLayouts(tiny, state, { ...among(S), rank }).reduce((n, l, b) => {
            const others = Array.from({ length: S }, (_, k) => (k === rank ? 0 : l.slab(k).heldBytes));
            const own = visits[b]! + (b === last ? 1 : 0);
            return n + own * l.paramBytes + visits[b]! * others.reduce((x, y) => x + y);
          }, 0);
          expect(bytes(tape, isFetch)).toBe(visited);
        }
      }
  });

  it("of astro-13b on two cards move each weight twice to each, its half of the state once, and no weight between them", () => {
    const astro = findModel("astro-13b").graph({ dtype: "bfloat16" });
    const state: StateFormat = { storage: "bfloat16", masterWeight: "none", optimizer: "adamw8bit" };
    const plan: Policy = {
      ...{ schedule: "breadthFirst", recompute: "all", update: "forward", clip: "global", state, microBatches: 4 },
      ...{ dims: { B: 8, T: 512 }, param: "host", optimizer: "host", boundary: "device", retained: "device" },
      ...{ retainedDType: "bfloat16", prefetch: 1, parts: 4 },
    };
    const of = astro.blocks.map(() => 0);
    const last = of.length - 2;
    for (const rank of [0, 1]) {
      const stages: Stages = { rank, ranks: 2, of, shards: 2, sharedHost: true };
      const { step } = writeTape(astro, { ...plan, stages });
      const layouts = blockLayouts(astro, state, stages);
      const sum = (n: (l: (typeof layouts)[number], b: number) => number) =>
        layouts.reduce((total, l, b) => total + n(l, b), 0);
      const whole = sum((l, b) => (b >= last ? 1 : 2) * (l.paramBytes + l.slab(1 - rank).heldBytes));
      const inward = bytes(step, (i) => i.op === "copy" && i.queue === "in");
      const outward = bytes(step, (i) => i.op === "copy" && i.queue === "out");
      const sent = bytes(step, (i) => i.op === "send");
      expect(inward).toBe(whole + sum((l) => l.stateBytes));
      expect(outward).toBe(sum((l) => l.trainableBytes + l.stateBytes));
      const words = layouts.filter((l) => l.trainableBytes > 0).length;
      expect(sent).toBe(words + sum((l) => 4 * (l.shard(1 - rank).partial.end - l.shard(1 - rank).partial.begin)));
      // What an early prototype said of two cards whose gradients go through the host: 91 GB to each, 53 GB from it.
      expect((inward + sent) / 1e9).toBeCloseTo(91.5, 0);
      expect((outward + sent) / 1e9).toBeCloseTo(52.8, 0);
    }
  });

  it("hold the parameters once", () => {
    const { steps } = tapesOf(tiny, policy("end"), among(4));
    const whole = writeTape(tiny, policy("end")).step.placement.homes.reduce((n, h) => n + (h.param?.bytes ?? 0), 0);
    for (const { placement } of steps) {
      expect(placement.arenas.sharedBytes).toBe(steps[0]!.placement.arenas.sharedBytes);
      expect(placement.arenas.sharedBytes).toBeLessThan(1.1 * whole);
      expect(placement.homes.every((h) => h.param === null || h.param.space === "shared")).toBe(true);
    }
  });

  const faults: Record<string, { updates?: UpdateOrder[]; plant: (t: Tape, next: () => number) => void }> = {
    "a shard fetched from where another lies": {
      plant: (t, next) => {
        const i = fetchOf(t, next);
        const [a, b] = [i.from, t.instructions.find((x) => isFetch(x) && x.from !== i.from) as Of<"copy">];
        expect(a).not.toBe(b.from);
        i.from = b.from;
      },
    },
    "a shard put where another belongs": {
      plant: (t, next) => {
        const i = fetchOf(t, next);
        const other = t.instructions.find(
          (x) => isFetch(x) && x.operand.block === i.operand.block && "shard" in x.operand && x.to !== i.to,
        ) as Of<"copy">;
        i.to = other.to;
      },
    },
    "another shard named": {
      plant: (t, next) => {
        const operand = fetchOf(t, next).operand as { shard: number };
        operand.shard = (operand.shard + 1) % 3;
      },
    },
    "a fetch lost": { plant: (t, next) => remove(t, t.instructions.indexOf(fetchOf(t, next))) },
    "a part stored to another's place": {
      plant: (t, next) => {
        const all = t.instructions.filter((i): i is Of<"copy"> => i.op === "copy" && i.queue === "out");
        const stores = all.filter((i) => t.places[i.to]!.space === "shared");
        const i = stores[Math.floor(next() * stores.length)]!;
        const homes = t.placement.homes[i.operand.block]!;
        const { offset } = t.places[i.to]!;
        const to = {
          ...t.places[i.to]!,
          offset: offset === homes.shared!.offset ? offset + 4096 : homes.shared!.offset,
        };
        i.to = t.places.push(to) - 1;
      },
    },
    "a home of another shard": {
      plant: (t) => {
        const home = t.placement.homes.find((h) => h.shared !== undefined && h.param !== null)!;
        home.param = { ...home.param!, offset: home.param!.offset + 4096 };
      },
    },
    "a pass that does not wait for a fetch": {
      plant: (t, next) => {
        const late = (i: Instruction) => i.waits.some((w) => isOthers(t.instructions[w]!));
        const i = t.instructions[pickOf(t, next, late)]!;
        i.waits = i.waits.filter((w) => !isOthers(t.instructions[w]!));
      },
    },
    "a word lost": {
      updates: ["forward"],
      plant: (t, next) =>
        remove(
          t,
          pickOf(t, next, (i) => isWord(i)),
        ),
    },
    "a fetch that does not wait for the word": {
      updates: ["forward"],
      plant: (t, next) => {
        const late = (i: Instruction) => isFetch(i) && i.waits.some((w) => isWord(t.instructions[w]!));
        const i = t.instructions[pickOf(t, next, late)]!;
        i.waits = i.waits.filter((w) => !isWord(t.instructions[w]!));
      },
    },
    "a word before the part is home": {
      updates: ["forward"],
      plant: (t, next) => {
        const said = (i: Instruction) => i.op === "send" && isWord(i) && i.waits.length > 0;
        const i = t.instructions[pickOf(t, next, said)]!;
        i.waits = [];
      },
    },
    "a partial gradient that does not wait for the passes": {
      updates: ["end", "backward"],
      plant: (t) => {
        // The last fetch of a block moves behind what tells its owner that the block is done with.
        const at = t.instructions.findLastIndex((i) => isOthers(i));
        const fetch = t.instructions[at] as Of<"copy">;
        remove(t, at);
        const done = t.instructions.findLastIndex(
          (i) => i.op === "send" && i.operand.kind === "partial" && i.operand.block === fetch.operand.block,
        );
        insert(t, done + 1, { ...fetch, waits: [done] });
      },
    },
  };

  it.each(Object.keys(faults))("are refused with %s", (name) => {
    const { updates = ["end", "backward", "forward"], plant } = faults[name]!;
    for (const [k, update] of (updates as UpdateOrder[]).entries())
      for (const state of Object.values(FORMATS)) {
        const good = tapesOf(tiny, policy(update, state), among(3));
        prove(tiny, good);
        for (let seed = 1; seed <= 4; seed++) {
          const { steps, flushes } = structuredClone(good);
          const next = random(seed * 31 + k);
          plant(steps[Math.floor(next() * 3)]!, next);
          expect(() => prove(tiny, { steps, flushes }), `${update}, ${seed}`).toThrow(StromaError);
        }
      }
  });

  it("are refused where an owner may write what another still reads", () => {
    // Each tape is right by itself; together they race.
    for (const update of ["end", "backward"] as const) {
      const { steps } = tapesOf(tiny, policy(update), among(2));
      const late = steps[1]!;
      const at = late.instructions.findLastIndex((i) => i.op === "partial");
      const { block } = late.instructions[at] as Of<"partial">;
      const fetch = late.instructions.find((i) => isOthers(i) && i.operand.block === block) as Of<"copy">;
      // The same part once more, at the end, to where the block no longer is.
      late.instructions.push({ ...fetch, waits: waitsForAll(late) });
      expect(() => prove(tiny, { steps, flushes: [] }), update).toThrow(/may not have read it yet/);
    }
  });
});

const isWord = (i: Instruction): boolean => (i.op === "send" || i.op === "receive") && i.operand.kind === "updated";
const isOthers = (i: Instruction): i is Of<"copy"> => isFetch(i) && "shard" in i.operand;

const waitsForAll = (t: Tape): number[] => {
  const last = new Map<string, number>();
  for (const [at, i] of t.instructions.entries())
    last.set(i.op === "copy" ? i.queue : i.op === "send" || i.op === "receive" ? `${i.op} ${i.peer}` : "compute", at);
  last.delete("in");
  return [...last.values()].sort((a, b) => b - a);
};

const pickOf = (t: Tape, next: () => number, wanted: (i: Instruction) => boolean): number => {
  const all = [...t.instructions.keys()].filter((at) => wanted(t.instructions[at]!));
  expect(all.length).toBeGreaterThan(0);
  return all[Math.floor(next() * all.length)]!;
};
const fetchOf = (t: Tape, next: () => number): Of<"copy"> =>
  t.instructions[pickOf(t, next, (i) => isOthers(i))] as Of<"copy">;

/** Waits are positions: those behind move up, and nothing waits for what is gone. */
function remove(t: Tape, at: number): void {
  t.instructions.splice(at, 1);
  for (const i of t.instructions) i.waits = i.waits.filter((w) => w !== at).map((w) => (w > at ? w - 1 : w));
}
function insert(t: Tape, at: number, i: Instruction): void {
  for (const other of t.instructions) other.waits = other.waits.map((w) => (w >= at ? w + 1 : w));
  t.instructions.splice(at, 0, i);
}
