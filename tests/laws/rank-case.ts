/** Several ranks in one process, each a session with a thread of its own, talking over Gloo and loopback. */
import { createServer } from "node:net";
import type { NativeAddon } from "../../src/native.js";
import { checkRanks } from "../../src/plan/check-ranks.js";
import type { Policy } from "../../src/plan/policy.js";
import { writeTape } from "../../src/plan/write-tape.js";
import type { NativeRanks, SessionOptions } from "../../src/train/native-session.js";
import { bytesOf, type LawCase, type Outcome } from "./offload-case.js";

export function freePort(): Promise<number> {
  return new Promise((done, fail) => {
    const server = createServer();
    server.on("error", fail);
    server.listen(0, "127.0.0.1", () => {
      const { port } = server.address() as { port: number };
      server.close(() => done(port));
    });
  });
}

export async function joinAll(native: NativeAddon, size: number, silenceSeconds = 30): Promise<NativeRanks[]> {
  const port = await freePort();
  const spec = { size, address: "127.0.0.1", port, serve: true, prefix: "", joinSeconds: 30, silenceSeconds };
  return Promise.all([...Array(size).keys()].map((rank) => native.joinRanks({ ...spec, rank })));
}

/** What all ranks hold after the steps; each rank's results must be those of rank 0. */
export async function trainRanks(
  native: NativeAddon,
  ranks: readonly NativeRanks[],
  options: SessionOptions,
  c: LawCase,
  policy: Policy,
  of: number[],
): Promise<Outcome & { sent: number[]; planned: number[]; results: Outcome["results"]; others: Outcome["results"][] }> {
  const plans = ranks.map(({ rank, size }) => writeTape(c.graph, { ...policy, stages: { rank, ranks: size, of } }));
  checkRanks(
    c.graph,
    plans.map((p) => p.step),
    plans.flatMap((p) => (p.flush === null ? [] : [p.flush])),
  );
  const run = async (r: NativeRanks) => {
    const plan = plans[r.rank]!;
    const session = native.createSession({ ...options, ranks: r });
    try {
      await session.load(c.graph, plan.step.placement);
      await session.initialize(7);
      const results = [];
      for (const step of c.steps)
        results.push(
          await session.step({ tape: plan.step, ...(plan.flush === null ? {} : { flush: plan.flush }), ...step }),
        );
      const state: [string, string][] = [];
      for (const { kind, name } of await session.state())
        state.push([`${kind} ${name}`, bytesOf(await session.read(kind, name)).toString("base64")]);
      return { results, state };
    } finally {
      await session.dispose();
    }
  };
  const outcomes = await Promise.all(ranks.map(run));
  return {
    results: outcomes[0]!.results,
    others: outcomes.slice(1).map((o) => o.results),
    state: new Map(outcomes.flatMap((o) => o.state)),
    sent: outcomes.map((o) => o.results.at(-1)!.bytesSent),
    planned: plans.map((p) => p.step.instructions.reduce((n, i) => n + (i.op === "send" ? i.bytes : 0), 0)),
  };
}
