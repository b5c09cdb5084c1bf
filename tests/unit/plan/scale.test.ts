import { describe, expect, it } from "vitest";
import { findModel } from "../../../src/models/registry.js";
import { type ClusterProfile, clusterNames, findCluster } from "../../../src/plan/cluster.js";
import { allReduceSeconds, highestOf, ringSeconds, slowest } from "../../../src/plan/collectives.js";
import { CostModel } from "../../../src/plan/cost.js";
import { sizedProgram } from "../../../src/plan/cost-calls.js";
import { fusedTraffic } from "../../../src/plan/cost-fused.js";
import { taken } from "../../../src/plan/cost-times.js";
import { type ScaleReport, type ScaleRequest, simulateScale, worksOf } from "../../../src/plan/scale.js";
import { play, type Work } from "../../../src/plan/scale-play.js";
import { parseRanks, scaleTable } from "../../../src/plan/scale-table.js";
import { blockWorks, SCALE_RECOMPUTE } from "../../../src/plan/scale-work.js";

const graph = findModel("1b").graph({ mode: "train", dtype: "bfloat16" });
const untied = findModel("8b").graph({ mode: "train", dtype: "bfloat16" });
const sizeOf = (p: { shape: number[] }) => p.shape.reduce((a, b) => a * b, 1);
const elements = (g: typeof graph, blocks?: string) =>
  g.parameters.filter((p) => blocks === undefined || p.name.startsWith(blocks)).reduce((n, p) => n + sizeOf(p), 0);

const request: ScaleRequest = {
  ranks: 16,
  dims: { B: 2, T: 2048 },
  microBatches: 1,
  order: "breadthFirst",
  recompute: "all",
  compiled: false,
  state: { storage: "bfloat16", masterWeight: "float32", optimizer: "adamw" },
  reduceDType: "float32",
  cluster: findCluster("h100"),
};
const run = (more: Partial<ScaleRequest> = {}, g = graph): ScaleReport => simulateScale(g, { ...request, ...more });
const links = (more: Partial<ClusterProfile>): ClusterProfile => ({ ...request.cluster, ...more });
const sum = (list: readonly number[]) => list.reduce((a, b) => a + b, 0);

describe("bytes on the wire of a rank", () => {
  const R = 16;

  it("are (R - 1) / R of each layer's weights twice in bfloat16 and of all gradients once in float32", () => {
    const report = run({ ranks: R }, untied);
    const layers = elements(untied, "model.layers.");
    // Embedding and head once: the embedding's backward needs no weights, the head goes forward and back in one, and the
    // last layer's weights stay for the backward that follows.
    const last = elements(untied, "model.layers.31.");
    const once = elements(untied) - layers + last;
    expect(report.gatheredBytes).toBeCloseTo((((layers - last) * 2 + once) * 2 * (R - 1)) / R, -1);
    expect(report.scatteredBytes).toBeCloseTo((elements(untied) * 4 * (R - 1)) / R, -1);
    expect(report.summedBytes).toBe(0);
  });

  it("halve with gradients in bfloat16, and do not depend on recompute, on kernels or on the order of one micro-batch", () => {
    const one = run();
    expect(run({ reduceDType: "bfloat16" }).scatteredBytes).toBe(one.scatteredBytes / 2);
    for (const recompute of SCALE_RECOMPUTE) expect(run({ recompute }).gatheredBytes).toBe(one.gatheredBytes);
    expect(run({ compiled: true }).gatheredBytes).toBe(one.gatheredBytes);
    expect(run({ order: "depthFirst" }).seconds).toBe(one.seconds);
  });

  it("are gathered once for all micro-batches breadth-first, and for each depth-first", () => {
    const one = run();
    const breadth = run({ microBatches: 4 });
    const depth = run({ microBatches: 4, order: "depthFirst" });
    expect([breadth.gatheredBytes, breadth.scatteredBytes]).toEqual([one.gatheredBytes, one.scatteredBytes]);
    expect([depth.gatheredBytes, depth.scatteredBytes]).toEqual([4 * one.gatheredBytes, 4 * one.scatteredBytes]);
    expect(depth.memory.activations * 4).toBe(breadth.memory.activations);
  });

  it("are a hybrid's inside its group, and a part of the gradients twice between the copies", () => {
    const report = run({ ranks: 64, shardGroup: 8 });
    const group = run({ ranks: 8 });
    expect([report.gatheredBytes, report.scatteredBytes]).toEqual([group.gatheredBytes, group.scatteredBytes]);
    expect(report.summedBytes).toBeCloseTo((2 * (elements(graph) / 8) * 4 * 7) / 8, -1);
  });
});

