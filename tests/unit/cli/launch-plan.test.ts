import { mkdirSync, mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, describe, expect, it } from "vitest";
import { ResumePoint } from "../../../src/cli/launch.js";
import { countCards, type DistributedPlan, distributedPlan, type RankFlags } from "../../../src/cli/launch-plan.js";
import type { MachineFacts } from "../../../src/device.js";
import type { StromaError } from "../../../src/errors.js";

const RANK = {
  RANK: "2",
  WORLD_SIZE: "4",
  LOCAL_RANK: "0",
  LOCAL_WORLD_SIZE: "2",
  MASTER_ADDR: "a",
  MASTER_PORT: "1000",
};
const LAUNCHED = { ...RANK, STROMA_ATTEMPT: "0" };

function planOf(flags: RankFlags, env: Record<string, string> = {}, cards = 4): DistributedPlan {
  return distributedPlan(flags, env, () => cards);
}

function refused(...args: Parameters<typeof planOf>): string {
  try {
    planOf(...args);
  } catch (error) {
    expect((error as StromaError).code).toBe("CONFIG");
    return (error as StromaError).message;
  }
  throw new Error("nothing was thrown");
}

describe("alone, launcher or rank", () => {
  it.each<[RankFlags, DistributedPlan]>([
    [{}, { mode: "single" }],
    [{ ranks: 1 }, { mode: "single" }],
    [{ ranks: 2 }, { mode: "launch", ranks: 2 }],
    [{ gpus: 1 }, { mode: "single", device: "cuda:0" }],
    [{ gpus: 3 }, { mode: "launch", ranks: 3 }],
    [
      { gpus: 2, device: "cuda" },
      { mode: "launch", ranks: 2 },
    ],
    [
      { ranks: 2, device: "auto" },
      { mode: "launch", ranks: 2 },
    ],
    [{ device: "cuda:1" }, { mode: "single" }],
    [{ distributed: true }, { mode: "launch", ranks: 4 }],
    [
      { distributed: true, gpus: 2 },
      { mode: "launch", ranks: 2 },
    ],
    [
      { gpus: 2, ranks: 2 },
      { mode: "launch", ranks: 2 },
    ],
    [{ distributed: false, restart: 0 }, { mode: "single" }],
    // One process too is started again only by another.
    [{ restart: 2 }, { mode: "launch", ranks: 1 }],
    [
      { restart: 2, gpus: 1 },
      { mode: "launch", ranks: 1 },
    ],
  ])("%j", (flags, plan) => {
    expect(planOf(flags)).toEqual(plan);
  });

  it("no card is counted where none is asked for", () => {
    const never = () => {
      throw new Error("counted");
    };
    expect(distributedPlan({ ranks: 2 }, {}, never).mode).toBe("launch");
    expect(distributedPlan({}, LAUNCHED, never)).not.toHaveProperty("device");
    // A cluster's launcher leaves it to the machine: what cannot be counted is not there.
    expect(distributedPlan({}, RANK, never)).not.toHaveProperty("device");
  });

  it("the one process that a launcher started trains alone, and starts no other", () => {
    expect(planOf({ restart: 2 }, { STROMA_ATTEMPT: "0" })).toEqual({ mode: "single" });
    expect(planOf({ restart: 2, gpus: 1 }, { STROMA_ATTEMPT: "1" })).toEqual({ mode: "single", device: "cuda:0" });
  });

  it("a rank: with the flags of its launcher, its own card and the time after which others are lost", () => {
    expect(planOf({}, RANK)).toMatchObject({ mode: "rank", spec: { rank: 2, size: 4 }, timeoutSeconds: 30 });
    expect(planOf({ ranks: 4, rankTimeout: 5, restart: 3 }, LAUNCHED)).toMatchObject({
      mode: "rank",
      timeoutSeconds: 5,
    });
    for (const cards of [2, 4])
      expect(planOf({}, { ...RANK, LOCAL_RANK: "1" }, cards)).toMatchObject({ device: "cuda:1" });
    for (const [flags, env, cards] of [
      [{}, RANK, 1],
      [{}, LAUNCHED, 4],
      [{ device: "cpu" }, RANK, 4],
    ] as const)
      expect(planOf(flags, env, cards)).not.toHaveProperty("device");
    for (const flags of [{ gpus: 2 }, { distributed: true }])
      expect(planOf(flags, { ...RANK, LOCAL_RANK: "1" })).toMatchObject({ mode: "rank", device: "cuda:1" });
    // srun --gpus-per-task=1 shows each rank its own card alone.
    expect(planOf({ distributed: true }, { ...RANK, LOCAL_RANK: "1" }, 1)).toMatchObject({ device: "cuda:0" });
  });
});

