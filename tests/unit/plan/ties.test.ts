/** Parameters that several stages use: what crosses for them, what the checker refuses, and what they cost. */
import fc from "fast-check";
import { describe, expect, it } from "vitest";
import type { Graph } from "../../../src/graph/types.js";
import { checkRanks } from "../../../src/plan/check-ranks.js";
import { ownersOf } from "../../../src/plan/layout.js";
import { residentPolicy } from "../../../src/plan/planner.js";
import type { Policy } from "../../../src/plan/policy.js";
import { assignStages, isContiguous } from "../../../src/plan/stages.js";
import type { Instruction, Stages, Tape } from "../../../src/plan/types.js";
import { deriveWaits } from "../../../src/plan/waits.js";
import { writeTape } from "../../../src/plan/write-tape.js";
import { resolveModel } from "../../../src/train/model-source.js";
import { graphs, policies } from "./random-policies.js";

type Exchange = Extract<Instruction, { op: "send" | "receive" }>;
type Plan = { steps: Tape[]; flushes: Tape[] };
const runs = Number(process.env.STROMA_CASES ?? 150);

function plan(graph: Graph, policy: Policy, stages: Omit<Stages, "rank">): Plan {
  const plans = Array.from({ length: stages.ranks }, (_, rank) =>
    writeTape(graph, { ...policy, stages: { ...stages, rank } }),
  );
  return { steps: plans.map((p) => p.step), flushes: plans.flatMap((p) => (p.flush === null ? [] : [p.flush])) };
}
const prove = (graph: Graph, { steps, flushes }: Plan) =>
  checkRanks(graph, steps, flushes.length > 0 ? flushes : undefined);

const shareAcross = (graph: Graph, of: readonly number[]) =>
  graph.blocks.some((_, b) => ownersOf(graph, b).some((owner) => of[owner] !== of[b]));

