/**
 * Rows shared out to ranks: losses, and gradients summed over the ranks, are those of one rank that has the rows whole, within
 * what another order of sums rounds; and whatever ends one rank's step ends that of all.
 */
import { afterAll, describe, expect, it } from "vitest";
import { traceModel } from "../../src/graph/trace.js";
import { type DecoderConfig, decoderConfig } from "../../src/models/decoder/config.js";
import { decoder } from "../../src/models/decoder/model.js";
import { planResident } from "../../src/plan/planner.js";
import { tapePeaks } from "../../src/plan/simulate.js";
import { callOp, type Tensor, tensor } from "../../src/tensor/index.js";
import type { Batch, HostTensor, NativeRanks } from "../../src/train/native-session.js";
import { nativeOrSkip } from "../support/native.js";
import { randomBatch } from "../support/random-models.js";
import {
  type CaseDType,
  type ContextCase,
  contextCase,
  distance,
  isFor,
  numbers,
  openShared,
  requestOf,
  type Splitter,
  sessionOptions,
  shareOf,
  split,
  stepShared,
  stepWhole,
  summed,
  withSession,
} from "./context-case.js";
import { joinAll } from "./rank-case.js";

const native = nativeOrSkip();
const cases = Number(process.env.STROMA_CASES ?? 20);
const firstSeed = Number(process.env.STROMA_SEED ?? 1);
const groups = new Map<number, NativeRanks[]>();
async function ranksOf(size: number): Promise<NativeRanks[]> {
  const known = groups.get(size);
  if (known !== undefined) return known;
  const made = await joinAll(native!, size);
  groups.set(size, made);
  return made;
}
afterAll(async () => {
  for (const ranks of groups.values()) await Promise.all(ranks.map((r) => r.leave()));
});

const SIZES = [2, 3, 4];
const everyCase = (dtype: CaseDType) =>
  Array.from({ length: cases }, (_, i) => contextCase(firstSeed + i, SIZES[i % SIZES.length]!, dtype));
/** The same step in float64, from the same parameters. */
const exactly = (c: ContextCase, one: Awaited<ReturnType<typeof stepWhole>>) =>
  stepWhole(native!, c, "float64", one.parameters);
const timeout = { timeout: cases * 6_000 + 60_000 };

