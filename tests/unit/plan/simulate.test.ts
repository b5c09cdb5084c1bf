import { existsSync, mkdtempSync, rmSync, symlinkSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { describe, expect, it, vi } from "vitest";
import { graphCost } from "../../../src/graph/costs.js";
import { validateGraph } from "../../../src/graph/validate.js";
import { findModel } from "../../../src/models/registry.js";
import { CostModel } from "../../../src/plan/cost.js";
import { blockLayouts } from "../../../src/plan/layout.js";
import { timeDisk } from "../../../src/plan/measure.js";
import { measuredFile, readMeasured, storeMeasured } from "../../../src/plan/measured.js";
import { passWorkspace } from "../../../src/plan/memory.js";
import { mergeBlocks } from "../../../src/plan/merge-blocks.js";
import { findProfile, type MachineProfile, profileNames, profileOfCard } from "../../../src/plan/profiles.js";
import { keptOf } from "../../../src/plan/selective.js";
import { simulate, tapePeaks } from "../../../src/plan/simulate.js";
import type { CopyQueue, Instruction, Recompute, Tape } from "../../../src/plan/types.js";
import { type Policy, writeTape } from "../../../src/plan/write-tape.js";

const tiny = findModel("tiny").graph({ mode: "train" });
const dims = { B: 2, T: 32 };

/** A machine of round numbers: memory and links alone take time. */
const round: MachineProfile = {
  ...findProfile("rtx4090"),
  gemm: {
    float32: { flops: 1e30, halfRows: 0 },
    bfloat16: { flops: 1e30, halfRows: 0 },
    float64: { flops: 1e30, halfRows: 0 },
  },
  deviceMemory: 1e12,
  hostToDevice: 100,
  deviceToHost: 50,
  diskRead: 10,
  diskWrite: 5,
  operatorSeconds: 0,
  instructionSeconds: 1,
  copySeconds: 0,
};

const policy: Policy = {
  schedule: "breadthFirst",
  recompute: "all",
  update: "backward",
  clip: "none",
  state: { storage: "float32", masterWeight: "none", optimizer: "adamw" },
  microBatches: 2,
  dims,
  param: "host",
  optimizer: "host",
  boundary: "device",
  retained: "device",
  retainedDType: "float32",
  prefetch: 1,
  parts: 1,
};

function handMade(instructions: Instruction[]): Tape {
  const { step } = writeTape(tiny, policy);
  return { ...step, instructions };
}
const coefficient = (waits: number[]): Instruction => ({ op: "coefficient", waits });
const copy = (queue: CopyQueue, bytes: number, waits: number[], kind: "param" | "x" = "param"): Instruction => ({
  op: "copy",
  queue,
  operand: kind === "param" ? { kind, block: 0 } : { kind, block: 0, output: 0, microBatch: 0 },
  from: 0,
  to: 0,
  at: 0,
  bytes,
  waits,
});

describe("the simulation", () => {
  it("runs each queue in order, beside the others, and waits where the tape says", () => {
    const result = simulate(
      tiny,
      handMade([
        copy("in", 300, []), // 0..3
        coefficient([]), // 0..1
        copy("in", 100, []), // 3..4: behind the first on its queue
        coefficient([0]), // 3..4
        copy("out", 100, [3], "x"), // 4..6
        copy("load", 10, [], "x"), // 0..1
        copy("save", 10, [4]), // 6..8
        coefficient([2, 5]), // 4..5
      ]),
      round,
    );
    expect([...result.start]).toEqual([0, 0, 3, 3, 4, 0, 6, 4]);
    expect([...result.end]).toEqual([3, 1, 4, 4, 6, 1, 8, 5]);
    expect(result.seconds).toBe(8);
    expect(result.busySeconds).toEqual({ compute: 3, in: 4, out: 2, load: 1, save: 2, send: 0, receive: 0 });
    expect(result).toMatchObject({ bytesToDevice: 400, bytesFromDevice: 100, bytesLoaded: 10, bytesSaved: 10 });
    // Boundaries are no state.
    expect(result).toMatchObject({ stateBytesToDevice: 400, stateBytesFromDevice: 0 });
    expect(result.boundBy).toBe("hostToDevice");
  });

  it.each([
    ["deviceToHost", [copy("out", 500, []), copy("in", 100, [])]],
    ["disk", [copy("save", 500, []), copy("out", 100, [])]],
    ["compute", [coefficient([]), copy("in", 50, [])]],
  ] as const)("is bound by %s where that queue is busiest", (what, instructions) => {
    expect(simulate(tiny, handMade([...instructions]), round).boundBy).toBe(what);
  });

  it("moves exactly the bytes of the tape's copies", () => {
    const { step } = writeTape(tiny, policy);
    const layouts = blockLayouts(tiny, policy.state);
    const sum = (f: (l: (typeof layouts)[number]) => number) => layouts.reduce((n, l) => n + f(l), 0);
    const result = simulate(tiny, step, round);
    // Every block's state comes and goes once.
    expect(result.stateBytesFromDevice).toBe(sum((l) => l.trainableBytes) + sum((l) => l.stateBytes));
    expect(result.stateBytesToDevice).toBeGreaterThanOrEqual(sum((l) => l.paramBytes) + sum((l) => l.stateBytes));
  });
});

describe("costs of instructions", () => {
  const kept = keptOf(tiny, dims);
  const model = (recompute: Recompute) =>
    new CostModel(
      tiny,
      { state: policy.state, recompute, ...(recompute === "selective" ? { kept } : {}) },
      dims,
      round,
    );
  const { step } = writeTape(tiny, policy);
  const backward = step.instructions.find((i) => i.op === "backward" && i.first)!;
  const later = step.instructions.find(
    (i) => i.op === "backward" && !i.first && i.block === (backward as { block: number }).block,
  )!;

  it("count a recompute as one more forward", () => {
    const forward = step.instructions.find(
      (i) => i.op === "forward" && i.block === (backward as { block: number }).block,
    )!;
    const ran = model("all").of(backward).flops;
    const kept = model("none").of(backward).flops;
    const once = model("all").of(forward).flops;
    expect(ran - kept).toBe(once);
    // Without products and attention, a forward is a few operations an element.
    const cheap = model("selective").of(backward).flops - kept;
    expect(cheap).toBeGreaterThan(0);
    expect(cheap).toBeLessThan(once / 20);
    expect(once).toBe(graphCost(tiny, dims).blocks[(backward as { block: number }).block]!.forwardFlops);
  });

  it("take as long as a host needs to ask a card for them, where that is longer", () => {
    const calls = tiny.programs[tiny.blocks[1]!.program]!.nodes.length;
    const forward = step.instructions.find((i) => i.op === "forward" && i.block === 1)!;
    const seconds = (more: Partial<MachineProfile>) =>
      new CostModel(tiny, step, dims, { ...round, instructionSeconds: 0, ...more }).of(forward).seconds;
    const moved = seconds({});
    expect(seconds({ operatorSeconds: 1e-12 })).toBeCloseTo(moved, 9);
    expect(seconds({ operatorSeconds: 1 })).toBeCloseTo(2.1 * calls, 6);
    expect(seconds({ operatorSeconds: 2 })).toBeCloseTo(4.2 * calls, 6);
    // Processors do what they ask for themselves.
    expect(seconds({ device: "cpu", operatorSeconds: 1 })).toBeLessThan(calls);
  });

  it("add later micro-batches to the sums: 12 bytes a parameter in fp32, the first 8", () => {
    const elements = blockLayouts(tiny, policy.state)[(backward as { block: number }).block]!.used.reduce(
      (a, b) => a + b,
      0,
    );
    expect(model("all").of(later).seconds - model("all").of(backward).seconds).toBeCloseTo((elements * 4) / 1e12, 15);
  });

  it("read and write parameters and state in an update", () => {
    const update = step.instructions.find((i) => i.op === "update")!;
    const layout = blockLayouts(tiny, policy.state)[(update as { block: number }).block]!;
    const sums = layout.trainable.reduce((a, b) => a + b, 0) * 4;
    const bytes = sums + 2 * (layout.trainableBytes + layout.stateBytes);
    expect(model("all").of(update).memorySeconds).toBeCloseTo(bytes / 1e12, 15);
  });
});

describe("peaks of a tape", () => {
  it("are its arenas and the largest workspace beside them", () => {
    const { step } = writeTape(tiny, policy);
    const most = Math.max(...tiny.blocks.map((_, b) => passWorkspace(tiny, b, dims).backward));
    expect(tapePeaks(tiny, step, "cuda")).toMatchObject({
      deviceBytes: step.placement.arenas.deviceBytes + most,
      hostBytes: step.placement.arenas.hostBytes,
      workspaceBytes: most,
    });
  });

  it("count kept graphs until their backward", () => {
    const kept: Policy = { ...policy, recompute: "none", param: "device", optimizer: "device", microBatches: 3 };
    const all = tiny.blocks.slice(0, -1).reduce((n, _, b) => n + passWorkspace(tiny, b, dims).kept, 0);
    const peak = (microBatches: number, schedule: Policy["schedule"]) =>
      tapePeaks(tiny, writeTape(tiny, { ...kept, microBatches, schedule }).step, "cuda").workspaceBytes;
    expect(peak(3, "breadthFirst") - peak(2, "breadthFirst")).toBe(all);
    expect(peak(3, "depthFirst")).toBe(peak(2, "depthFirst"));
  });

  it("count kept results until their backward, fewer bytes than graphs", () => {
    const resident: Policy = { ...policy, recompute: "selective", param: "device", optimizer: "device" };
    const written = (microBatches: number) => writeTape(tiny, { ...resident, microBatches }).step;
    const { kept } = written(3);
    const results = (b: number) => passWorkspace(tiny, b, dims, { kept }).kept;
    const blocks = [...tiny.blocks.keys()].slice(0, -1);
    const all = blocks.reduce((n, b) => n + results(b), 0);
    const peak = (microBatches: number) => tapePeaks(tiny, written(microBatches), "cuda").workspaceBytes;
    expect(peak(3) - peak(2)).toBe(all);
    for (const b of blocks) expect(results(b)).toBeLessThan(passWorkspace(tiny, b, dims).kept);
    expect(results(1)).toBeGreaterThan(0);
  });

  it("count boundaries in slots at their size", () => {
    const one = { ...policy, param: "device", optimizer: "device", boundary: "slot", dims: null } as const;
    const slots = tapePeaks(tiny, writeTape(tiny, one).step, "cuda", dims).workspaceBytes;
    const most = Math.max(...tiny.blocks.map((_, b) => passWorkspace(tiny, b, dims).backward));
    // Breadth-first, two micro-batches, boundaries of four layers and the embedding.
    expect(slots - most).toBeGreaterThanOrEqual(2 * 4 * 2 * 32 * 128 * 4);
  });
});

describe("merged blocks", () => {
  it("are the same operators and parameters in fewer blocks", () => {
    const merged = mergeBlocks(tiny, 2);
    validateGraph(merged);
    expect(merged.blocks.map((b) => b.name)).toEqual([
      "model.embed_tokens",
      "model.layers.0..1",
      "model.layers.2..3",
      "lm_head",
    ]);
    const nodes = (g: typeof tiny) => g.blocks.flatMap((b) => g.programs[b.program]!.nodes.map((n) => n.op));
    expect(nodes(merged)).toEqual(nodes(tiny));
    expect(merged.blocks.flatMap((b) => b.parameters)).toEqual(tiny.blocks.flatMap((b) => b.parameters));
    expect(graphCost(merged, dims).trainingFlops).toBe(graphCost(tiny, dims).trainingFlops);
    expect(merged.programs).toHaveLength(3);
    expect(mergeBlocks(tiny, 3).blocks).toHaveLength(4);
  });

  it("stay apart where draws are keyed by block", () => {
    const found = findModel("tiny");
    const dropping = structuredClone(found.graph({ mode: "train" }));
    for (const p of dropping.programs.slice(1, 2))
      p.inputs.push({ name: "key", kind: "rngKey", dtype: "int64", shape: [4], grad: false });
    for (const b of dropping.blocks) if (b.program === 1) b.inputs.push({ rngKey: true });
    expect(mergeBlocks(dropping, 2)).toBe(dropping);
  });
});

describe("profiles", () => {
  it("are found by name and by the driver's name of a card", () => {
    expect(profileNames()).toEqual(["a5000", "rtx4090", "a100", "h100", "h200", "cpu"]);
    expect(profileOfCard("NVIDIA GeForce RTX 4090")?.name).toBe("rtx4090");
    expect(profileOfCard("NVIDIA RTX A5000")?.name).toBe("a5000");
    expect(profileOfCard("NVIDIA A100-SXM4-80GB")?.name).toBe("a100");
    expect(profileOfCard("NVIDIA GeForce GTX 970")).toBeNull();
    expect(() => findProfile("h300")).toThrow(/there is no profile "h300". Profiles: a5000/);
  });
});

describe("a measured machine", () => {
  it("whose disk is full is told where, how much is wanted and what to do", () => {
    const folder = mkdtempSync(join(tmpdir(), "stroma-full-"));
    const file = join(folder, "disk.measure");
    symlinkSync("/dev/full", file);
    try {
      expect(() => timeDisk(file)).toThrow(`no room for the 128 MB that time the disk, in ${folder}`);
      expect(existsSync(file)).toBe(false);
    } finally {
      rmSync(folder, { recursive: true });
    }
  });

  it("is read as it was stored, and not where it is missing, damaged or of another version", () => {
    const folder = mkdtempSync(join(tmpdir(), "stroma-measured-"));
    vi.stubEnv("STROMA_CACHE", folder);
    try {
      expect(readMeasured()).toBeNull();
      storeMeasured(round);
      expect(readMeasured()).toEqual(round);
      writeFileSync(measuredFile(), JSON.stringify({ version: 0, profile: round }));
      expect(readMeasured()).toBeNull();
      writeFileSync(measuredFile(), "{");
      expect(readMeasured()).toBeNull();
    } finally {
      vi.unstubAllEnvs();
      rmSync(folder, { recursive: true });
    }
  });
});
