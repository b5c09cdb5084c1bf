/**
 * Ranks on two machines, which are network namespaces of this one: that they find each other by whatever name or address,
 * and what each says when the link between them goes. Where the system has no namespaces to give, left out with a message.
 */
import { mkdirSync } from "node:fs";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, test, vi } from "vitest";
import { openCheckpoint } from "../../src/checkpoint/read.js";
import { tensorsOf } from "../support/checkpoint-tensors.js";
import { type Host, Hosts, hostsOrSkip } from "../support/hosts.js";
import { nativeOrSkip } from "../support/native.js";
import { begun, lossesOf, type Run, startRanks, startRun, until } from "./rank-runs.js";
import { nanoConfig, scratch } from "./spawn.js";

vi.setConfig({ testTimeout: 180_000 });
const folder = scratch();
const STEPS = 12;
const PORT = 29_400;
const args = (name: string, steps: number, ...more: string[]) => [
  ...["--config", nanoConfig(folder), "--steps", String(steps), "--save-every-n-steps", "2"],
  ...["--learning-rate-schedule", "constant", "--warmup-steps", "0", "--output-dir", join(folder, name), ...more],
];

describe.skipIf(!nativeOrSkip() || !hostsOrSkip())("two machines", () => {
  let hosts: Hosts;
  let losses: unknown[][];
  let tensors: Map<string, string>;
  beforeAll(async () => {
    mkdirSync(join(folder, "names"));
    hosts = new Hosts(join(folder, "names"));
    expect((await startRun(args("one", STEPS)).ended).code).toBe(0);
    losses = await lossesOf(join(folder, "one"));
    tensors = await tensorsOf(join(folder, "one"));
    expect(losses).toHaveLength(STEPS);
  });
  afterAll(() => hosts[Symbol.dispose]());

  /** Ranks in order, on the machines given. */
  const between = (on: readonly Host[], address: string, more: string[], env: Record<string, string> = {}) =>
    startRanks(more, {
      ...{ ranks: on.length, address, port: PORT },
      each: (rank) => ({ under: hosts.under(on[rank]!), env }),
    });

  async function same(name: string, runs: readonly Run[]): Promise<void> {
    for (const run of runs) expect((await run.ended).code, runs.map((r) => r.text()).join("\n")).toBe(0);
    expect(await lossesOf(join(folder, name))).toEqual(losses);
    expect(await tensorsOf(join(folder, name))).toEqual(tensors);
  }

  test.each([
    ["an address", "192.168.77.1", ""],
    ["a name", "alpha", "192.168.77.1 alpha"],
    ["a name that the machine itself knows as its loopback, as Debian's do", "alpha", "127.0.1.1 alpha"],
    ["an address of IPv6", "fd77::1", ""],
    ["a name that is IPv6 on one machine and IPv4 on the other", "alpha.six", "192.168.77.1 alpha.six"],
  ])("meet by %s, and train what one does, to the bit", async (what, address, line) => {
    hosts.names("alpha", line);
    hosts.names("beta", "fd77::1 alpha.six");
    const name = what.replaceAll(/\W/g, "-");
    await same(name, await between(["alpha", "beta"], address, args(name, STEPS)));
  });

  test("two ranks on the first, which knows itself as its loopback, and one on the second", async () => {
    hosts.names("alpha", "127.0.1.1 alpha");
    await same("three", await between(["alpha", "alpha", "beta"], "alpha", args("three", STEPS)));
  });

  test("an interface that does not lead to the others is named", async () => {
    const [alpha, beta] = await between(["alpha", "beta"], "192.168.77.1", args("lo", STEPS, "--rank-timeout", "3"), {
      GLOO_SOCKET_IFNAME: "lo",
    });
    expect((await alpha!.ended).code).not.toBe(0);
    expect((await beta!.ended).code).not.toBe(0);
    for (const run of [alpha!, beta!])
      expect(run.text()).toMatch(/by interface lo \(GLOO_SOCKET_IFNAME\) could not connect to all others/);
  });

  const cut: [string, () => void][] = [
    ["goes down where rank 1 is", () => hosts.cut("beta")],
    ["loses all packets without a word", () => hosts.drop("alpha", "beta")],
    ["goes down where rank 0 is", () => hosts.cut("alpha")],
    ["loses what rank 0 sends", () => hosts.drop("alpha")],
    ["loses what rank 1 sends", () => hosts.drop("beta")],
  ];
  // Each takes a quarter of a minute: all of them in a long series.
  test.each(Number(process.env.STROMA_KILLS ?? 0) >= 20 ? cut : cut.slice(0, 2))(
    "a link that %s ends both, each naming the other, and the run goes on from its checkpoint",
    async (what, breakIt) => {
      const name = what.replaceAll(" ", "-");
      // So many steps that none of them is the last before the link goes.
      const endless = args(name, 1_000_000, "--rank-timeout", "3");
      const [alpha, beta] = (await between(["alpha", "beta"], "192.168.77.1", endless)) as [Run, Run];
      await begun(alpha, 5);
      try {
        breakIt();
        await until(
          () => alpha.isOver() && beta.isOver(),
          25,
          () => `${alpha.text()}\n${beta.text()}`,
        );
      } finally {
        hosts.connect();
        for (const run of [alpha, beta]) run.kill("SIGKILL");
      }
      expect((await alpha.ended).code).toBe(1);
      expect((await beta.ended).code).toBe(1);
      expect(alpha.text()).toMatch(/rank 1 \(beta, process \d+\) (has been silent for 3 s|is gone|failed)/);
      expect(beta.text()).toMatch(
        /rank 0 \(alpha, process \d+\).* (has not answered for 3 s|has been silent|is gone|failed)/,
      );
      const { state } = await openCheckpoint(join(folder, name));
      const on = args(name, state.step + 2, "--resume");
      for (const run of await between(["alpha", "beta"], "192.168.77.1", on)) {
        expect((await run.ended).code, run.text()).toBe(0);
      }
      expect((await lossesOf(join(folder, name))).slice(0, STEPS)).toEqual(losses.slice(0, state.step + 2));
      expect((await openCheckpoint(join(folder, name))).state.step).toBe(state.step + 2);
    },
  );
});
