/**
 * Shards and replicas. One micro-batch a rank, unclipped: the numbers of one rank to the bit (partial gradients are then
 * its micro-batches, added in the same order). More than one: shards and replicas agree to the bit with each other, and
 * with one rank to rounding. The bytes on the wire are the least possible.
 */
import { mkdtempSync, readdirSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, describe, expect, it } from "vitest";
import type { Policy } from "../../src/plan/policy.js";
import type { NativeRanks, SessionOptions } from "../../src/train/native-session.js";
import { nativeOrSkip } from "../support/native.js";
import { random } from "../support/random-models.js";
import { type LawCase, lawCase, pick } from "./offload-case.js";
import { RankGroups, randomStages, trainRanks } from "./rank-case.js";
import { differences, randomPolicy, sessionOptions, trainResident } from "./trial.js";

const native = nativeOrSkip();
const cases = Number(process.env.STROMA_CASES ?? 40);
const firstSeed = Number(process.env.STROMA_SEED ?? 1);
const folder = mkdtempSync(join(tmpdir(), "stroma-shards-"));
const groups = new RankGroups(native);
const ranksOf = (size: number): Promise<NativeRanks[]> => groups.of(size);
afterAll(async () => {
  await groups.leave();
  rmSync(folder, { recursive: true, force: true });
});

const simulated = (c: LawCase): SessionOptions =>
  sessionOptions(c, {
    device: "sim",
    diskFolder: folder,
    threads: 1,
    sim: { memoryBytes: null, hostToDevice: null, deviceToHost: null, adversary: null },
  });

/** Boundaries have places among ranks. */
function policyOf(next: () => number, c: LawCase): Policy {
  const policy = randomPolicy(next, c);
  return { ...policy, boundary: policy.boundary === "slot" ? "device" : policy.boundary };
}

const unclipped = (c: LawCase): LawCase => ({
  ...c,
  clip: "none",
  maxGradNorm: null,
  steps: c.steps.map((s) => ({ ...s, maxGradNorm: null })),
});

const say = (seed: number, c: LawCase, policy: Policy, mesh: object): string =>
  `seed ${seed}: ${c.label}, ${JSON.stringify(mesh)}, ${JSON.stringify({ ...policy, dims: undefined })}`;

/** Whether a parameter has several users: one rank adds their sums last, several ranks each their own first. */
const hasTies = ({ graph }: LawCase): boolean =>
  graph.parameters.some((p) => graph.blocks.filter((b) => b.parameters.includes(p.name)).length > 1);

/** Largest difference of a tensor's elements, in parts of its largest. */
function apart(a: string, b: string, float64: boolean): number {
  const [x, y] = [a, b].map((text) => {
    const bytes = Uint8Array.from(Buffer.from(text, "base64"));
    return float64 ? new Float64Array(bytes.buffer) : new Float32Array(bytes.buffer);
  }) as [Float64Array, Float64Array];
  const most = y.reduce((m, v) => Math.max(m, Math.abs(v)), 0);
  const difference = y.reduce((m, v, i) => Math.max(m, Math.abs(v - x[i]!)), 0);
  return difference === 0 ? 0 : difference / most;
}

