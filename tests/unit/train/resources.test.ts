/** What a run plans for where its options do not say: detected, agreed on among ranks, and kept with a margin. */
import { describe, expect, it } from "vitest";
import type { MachineFacts } from "../../../src/device.js";
import type { ProbeReport } from "../../../src/native.js";
import { usableOf } from "../../../src/plan/budget.js";
import { findProfile } from "../../../src/plan/profiles.js";
import { resolveModel } from "../../../src/train/model-source.js";
import type { NativeRanks } from "../../../src/train/native-session.js";
import { resolveOptions, type SettledOptions, type TrainerOptions } from "../../../src/train/options.js";
import { planTraining } from "../../../src/train/plan.js";
import { agreeOnResources, detectResources, type Resources } from "../../../src/train/resources.js";
import { Trainer } from "../../../src/train/trainer.js";
import { collect, fakeParts, SMALL } from "../../support/fake-trainer.js";
import { REAL } from "../../support/real-trainer.js";

const GB = 1e9;
const facts = (name: string, freeBytes = 23 * GB): MachineFacts => ({
  probe: {
    gpus: [0, 1].map((index) => ({
      index,
      name,
      memoryBytes: 24 * GB,
      freeBytes: freeBytes - index,
      computeCapability: "8.6",
    })),
    driver: { version: "580", cuda: "13.0" },
    memory: { totalBytes: 128 * GB, availableBytes: 90 * GB, cgroupBytes: 64 * GB },
  } as unknown as ProbeReport,
  build: { version: "2.14.1+cu130", cuda: "13.0" },
});
const none = () => null;

describe("what is detected", () => {
  it("of a card: what is free on it, the container's memory, the speed of cards of its name", () => {
    expect(detectResources({ device: "cuda:1" }, () => facts("NVIDIA RTX A5000"), none)).toEqual({
      cardBytes: 23 * GB - 1,
      memoryBytes: 64 * GB,
      profile: findProfile("a5000"),
      guess: null,
    });
  });

  it("of a card that was measured, its own speed", () => {
    const own = { ...findProfile("h100"), name: "own" };
    const measured = (card?: string) => (card === "NVIDIA L4" ? own : null);
    expect(detectResources({ device: "cuda:0" }, () => facts("NVIDIA L4"), measured).profile).toBe(own);
  });

  it("of a card that nobody knows, a slow one's speed, and it is said", () => {
    const { profile, guess } = detectResources({ device: "cuda:0" }, () => facts("NVIDIA L4"), none);
    expect(profile.name).toBe("a5000");
    expect(guess).toContain("NVIDIA L4 has no profile");
    expect(guess).toContain("doctor --measure");
  });

  it("of the processors no card; of a simulated one their kernels behind a link", () => {
    for (const device of ["cpu", "sim"] as const) {
      const { cardBytes, profile } = detectResources({ device }, () => facts("NVIDIA L4"), none);
      expect([cardBytes, profile.device, profile.gemm]).toEqual([
        null,
        device === "sim" ? "cuda" : "cpu",
        findProfile("cpu").gemm,
      ]);
    }
  });

  it("among ranks the least of each, and rank 0's speed", async () => {
    const all: Resources[] = [
      { cardBytes: 23 * GB, memoryBytes: 64 * GB, profile: findProfile("a5000"), guess: null },
      { cardBytes: 22 * GB, memoryBytes: 128 * GB, profile: findProfile("h100"), guess: "x" },
    ];
    const agreed = await Promise.all(
      [0, 1].map((rank) => {
        const say = (r: number) => JSON.stringify(r === 0 ? all[0] : { ...all[1], profile: undefined });
        const ranks = { rank, size: 2, gather: async () => [say(0), say(1)] } as unknown as NativeRanks;
        return agreeOnResources(ranks, all[rank]!);
      }),
    );
    const expected = { cardBytes: 22 * GB, memoryBytes: 64 * GB, profile: findProfile("a5000"), guess: null };
    expect(agreed).toEqual([expected, expected]);
  });
});

const settled = (extra: TrainerOptions): SettledOptions =>
  resolveOptions({ ...REAL, ...extra }, (asked) => ({
    device: asked === "auto" ? "cpu" : (asked as "cpu"),
    why: null,
  })) as SettledOptions;
const planned = (extra: TrainerOptions, r: Partial<Resources>) => {
  const o = settled(extra);
  const profile = findProfile(o.device.startsWith("cuda") ? "a5000" : "cpu");
  const resources = { cardBytes: null, memoryBytes: 1e12, profile, guess: null, ...r };
  return planTraining(resolveModel(o.model).graph("train", o.dtype), o, resources);
};
const ranks = (localSize: number) => ({ rank: 0, size: 2, localSize }) as NonNullable<TrainerOptions["ranks"]>;
/** The least memory of which so much can be planned with. */
const holding = (bytes: number) => Math.ceil(bytes / 0.95);

