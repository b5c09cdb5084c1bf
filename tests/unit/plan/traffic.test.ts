import { describe, expect, it } from "vitest";
import { evaluate } from "../../../src/graph/dims.js";
import { model } from "../../../src/graph/model.js";
import * as ops from "../../../src/graph/ops.js";
import { traceModel } from "../../../src/graph/trace.js";
import { findModel } from "../../../src/models/registry.js";
import { blockLayouts } from "../../../src/plan/layout.js";
import { residentPolicy } from "../../../src/plan/planner.js";
import type { CopyQueue, Instruction, Tape } from "../../../src/plan/types.js";
import { type Policy, writeTape } from "../../../src/plan/write-tape.js";

const GB = 1e9;
const astro = findModel("astro-13b").graph({ dtype: "bfloat16" });
const T = 512;
const streamed: Policy = {
  schedule: "breadthFirst",
  recompute: "all",
  update: "backward",
  clip: "none",
  state: { storage: "bfloat16", masterWeight: "none", optimizer: "adamw8bit" },
  microBatches: 32,
  dims: { B: 1, T },
  param: "host",
  optimizer: "host",
  boundary: "host",
  retained: "device",
  retainedDType: "bfloat16",
  prefetch: 1,
  parts: 4,
};
const exact: Policy = { ...streamed, update: "forward", clip: "global" };

type Copy = Extract<Instruction, { op: "copy" }>;
const copies = (tape: Tape, queue?: CopyQueue): Copy[] =>
  tape.instructions.filter((i): i is Copy => i.op === "copy" && (queue === undefined || i.queue === queue));
const moved = (tape: Tape, queue: CopyQueue): number => copies(tape, queue).reduce((sum, c) => sum + c.bytes, 0);

const layouts = blockLayouts(astro, streamed.state);
const total = (of: (l: (typeof layouts)[number]) => number) => layouts.reduce((sum, l) => sum + of(l), 0);
const params = total((l) => l.paramBytes);
const states = total((l) => l.stateBytes);
const head = layouts.length - 1;
const output = astro.programs[astro.blocks[1]!.program]!.outputs[0]!;
/** bfloat16 [B, T, D] of all micro-batches. */
const boundaries = 2 * 32 * output.shape.reduce<number>((n, d) => n * evaluate(d, { B: 1, T }), 1);

describe("the traffic of astro-13b, 32 micro-batches breadth-first", () => {
  const { step } = writeTape(astro, streamed);

  it("fetches each block's parameters twice, the head's once, and its state once", () => {
    // The last layer's output goes straight to the head; the other boundaries but it come back for their backward.
    const x = (layouts.length - 2) * boundaries;
    expect(moved(step, "in")).toBe(2 * params - layouts[head]!.paramBytes + states + x);
    expect(moved(step, "out")).toBe(params + states + x);
  });

  it("moves boundaries only where they wait on the host", () => {
    const resident = writeTape(astro, { ...streamed, boundary: "device" }).step;
    expect(moved(resident, "in")).toBe(2 * params - layouts[head]!.paramBytes + states);
    expect(moved(resident, "out")).toBe(params + states);
    expect(resident.placement.arenas.hostBytes).toBe(params + states);
  });

  it("goes through staging places on the host to disk and back", () => {
    const disk = writeTape(astro, { ...streamed, param: "disk", optimizer: "disk", boundary: "disk" }).step;
    expect(moved(disk, "load")).toBe(moved(disk, "in"));
    expect(moved(disk, "save")).toBe(moved(disk, "out"));
    expect(moved(disk, "out")).toBe(moved(step, "out"));
    expect(disk.placement.arenas.diskBytes).toBeGreaterThanOrEqual(params + states);
    // Staging: three operands on their way in either direction at most, not a model.
    expect(disk.placement.arenas.hostBytes).toBeLessThan(8 * Math.max(...layouts.map((l) => l.stateBytes)));
  });

  it("fits a card of 4 GB beside 61 GB of host, as the prototype's did", () => {
    const { deviceBytes, hostBytes } = step.placement.arenas;
    expect(deviceBytes).toBeLessThan(3.6 * GB);
    expect(hostBytes).toBeLessThan(61.05 * GB);
  });

  it("lets boundaries use the places of retained gradients", () => {
    const retained = total((l) => l.retainedBytes("bfloat16"));
    const device = (policy: Policy) => writeTape(astro, policy).step.placement.arenas.deviceBytes;
    const apart = device({ ...exact, boundary: "host" });
    const shared = device({ ...exact, boundary: "device" });
    expect(apart).toBeGreaterThan(retained);
    expect(shared - apart).toBeLessThan(0.05 * layouts.length * boundaries);
  });

  it("retains on the host what the card has no room for", () => {
    const split: Policy = { ...exact, boundary: "device", retained: (b) => (b % 3 < 2 ? "device" : "host") };
    const { step, flush } = writeTape(astro, split);
    const away = layouts.reduce((sum, l, b) => sum + (b % 3 < 2 ? 0 : l.retainedBytes("bfloat16")), 0);
    expect(step.placement.arenas.hostBytes).toBe(params + states + away);
    expect(step.placement.arenas.deviceBytes).toBeLessThan(24 * GB);
    expect(moved(flush!, "in")).toBe(params + states + away);
    expect(moved(flush!, "out")).toBe(params + states);
  });
});

