/** Tapes of ranks that share a block's state: proved together, the least bytes on the wire, refused when wrong. */
import fc from "fast-check";
import { describe, expect, it } from "vitest";
import { StromaError } from "../../../src/errors.js";
import type { Graph } from "../../../src/graph/types.js";
import { checkRanks } from "../../../src/plan/check-ranks.js";
import { blockLayouts, ownersOf } from "../../../src/plan/layout.js";
import { residentPolicy } from "../../../src/plan/planner.js";
import type { Policy } from "../../../src/plan/policy.js";
import { assignStages } from "../../../src/plan/stages.js";
import type { Instruction, Shard, Stages, Tape, UpdateOrder } from "../../../src/plan/types.js";
import { writeTape } from "../../../src/plan/write-tape.js";
import { resolveModel } from "../../../src/train/model-source.js";
import { random } from "../../support/random-models.js";
import { graphs, policies } from "./random-policies.js";

type Of<K extends Instruction["op"]> = Extract<Instruction, { op: K }>;

type Mesh = Omit<Stages, "rank" | "of">;
const meshes = fc.constantFrom<Mesh & { stages: number }>(
  { ranks: 2, shards: 2, replicas: 1, stages: 1 },
  { ranks: 3, shards: 3, replicas: 1, stages: 1 },
  { ranks: 2, shards: 1, replicas: 2, stages: 1 },
  { ranks: 4, shards: 2, replicas: 2, stages: 1 },
  { ranks: 4, shards: 2, replicas: 1, stages: 2 },
  { ranks: 4, shards: 1, replicas: 2, stages: 2 },
);

interface Tapes {
  steps: Tape[];
  flushes: Tape[];
}

function tapesOf(graph: Graph, policy: Policy, stages: Omit<Stages, "rank">): Tapes {
  const plans = Array.from({ length: stages.ranks }, (_, rank) =>
    structuredClone(writeTape(graph, { ...policy, stages: { ...stages, rank } })),
  );
  return { steps: plans.map((p) => p.step), flushes: plans.flatMap((p) => (p.flush === null ? [] : [p.flush])) };
}

/** Null where the graph has too few blocks for the mesh. */
function spread(graph: Graph, { stages, ...mesh }: Mesh & { stages: number }): Omit<Stages, "rank"> | null {
  const groups = new Set(graph.blocks.map((_, b) => ownersOf(graph, b)[0] ?? b)).size;
  if (groups < stages) return null;
  try {
    return { ...mesh, of: assignStages(graph, stages) };
  } catch {
    return null;
  }
}

/** Depth-first, all ranks have equally many micro-batches. */
function withRanks(policy: Policy, mesh: Mesh, bfloat16: boolean): Policy {
  const members = mesh.shards! * mesh.replicas!;
  const ragged = Math.max(policy.microBatches, members);
  return {
    ...policy,
    boundary: policy.boundary === "slot" ? "device" : policy.boundary,
    microBatches: policy.schedule === "breadthFirst" ? ragged : members * Math.min(2, policy.microBatches),
    ...(bfloat16 ? { reduceDType: "bfloat16" } : {}),
  };
}

const sent = (tape: Tape, kind: string): number =>
  tape.instructions.reduce((n, i) => n + (i.op === "send" && i.operand.kind === kind ? i.bytes : 0), 0);