describe("time of a step", () => {
  const computeBound = (more: Partial<ScaleRequest> = {}) => {
    const works = blockWorks(graph, { ...request, ...more });
    const passes = works.map((w) => (w.turns ? taken(w.turn) : taken(w.forward) + taken(w.backward)));
    return sum(passes) * (more.microBatches ?? 1);
  };

  it("is never below the arithmetic's, on any number of ranks", () => {
    for (const more of [{}, { recompute: "none" }, { compiled: true }, { microBatches: 3 }] as const)
      for (const ranks of [1, 2, 8, 64, 4096])
        expect(run({ ...more, ranks }).seconds).toBeGreaterThanOrEqual(computeBound(more));
  });

  it("of one rank has no communication: passes, sums and the update, in order", () => {
    const alone = run({ ranks: 1, cluster: links({ nodeLink: 1, network: 1 }) });
    expect(alone).toMatchObject({ gatheredBytes: 0, scatteredBytes: 0, summedBytes: 0, waiting: 0 });
    expect(alone.busySeconds).toMatchObject({ shard: 0, copies: 0 });
    const works = blockWorks(graph, request);
    const { instructionSeconds, deviceMemory } = request.cluster.card;
    const visits = works.length * 2 - 1;
    const update = sum(works.map((w) => w.updateBytes)) / deviceMemory;
    const expected = computeBound() + sum(works.map((w) => w.sum(true))) + visits * instructionSeconds + update;
    expect(alone.seconds).toBeCloseTo(expected, 9);
  });

  it("does not grow with faster links, and falls where they bind", () => {
    const bandwidths = [1e9, 2e9, 5e9, 20e9, 100e9, 1e12];
    for (const link of ["network", "nodeLink"] as const)
      for (const more of [{ ranks: 64 }, { ranks: 64, shardGroup: 8 }, { ranks: 64, shardGroup: 16 }]) {
        const times = bandwidths.map((b) => run({ ...more, cluster: links({ [link]: b }) }).seconds);
        expect(times.toSorted((a, b) => b - a)).toEqual(times);
        expect(times[0]).toBeGreaterThan(times.at(-1)! * 1.5);
      }
  });

  it("has weights of two blocks at hand: a gather begins with the visit before its own", () => {
    const works = worksOf(graph, request);
    const compute = works.flatMap((w, i) => (w.line === "compute" ? [i] : []));
    // What the card copies out of a buffer, it waits for; all but the update, which waits for a norm.
    const gathers = compute.slice(0, -1).flatMap((i) => works[i]!.waits);
    const visits = blockWorks(graph, request).length * 2 - 1;
    // Not again: those of the embedding and of the last layer.
    expect(gathers).toHaveLength(visits - 2);
    for (const i of gathers) {
      const before = compute.findLast((c) => c < i);
      expect(works[i]!.waits).toEqual(before === undefined ? [] : [before]);
    }
  });

  it("updates each rank's part", () => {
    const { deviceMemory } = request.cluster.card;
    const bytes = sum(blockWorks(graph, request).map((w) => w.updateBytes));
    const last = worksOf(graph, request).at(-1)!;
    expect(last.seconds).toBeCloseTo((bytes / 16 / deviceMemory) * slowest(16, request.cluster.spread), 12);
  });

  it("says what binds", () => {
    expect(run({ dims: { B: 8, T: 2048 } }).boundBy).toBe("compute");
    expect(run({ cluster: links({ network: 1e9 }) }).boundBy).toBe("network");
    expect(run({ ranks: 8, cluster: links({ nodeLink: 1e9 }) }).boundBy).toBe("nodeLink");
    expect(run({ ranks: 4096, dims: { B: 1, T: 64 } }).boundBy).toBe("latency");
    expect(
      run({ ranks: 1, dims: { B: 1, T: 1 }, cluster: links({ card: { ...request.cluster.card, deviceMemory: 1e9 } }) })
        .boundBy,
    ).toBe("memory");
  });

  it("of a hybrid over all ranks is that of full sharding, and over one rank that of copies", () => {
    expect(run({ shardGroup: 16 })).toEqual(run());
    const copies = run({ shardGroup: 1 });
    expect(copies.gatheredBytes + copies.scatteredBytes).toBe(0);
    expect(copies.summedBytes).toBeCloseTo((2 * elements(graph) * 4 * 15) / 16, -1);
  });

  it("counts the graph's own operations: a forward again with recompute all, none of it with none", () => {
    const [none, all] = [run({ recompute: "none" }), run()];
    const works = blockWorks(graph, request);
    const layers = sum(works.filter((w) => w.name.startsWith("model.layers.")).map((w) => w.forward.flops));
    expect(all.flops - none.flops).toBeCloseTo(layers, -6);
    expect(run({ microBatches: 3 }).flops).toBeCloseTo(3 * all.flops, -6);
    for (const recompute of ["selective", "everySecondProduct", "everySecondLayer"] as const) {
      const report = run({ recompute });
      expect(report.flops).toBeGreaterThan(none.flops);
      expect(report.flops).toBeLessThan(all.flops);
      expect(report.memory.activations).toBeLessThan(none.memory.activations);
      expect(report.memory.activations).toBeGreaterThan(all.memory.activations);
    }
  });
});