describe.skipIf(!native)("ranks that share the state of blocks", () => {
  it(`give the numbers of one rank where each has one micro-batch: ${cases} random models and plans`, {
    timeout: cases * 6_000 + 60_000,
  }, async () => {
    for (let seed = firstSeed, tried = 0; tried < cases; seed++) {
      const c = unclipped(lawCase(seed));
      if (hasTies(c)) continue;
      tried++;
      const next = random(seed * 15_485_863 + 5);
      const policy = policyOf(next, c);
      const size = c.microBatches;
      const [shards, replicas] = next() < 0.7 ? [size, 1] : [1, size];
      const options = simulated(c);
      const label = say(seed, c, policy, { shards, replicas });
      const plain = await trainResident(native!, c, options.threads);
      const stages = { of: c.graph.blocks.map(() => 0), shards, replicas };
      const other = await trainRanks(native!, await ranksOf(size), options, c, policy, stages).catch((error: Error) => {
        throw new Error(`${label}: ${error.message}`);
      });
      // Norms of tensors that are cut are sums of squares in another order.
      for (const [i, r] of plain.results.entries())
        expect(Math.abs(other.results[i]!.gradNorm / r.gradNorm - 1), label).toBeLessThan(1e-6);
      for (const r of [...plain.results, ...other.results]) r.gradNorm = 0;
      expect(differences(other, plain), label).toEqual([]);
      expect(other.sent, label).toEqual(other.planned);
      for (const [i, result] of plain.results.entries())
        for (const theirs of [other.results, ...other.others]) {
          expect(theirs[i]!.loss, label).toBe(result.loss);
          expect(theirs[i]!.losses, label).toEqual(result.losses);
          expect(theirs[i]!.microBatchLosses, label).toEqual(result.microBatchLosses);
        }
    }
    expect(readdirSync(folder)).toEqual([]);
  });

  it(`agree with each other however they share, and with one rank to rounding: ${cases} more, two or three ranks`, {
    timeout: cases * 9_000 + 60_000,
  }, async () => {
    for (let seed = firstSeed + 100_000; seed < firstSeed + 100_000 + cases; seed++) {
      const drawn = lawCase(seed);
      const next = random(seed * 15_485_863 + 5);
      // What one rank is compared with: the first step, its moments unquantized.
      const c: LawCase = { ...drawn, state: { ...drawn.state, optimizer: "adamw" } };
      const size = pick(next, [2, 3]);
      const policy = policyOf(next, c);
      if (c.microBatches % size !== 0) policy.schedule = "breadthFirst";
      const options = simulated(c);
      const of = c.graph.blocks.map(() => 0);
      const label = say(seed, c, policy, { size });
      const ranks = await ranksOf(size);
      const run = (kase: LawCase, mesh: { shards: number; replicas: number }) =>
        trainRanks(native!, ranks, options, kase, { ...policy, clip: kase.clip }, { of, ...mesh }).catch(
          (error: Error) => {
            throw new Error(`${label}: ${error.message}`);
          },
        );
      const free = unclipped(c);
      const sharded = await run(free, { shards: size, replicas: 1 });
      const replicated = await run(free, { shards: 1, replicas: size });
      for (const r of [...sharded.results, ...replicated.results]) r.gradNorm = 0;
      expect(differences(sharded, replicated), label).toEqual([]);

      const first: LawCase = { ...c, steps: c.steps.slice(0, 1) };
      const plain = await trainResident(native!, first, options.threads);
      const clipped = await run(first, { shards: size, replicas: 1 });
      // Sums of few hundred terms: their order moves the last digits.
      const near = c.dtype === "float64" ? 1e-13 : 1e-5;
      expect(clipped.results[0]!.loss, label).toBe(plain.results[0]!.loss);
      expect(Math.abs(clipped.results[0]!.gradNorm / plain.results[0]!.gradNorm - 1), label).toBeLessThan(near);
      expect([...clipped.state.keys()].sort(), label).toEqual([...plain.state.keys()].sort());
      for (const [key, data] of plain.state)
        if (key.startsWith("exp_avg "))
          expect(apart(clipped.state.get(key)!, data, c.dtype === "float64"), `${label}: ${key}`).toBeLessThan(near);
    }
    expect(readdirSync(folder)).toEqual([]);
  });

  it(`compose with stages to the bit, and shards with replicas: ${Math.ceil(cases / 2)} on four ranks`, {
    timeout: cases * 6_000 + 60_000,
  }, async () => {
    const last = firstSeed + 200_000 + Math.ceil(cases / 2);
    for (let seed = firstSeed + 200_000; seed < last; seed++) {
      const c = unclipped(lawCase(seed));
      const next = random(seed * 15_485_863 + 5);
      const policy = { ...policyOf(next, c), microBatches: c.microBatches };
      const options = simulated(c);
      const of = randomStages(next, c.graph, 2, next() < 0.6 ? "apart" : "together");
      if (of === null || c.microBatches < 4) continue;
      policy.schedule = "breadthFirst";
      const zeros = c.graph.blocks.map(() => 0);
      const label = say(seed, c, policy, { of });
      const run = async (ranks: number, stages: { of: number[]; shards: number; replicas: number }, kase = c) =>
        trainRanks(native!, await ranksOf(ranks), simulated(kase), kase, policy, stages).catch((error: Error) => {
          throw new Error(`${label}: ${error.message}`);
        });
      const alone = await run(2, { of: zeros, shards: 2, replicas: 1 });
      const staged = await run(4, { of, shards: 2, replicas: 1 });
      const copies = await run(4, { of, shards: 1, replicas: 2 });
      for (const r of [...alone.results, ...staged.results, ...copies.results]) r.gradNorm = 0;
      expect(differences(staged, alone), label).toEqual([]);
      expect(differences(copies, alone), label).toEqual([]);
      const first: LawCase = { ...c, state: { ...c.state, optimizer: "adamw" }, steps: c.steps.slice(0, 1) };
      policy.state = first.state;
      const plain = await trainResident(native!, first, options.threads);
      const hybrid = await run(4, { of: zeros, shards: 2, replicas: 2 }, first);
      const near = c.dtype === "float64" ? 1e-13 : 1e-5;
      for (const [key, data] of plain.state)
        if (key.startsWith("exp_avg "))
          expect(apart(hybrid.state.get(key)!, data, c.dtype === "float64"), `${label}: ${key}`).toBeLessThan(near);
    }
    expect(readdirSync(folder)).toEqual([]);
  });

  it("may send gradients as bfloat16: half the bytes, and as far off as that rounds", {
    timeout: 120_000,
  }, async () => {
    for (let seed = firstSeed + 300_000, tried = 0; tried < 6; seed++) {
      const drawn = unclipped(lawCase(seed));
      if (drawn.dtype === "float64") continue;
      tried++;
      const c: LawCase = {
        ...drawn,
        state: { storage: "float32", masterWeight: "none", optimizer: "adamw" },
        steps: drawn.steps.slice(0, 1),
      };
      const next = random(seed * 15_485_863 + 5);
      const policy = { ...policyOf(next, c), schedule: "breadthFirst" } as const;
      const stages = { of: c.graph.blocks.map(() => 0), shards: 2 };
      const ranks = await ranksOf(2);
      const wide = await trainRanks(native!, ranks, simulated(c), c, policy, stages);
      const narrow = await trainRanks(native!, ranks, simulated(c), c, { ...policy, reduceDType: "bfloat16" }, stages);
      const label = say(seed, c, policy, stages);
      for (const [rank, sent] of narrow.sent.entries()) expect(sent, label).toBeLessThan(wide.sent[rank]!);
      let most = 0;
      for (const [key, data] of wide.state)
        if (key.startsWith("exp_avg ")) most = Math.max(most, apart(narrow.state.get(key)!, data, false));
      // Each of two parts is rounded to eight bits of mantissa; they may be larger than their sum.
      expect(most, label).toBeGreaterThan(0);
      expect(most, label).toBeLessThan(4 * 2 ** -8);
    }
  });
});