describe("tapes of stages that share parameters", () => {
  it(`are accepted over ${runs} random graphs, policies and stages`, { timeout: runs * 1_000 + 60_000 }, () => {
    let shared = 0;
    const meshes = fc.constantFrom<Omit<Stages, "rank" | "of">>(
      { ranks: 2 },
      { ranks: 3 },
      { ranks: 4 },
      { ranks: 4, shards: 2 },
      { ranks: 4, replicas: 2 },
      { ranks: 8, shards: 2, replicas: 2 },
    );
    const draws = fc.array(fc.nat(11), { minLength: 3, maxLength: 9 });
    fc.assert(
      fc.property(graphs, policies, draws, meshes, fc.integer({ min: 1, max: 12 }), (graph, policy, drawn, mesh, M) => {
        const members = (mesh.shards ?? 1) * (mesh.replicas ?? 1);
        const count = mesh.ranks / members;
        const of = graph.blocks.map((_, b) => drawn[b % drawn.length]! % count);
        if (new Set(of).size !== count) return;
        const microBatches = M < members ? members : M - (M % members);
        const whole: Policy = {
          ...policy,
          microBatches,
          boundary: policy.boundary === "slot" ? "device" : policy.boundary,
        };
        if (M % 2 === 0 && isContiguous(graph, { ...mesh, rank: 0, of })) whole.schedule = "oneForwardOneBackward";
        prove(graph, plan(graph, whole, { ...mesh, of }));
        if (shareAcross(graph, of)) shared++;
      }),
      { numRuns: runs, seed: Number(process.env.STROMA_SEED ?? 5), endOnFailure: true },
    );
    if (runs >= 50) expect(shared).toBeGreaterThan(runs / 6);
  });

  const graph = resolveModel("tiny").graph("train", "float32");
  const head = graph.blocks.length - 1;
  const bfloat16 = { storage: "bfloat16", masterWeight: "split16", optimizer: "adamw8bit" } as const;
  const policyOf = (extra: Partial<Policy> = {}): Policy => ({
    ...residentPolicy(graph, { microBatches: 4, schedule: "breadthFirst", recompute: "all" }),
    dims: { B: 2, T: 16 },
    boundary: "device",
    ...extra,
  });
  const tied = (tape: Tape) =>
    tape.instructions.filter(
      (i): i is Exchange => (i.op === "send" || i.op === "receive") && !("output" in i.operand || "shard" in i.operand),
    );

  it("lend what passes read and get back sums, each once, between the same members", () => {
    const of = assignStages(graph, 2, "contiguous");
    const said = (extra: Partial<Policy>, mesh: Omit<Stages, "rank" | "of">) =>
      plan(graph, policyOf(extra), { ...mesh, of }).steps.map((t) =>
        tied(t).map((i) => `${i.op} ${i.operand.kind}(${i.operand.block}) ${i.peer}`),
      );
    const lent = (kind: string, to: number) => [`send ${kind}(0) ${to}`, `receive sums(${head}) ${to}`];
    const owed = (kind: string, to: number) => [`receive ${kind}(0) ${to}`, `send sums(${head}) ${to}`];
    expect(said({}, { ranks: 2 })).toEqual([lent("param", 1), owed("param", 0)]);
    expect(said({ state: bfloat16 }, { ranks: 2 })).toEqual([lent("compute", 1), owed("compute", 0)]);
    expect(said({ clip: "none" }, { ranks: 4, shards: 2 })).toEqual([
      lent("compute", 2),
      lent("compute", 3),
      owed("compute", 0),
      owed("compute", 1),
    ]);
  });

  /** Moves an instruction, and derives all waits anew: the tape is then wrong in what it means alone. */
  function move(tape: Tape, from: number, to: number): void {
    const [i] = tape.instructions.splice(from, 1);
    tape.instructions.splice(to, 0, i!);
    deriveWaits(tape.instructions, tape.places);
  }
  const at = (tape: Tape, what: (i: Instruction) => boolean) => tape.instructions.findIndex(what);
  /** The instruction waits for nothing that comes from another rank. */
  function hastily(tape: Tape, what: (i: Instruction) => boolean): void {
    const i = tape.instructions[at(tape, what)]!;
    i.waits = i.waits.filter((w) => tape.instructions[w]!.op !== "receive");
  }
  const exchanged = (op: "send" | "receive", kind: string) => (i: Instruction) =>
    i.op === op && i.operand.kind === kind;

  const faults: [string, Partial<Policy>, rank: number, RegExp, (tape: Tape) => void][] = [
    [
      "a parameter lent before its pending update",
      { update: "forward" },
      0,
      /send of param\(0\) .* expected param\(0\) after 1 updates|after 0 updates/,
      (t) =>
        move(
          t,
          at(t, exchanged("send", "param")),
          at(t, (i) => i.op === "update" && i.block === 0),
        ),
    ],
    [
      "a parameter that comes behind its first use",
      {},
      2,
      /params 0: .* holds nothing|params 1: .* holds nothing/,
      (t) => move(t, at(t, exchanged("receive", "param")), t.instructions.length - 1),
    ],
    [
      "sums sent before the last micro-batch",
      {},
      2,
      /holds sums\(5\) of 3 micro-batches, expected sums\(5\) of 4/,
      (t) =>
        move(
          t,
          at(t, exchanged("send", "sums")),
          at(t, (i) => i.op === "turn" && i.microBatch === 3),
        ),
    ],
    [
      "a norm before the other stage's sums",
      {},
      0,
      /norm of block 0.* expected sums\(5\) of 4/,
      (t) =>
        move(
          t,
          at(t, exchanged("receive", "sums")),
          at(t, (i) => i.op === "norm" && i.block === 0),
        ),
    ],
    [
      "a pass that does not wait for what is lent",
      {},
      2,
      /does not wait for it/,
      (t) => {
        hastily(t, (i) => i.op === "turn" && i.microBatch === 0);
      },
    ],
    [
      "a norm that does not wait for the sums",
      {},
      0,
      /does not wait for it/,
      (t) => {
        hastily(t, (i) => i.op === "norm" && i.block === 0);
      },
    ],
    [
      "the parameter where passes read its copy",
      { state: bfloat16 },
      0,
      /passes read compute\(0\), not its param/,
      (t) => {
        const i = t.instructions[at(t, exchanged("send", "compute"))] as Exchange;
        i.operand = { kind: "param", block: 0 };
      },
    ],
    [
      "sums of a block that is not tied",
      {},
      2,
      /sums\(4\) is not for rank 0/,
      (t) => {
        const i = t.instructions[at(t, exchanged("send", "sums"))] as Exchange;
        i.operand = { kind: "sums", block: 4 };
      },
    ],
    [
      "a parameter that is never lent",
      {},
      0,
      /rank 0 never sends it|expected/,
      (t) => {
        const k = at(t, exchanged("send", "param"));
        t.instructions.splice(k, 1);
        deriveWaits(t.instructions, t.places);
      },
    ],
  ];
  it.each(faults)("are refused with %s", (_, extra, rank, why, plant) => {
    // Of three, the first and the last have nothing else to tell each other.
    const good = plan(graph, policyOf(extra), { ranks: 3, of: assignStages(graph, 3, "contiguous") });
    prove(graph, good);
    const bad = structuredClone(good);
    plant(bad.steps[rank]!);
    expect(() => prove(graph, bad)).toThrow(why);
  });
});