describe("what a plan may take of it", () => {
  it.each<
    [
      string,
      TrainerOptions,
      "cardBytes" | "memoryBytes",
      (o: { deviceBytes: number; hostBytes: number }) => number,
      RegExp,
    ]
  >([
    ["cpu", {}, "memoryBytes", (p) => p.deviceBytes + p.hostBytes, /of this machine's memory, .* deviceMemory says/],
    [
      "cpu, on disk",
      { offload: "disk" },
      "memoryBytes",
      (p) => p.deviceBytes + p.hostBytes,
      /of this machine's memory/,
    ],
    [
      "sim",
      { device: "sim", offload: "host" },
      "memoryBytes",
      (p) => p.deviceBytes + p.hostBytes,
      /this machine's memory/,
    ],
    [
      "cuda",
      { device: "cuda:0", plan: "resident" },
      "cardBytes",
      (p) => p.deviceBytes,
      /of cuda:0's free memory, .*offload or plan auto takes state/,
    ],
    ["cuda, beside", { device: "cuda:0", offload: "host" }, "memoryBytes", (p) => p.hostBytes, /this machine's memory/],
    [
      "two ranks",
      { ranks: ranks(2) },
      "memoryBytes",
      // The blocks of two ranks are not equal: the sum of both counts.
      (p) => {
        const other = planned({ ranks: { ...ranks(2), rank: 1 } }, {}).predicted!.peaks;
        expect(other.deviceBytes).not.toBe(p.deviceBytes);
        return p.deviceBytes + p.hostBytes + other.deviceBytes + other.hostBytes;
      },
      /memory in its 2 ranks/,
    ],
    ["one here", { ranks: ranks(1) }, "memoryBytes", (p) => p.deviceBytes + p.hostBytes, /of this machine's memory/],
  ])("%s: what just fits is taken, a little less is refused", (_name, extra, memory, needs, why) => {
    const { peaks } = planned(extra, {}).predicted!;
    const just = holding(needs(peaks));
    expect(usableOf(just, "hostBytes").bytes).toBeGreaterThanOrEqual(needs(peaks));
    expect(planned(extra, { [memory]: just }).predicted!.peaks).toEqual(peaks);
    let error: unknown;
    try {
      planned(extra, { [memory]: just - 100 });
    } catch (thrown) {
      error = thrown;
    }
    expect(error).toMatchObject({ code: "OUT_OF_MEMORY", message: expect.stringMatching(why) });
  });

  it("given sizes go before: no margin is taken of them", () => {
    const { peaks } = planned({}, {}).predicted!;
    const deviceMemory = peaks.deviceBytes + peaks.hostBytes;
    expect(() => planned({ plan: "resident", deviceMemory }, { memoryBytes: 1 })).not.toThrow();
    expect(() => planned({ plan: "resident", deviceMemory: deviceMemory - 1 }, {})).toThrow("are given");
    const onCard = { device: "cuda:0", plan: "resident", deviceMemory: 1e9 } as const;
    expect(() => planned(onCard, { cardBytes: 1 })).not.toThrow();
  });

  it("a plan is searched for what the card has free and the host beside it", () => {
    const search = { device: "cuda:0", plan: "auto" } as const;
    const all = planned(search, { cardBytes: 24 * GB });
    const part = planned(search, { cardBytes: all.predicted!.peaks.deviceBytes / 4 });
    expect(part.predicted!.peaks.deviceBytes).toBeLessThan(all.predicted!.peaks.deviceBytes / 4);
    expect(part.predicted!.peaks.hostBytes).toBeGreaterThan(0);
    expect(() => planned(search, { cardBytes: 1e5, memoryBytes: 1e5 })).toThrow("missing");
    expect(() => planned(search, { cardBytes: null })).toThrow("how much memory cuda:0 has is not told here");
    // Where nothing was said, everything is tried on the card.
    const unasked = planned({ device: "cuda:0" }, { cardBytes: null });
    expect(unasked.facts).toMatchObject({ order: "breadthFirst", update: "end" });
    expect(unasked.predicted!.peaks.hostBytes).toBe(0);
  });

  it("ranks on cards run what the planner picks, unless where a card ends is not told", () => {
    const two = { device: "cuda:0", ranks: ranks(2) } as const;
    const known = planned(two, { cardBytes: 8e9 });
    expect(known.summary).toContain("chosen for the budgets");
    expect(known.facts).toEqual(planned({ ...two, plan: "auto" }, { cardBytes: 8e9 }).facts);
    const stages = planned({ ...two, stages: "contiguous" }, { cardBytes: 8e9 });
    expect(stages.summary).toMatch(/contiguous.*chosen for the budgets/);
    expect(planned(two, { cardBytes: null }).summary).toMatch(/blocks alternating, all on the device/);
    expect(() => planned(two, { cardBytes: 1e5 })).toThrow(/over 2 ranks, .* are missing/);
  });

  it("a guessed speed is told with the plan", () => {
    expect(planned({ device: "cuda:0" }, { guess: "a guess", cardBytes: 8e9 }).summary).toMatch(/ \(a guess\)$/);
  });
});

it("the session of a card is told where the card ends, for whichever plan", async () => {
  for (const [extra, expected] of [
    [{ plan: "resident", deviceMemory: "8GB" }, 8e9],
    [{ plan: "auto", deviceMemory: "8GB" }, 8e9],
    [{}, undefined],
  ] as const) {
    const parts = fakeParts();
    await using trainer = new Trainer(
      {
        ...SMALL,
        ...extra,
        steps: 1,
        device: "cuda:1",
        outputDir: `/tmp/stroma-resources-${process.pid}-${expected}-${"plan" in extra ? extra.plan : ""}`,
      },
      parts,
    );
    await collect(trainer);
    expect(parts.sessions[0]!.options).toMatchObject({ device: "cuda:1" });
    expect(parts.sessions[0]!.options.deviceMemory).toBe(expected);
  }
});
