/**
 * A profiled step of several ranks: rank 0 writes all of it, on one clock; what the lanes say was sent is what the ranks
 * counted, and every rank's peak is what was planned.
 */
import { mkdtemp, readdir, readFile, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { agreeOnClock, monotonicMs } from "../../src/distributed/clock.js";
import type { ProfileDocument, TraceEvent } from "../../src/profile/index.js";
import { messagesOf } from "../../src/profile/ranks.js";
import type { NativeRanks, RankSpec } from "../../src/train/native-session.js";
import type { TrainerOptions } from "../../src/train/options.js";
import { realParts } from "../../src/train/parts.js";
import { Trainer } from "../../src/train/trainer.js";
import { collect, only } from "../support/fake-trainer.js";
import { nativeOrSkip } from "../support/native.js";
import { REAL } from "../support/real-trainer.js";
import { freePort } from "./rank-case.js";

const native = nativeOrSkip();
let root: string;
beforeAll(async () => {
  root = await mkdtemp(join(tmpdir(), "stroma-rank-profile-"));
});
afterAll(() => rm(root, { recursive: true, force: true }));

async function specs(size: number): Promise<RankSpec[]> {
  const port = await freePort();
  const all = { size, address: "127.0.0.1", port, serve: true, prefix: "", joinSeconds: 30, silenceSeconds: 30 };
  return Array.from({ length: size }, (_, rank) => ({ ...all, rank }));
}

/** Trains one step on as many ranks, each in a folder of its own; the files that each wrote, and the bytes that it counted. */
async function profiled(size: number, options: TrainerOptions, name: string) {
  return Promise.all(
    (await specs(size)).map(async (ranks, rank) => {
      let joined: NativeRanks;
      const joinRanks: typeof realParts.joinRanks = async (...given) => {
        joined = await realParts.joinRanks(...given);
        return joined;
      };
      const counts: ReturnType<NativeRanks["counts"]>[] = [];
      let files: string[] = [];
      const onEvent: TrainerOptions["onEvent"] = (e) => {
        if (e.event === "start" || e.event === "profile") counts.push(joined.counts());
        if (e.event === "profile") files = e.files;
      };
      const outputDir = join(root, `${name}-${rank}`);
      const one = { ...REAL, model: MODEL, ...options, steps: 1, profileMemory: 1, outputDir, onEvent, ranks };
      // Checkpoints of ranks take one folder: it is the profile that does not.
      await using trainer = new Trainer(one, { joinRanks });
      await collect(trainer).catch((error) => {
        if (!/checkpoint|ENOENT/i.test(error.message)) throw error;
      });
      const [before, after] = counts as [(typeof counts)[0], (typeof counts)[0]];
      return {
        files,
        outputDir,
        sent: after.sentBytes - before.sentBytes,
        received: after.receivedBytes - before.receivedBytes,
      };
    }),
  );
}

/** Large enough for what is planned to be more than libtorch's small change. */
const MODEL = { config: { ...REAL.model.config, dim: 256, ffn: 512 } };
const STILL = { config: { ...MODEL.config, dropout: 0 } };
/** On update "backward" shards also tell each other norms of blocks, which no lane shows. */
const shards = { update: "forward", device: "sim", offload: "host" } satisfies TrainerOptions;

describe.skipIf(!native)("a profile of ranks", () => {
  test.each([
    ["two stages", 2, { stages: "contiguous", order: "oneForwardOneBackward" }],
    ["two stages in turn", 2, { model: STILL, order: "breadthFirst" }],
    ["three stages", 3, { stages: "contiguous" }],
    ["three shards", 3, { ...shards, shards: 3, sharedHost: "off" }],
    ["three shards of shared memory", 3, { ...shards, shards: 3, sharedHost: "on" }],
    ["two that share rows", 2, { model: STILL, context: 2 }],
  ] as [string, number, TrainerOptions][])("%s", async (name, size, options) => {
    const runs = await profiled(size, options, name);
    const folder = join(runs[0]!.outputDir, "profile-1");
    const expected = ["profile.html", "profile.trace.json"];
    for (const r of runs.keys()) expected.push(`profile-rank-${r}.json`, `profile-rank-${r}.html`);
    expect(runs.map((r) => r.files)).toEqual(runs.map((_, r) => (r === 0 ? expected.map((f) => join(folder, f)) : [])));
    expect((await readdir(folder)).sort()).toEqual(expected.sort());
    const documents = await Promise.all(
      runs.map(
        async (_, r) => JSON.parse(await readFile(join(folder, `profile-rank-${r}.json`), "utf8")) as ProfileDocument,
      ),
    );
    expect(Math.min(...documents.map((d) => d.rank!.beganMs))).toBe(0);

    for (const [r, { instructions, summary, rank }] of documents.entries()) {
      expect(rank).toMatchObject({ rank: r, ranks: size });
      const bytes = (queue: string) => instructions.reduce((sum, i) => sum + (i.queue === queue ? i.bytes : 0), 0);
      // Ranks that share memory begin a step together: a word of one byte to each other one, before the tape.
      const words = options.sharedHost === "on" ? size - 1 : 0;
      expect([bytes("send") + words, bytes("receive") + words]).toEqual([runs[r]!.sent, runs[r]!.received]);
      expect([summary.bytes.bytesSent, summary.bytes.bytesReceived]).toEqual([bytes("send"), bytes("receive")]);
      expect(Math.abs(summary.peakDeviceBytes / summary.predictedPeakDeviceBytes - 1)).toBeLessThan(0.05);
      const { waitMs, movingMs, hiddenMs } = summary.messages!;
      const lanes = summary.busyMs.send + summary.busyMs.receive;
      expect(Math.abs(waitMs + movingMs - lanes)).toBeLessThan(0.01 * instructions.length);
      expect(hiddenMs).toBeGreaterThanOrEqual(0);
      expect(hiddenMs).toBeLessThanOrEqual(movingMs);
      expect(summary.hiddenCopyMs).toBeLessThanOrEqual(summary.copyMs);
    }

    // On one axis nothing arrives before it went.
    const messages = messagesOf(documents);
    expect(messages.length).toBeGreaterThan(0);
    for (const { from, to } of messages) {
      const [sent, got] = [from, to].map((at) => documents[at.rank]!.instructions[at.instruction]!);
      expect([got!.bytes, got!.operand]).toEqual([sent!.bytes, sent!.operand]);
      const [left, arrived] = [
        sent!.startMs + documents[from.rank]!.rank!.beganMs,
        got!.endMs + documents[to.rank]!.rank!.beganMs,
      ];
      expect(arrived - left).toBeGreaterThan(-0.01);
    }

    const trace = JSON.parse(await readFile(join(folder, "profile.trace.json"), "utf8")) as {
      traceEvents: TraceEvent[];
    };
    const spans = trace.traceEvents.filter((e) => e.ph === "X");
    expect(spans.length).toBe(documents.reduce((n, d) => n + d.instructions.length, 0));
    expect([...new Set(spans.map((e) => e.pid))]).toEqual(documents.map((_, r) => r + 1));
    // A track's spans lie one after the other.
    const ends = new Map<string, number>();
    for (const e of spans.sort((a, b) => a.ts! - b.ts!)) {
      const track = `${e.pid} ${e.tid}`;
      expect(e.ts!).toBeGreaterThanOrEqual((ends.get(track) ?? 0) - 2);
      ends.set(track, e.ts! + e.dur!);
    }
    const page = await readFile(join(folder, "profile.html"), "utf8");
    for (const r of runs.keys()) expect(page).toContain(`profile-rank-${r}.html`);
  });

  test("real ranks whose clocks differ by hours agree on one", async () => {
    const skews = [0, 3.6e6, -7.2e6];
    const clocks = await Promise.all(
      (await specs(3)).map(async (spec, rank) => {
        const ranks = await realParts.joinRanks(spec, new AbortController().signal);
        const clock = await agreeOnClock(ranks, () => monotonicMs() + skews[rank]!);
        await ranks.leave();
        return clock;
      }),
    );
    for (const [rank, { offsetMs, uncertainMs }] of clocks.entries()) {
      expect(Math.abs(offsetMs + skews[rank]!)).toBeLessThanOrEqual(uncertainMs);
      expect(uncertainMs).toBeLessThan(100);
    }
  });

  test("ranks that would profile different steps are told", async () => {
    const settled = await Promise.allSettled(
      (await specs(2)).map(async (ranks, rank) => {
        await using trainer = new Trainer({
          ...REAL,
          outputDir: join(root, "differ"),
          ranks,
          profileMemory: rank === 0,
        });
        return only(await collect(trainer), "profile");
      }),
    );
    for (const s of settled)
      expect((s as PromiseRejectedResult).reason).toMatchObject({
        code: "RANKS",
        message: expect.stringMatching(/profileMemory: true on rank 0, false on rank 1/),
      });
  });
});