describe("memory of a card", () => {
  it("holds a part of the state, and shrinks with the ranks down to what does not", () => {
    const [eight, sixteen] = [run({ ranks: 8 }), run({ ranks: 16 })];
    // bfloat16, a float32 master and two float32 moments; no room of this model is rounded up.
    const state = elements(graph) * (2 + 4 + 8);
    expect(eight.memory.state).toBe(state / 8);
    expect(sixteen.memory.state).toBe(eight.memory.state / 2);
    expect(sixteen.memory.gradients).toBe(eight.memory.gradients / 2);
    expect(sixteen.memory.activations).toBe(eight.memory.activations);
    const { total, ...parts } = sixteen.memory;
    expect(total).toBe(sum(Object.values(parts)));
  });
});

describe("collectives", () => {
  const cluster = links({ nodeLink: 100, network: 10, launchSeconds: 1, nodeStepSeconds: 2, networkStepSeconds: 5 });

  it("of a ring in a node: R - 1 steps, (R - 1) / R of the bytes at the link's rate", () => {
    expect(ringSeconds(800, { ranks: 8, perNode: 8 }, cluster)).toEqual({
      seconds: 1 + 7 * 2 + 7,
      latency: 15,
      bytes: 700,
    });
  });

  it("over nodes: a step between nodes for each but the last, at the rate of all cards' networks together", () => {
    // 2 nodes of 8: 14 steps inside, 1 between; 8 x 10 bytes a second.
    expect(ringSeconds(1600, { ranks: 16, perNode: 8 }, cluster)).toEqual({
      seconds: 1 + 14 * 2 + 5 + 1500 / 80,
      latency: 34,
      bytes: 1500,
    });
    // As many networks cannot carry more than the node's own links.
    expect(ringSeconds(1600, { ranks: 16, perNode: 8 }, { ...cluster, network: 1e6 }).seconds).toBe(34 + 15);
  });

  it("of an all-reduce between cards of different nodes: twice the bytes, and a tree's steps", () => {
    expect(allReduceSeconds(160, { ranks: 16, perNode: 1 }, cluster)).toEqual({
      seconds: 1 + 2 * 4 * 5 + 300 / 10,
      latency: 41,
      bytes: 300,
    });
    expect(allReduceSeconds(160, { ranks: 1, perNode: 1 }, cluster).seconds).toBe(0);
  });

  it("wait for the slowest card: expected highest of n normal draws, as tables have it", () => {
    // Harter (1961): n = 2, 8, 100.
    for (const [n, highest] of [
      [1, 0],
      [2, 0.5642],
      [8, 1.4236],
      [100, 2.5076],
    ] as const)
      expect(Math.abs(highestOf(n) - highest)).toBeLessThan(0.03);
    expect(slowest(4096, 0.01)).toBeGreaterThan(slowest(8, 0.01));
    expect(slowest(4096, 0)).toBe(1);
  });
});

describe("works in time", () => {
  const compute = (seconds: number, waits: number[] = []): Work => ({ line: "compute", seconds, waits });
  const shard = (seconds: number, waits: number[] = []): Work => ({ line: "shard", seconds, waits });

  it("run beside each other, each line in order, after what they wait for", () => {
    const { start, end, seconds } = play([shard(3), compute(1), compute(2, [0]), shard(1, [1]), compute(1)], 0);
    expect([...start]).toEqual([0, 0, 3, 3, 5]);
    expect([...end]).toEqual([3, 1, 5, 4, 6]);
    expect(seconds).toBe(6);
  });

  it("slow arithmetic by the share that a collective holds, while it runs", () => {
    const { end, busySeconds } = play([shard(2), compute(2)], 0.25);
    // 1.5 of 2 seconds' work done when the collective ends.
    expect([...end]).toEqual([2, 2.5]);
    expect(busySeconds).toEqual({ compute: 2.5, shard: 2, copies: 0 });
  });

  it("of no length end where they begin", () => {
    expect(play([compute(0), shard(0, [0]), compute(1, [1])], 0.1).seconds).toBe(1);
  });
});

