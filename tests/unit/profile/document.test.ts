import { mkdtempSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { basename, join } from "node:path";
import { expect, it } from "vitest";
import type { Graph } from "../../../src/graph/types.js";
import { residentPolicy } from "../../../src/plan/planner.js";
import { findProfile } from "../../../src/plan/profiles.js";
import type { Tape } from "../../../src/plan/types.js";
import { type Policy, writeTape } from "../../../src/plan/write-tape.js";
import { type ProfileInput, predictStep, profileDocument, traceOf, writeProfile } from "../../../src/profile/index.js";
import { arenaAllocation, heldByInstruction, holdings } from "../../../src/profile/timeline.js";
import type { StepProfile, StepResult } from "../../../src/train/native-session.js";
import { randomModel } from "../../support/random-models.js";

const dims = { B: 2, T: 3 };
const { graph } = randomModel(5);
const policyOf = (more: Partial<Policy>): Policy => ({
  ...residentPolicy(graph, { microBatches: 3, recompute: "all", update: "backward", schedule: "breadthFirst" }),
  dims,
  ...more,
});

/** A run in which copies take 3 ms and all else 2, the queues side by side, and memory is what the plan expects. */
function run(tape: Tape, of: Graph = graph): ProfileInput {
  const n = tape.instructions.length;
  const predicted = predictStep(of, tape, findProfile("cpu"), "cpu", dims);
  const slots = heldByInstruction(holdings(of, tape, dims), "slot", n);
  const [startMs, endMs] = [new Float64Array(n), new Float64Array(n)];
  const free = new Map<string, number>();
  for (const [i, at] of tape.instructions.entries()) {
    const queue = at.op === "copy" ? at.queue : "compute";
    startMs[i] = Math.max(free.get(queue) ?? 0, ...at.waits.map((w) => endMs[w]!));
    endMs[i] = startMs[i]! + (at.op === "copy" ? 3 : 2);
    free.set(queue, endMs[i]!);
  }
  const arena = arenaAllocation(tape.placement.arenas.deviceBytes);
  const devicePeakBytes = Float64Array.from(tape.instructions, (at, i) =>
    at.op === "copy" ? 0 : arena + slots.boundaries[i]! + predicted.workspace[i]!,
  );
  const profile: StepProfile = {
    startMs,
    endMs,
    devicePeakBytes,
    deviceBytes: devicePeakBytes.map((b, i) => (b === 0 ? 0 : arena + (slots.boundaries[i + 1] ?? 0))),
    hostBytes: new Float64Array(n).fill(tape.placement.arenas.hostBytes),
  };
  const result = {
    seconds: Math.max(...endMs) / 1e3,
    nonFinite: null,
    newDeviceSegments: 0,
    peakDeviceBytes: Math.max(...devicePeakBytes),
    bytesToDevice: 1,
    bytesFromDevice: 2,
    bytesLoaded: 3,
    bytesSaved: 4,
  } as StepResult;
  return { graph: of, tape, profile, result, predicted, dims };
}

const offloaded = policyOf({ param: "host", optimizer: "host", boundary: "host", prefetch: 1, parts: 2 });

it.each([
  ["offloaded", offloaded],
  ["in slots", policyOf({ boundary: "slot" })],
])("names every byte of the peak, %s", (_, policy) => {
  const input = run(writeTape(graph, policy).step);
  const { summary, memory } = profileDocument(input);
  const { peak } = summary;
  const held = Object.values(peak.byKind).reduce((sum, bytes) => sum + bytes, 0);
  expect(held + peak.unusedBytes).toBe(summary.peakDeviceBytes);
  expect(peak.byKind.workspace).toBe(input.predicted.workspace[peak.instruction]);
  // The picture over time says the same of that moment.
  const k = memory.timeMs.findLastIndex((t) => t <= peak.atMs);
  for (const [kind, bytes] of Object.entries(peak.byKind)) expect(memory.bytes[kind as "sums"][k]).toBe(bytes);
  expect(memory.unusedBytes[k]).toBe(peak.unusedBytes);
});

it("counts as hidden what was copied while an instruction computed", () => {
  const input = run(writeTape(graph, offloaded).step);
  const { startMs, endMs } = input.profile;
  const ticks = (copies: boolean, t: number) =>
    input.tape.instructions.filter((at, i) => (at.op === "copy") === copies && startMs[i]! <= t && t < endMs[i]!)
      .length;
  let [hidden, copying] = [0, 0];
  for (let t = 0; t < Math.max(...endMs); t++) {
    copying += ticks(true, t);
    if (ticks(false, t) > 0) hidden += ticks(true, t);
  }
  const { summary } = profileDocument(input);
  expect(summary.copyMs).toBe(copying);
  expect(summary.hiddenCopyMs).toBe(hidden);
  expect(hidden).toBeGreaterThan(0);
  expect(hidden).toBeLessThan(copying);
});

it("draws every instruction once on the track of its queue, and none over another", () => {
  const document = profileDocument(run(writeTape(graph, offloaded).step));
  const { traceEvents } = traceOf(document);
  const spans = traceEvents.filter((e) => e.ph === "X");
  expect(spans.map((e) => e.args.instruction)).toEqual(document.instructions.map((_, i) => i));
  const names = new Map(traceEvents.flatMap((e) => (e.name === "thread_name" ? [[e.tid, e.args.name as string]] : [])));
  for (const [tid, name] of names) {
    const track = spans.filter((e) => e.tid === tid);
    for (const [k, e] of track.entries()) {
      expect(name.split(":")[0]).toBe(document.instructions[e.args.instruction as number]!.queue);
      if (k > 0) expect(e.ts).toBeGreaterThanOrEqual(track[k - 1]!.ts! + track[k - 1]!.dur!);
    }
  }
});

it("writes three files; the page needs no network, and its data is data whatever names say", async () => {
  const folder = mkdtempSync(join(tmpdir(), "stroma-profile-"));
  try {
    const hostile = '</script><img src="x">';
    const named = { ...graph, model: hostile, blocks: graph.blocks.map((b) => ({ ...b, name: hostile + b.name })) };
    const paths = await writeProfile(join(folder, "new"), run(writeTape(named, offloaded).step, named));
    expect(paths.map((p) => basename(p))).toEqual(["profile.json", "profile.html", "profile.trace.json"]);
    const [json, page, trace] = paths.map((path) => readFileSync(path, "utf8"));
    expect(JSON.parse(json!)).toMatchObject({ format: "stromatolite.profile", version: 1, model: named.model });
    expect(JSON.parse(trace!).traceEvents.length).toBeGreaterThan(0);
    expect(page).not.toMatch(/https?:|<img|<link|@import|\bsrc=x/);
    const [data, script] = [...page!.matchAll(/<script[^>]*>(.*?)<\/script>/gs)].map((m) => m[1]!);
    expect(JSON.parse(data!).run.length).toBe(JSON.parse(json!).instructions.length);
    // Parses, that is: what it draws is looked at, not tested.
    expect(() => new Function(script!)).not.toThrow();
  } finally {
    rmSync(folder, { recursive: true });
  }
});

it("refuses a profile of another tape, and a step that ran in part", () => {
  const input = run(writeTape(graph, offloaded).step);
  const other = writeTape(graph, policyOf({})).step;
  expect(() => profileDocument({ ...input, tape: other })).toThrow(
    expect.objectContaining({ code: "INVALID_ARGUMENT", message: expect.stringContaining("instructions") }),
  );
  const result = { ...input.result, nonFinite: { microBatch: 0, loss: Number.NaN } };
  expect(() => profileDocument({ ...input, result })).toThrow(expect.objectContaining({ code: "NON_FINITE" }));
});
