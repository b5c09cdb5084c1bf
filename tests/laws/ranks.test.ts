/**
 * Laws 1, 3 and 6 for several ranks: whatever blocks are on whichever rank, those that share a parameter too, losses, norms,
 * parameters and moments are those of one rank, to the bit, and the bytes on the wire are those of the tapes.
 */
import { mkdtempSync, readdirSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, describe, expect, it } from "vitest";
import { model, ops, traceModel, type Value } from "../../src/graph/index.js";
import * as nn from "../../src/nn/index.js";
import { residentPolicy } from "../../src/plan/planner.js";
import { playRanks } from "../../src/plan/play-ranks.js";
import { isContiguous } from "../../src/plan/stages.js";
import type { Instruction, Tape } from "../../src/plan/types.js";
import { nativeOrSkip } from "../support/native.js";
import { random, randomBatch } from "../support/random-models.js";
import { type LawCase, lawCase } from "./offload-case.js";
import { interleavedStages, plansOf, RankGroups, randomStages, shareAcross, trainRanks } from "./rank-case.js";
import { differences, randomPolicy, sessionOptions, trainResident } from "./trial.js";

const native = nativeOrSkip();
const cases = Number(process.env.STROMA_CASES ?? 60);
const firstSeed = Number(process.env.STROMA_SEED ?? 1);
const folder = mkdtempSync(join(tmpdir(), "stroma-ranks-"));
const groups = new RankGroups(native);
afterAll(async () => {
  await groups.leave();
  rmSync(folder, { recursive: true, force: true });
});

describe.skipIf(!native)("any number of ranks gives the same numbers", () => {
  it(`holds over ${cases} random models, plans and stages`, { timeout: cases * 4_000 + 60_000 }, async () => {
    let shared = 0;
    for (let seed = firstSeed; seed < firstSeed + cases; seed++) {
      const c = lawCase(seed);
      const next = random(seed * 104_729 + 7);
      const size = Math.min(1 + Math.floor(next() * 4), c.graph.blocks.length);
      const policy = randomPolicy(next, c);
      if (policy.boundary === "slot") policy.boundary = "device";
      let of = randomStages(next, c.graph, size, next() < 0.6 ? "apart" : "together");
      if (of === null) continue;
      const turns = c.microBatches % size === 0 ? interleavedStages(c.graph, size) : null;
      if (next() < 0.4 && turns !== null) of = turns;
      const stages = { rank: 0, ranks: size, of };
      if (shareAcross(c.graph, of)) shared++;
      if (next() < 0.6 && (of === turns || isContiguous(c.graph, stages))) policy.schedule = "oneForwardOneBackward";
      const ranks = await groups.of(size);
      const options = sessionOptions(c, {
        device: "sim",
        diskFolder: folder,
        threads: 1,
        sim: { memoryBytes: null, hostToDevice: null, deviceToHost: null, adversary: null },
      });
      const label = `seed ${seed}: ${c.label}, ${size} ranks, blocks on ${of}, ${JSON.stringify({ ...policy, dims: undefined })}`;
      const plain = await trainResident(native!, c, options.threads);
      const other = await trainRanks(native!, ranks, options, c, policy, { of }).catch((error: Error) => {
        throw new Error(`${label}: ${error.message}`);
      });
      expect(differences(other, plain), label).toEqual([]);
      expect(other.sent, label).toEqual(other.planned);
      for (const [i, result] of plain.results.entries())
        for (const theirs of [other.results, ...other.others]) {
          expect(theirs[i]!.loss, label).toBe(result.loss);
          expect(theirs[i]!.losses, label).toEqual(result.losses);
          expect(theirs[i]!.microBatchLosses, label).toEqual(result.microBatchLosses);
          expect(theirs[i]!.gradNorm, label).toBe(result.gradNorm);
        }
    }
    expect(readdirSync(folder)).toEqual([]);
    if (cases >= 20) expect(shared, "cases in which stages share a parameter").toBeGreaterThan(cases / 6);
  });

  it("holds where a gradient reaches a shared parameter on one rank alone, or on none", {
    timeout: 120_000,
  }, async () => {
    const graph = traceModel(half, { dim: 12, vocab: 11 }, { mode: "train", dtype: "float32" });
    const c: LawCase = { ...lawCase(1), graph, label: "half", dtype: "float32", clip: "global", maxGradNorm: 0.3 };
    c.state = { storage: "float32", masterWeight: "none", optimizer: "adamw" };
    c.steps = Array.from({ length: 3 }, (_, step) => ({
      microBatches: Array.from({ length: c.microBatches }, (_, m) => randomBatch(graph, 11, 2, 9, step * 10 + m)),
      ...{ step, seed: 5, learningRate: 1e-2, maxGradNorm: 0.3 },
    }));
    const options = sessionOptions(c, { threads: 1 });
    const plain = await trainResident(native!, c, options.threads);
    const policy = { ...residentPolicy(graph, { microBatches: c.microBatches, clip: "global" }), dims: c.dims };
    for (const update of ["end", "forward"] as const) {
      const given = { ...policy, boundary: "device", update } as const;
      const other = await trainRanks(native!, await groups.of(2), options, c, given, { of: [0, 1, 1] });
      expect(differences(other, plain), update).toEqual([]);
    }
    // The law is of something: what nothing reaches has no moments.
    const of = (name: string) => plain.state.get(`exp_avg first.${name}`)!;
    const zeros = Buffer.alloc(Buffer.from(of("none"), "base64").length).toString("base64");
    expect(["here", "there", "none"].map((name) => of(name) === zeros)).toEqual([false, false, true]);
  });

  it("a rank that stands over a pass takes what others send: waits for sends that only so come to an end", {
    timeout: 60_000,
  }, async () => {
    // One draw in a thousand is of that kind: found by asking `handedOutOnTheWay` of all from 50,000 on.
    for (const seed of [50_541, 51_225, 53_282]) {
      const c = lawCase(seed, 2);
      const next = random(seed * 104_729 + 7);
      const size = Math.min(2 + Math.floor(next() * 3), c.graph.blocks.length);
      const policy = randomPolicy(next, c);
      if (policy.boundary === "slot") policy.boundary = "device";
      const of = randomStages(next, c.graph, size, "apart")!;
      const plans = plansOf(c, policy, size, { of });
      const tapes = plans.map((p) => p.step);
      for (let k = 0; k < 12; k++) waitForSend(next, tapes);
      expect(comesToAnEnd(tapes.map(handedOutOnTheWay)), "this case shows nothing any more: find another").toBe(false);
      const options = sessionOptions(c, { device: "sim", diskFolder: folder, threads: 1 });
      const label = `seed ${seed}: ${c.label}, ${size} ranks, blocks on ${of}`;
      const other = await trainRanks(native!, await groups.of(size), options, c, policy, { of }, { plans });
      expect(differences(other, await trainResident(native!, c, options.threads)), label).toEqual([]);
    }
  });
});