describe("compiled elementwise work", () => {
  it("reads what a stage is given once, and writes what others need once", () => {
    const program = sizedProgram(graph, 1, request.dims);
    const eager = sum(
      program.calls
        .filter(
          (c) =>
            !["linear", "scaledDotProductAttention", "view", "transpose", "reshape", "slice", "unsqueeze"].includes(
              c.op,
            ),
        )
        .map((c) => c.out.bytes + sum(c.tensors.map((t) => t.bytes))),
    );
    const { forward, backward } = fusedTraffic(program);
    // Norms, rotations and SwiGLU's product are one operator each: what is left to fuse are sums with norms.
    expect(forward).toBeLessThan(eager);
    const [B, T, D, F] = [2, 2048, 2048, 8192];
    const [x, wide] = [B * T * D * 2, B * T * F * 2];
    const key = x / 4;
    // Reads x, writes its norm; reads q and k, writes them turned; reads x and attention's output, writes their sum and its
    // norm; reads gate and up, writes their product; reads the sum and what comes down, writes the layer's output.
    const tensors = 2 * x + 2 * (x + key) + 4 * x + 3 * wide + 3 * x;
    // Positions and the norms' weights are read; a table of 64 cosines and sines is written by one stage and read by the next.
    expect(forward - tensors).toBe(B * T * 8 + 2 * D * 2 + 2 * B * T * 64 * 2);
    expect(backward).toBeGreaterThan(forward);
  });

  it("makes passes faster by as much, and changes no operation", () => {
    const card = request.cluster.card;
    const costs = (compiled: boolean) =>
      new CostModel(graph, { state: request.state, recompute: "all" }, request.dims, { ...card, compiled }).pass(1);
    const [eager, fused] = [costs(false), costs(true)];
    for (const pass of ["forward", "again", "backward"] as const) {
      expect(fused[pass].seconds).toBeLessThan(eager[pass].seconds);
      expect(fused[pass].memorySeconds).toBeLessThan(eager[pass].memorySeconds);
      // Elementwise operations are not counted there: a thousandth of all.
      expect(fused[pass].flops / eager[pass].flops).toBeGreaterThan(0.99);
    }
  });
});

describe("a table of ranks", () => {
  const { ranks: _, order: __, recompute: ___, ...rest } = request;

  it("has for each the fastest arrangement that fits, and how it grows", () => {
    const rows = scaleTable(graph, { ...rest, microBatches: 2 }, [8, 64, 512, 4096]);
    expect(rows.map((r) => r.ranks)).toEqual([8, 64, 512, 4096]);
    expect(rows.every((r) => r.fits && r.memory.total <= 79e9)).toBe(true);
    expect(rows[0]!.efficiency).toBe(1);
    for (const [i, row] of rows.entries()) {
      if (i > 0) expect(row.efficiency).toBeLessThan(rows[i - 1]!.efficiency);
      for (const order of ["breadthFirst", "depthFirst"] as const)
        for (const recompute of ["none", "selective", "all"] as const) {
          const other = run({ ranks: row.ranks, microBatches: 2, order, recompute });
          if (other.memory.total <= 79e9) expect(other.seconds).toBeGreaterThanOrEqual(row.seconds);
        }
    }
    // A ring over thousands is a matter of latency: then the machine's own links.
    expect(rows.at(-1)!.shardGroup).toBe(8);
    expect(scaleTable(graph, { ...rest, shardGroup: 4 }, [8])[0]!.shardGroup).toBe(4);
  });

  it("takes what needs least where nothing fits", () => {
    const [row] = scaleTable(graph, { ...rest, deviceBytes: 1e9 }, [8]);
    expect(row).toMatchObject({ fits: false, recompute: "all" });
  });

  it("reads numbers of ranks", () => {
    expect(parseRanks("8-64")).toEqual([8, 16, 32, 64]);
    expect(parseRanks("128, 8-20,8")).toEqual([8, 16, 128]);
    for (const wrong of ["", "0", "8-", "many", "1e9", "8.5", "-8", "99999999"])
      expect(() => parseRanks(wrong)).toThrow(/expected --ranks to be whole numbers from 1 to/);
  });

  it("refuses what cannot be", () => {
    expect(() => run({ ranks: 12, shardGroup: 8 })).toThrow(/12 ranks cannot be groups of 8/);
    expect(() => run({ ranks: 0 })).toThrow(/expected ranks to be a whole number/);
    expect(() => run({}, findModel("tiny").graph({ mode: "eval" }))).toThrow(
      /expected a graph in train mode, got eval/,
    );
    expect(() => findCluster("a5000")).toThrow(/Profiles: a100, h100, h200/);
    expect(
      clusterNames()
        .map(findCluster)
        .map((c) => c.card.name),
    ).toEqual(clusterNames());
  });
});
