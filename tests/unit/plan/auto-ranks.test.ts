import { describe, expect, it } from "vitest";
import type { Graph } from "../../../src/graph/types.js";
import { findModel } from "../../../src/models/registry.js";
import { planAuto } from "../../../src/plan/auto.js";
import { planForRank, planRanksAuto, type RanksRequest } from "../../../src/plan/auto-ranks.js";
import { checkRanks } from "../../../src/plan/check-ranks.js";
import { findProfile } from "../../../src/plan/profiles.js";
import { writeTape } from "../../../src/plan/write-tape.js";

describe("13 billion parameters over two 24 GB cards and 64 GB, 32 x 1 x 512, exact clip", () => {
  const astro = findModel("astro-13b").graph({ mode: "train", dtype: "bfloat16" });
  const request: RanksRequest = {
    devices: 2,
    dims: { B: 1, T: 512 },
    gradientAccumulationSteps: 32,
    state: { storage: "bfloat16", masterWeight: "none", optimizer: "adamw8bit" },
    clip: "global",
    profile: findProfile("rtx4090"),
    budget: { deviceBytes: 24e9, hostBytes: 64e9, diskBytes: 0 },
  };
  const began = process.cpuUsage();
  const plan = planRanksAuto(astro, request);
  const seconds = process.cpuUsage(began).user / 1e6;
  const { report } = plan;

  it("fits 18 GB of each card and 55 GB of host in all, one copy of the state", () => {
    expect(report).toMatchObject({ fits: true, devices: 2, update: "forward" });
    expect(report.peakDeviceBytes).toBeLessThanOrEqual(18e9);
    expect(report.peakHostBytes).toBeLessThanOrEqual(55e9);
    expect(report.peakDeviceBytes).toBe(Math.max(...report.perRank.map((r) => r.peakDeviceBytes)));
    expect(report.peakHostBytes).toBe(report.perRank.reduce((sum, r) => sum + r.peakHostBytes, 0));
    expect(plan.policy.retainedDType).toBe("bfloat16");
    // Processor time: the machine may be shared.
    expect(seconds).toBeLessThan(5);
  });

  it("takes alternating stages, at 1.8 times the speed of one card and of contiguous ones at the least", () => {
    expect(report.stages).toBe("alternating");
    const alone = planAuto(astro, request).report.predictedTokensPerSecond;
    expect(report.predictedTokensPerSecond).toBeGreaterThan(1.8 * alone);
    const by = (start: string) => report.alternatives.find((a) => a.plan.startsWith(start))!;
    expect(by("one card")).toMatchObject({ fits: true, predictedTokensPerSecond: alone });
    expect(by("contiguous").predictedTokensPerSecond!).toBeLessThan(report.predictedTokensPerSecond / 1.8);
    // It fits as well, and what crosses between the cards costs it the race.
    const sharded = by("sharded data parallel");
    expect(sharded).toMatchObject({
      fits: true,
      why: expect.stringMatching(/every card fetches every block, and its gradients cross/),
    });
    expect(sharded.predictedTokensPerSecond!).toBeGreaterThan(alone);
    expect(report.bubble).toBeLessThan(0.03);
  });

  it("over cards that share host memory sends gradients alone, and is faster than by messages; the host holds as much", () => {
    const [shared, sent] = [true, false].map((sharedHost) =>
      planRanksAuto(astro, { ...request, shards: 2, sharedHost }),
    );
    expect([shared!.report.sharedHost, sent!.report.sharedHost]).toEqual([true, false]);
    expect(shared!.report.peakHostBytes).toBe(sent!.report.peakHostBytes);
    const gradients = 2 * 2 * 13_147_013_376;
    const between = [shared!, sent!].map(({ report: r }) => r.bytesBetweenDevicesPerStep / gradients);
    expect(between[0]).toBeCloseTo(1, 2);
    expect(between[1]).toBeCloseTo(2, 1);
    const speed = [shared!, sent!].map(({ report: r }) => r.predictedTokensPerSecond);
    expect(speed[0]).toBeGreaterThan(1.4 * speed[1]!);
  });

  it("writes tapes that the checker proves together", () => {
    const flushes = plan.ranks.map(({ tapes }) => tapes.flush!);
    checkRanks(
      plan.graph,
      plan.ranks.map(({ tapes }) => tapes.step),
      flushes,
    );
    for (const [rank, { tapes }] of plan.ranks.entries()) {
      const sent = tapes.step.instructions.reduce((n, i) => n + (i.op === "send" ? i.bytes : 0), 0);
      expect(report.perRank[rank]!.bytesSentPerStep).toBe(sent);
    }
  });

  it("moves blocks from a host that is too small to the cards that own them", () => {
    const budget = { deviceBytes: 24e9, hostBytes: 46e9, diskBytes: 0 };
    const { report: tight } = planRanksAuto(astro, { ...request, budget, stages: "alternating" });
    expect(tight.fits).toBe(true);
    expect(tight.peakHostBytes).toBeLessThanOrEqual(44e9);
    expect(tight.peakDeviceBytes).toBeLessThanOrEqual(23e9);
  });
});