describe("contradictions are refused with the arithmetic", () => {
  it.each<[Parameters<typeof planOf>, string]>([
    [
      [{ ranks: 3 }, { ...RANK, WORLD_SIZE: "2", RANK: "0" }],
      "--ranks 3 asks for 3 ranks, and torchrun (WORLD_SIZE) started 2 (this is rank 0): 3 is not 2. Leave --ranks out",
    ],
    [
      [{ gpus: 4 }, RANK],
      "--gpus 4 asks for 4 ranks on this machine, and torchrun (WORLD_SIZE) started 2 here (4 in all): 4 is not 2.",
    ],
    [[{ ranks: 3, gpus: 2 }], "--ranks 3 and --gpus 2: one rank a card makes 2, and 3 is not 2."],
    [[{ ranks: 3, distributed: true }], "--ranks 3 and --distributed: one rank a card makes 4, and 3 is not 4."],
    [[{ gpus: 5 }], "--gpus 5: this machine has 4 cards to use, and 5 > 4"],
    [[{ gpus: 2 }, {}, 1], "this machine has 1 card to use, and 2 > 1"],
    [[{ distributed: true }, {}, 0], "--distributed: no card of this machine can be used"],
    [
      [{ distributed: true }, { ...RANK, LOCAL_WORLD_SIZE: "4" }, 2],
      "4 ranks were started on this machine, which has 2 cards to use: 4 > 2",
    ],
    [[{ gpus: 2, device: "cpu" }], "--gpus 2 trains on cards, and --device cpu is given"],
    [[{ gpus: 1, device: "cuda:1" }], "--device cuda:1 is given: leave one out; CUDA_VISIBLE_DEVICES says which"],
    [[{ ranks: 2, device: "cuda" }], "--ranks 2 and --device cuda: all ranks would be on one card"],
    [[{ device: "cuda:0" }, RANK], "torchrun (WORLD_SIZE) started 4 ranks and --device cuda:0"],
    [[{ restart: 1 }, RANK], "torchrun --max-restarts N"],
    [[{ transport: "gloo" }], "--transport gloo is how several ranks exchange"],
    [[{ rankTimeout: 5 }], "--rank-timeout 5 is for a run over several ranks"],
    [[{}, { RANK: "0", WORLD_SIZE: "2" }], "missing are LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT"],
  ])("%j", (args, message) => {
    expect(refused(...args)).toContain(message);
  });
});

describe("cards that may be used", () => {
  const machine = (n: number, visible?: string, cuda: string | null = "13.0") =>
    ({
      probe: {
        gpus: Array.from({ length: n }, (_, index) => ({ index, name: "a card", computeCapability: "8.6" })),
        driver: n === 0 ? null : { version: "580", cuda: "13.0" },
      },
      build: { version: "2.14.1", cuda },
      visible,
    }) as MachineFacts;

  it.each<[string | undefined, number, number]>([
    [undefined, 4, 4],
    ["0,1", 4, 2],
    ["3", 4, 1],
    ["", 4, 0],
    ["-1", 4, 0],
    ["0,-1,1", 4, 1],
    ["0,7,1", 4, 1],
    ["GPU-8932f937,MIG-a", 4, 2],
    ["0,1", 0, 0],
  ])("CUDA_VISIBLE_DEVICES=%s of %i: %i", (visible, cards, usable) => {
    expect(countCards({}, machine(cards, visible))).toBe(usable);
  });

  it("nothing that could count them is an error with its cure", () => {
    const notSetUp = expect.objectContaining({ code: "NOT_SET_UP" });
    expect(() => countCards({}, { ...machine(2), probe: null })).toThrow(notSetUp);
    expect(() => countCards({}, machine(2, undefined, null))).toThrow("this is the CPU build");
  });
});

describe("where a restart goes on", () => {
  const folder = mkdtempSync(join(tmpdir(), "stroma-resume-"));
  afterAll(() => rmSync(folder, { recursive: true, force: true }));
  const save = (run: string, step: number) =>
    mkdirSync(join(run, "checkpoints", `step-${String(step).padStart(6, "0")}`), { recursive: true });
  const given = ["train", "--steps", "9", "--resume", "runs/a", "--json"];

  it("as it began, until a checkpoint was saved since: then from the newest of the run's folder", async () => {
    const run = join(folder, "a");
    save(run, 5); // of an earlier run
    const point = new ResumePoint(given);
    expect(await point.arguments(0)).toEqual({ args: given });
    expect((await point.arguments(1)).args).toEqual(given);
    point.begun(run);
    expect(await point.arguments(1)).toEqual({ args: given, from: "no checkpoint was saved, so from where it began" });
    save(run, 10);
    const resumed = {
      args: ["train", "--steps", "9", "--json", `--resume=${run}`],
      from: `from the last checkpoint in ${run}`,
    };
    expect(await point.arguments(2)).toEqual(resumed);
    point.begun(run); // as the second attempt says too
    expect(await point.arguments(3)).toEqual(resumed);
  });

  it.each([
    [["train"], ["train"]],
    [["train", "--resume"], ["train"]],
    [
      ["train", "--resume", "--json"],
      ["train", "--json"],
    ],
    [
      ["train", "--resume=auto", "--seed", "1"],
      ["train", "--seed", "1"],
    ],
    [
      ["train", "--resume", "auto", "--seed", "1"],
      ["train", "--seed", "1"],
    ],
  ])("%j", async (args, kept) => {
    const run = join(folder, "b", String(Math.random()));
    const point = new ResumePoint(args);
    point.begun(run);
    await point.arguments(1); // what lies there has been looked at
    save(run, 1);
    expect((await point.arguments(1)).args).toEqual([...kept, `--resume=${run}`]);
  });
});