describe("prefetch", () => {
  const tiny = findModel("tiny").graph();
  const small: Policy = {
    ...streamed,
    state: { storage: "float32", masterWeight: "none", optimizer: "adamw" },
    microBatches: 4,
    boundary: "device",
  };
  /** Passes between a parameter's copy and the visit that it is for. */
  const distances = (policy: Policy, queue: CopyQueue = "in"): number[] => {
    const { instructions } = writeTape(tiny, policy).step;
    const isPass = (i: Instruction) => i.op === "forward" || i.op === "turn" || i.op === "backward";
    return instructions.flatMap((copy, at) => {
      if (copy.op !== "copy" || copy.queue !== queue || copy.operand.kind !== "param") return [];
      const passes = instructions.slice(at).filter(isPass);
      const { block } = copy.operand;
      return [passes.findIndex((i) => "block" in i && (i.block === block || (i.block === 5 && block === 0)))];
    });
  };

  it("begins a block's four copies before the four passes of the visit before", () => {
    // The first visit's copies come before everything.
    const found = distances({ ...small, parts: 4, prefetch: 1 });
    expect(found.slice(0, 4)).toEqual([0, 0, 0, 0]);
    expect(found.slice(4, 8)).toEqual([4, 3, 2, 1]);
    expect(new Set(found)).toEqual(new Set([0, 1, 2, 3, 4]));
  });

  // The first visit also begins what the second needs.
  it("begins two visits before where it is told so, and not before it is needed at 0", () => {
    const two = distances({ ...small, parts: 1, prefetch: 2 });
    expect(two.slice(0, 3)).toEqual([0, 4, 6]);
    expect(two.slice(3).every((d) => d > 4 && d <= 8)).toBe(true);
    expect(new Set(distances({ ...small, parts: 3, prefetch: 0 }))).toEqual(new Set([0]));
  });

  it("reads from disk one visit before it copies to the device", () => {
    const disk: Policy = { ...small, parts: 1, param: "disk", prefetch: 1 };
    expect(
      distances(disk)
        .slice(3)
        .every((d) => d <= 4),
    ).toBe(true);
    expect(
      distances(disk, "load")
        .slice(3)
        .every((d) => d > 4 && d <= 8),
    ).toBe(true);
  });
});

describe("what stays on the device", () => {
  const tiny = findModel("tiny").graph();
  const state: Policy["state"] = { storage: "float32", masterWeight: "none", optimizer: "adamw" };

  it("is what the very next visit needs, also without prefetch", () => {
    const { step } = writeTape(tiny, { ...streamed, state, update: "end", prefetch: 0, parts: 1, boundary: "slot" });
    const fetched = (block: number) =>
      copies(step, "in").filter((c) => c.operand.kind === "param" && c.operand.block === block).length;
    // The embedding: for its forward, the tied head, and its backward with the update behind it.
    expect(fetched(0)).toBe(3);
    // A layer: for its forward, its backward and its update.
    expect(fetched(1)).toBe(3);
  });

  it("sends back what an update changes, and not the frozen rest", () => {
    const half = model<null>("half-frozen", (m) => {
      const labels = m.input("labels", "int64", ["B"]);
      const x = m.input("x", "float32", ["B", 64]);
      return m.block("only", (p) => {
        const frozen = ops.linear(x, p.param("frozen", [64, 64], { trainable: false }));
        const y = ops.linear(frozen, p.param("weight", [64, 64]));
        const loss = ops.mul(ops.sum(ops.mul(y, y), []), p.lossScale("loss"));
        p.loss("loss", loss, { count: labels, ignore: -100 });
        return loss;
      });
    });
    const { step } = writeTape(traceModel(half, null), { ...streamed, state, optimizer: "device" });
    expect(moved(step, "in")).toBe(2 * 64 * 64 * 4);
    expect(moved(step, "out")).toBe(64 * 64 * 4);
  });
});

describe("an input that a block takes twice", () => {
  it("adds its second gradient to its first", () => {
    const graph = structuredClone(findModel("tiny").graph());
    const program = { ...graph.programs[graph.blocks[2]!.program]! };
    program.inputs = [...program.inputs, program.inputs[0]!];
    graph.blocks[2]!.program = graph.programs.push(program) - 1;
    graph.blocks[2]!.inputs.push(graph.blocks[2]!.inputs[0]!);
    const { step } = writeTape(graph, residentPolicy(graph, { microBatches: 2 }));
    const backwards = step.instructions.flatMap((i) => (i.op === "backward" && i.block === 2 ? [i] : []));
    for (const { dIn, add } of backwards) {
      expect(add).toEqual([false, ...dIn.slice(1, -1).map(() => false), true]);
      expect(dIn.at(-1)).toBe(dIn[0]);
    }
    expect(backwards).toHaveLength(2);
  });
});

describe("policies that contradict themselves", () => {
  const tiny = findModel("tiny").graph();
  const written = (change: Partial<Policy>) => () =>
    writeTape(tiny, {
      ...streamed,
      state: { storage: "float32", masterWeight: "none", optimizer: "adamw" },
      ...change,
    });

  it.each<[Partial<Policy>, RegExp]>([
    [{ clip: "global" }, /before the global norm is known/],
    [{ dims: null }, /need the largest value of every dim/],
    [{ prefetch: 3 }, /prefetch 0, 1 or 2, got 3/],
    [{ parts: 0 }, /at least 1 part/],
    [{ recompute: "none" }, /hold their inputs on the device, not on host/],
    [{ recompute: "none", boundary: "device" }, /hold the parameters of model.embed_tokens on the device/],
  ])("refuses %j", (change, message) => {
    expect(written(change)).toThrow(message);
    expect(written(change)).toThrow(expect.objectContaining({ code: "CONFIG" }));
  });

  it("refuses dims that a boundary's shape needs and does not find", () => {
    expect(written({ dims: { B: 2 } })).toThrow(expect.objectContaining({ code: "SHAPE" }));
  });
});