describe("small models over several devices", () => {
  const tiny = findModel("tiny").graph({ mode: "train" });
  const request: RanksRequest = {
    devices: 2,
    dims: { B: 1, T: 128 },
    gradientAccumulationSteps: 8,
    state: { storage: "float32", masterWeight: "none", optimizer: "adamw" },
    clip: "global",
    profile: findProfile("cpu"),
    budget: { deviceBytes: 4e9, hostBytes: 0, diskBytes: 0 },
  };

  it("leave enough micro-batches for all to work at once, where one device fuses all", () => {
    expect(planAuto(tiny, request).report.microBatch.count).toBe(1);
    const { report } = planRanksAuto(tiny, { ...request, shards: 1 });
    expect(report.microBatch.count).toBeGreaterThanOrEqual(4);
    expect(report.bubble).toBeLessThan(0.2);
  });

  it("share blocks where that is faster or asked for, each with a micro-batch at the least", () => {
    const { report, policy, ranks, graph } = planRanksAuto(tiny, { ...request, shards: 2 });
    expect(report).toMatchObject({ shards: 2, stagesOf: graph.blocks.map(() => 0) });
    expect(policy.microBatches).toBeGreaterThanOrEqual(2);
    checkRanks(
      graph,
      ranks.map((r) => r.tapes.step),
    );
    const [four, two] = [4, 2].map((devices) => planRanksAuto(tiny, { ...request, devices, shards: 2 }));
    expect(four!.policy.stages).toMatchObject({ shards: 2, ranks: 4 });
    expect(new Set(four!.policy.stages!.of)).toEqual(new Set([0, 1]));
    const state = (p: typeof four) => p!.report.perRank[0]!.placements.optimizer.device;
    expect(state(four)).toBeLessThan(0.7 * state(two));
    const few = { ...request, gradientAccumulationSteps: 1, shards: 2 };
    expect(() => planRanksAuto(tiny, few)).toThrow(
      /2 ranks that share blocks need a micro-batch each, and a step has 1/,
    );
  });

  it("hold the same where that is asked for, and try it where a card holds everything", () => {
    for (const [devices, more] of [
      [2, {}],
      [4, { stages: "contiguous" }],
      [4, { shards: 2 }],
    ] as const) {
      const found = planRanksAuto(tiny, { ...request, devices, ...more, replicas: 2 });
      expect(found.report).toMatchObject({ fits: true, replicas: 2 });
      expect(found.policy.stages).toMatchObject({ replicas: 2, ranks: devices });
      checkRanks(
        found.graph,
        found.ranks.map((r) => r.tapes.step),
      );
    }
    const tried = (deviceBytes: number) =>
      planRanksAuto(tiny, { ...request, budget: { ...request.budget, deviceBytes } }).report;
    const named = ({ alternatives, replicas }: ReturnType<typeof tried>) =>
      replicas > 1 || alternatives.some(({ plan: text }) => text.startsWith("replicas"));
    expect(named(tried(24e9))).toBe(true);
    expect(named(tried(8e6))).toBe(false);
  });

  it("share rows where that is asked for: a share of a pass's memory each, whole tokens a second", () => {
    const whole = findModel("100m").graph({ mode: "train", dtype: "bfloat16" });
    const context = { ranks: 2, kind: "ring" } as const;
    const shared = findModel("100m").graph({ mode: "train", dtype: "bfloat16", context });
    const state = { storage: "bfloat16", masterWeight: "float32", optimizer: "adamw" } as const;
    const budget = { deviceBytes: 80e9, hostBytes: 1e9, diskBytes: 0 };
    const size = { gradientAccumulationSteps: 4, state, budget, profile: { ...findProfile("a100"), rankLink: 1e14 } };
    const of = (graph: Graph, T: number, more: Partial<RanksRequest>) =>
      planRanksAuto(graph, { ...request, ...size, recompute: "all", dims: { B: 1, T }, ...more });
    const rows = of(shared, 8192, { context: 2, shards: 2 });
    const batch = of(whole, 16384, { shards: 2 });
    expect(rows.report).toMatchObject({ fits: true, context: 2, shards: 2, stages: "alternating" });
    expect(rows.policy.stages).toMatchObject({ context: 2, shards: 2 });
    expect(batch.report.context).toBe(1);
    const workspace = ({ report: { placements } }: typeof rows) => placements.workspace.device;
    // Not half of it: the head's logits come in chunks of the same size.
    expect(workspace(rows)).toBeLessThan(0.97 * workspace(batch));
    // As many tokens a step as whole rows have, and over a link that costs nothing nearly their speed.
    const speed = rows.report.predictedTokensPerSecond / batch.report.predictedTokensPerSecond;
    expect(speed).toBeGreaterThan(0.8);
    expect(speed).toBeLessThan(1.05);
    expect(rows.report.alternatives.map((a) => a.plan)).not.toContain("one card");
    // Keys and values of a half row go once to the other forward, which runs twice, and once back with their gradients' sums.
    const { layers, kvHeads, dim, heads } = findModel("100m").config as Record<string, number>;
    const block = 8192 * kvHeads! * 2 * (dim! / heads!);
    for (const { contextBytesPerStep } of rows.report.perRank)
      expect(contextBytesPerStep).toBe(4 * layers! * (3 * 2 * block + 2 * 4 * block));
    expect(batch.report.perRank[0]!.contextBytesPerStep).toBe(0);
    // Of four, two stages of two that share rows, or all at every block.
    const four = of(shared, 8192, { devices: 4, context: 2, shards: 2 });
    expect(four.report).toMatchObject({ context: 2, shards: 2 });
    expect(new Set(four.report.stagesOf).size).toBe(2);
    checkRanks(
      four.graph,
      four.ranks.map(({ tapes }) => tapes.step),
    );
    const copies = of(shared, 8192, { context: 2, replicas: 2 });
    expect(copies.policy.stages).toMatchObject({ shards: 1, replicas: 2, context: 2 });
    for (const more of [{ context: 3 }, { context: 2, shards: 1 }, { devices: 4, context: 4, shards: 2 }])
      expect(() => of(shared, 8192, more)).toThrow(/context \d is no divisor/);
  });

  it("are never fitted with kept graphs whose parameters are elsewhere", () => {
    // Everything but the sums fits each card: what is over must not leave it.
    const one = findModel("1b").graph({ mode: "train", dtype: "bfloat16" });
    const state = { storage: "bfloat16", masterWeight: "none", optimizer: "adamw8bit" } as const;
    const budget = { deviceBytes: 24e9, hostBytes: 64e9, diskBytes: 0 };
    const profile = findProfile("rtx4090");
    const size = { dims: { B: 1, T: 512 }, gradientAccumulationSteps: 32, clip: "global" } as const;
    const found = planRanksAuto(one, { ...size, state, budget, profile, devices: 2, replicas: 2 });
    expect(found.report).toMatchObject({ fits: true, replicas: 2 });
  });

  it("keep to the stages asked for: contiguous ones run one forward, one backward", () => {
    const { report } = planRanksAuto(tiny, { ...request, stages: "contiguous" });
    expect(report).toMatchObject({ stages: "contiguous", order: "oneForwardOneBackward" });
  });

  it("give each rank its policy and tapes", () => {
    const { ranks, policy } = planRanksAuto(tiny, request);
    const mine = planForRank(tiny, request, 1);
    expect(mine.tapes).toEqual(ranks[1]!.tapes);
    expect(mine.policy.stages).toEqual({ ...policy.stages, rank: 1 });
    expect(writeTape(mine.graph, mine.policy)).toEqual(mine.tapes);
    expect(() => planForRank(tiny, request, 2)).toThrow(/there is no rank 2 of 2/);
  });

  it.each([1, 0, 2.5, 7])("refuse %d devices", (devices) => {
    expect(() => planRanksAuto(tiny, { ...request, devices })).toThrow(/expected devices to be|would have no block/);
  });
});