describe("tapes with shards", () => {
  it("are accepted for any graph, policy and mesh", { timeout: 120_000 }, () => {
    let tried = 0;
    fc.assert(
      fc.property(graphs, policies, meshes, fc.boolean(), (graph, policy, mesh, bfloat16) => {
        const stages = spread(graph, mesh);
        if (stages === null) return;
        const { steps, flushes } = tapesOf(graph, withRanks(policy, mesh, bfloat16), stages);
        checkRanks(graph, steps, flushes.length > 0 ? flushes : undefined);
        tried++;
      }),
      { numRuns: 150, seed: 7 },
    );
    expect(tried).toBeGreaterThan(100);
  });

  const tiny = resolveModel("tiny").graph("train", "float32");
  const policy = (update: UpdateOrder): Policy => ({
    ...residentPolicy(tiny, { microBatches: 4, schedule: "breadthFirst", update, recompute: "all" }),
    boundary: "device",
    dims: { B: 2, T: 16 },
    prefetch: 1,
  });
  const plain = (shards: number, replicas = 1) => ({
    ranks: shards * replicas,
    of: tiny.blocks.map(() => 0),
    shards,
    replicas,
  });

  it.each([2, 3, 4])(
    "over %i ranks send each parameter once a visit and each gradient once, to whom they must",
    (S) => {
      const { steps } = tapesOf(tiny, policy("end"), plain(S));
      const layouts = blockLayouts(tiny, steps[0]!.state);
      const losses = new Set(tiny.losses.map((l) => l.block));
      // The last block before the head and the head are visited twice in a row: gathered once.
      const parameters = layouts.reduce((n, l, b) => n + (losses.has(b) ? 1 : 2) * l.shard(0).compute.end * 4, 0);
      const gradients = layouts.reduce((n, l) => n + l.shard(0).partial.end * 4, 0);
      const total = (kind: string) => steps.reduce((n, t) => n + sent(t, kind), 0);
      expect(total("compute")).toBeLessThanOrEqual((S - 1) * parameters);
      expect(total("compute")).toBeGreaterThan(0.8 * (S - 1) * parameters);
      expect(total("partial")).toBe((S - 1) * gradients);
      // Evenly, but for what the last shard of a block lacks.
      for (const tape of steps) expect(sent(tape, "compute")).toBeLessThanOrEqual((1.1 * total("compute")) / S);
    },
  );

  it("hold a shard of the state each, and together all of it once", () => {
    const { steps } = tapesOf(tiny, policy("end"), plain(4));
    const homes = (t: Tape) => t.placement.homes.reduce((n, h) => n + (h.param?.bytes ?? 0) + (h.state?.bytes ?? 0), 0);
    const whole = homes(writeTape(tiny, policy("end")).step);
    const each = steps.map(homes);
    expect(each.reduce((a, b) => a + b)).toBeLessThan(1.1 * whole);
    for (const bytes of each) expect(bytes).toBeLessThan(0.3 * whole);
  });

  const faults: Record<string, (t: Tape, next: () => number) => void> = {
    "an exchange lost": (t, next) =>
      remove(
        t,
        pickOf(t, next, (i) => i.op === "send" || i.op === "receive"),
      ),
    "a shard in another place": (t, next) => {
      const i = exchangeOf(t, next);
      i.place = t.places.findIndex((p, k) => k !== i.place && p.space === "device" && p.bytes === i.bytes);
    },
    "another shard": (t, next) => {
      const i = exchangeOf(t, next);
      (i.operand as Shard).shard = ((i.operand as Shard).shard + 1) % 3;
    },
    "another rank": (t, next) => {
      const i = exchangeOf(t, next);
      i.peer = [0, 1, 2].find((r) => r !== i.peer && r !== t.stages!.rank)!;
    },
    "parts in another order": (t, next) => {
      const i = t.instructions[pickOf(t, next, (at) => at.op === "reduce")] as Of<"reduce">;
      [i.parts[0], i.parts[1]] = [i.parts[1]!, i.parts[0]!];
    },
    "a part twice": (t, next) => {
      const i = t.instructions[pickOf(t, next, (at) => at.op === "reduce")] as Of<"reduce">;
      i.parts[0] = i.parts[1]!;
    },
    "no partial gradient": (t, next) =>
      remove(
        t,
        pickOf(t, next, (i) => i.op === "partial"),
      ),
    "no reduction": (t, next) =>
      remove(
        t,
        pickOf(t, next, (i) => i.op === "reduce"),
      ),
    "no shard of its own": (t, next) =>
      remove(
        t,
        pickOf(t, next, (i) => i.op === "cast"),
      ),
    "another rank's micro-batch": (t, next) => {
      const i = t.instructions[pickOf(t, next, (at) => at.op === "forward")] as Of<"forward">;
      i.microBatch = (i.microBatch + 1) % 4;
    },
    "a pass that does not wait for a shard": (t, next) => {
      const of = (i: Instruction) => i.waits.some((w) => t.instructions[w]!.op === "receive");
      const i = t.instructions[pickOf(t, next, of)]!;
      i.waits = i.waits.filter((w) => t.instructions[w]!.op !== "receive");
    },
  };

  it.each(Object.keys(faults))("are refused with %s", (name) => {
    for (const [k, update] of (["end", "backward", "forward"] as const).entries()) {
      const good = tapesOf(tiny, policy(update), plain(3));
      for (let seed = 1; seed <= 4; seed++) {
        const steps = structuredClone(good.steps);
        const next = random(seed * 31 + k);
        faults[name]!(steps[Math.floor(next() * 3)]!, next);
        const check = () => checkRanks(tiny, steps, good.flushes.length > 0 ? good.flushes : undefined);
        expect(check, `${update}, ${seed}`).toThrow(StromaError);
      }
    }
  });

  it("are not written for fewer micro-batches than ranks, or unlike numbers of them depth-first", () => {
    expect(() => tapesOf(tiny, policy("end"), plain(5))).toThrow(/each of 5 ranks of a stage needs a micro-batch/);
    expect(() => tapesOf(tiny, { ...policy("end"), schedule: "depthFirst" }, plain(3))).toThrow(/4 \/ 3 is no whole/);
    expect(() => tapesOf(tiny, policy("end"), { ...plain(2), ranks: 3 })).toThrow(/3 ranks are no whole number/);
  });
});

const pickOf = (t: Tape, next: () => number, wanted: (i: Instruction) => boolean): number => {
  const all = [...t.instructions.keys()].filter((at) => wanted(t.instructions[at]!));
  return all[Math.floor(next() * all.length)]!;
};

const exchangeOf = (t: Tape, next: () => number): Of<"send" | "receive"> =>
  t.instructions[pickOf(t, next, (i) => i.op === "send" || i.op === "receive")] as Of<"send" | "receive">;

/** Waits are positions: those behind move up, and nothing waits for what is gone. */
function remove(t: Tape, at: number): void {
  t.instructions.splice(at, 1);
  for (const i of t.instructions) i.waits = i.waits.filter((w) => w !== at).map((w) => (w > at ? w - 1 : w));
}