describe.skipIf(!native)("rows shared out to ranks", () => {
  it.each([
    ["float64", 1e-10],
    ["float32", 1e-6],
  ] as const)(
    `gives the losses and gradients of one rank over ${cases} random decoders, in %s within %d`,
    timeout,
    async (dtype, bound) => {
      let worst = 0;
      for (const c of everyCase(dtype)) {
        expect(isFor(c), c.label).toBe(true);
        const one = await stepWhole(native!, c);
        const shares = await stepShared(native!, await ranksOf(c.ranks), c).catch((error: Error) => {
          throw new Error(`${c.label}: ${error.message}`);
        });
        const off = distance(summed(shares), one.gradients);
        worst = Math.max(worst, off);
        // In float32 one rank itself is off from float64 by up to 5.3e-6 (300 decoders), where a gradient is what large terms
        // leave; another order of the same sums is off from that one by up to 3 times as much (2.97 was seen).
        const plain = off < bound ? 0 : distance(one.gradients, (await exactly(c, one)).gradients);
        expect(off, c.label).toBeLessThan(dtype === "float32" ? Math.max(bound, 4 * plain) : bound);
        for (const { result } of shares) {
          expect(Math.abs(result.loss - one.result.loss) / one.result.loss, c.label).toBeLessThan(bound);
          expect(result.counts).toEqual(one.result.counts);
          for (const [m, loss] of one.result.microBatchLosses.entries())
            expect(Math.abs(result.microBatchLosses[m]! - loss) / loss, c.label).toBeLessThan(bound);
          expect(result.losses).toEqual(shares[0]!.result.losses);
        }
      }
      if (process.env.STROMA_SHOW === "1") console.log(`${dtype}: largest error ${worst}`);
    },
  );

  it("is off by no more than twice what bfloat16 on one rank is", timeout, async () => {
    const ratios: number[] = [];
    for (const c of everyCase("bfloat16")) {
      const one = await stepWhole(native!, c);
      const exact = await stepWhole(native!, c, "float32", one.parameters);
      const shares = await stepShared(native!, await ranksOf(c.ranks), c);
      const [ours, plain] = [distance(summed(shares), exact.gradients), distance(one.gradients, exact.gradients)];
      expect(plain, c.label).toBeGreaterThan(0);
      ratios.push(ours / plain);
      expect(ours / plain, c.label).toBeLessThan(2);
    }
    if (process.env.STROMA_SHOW === "1") console.log(`bfloat16: ratios ${ratios.map((r) => r.toFixed(2)).join(" ")}`);
  });

  it("gives the same bits again", timeout, async () => {
    for (const c of everyCase("float32").slice(0, 6)) {
      const ranks = await ranksOf(c.ranks);
      const [first, again] = [await stepShared(native!, ranks, c), await stepShared(native!, ranks, c)];
      for (const r of first.keys()) {
        expect(again[r]!.gradients, c.label).toEqual(first[r]!.gradients);
        expect(again[r]!.result.losses, c.label).toEqual(first[r]!.result.losses);
      }
    }
  });

  /** Row of tokens by place, as `rank` would hold them in another order than the zigzag's. */
  const inOneChunk: Splitter = (graph, batch, rank, ranks) => {
    const { counts } = split(graph, batch, rank, ranks);
    const cut = ({ dtype, shape, data }: HostTensor): HostTensor => {
      const [rows, tokens] = shape as [number, number];
      const t = tokens / ranks;
      const from = data as BigInt64Array;
      const own = Array.from({ length: rows }, (_, b) => [
        ...from.subarray(b * tokens + rank * t, b * tokens + (rank + 1) * t),
      ]);
      return { dtype, shape: [rows, t], data: BigInt64Array.from(own.flat()) };
    };
    return { counts, batch: Object.fromEntries(Object.entries(batch).map(([name, x]) => [name, cut(x)])) };
  };
  const firstPositions: Splitter = (graph, batch, rank, ranks) => {
    const share = split(graph, batch, rank, ranks);
    return {
      ...share,
      batch: { ...share.batch, position_ids: inOneChunk(graph, batch, 0, ranks).batch.position_ids! },
    };
  };
  const ownDocuments: Splitter = (graph, batch, rank, ranks) => {
    const share = split(graph, batch, rank, ranks);
    if (share.batch.segment_ids === undefined) return share;
    return { ...share, batch: { ...share.batch, segment_ids: inOneChunk(graph, batch, 0, ranks).batch.segment_ids! } };
  };
  it.each<[string, Splitter, boolean]>([
    ["the zigzag", inOneChunk, true],
    ["positions that are split", firstPositions, true],
    ["documents that are split", ownDocuments, true],
    ["counts of the whole rows", split, false],
  ])("needs %s", timeout, async (_, splitter, counted) => {
    let worst = 0;
    for (const c of everyCase("float64").slice(0, 8)) {
      const one = await stepWhole(native!, c);
      worst = Math.max(
        worst,
        distance(summed(await stepShared(native!, await ranksOf(c.ranks), c, splitter, counted)), one.gradients),
      );
    }
    expect(worst).toBeGreaterThan(1e-3);
  });

  it("holds as much as its plan says, within 5 %", timeout, async () => {
    for (const kind of ["ring", "allToAll"] as const)
      for (const recompute of ["all", "none"] as const)
        for (const documentMask of [false, true]) {
          const [R, T] = [2, 256];
          const config = decoderConfig({
            vocabSize: 300,
            dim: 128,
            layers: 3,
            heads: 4,
            kvHeads: 2,
            ffn: 256,
            documentMask,
          });
          const graph = traceModel(decoder, config, { context: { ranks: R, kind } });
          const tape = planResident(graph, { microBatches: 1, clip: "none", recompute });
          const predicted = tapePeaks(graph, tape, "cpu", { B: 1, T: T / R }).deviceBytes;
          const whole = randomBatch(graph, 300, 1, T, 5);
          const peaks = await Promise.all(
            (await ranksOf(R)).map((r) =>
              withSession(openShared(native!, r, { dtype: "float32", ranks: R }), graph, async (session) => {
                const { batch, counts } = split(graph, whole, r.rank, R);
                const request = { ...requestOf(graph, { clip: "none", recompute }, [batch]), counts };
                return (await session.step(request)).peakDeviceBytes;
              }),
            ),
          );
          const off = Math.abs(predicted / Math.max(...peaks) - 1);
          expect(off, `${kind} ${recompute} ${documentMask}: ${predicted} for ${peaks}`).toBeLessThan(0.05);
        }
  });

  it("evaluates each rank's share, which add up to the whole", timeout, async () => {
    for (const c of everyCase("float64").slice(0, 4)) {
      const one = await stepWhole(native!, { ...c, microBatches: c.microBatches.slice(0, 1) });
      const losses = await Promise.all(
        (await ranksOf(c.ranks)).map((r) =>
          withSession(openShared(native!, r, c), c.shared, async (session) => {
            await session.attach("eval", c.evaluate);
            const { batch, counts } = split(c.shared, c.microBatches[0]!, r.rank, c.ranks);
            return numbers((await session.run("eval", batch, { counts })).loss!)[0]!;
          }),
        ),
      );
      const sum = losses.reduce((a, b) => a + b, 0);
      expect(Math.abs(sum - one.result.loss) / one.result.loss, c.label).toBeLessThan(1e-10);
    }
  });
});

