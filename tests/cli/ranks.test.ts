/**
 * Several ranks as a user runs them, and what happens when one is lost: the others end within seconds and name it, the
 * last checkpoint is whole, any number of ranks goes on from it, and what is trained in the end is what an undisturbed
 * run trains. STROMA_KILLS sets how many are killed (STROMA_BUILT=1 halves the time); from 20 on the times from kill to
 * end are printed.
 */
import { existsSync, readdirSync } from "node:fs";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, test, vi } from "vitest";
import { openCheckpoint, verifyCheckpoint } from "../../src/checkpoint/read.js";
import { Draws } from "../../src/data/planets/philox.js";
import { freePort } from "../laws/rank-case.js";
import { tensorsOf } from "../support/checkpoint-tensors.js";
import { nativeOrSkip } from "../support/native.js";
import { begun, lossesOf, type Run, ranksOf, startRanks, startRun, until } from "./rank-runs.js";
import { nanoConfig, scratch } from "./spawn.js";

const native = nativeOrSkip();
const KILLS = Number(process.env.STROMA_KILLS ?? 4);
/** Every case in a long run, the first few in a short one. */
const some = <T>(cases: T[], few: number): T[] => (KILLS >= 20 ? cases : cases.slice(0, few));
const SEED = Number(process.env.STROMA_KILLS_SEED ?? 31);
const STEPS = 60;
vi.setConfig({ testTimeout: 300_000 });
const root = scratch();
const folder = (name: string) => join(root, name);

const args = (name: string, steps: number, ...more: string[]) => [
  ...[
    "--config",
    nanoConfig(root),
    "--steps",
    String(steps),
    "--learning-rate-schedule",
    "constant",
    "--warmup-steps",
    "0",
  ],
  ...["--output-dir", folder(name), ...more],
];
const ENDLESS = 1_000_000;

/** What an undisturbed process trains. */
let losses: unknown[][];
let tensors: Map<string, string>;
async function expectSame(name: string): Promise<void> {
  expect(await lossesOf(folder(name))).toEqual(losses);
  expect(await tensorsOf(folder(name))).toEqual(tensors);
}
async function expectWhole(name: string): Promise<void> {
  if (!existsSync(join(folder(name), "checkpoints", "latest"))) return;
  await verifyCheckpoint((await openCheckpoint(folder(name))).path);
}