/** Three matrices of two blocks: the first learns `here`, the second `there`, and of `none` only signs are read. */
const half = model<{ dim: number; vocab: number }>("half", (m, { dim, vocab }) => {
  const tokens = m.input("input_ids", "int64", ["B", "T"]);
  const labels = m.input("labels", "int64", ["B", "T"]);
  const signs = (w: Value) => ops.to(ops.gt(w, 0), "float32");
  const x = m.block("first", (p) => {
    const [here, there, none] = ["here", "there", "none"].map((name) => p.param(name, [dim, dim]));
    const e = nn.embedding(p, tokens, vocab, dim);
    return ops.add(ops.linear(e, here!), ops.linear(e, ops.add(signs(there!), signs(none!))));
  });
  const y = m.block("second", (p) => {
    const [here, there, none] = ["here", "there", "none"].map((name) => p.at("first").param(name, [dim, dim]));
    return ops.add(ops.linear(x, there!), ops.linear(x, ops.sub(signs(here!), signs(none!))));
  });
  return m.block("head", (p) => nn.crossEntropyHead(p, y, labels, { vocabSize: vocab }));
});

const comesToAnEnd = (tapes: readonly Tape[]): boolean => {
  try {
    playRanks(tapes);
    return true;
  } catch {
    return false;
  }
};

const isQueued = (i: Instruction) => i.op === "copy" || i.op === "send" || i.op === "receive";

/** Some later pass or update of a rank waits for something that it sends, where the ranks come to an end with that. */
function waitForSend(next: () => number, tapes: readonly Tape[]): void {
  const { instructions } = tapes[Math.floor(next() * tapes.length)]!;
  const sends = [...instructions.entries()].filter(([, i]) => i.op === "send");
  if (sends.length === 0) return;
  const [at] = sends[Math.floor(next() * sends.length)]!;
  const later = instructions.slice(at).filter((i) => !isQueued(i) && !i.waits.includes(at));
  const waiting = later[Math.floor(next() * Math.min(8, later.length))];
  if (waiting === undefined) return;
  waiting.waits.push(at);
  if (!comesToAnEnd(tapes)) waiting.waits.pop();
}

/** The tape, if its queues heard of what is theirs when the walk over it comes there. */
function handedOutOnTheWay(tape: Tape): Tape {
  let computed = -1;
  const instructions = tape.instructions.map((i, at) => {
    if (isQueued(i)) return computed < 0 ? i : { ...i, waits: [...i.waits, computed] };
    computed = at;
    return i;
  });
  return { ...tape, instructions };
}