describe.skipIf(!native)("a group of ranks that share rows", () => {
  const c: ContextCase = { ...contextCase(3, 2, "float32"), plan: { clip: "none" } };
  /** Every rank a session; what each says of its step. */
  async function steps(
    ranks: readonly NativeRanks[],
    change: (rank: number, batches: Batch[]) => Batch[],
    during?: (sessions: ReturnType<typeof openShared>[]) => void,
  ) {
    const sessions = ranks.map((r) => openShared(native!, r, c));
    try {
      await Promise.all(sessions.map((s) => s.load(c.shared)));
      await Promise.all(sessions.map((s) => s.initialize(7)));
      const running = sessions.map((session, rank) => {
        const { microBatches, counts } = shareOf(c, rank);
        return session.step({ ...requestOf(c.shared, c.plan, change(rank, microBatches)), counts }).then(
          (result) => result,
          (error: Error & { code: string }) => error,
        );
      });
      during?.(sessions);
      return await Promise.all(running);
    } finally {
      await Promise.all(sessions.map((s) => s.dispose()));
    }
  }
  const failed = (outcome: unknown) => outcome as Error & { code: string };
  const withToken = (batch: Batch, to: (x: bigint, i: number, n: number) => bigint, name = "input_ids"): Batch => {
    const { dtype, shape, data } = batch[name]!;
    const own = data.buffer.slice(data.byteOffset, data.byteOffset + data.byteLength) as ArrayBuffer;
    const changed = new BigInt64Array(own).map((x, i, all) => to(x, i, all.length));
    return { ...batch, [name]: { dtype, shape, data: changed } };
  };

  it("ends on all ranks when one says that it fails, naming it", async () => {
    const ranks = await joinAll(native!, 2);
    const session = openShared(native!, ranks[0]!, c);
    const other = openShared(native!, ranks[1]!, c);
    await Promise.all([session.load(c.shared), other.load(c.shared)]);
    await session.initialize(7);
    const { microBatches, counts } = shareOf(c, 0);
    const waiting = session.step({ ...requestOf(c.shared, c.plan, microBatches), counts });
    setTimeout(() => ranks[1]!.fail("out of coffee"), 300);
    await expect(waiting).rejects.toMatchObject({
      code: "RANKS",
      message: expect.stringMatching(/^\[ranks\] rank 1 \(.*, process \d+\) failed: out of coffee/),
    });
    await Promise.all([session.dispose(), other.dispose()]);
    await Promise.all(ranks.map((r) => r.leave()));
  });

  it("ends when a rank goes without a word", async () => {
    const ranks = await joinAll(native!, 2);
    const session = openShared(native!, ranks[0]!, c);
    await Promise.all([session.load(c.shared), ranks[1]!.group([0, 1])]);
    await session.initialize(7);
    const { microBatches, counts } = shareOf(c, 0);
    const waiting = session.step({ ...requestOf(c.shared, c.plan, microBatches), counts });
    setTimeout(() => void ranks[1]!.leave(), 300);
    await expect(waiting).rejects.toMatchObject({
      code: "RANKS",
      message: expect.stringMatching(/^\[ranks\] rank 1 \(.*, process \d+\) is gone: /),
    });
    await session.dispose();
    await ranks[0]!.leave();
  });

  it("ends on all ranks when a pass of one fails, and each says whose", async () => {
    const ranks = await joinAll(native!, 2);
    const [well, ill] = await steps(ranks, (rank, b) =>
      rank === 1 ? b.map((batch) => withToken(batch, () => 10_000n)) : b,
    );
    expect(failed(ill)).toMatchObject({
      code: "NATIVE",
      message: expect.stringContaining("[block model.embed_tokens]"),
    });
    expect(failed(well)).toMatchObject({
      code: "RANKS",
      message: expect.stringMatching(/^\[ranks\] rank 1 \(.*\) failed: \[block model.embed_tokens\] /),
    });
    await Promise.all(ranks.map((r) => r.leave()));
  });

  it("carries a loss that is not finite on one rank to where all agree", async () => {
    const untied = [...Array(50).keys()]
      .map((seed) => contextCase(seed, 2, "float32"))
      .find(({ whole, microBatches }) => microBatches.length > 1 && !(whole.config as DecoderConfig).tiedEmbeddings)!;
    const { vocabSize, dim } = untied.whole.config as DecoderConfig;
    const table = new Float32Array(vocabSize * dim).fill(0.1).fill(Number.NaN, (vocabSize - 1) * dim);
    const outcomes = await Promise.all(
      (await ranksOf(2)).map((r) =>
        withSession(openShared(native!, r, untied), untied.shared, async (session) => {
          const name = "model.embed_tokens.weight";
          await session.write("param", name, { dtype: "float32", shape: [vocabSize, dim], data: table });
          const { microBatches, counts } = shareOf(untied, r.rank);
          const without = microBatches.map((batch) => withToken(batch, (x) => (x === BigInt(vocabSize - 1) ? 0n : x)));
          const last = (x: bigint, i: number, n: number) => (i === n - 1 ? BigInt(vocabSize - 1) : x);
          const labelled = (x: bigint, i: number, n: number) => (i === n - 1 ? 1n : x);
          // A row's last token, which rank 0 holds and no other token sees.
          const poisoned = without.map((batch, m) =>
            m === 1 && r.rank === 0 ? withToken(withToken(batch, last), labelled, "labels") : batch,
          );
          const step = async (batches: Batch[]) =>
            (await session.step({ ...requestOf(untied.shared, untied.plan, batches), counts })).nonFinite;
          return [await step(without), await step(poisoned), await step(without)];
        }),
      ),
    );
    for (const outcome of outcomes) expect(outcome).toEqual([null, { microBatch: 1, loss: Number.NaN }, null]);
  });

  it("is cancelled on all ranks or on none", async () => {
    const ranks = await ranksOf(2);
    for (let i = 0; i < 8; i++) {
      const outcomes = await steps(
        ranks,
        (_, b) => b,
        (sessions) => setTimeout(() => sessions[i % 2]!.cancel(), i),
      );
      const codes = outcomes.map((o) => (o instanceof Error ? failed(o).code : "done"));
      expect(new Set(codes).size, codes.join(" ")).toBe(1);
      expect(["done", "ABORTED"]).toContain(codes[0]);
    }
  });

  it("has a name of its own in this process, until its rank leaves", async () => {
    const ranks = await joinAll(native!, 2);
    const both = await Promise.all(ranks.map((r) => r.group([1, 0])));
    const alone = await Promise.all(ranks.map((r) => r.group([r.rank])));
    expect(new Set([...both, ...alone]).size).toBe(4);
    expect(await ranks[0]!.group([1, 0])).toBe(both[0]);
    const q = tensor([...Array(16).keys()].map((i) => Math.sin(i))).reshape([1, 1, 8, 2]);
    const attend = () => callOp("stroma::ring_attention", [q, q, q, null, true, null, alone[1]!]) as Tensor;
    const plain = callOp("aten::scaled_dot_product_attention", [q, q, q, null, 0, true]) as Tensor;
    expect(attend().toArray()).toEqual(plain.toArray());
    for (const members of [[1], [0, 0], [0, 2], []])
      await expect(ranks[0]!.group(members)).rejects.toMatchObject({
        code: "RANKS",
        message: expect.stringContaining("different ranks from 0 to 1 that holds rank 0"),
      });
    await Promise.all(ranks.map((r) => r.leave()));
    expect(attend).toThrow(/expected the name of a process group/);
  });

  it("refuses a graph for another number of ranks, and a context without ranks", async () => {
    const ranks = await ranksOf(2);
    const three = contextCase(3, 3, "float32");
    const sessions = ranks.map((r) => openShared(native!, r, c));
    const loads = await Promise.allSettled(sessions.map((s) => s.load(three.shared)));
    for (const load of loads)
      expect(load).toMatchObject({
        status: "rejected",
        reason: { code: "GRAPH", message: expect.stringMatching(/no group of ranks "context:3" but "context:2"/) },
      });
    await Promise.all(sessions.map((s) => s.dispose()));
    await expect(
      withSession(native!.createSession(sessionOptions("float32")), c.shared, async () => {}),
    ).rejects.toMatchObject({ code: "GRAPH", message: expect.stringContaining('no group of ranks "context:2"') });
  });
});