describe.skipIf(!native)("stroma train over ranks", () => {
  beforeAll(async () => {
    const { code, stderr } = await startRun(args("one", STEPS)).ended;
    expect(code, stderr).toBe(0);
    losses = await lossesOf(folder("one"));
    tensors = await tensorsOf(folder("one"));
    expect(losses).toHaveLength(STEPS);
  });

  test("trains, and one rank goes on from it", async () => {
    const many = startRun(args("plain", 3, "--ranks", "2"));
    expect((await many.ended).code, many.text()).toBe(0);
    expect(many.text()).toMatch(/step 3\/3/);
    expect(many.text()).toMatch(/rank 0 of 2/);
    const one = startRun(args("plain", STEPS, "--resume"));
    expect((await one.ended).code, one.text()).toBe(0);
    await expectSame("plain");
  });

  describe("killed", () => {
    type When = "starting" | "training" | "saving";
    const times: { ranks: number; victim: string; when: When; ms: number }[] = [];
    afterAll(() => {
      if (times.length >= 20) process.stdout.write(`${summaryOf(times)}\n`);
    });

    test(`${KILLS} times, a rank or the launcher, at any instant`, { timeout: 60_000 + KILLS * 30_000 }, async () => {
      const draws = new Draws(SEED, 0, 0);
      const pick = <T>(list: readonly T[]): T => list[Math.floor(draws.uniform() * list.length)]!;
      let name = "killed-0";
      for (let round = 0; times.length < KILLS; ) {
        const ranks = 2 + (times.length % 2);
        const victim = pick(["launcher", ...Array(ranks).keys()] as const);
        const when = pick<When>(["starting", "training", "saving"]);
        const seconds = draws.uniform() * { starting: 2, training: 1, saving: 0.02 }[when];
        const run = startRun(
          args(
            name,
            STEPS,
            ...["--ranks", String(ranks), "--save-every-n-steps", "1", "--resume", "auto", "--rank-timeout", "5"],
          ),
        );
        const pid = await at(run, name, ranks, victim, when, seconds);
        if (pid !== null && kill(pid)) {
          const from = performance.now();
          const { code, signal } = await run.ended;
          await until(() => ranksOf(folder(name)).size === 0, 20, run.text);
          const ms = performance.now() - from;
          expect(ms, run.text()).toBeLessThan(20_000);
          if (victim === "launcher") expect(signal).toBe("SIGKILL");
          else {
            expect(code, run.text()).toBe(137);
            expect(run.text()).toContain(`rank ${victim} (process ${pid}) was ended by SIGKILL`);
          }
          times.push({ ranks, victim: String(victim), when, ms });
          if (KILLS >= 20) process.stdout.write(`${times.length} ${ranks} ${victim} ${when} ${ms.toFixed(0)} ms\n`);
          await expectWhole(name);
        }
        const { code } = await run.ended;
        if (code !== 0) continue;
        await expectSame(name);
        name = `killed-${++round}`;
      }
      const last = startRun(args(name, STEPS, "--resume", "auto", "--ranks", "2"));
      expect((await last.ended).code, last.text()).toBe(0);
      await expectSame(name);
      const left = readdirSync(join(folder(name), "checkpoints")).filter((n) => n.startsWith("."));
      expect(left).toEqual([]);
    });

    /** Waits for the instant; the process to kill, or null where the run was over before. */
    async function at(
      run: Run,
      name: string,
      ranks: number,
      victim: "launcher" | number,
      when: When,
      seconds: number,
    ): Promise<number | null> {
      const checkpoints = join(folder(name), "checkpoints");
      const written = (): boolean =>
        existsSync(checkpoints) && readdirSync(checkpoints).some((n) => n.startsWith(".tmp-"));
      if (when === "starting") await until(() => run.isOver() || ranksOf(folder(name)).size === ranks, 120, run.text);
      else await until(() => run.isOver() || /step +\d+\//.test(run.text()), 120, run.text);
      const pid = victim === "launcher" ? run.pid : ranksOf(folder(name)).get(victim);
      if (when === "saving") await until(() => run.isOver() || written(), 120, run.text);
      await new Promise((done) => setTimeout(done, seconds * 1000));
      return run.isOver() ? null : (pid ?? null);
    }
  });

  describe("without a launcher of ours", () => {
    const killed = [
      [3, 0],
      [3, 1],
      [2, 0],
      [2, 1],
      [3, 2],
    ] as [number, number][];
    test.each(some(killed, 2))("of %i, rank %i is killed: each of the others names it", async (ranks, victim) => {
      const runs = await startRanks(args(`alone-${ranks}-${victim}`, ENDLESS, "--rank-timeout", "5"), { ranks });
      await begun(runs[0]!);
      const { pid } = runs[victim]!;
      kill(pid);
      for (const [rank, run] of runs.entries()) {
        const { code } = await run.ended;
        if (rank === victim) continue;
        expect(code, run.text()).toBe(1);
        expect(run.text()).toMatch(new RegExp(`rank ${victim} \\(.+, process ${pid}\\).* (is gone|failed)`));
      }
    });

    test("one of two is asked to stop: both save and say that they are not done", async () => {
      const runs = await startRanks(args("drained", ENDLESS), { ranks: 2 });
      await begun(runs[0]!, 3);
      runs[1]!.kill("SIGTERM");
      for (const run of runs) expect((await run.ended).code, run.text()).toBe(143);
      await expectWhole("drained");
    });

    test("a rank that is started again while the others still end meets the next rank 0", async () => {
      const port = 21_000 + (process.pid % 5000);
      const more = ["--rank-timeout", "5", "--save-every-n-steps", "1"];
      const first = await startRanks(args("again", ENDLESS, ...more), { ranks: 2, port });
      await begun(first[0]!, 3);
      // The old rank 0 is there, and does not notice: the store that the new rank 1 finds is the old one.
      first[0]!.kill("SIGSTOP");
      first[1]!.kill("SIGKILL");
      await first[1]!.ended;
      first[0]!.kill("SIGCONT");
      const [, again] = await startRanks(args("again", STEPS, ...more, "--resume", "auto"), {
        ranks: 2,
        port,
        each: only(1),
      });
      expect((await first[0]!.ended).code).toBe(1);
      const [zero] = await startRanks(args("again", STEPS, ...more, "--resume", "auto"), {
        ranks: 2,
        port,
        each: only(0),
      });
      expect((await again!.ended).code, again!.text()).toBe(0);
      expect((await zero!.ended).code, zero!.text()).toBe(0);
      await expectSame("again");
    });
  });

  test("in a store that outlives them, started again by agents that count differently, they meet", async () => {
    const port = await freePort();
    const self = { rank: 0, size: 1, address: "127.0.0.1", port, serve: true, joinSeconds: 30, silenceSeconds: 30 };
    const agent = await native!.joinRanks({ ...self, prefix: "/agent" });
    const restarted = (counts: readonly number[]) => (rank: number) => ({
      env: { TORCHELASTIC_USE_AGENT_STORE: "True", TORCHELASTIC_RESTART_COUNT: String(counts[rank]) },
    });
    const more = ["--save-every-n-steps", "1"];
    const first = await startRanks(args("agents", ENDLESS, ...more), { ranks: 2, port, each: restarted([0, 0]) });
    await begun(first[0]!, 3);
    for (const run of first) run.kill("SIGKILL");
    await Promise.all(first.map((run) => run.ended));
    const again = args("agents", STEPS, ...more, "--resume", "auto");
    for (const run of await startRanks(again, { ranks: 2, port, each: restarted([0, 1]) }))
      expect((await run.ended).code, run.text()).toBe(0);
    await expectSame("agents");
    await agent.leave();
  });

  describe("frozen", () => {
    test("under a launcher: all end, the frozen one is named and is gone", async () => {
      const run = startRun(args("frozen", ENDLESS, "--ranks", "2", "--rank-timeout", "3"));
      await begun(run);
      process.kill(ranksOf(folder("frozen")).get(1)!, "SIGSTOP");
      expect((await run.ended).code, run.text()).not.toBe(0);
      expect(run.text()).toMatch(/rank 1 \(.*\) has been silent for 3 s/);
      await until(() => ranksOf(folder("frozen")).size === 0, 5);
    });

    const frozenOf = [
      [2, [0]],
      [3, [1, 2]],
      [2, [1]],
      [3, [0]],
      [3, [0, 1]],
    ] as [number, number[]][];
    test.each(some(frozenOf, 2))(
      "of %i, %j: the others end and name one; continued, those end too",
      async (ranks, frozen) => {
        const name = `frozen-${ranks}-${frozen.join("-")}`;
        const runs = await startRanks(args(name, ENDLESS, "--rank-timeout", "3", "--save-every-n-steps", "2"), {
          ranks,
        });
        await begun(runs[0]!, 3);
        for (const rank of frozen) runs[rank]!.kill("SIGSTOP");
        const others = runs.filter((_, rank) => !frozen.includes(rank));
        await until(
          () => others.every((run) => run.isOver()),
          20,
          () => others.map((run) => run.text()).join("\n"),
        );
        const named = frozen.map((rank) => `rank ${rank} \\(.+, process ${runs[rank]!.pid}\\)`).join("|");
        for (const run of others) {
          expect((await run.ended).code, run.text()).toBe(1);
          expect(run.text()).toMatch(new RegExp(`(${named}).* (has been silent|has not answered) for 3 s`));
        }
        const last = frozen.map((rank) => runs[rank]!);
        for (const run of last) run.kill("SIGCONT");
        await until(
          () => last.every((run) => run.isOver()),
          20,
          () => last.map((run) => run.text()).join("\n"),
        );
        for (const run of last) expect((await run.ended).code, run.text()).toBe(1);
        await expectWhole(name);
      },
    );

    const paused = [[[0, 2]], [[0, 1, 2]], [[0]], [[1]]] as [number[]][];
    test.each(some(paused, 2))("%j, and continued in time: as if nothing was", async (frozen) => {
      const name = `paused-${frozen.join("-")}`;
      const runs = await startRanks(args(name, STEPS, "--rank-timeout", "6", "--save-every-n-steps", "20"), {
        ranks: 3,
      });
      await begun(runs[0]!, 2);
      for (const rank of frozen) runs[rank]!.kill("SIGSTOP");
      await new Promise((done) => setTimeout(done, 2500));
      expect(runs.filter((run) => run.isOver())).toEqual([]);
      for (const rank of frozen) runs[rank]!.kill("SIGCONT");
      for (const run of runs) expect((await run.ended).code, run.text()).toBe(0);
      await expectSame(name);
    });

    test("all by Ctrl-Z, for longer than a rank may be silent: as if nothing was", async () => {
      const run = startRun(args("suspended", STEPS, "--ranks", "2", "--rank-timeout", "2"));
      await begun(run, 2);
      run.kill("SIGTSTP");
      await new Promise((done) => setTimeout(done, 5000));
      expect(ranksOf(folder("suspended")).size).toBe(2);
      run.kill("SIGCONT");
      expect((await run.ended).code, run.text()).toBe(0);
      await expectSame("suspended");
    });
  });

  test("asked to end before all are there, a rank ends at once", async () => {
    const [zero] = await startRanks(args("lonely", STEPS), { ranks: 2, each: only(0) });
    // It shows nothing until all are there: by then it looks for signals.
    await new Promise((done) => setTimeout(done, 3000));
    zero!.kill("SIGINT");
    await until(() => zero!.isOver(), 10, zero!.text);
    expect((await zero!.ended).code, zero!.text()).toBe(130);
  });
});

/** False where it has ended already. */
function kill(pid: number): boolean {
  try {
    return process.kill(pid, "SIGKILL");
  } catch {
    return false;
  }
}

/** Of the ranks that startRanks() starts only one trains; the others are commands that end at once. */
const only = (rank: number) => (each: number) => (each === rank ? {} : { under: ["true"] });

function summaryOf(times: readonly { ranks: number; victim: string; when: string; ms: number }[]): string {
  const line = (what: string, some: readonly { ms: number }[]): string => {
    const sorted = some.map(({ ms }) => ms).sort((a, b) => a - b);
    const seconds = (ms = 0) => (ms / 1000).toFixed(2);
    return `${what}: ${sorted.length} kills, from kill to end median ${seconds(sorted[sorted.length >> 1])} s, longest ${seconds(sorted.at(-1))} s`;
  };
  const groups = new Map<string, { ms: number }[]>();
  for (const time of times)
    for (const key of [
      `${time.ranks} ranks`,
      time.when,
      time.victim === "launcher" ? "launcher" : `rank ${time.victim}`,
    ])
      groups.set(key, [...(groups.get(key) ?? []), time]);
  return [line("all", times), ...[...groups].map(([key, some]) => line(key, some))].join("\n");
}
