/**
 * Host memory that ranks share. Whatever they fetch from it is what they would have been sent: the numbers are those of the
 * run in which parts go from rank to rank, to the bit, with copies that are late and leave NaN until they are done. What
 * crosses to the devices and between ranks is what the plan says, and there is one copy of the parameters.
 */
import { mkdtempSync, readdirSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, describe, expect, it } from "vitest";
import type { Policy } from "../../src/plan/policy.js";
import type { Instruction, Stages, Tape } from "../../src/plan/types.js";
import { writeTape } from "../../src/plan/write-tape.js";
import type { SessionOptions } from "../../src/train/native-session.js";
import { nativeOrSkip } from "../support/native.js";
import { random } from "../support/random-models.js";
import { type LawCase, lawCase, pick } from "./offload-case.js";
import { RankGroups, randomStages, trainRanks } from "./rank-case.js";
import { differences, randomPolicy, sessionOptions } from "./trial.js";

const native = nativeOrSkip();
const cases = Number(process.env.STROMA_CASES ?? 30);
const firstSeed = Number(process.env.STROMA_SEED ?? 1);
const folder = mkdtempSync(join(tmpdir(), "stroma-shared-"));
const groups = new RankGroups(native);
afterAll(async () => {
  await groups.leave();
  rmSync(folder, { recursive: true, force: true });
});

const simulated = (c: LawCase, adversary: number | null): SessionOptions =>
  sessionOptions(c, {
    device: "sim",
    diskFolder: folder,
    threads: 1,
    sim: { memoryBytes: null, hostToDevice: null, deviceToHost: null, adversary },
  });

type Mesh = Omit<Stages, "rank" | "ranks">;
interface Drawn {
  c: LawCase;
  policy: Policy;
  size: number;
  mesh: Mesh;
  label: string;
}

/** Parameters live on the host, most of them; anything else is anywhere. Null: the draw fits no mesh. */
function drawn(seed: number, update?: Policy["update"]): Drawn | null {
  const c = lawCase(seed);
  const next = random(seed * 32_452_843 + 7);
  const policy: Policy = { ...randomPolicy(next, c) };
  if (policy.recompute === "none") policy.recompute = "all";
  if (policy.boundary === "slot") policy.boundary = "device";
  const [some, most] = [policy.param, next() < 0.7];
  policy.param = most ? "host" : (b) => (b % 2 === 0 || typeof some === "string" ? "host" : some(b));
  if (update !== undefined) policy.update = update;
  if (policy.update === "backward" && c.clip === "global") return null;
  if (next() < 0.3 && c.dtype === "float32") policy.reduceDType = "bfloat16";
  const zeros = c.graph.blocks.map(() => 0);
  const kind = next();
  const size = pick(next, [2, 2, 3, 4]);
  let mesh: Mesh = { of: zeros, shards: size };
  if (size === 4 && kind < 0.3) mesh = { of: zeros, shards: 2, replicas: 2 };
  if (size === 4 && kind > 0.7) {
    const of = randomStages(next, c.graph, 2);
    if (of === null) return null;
    mesh = { of, shards: 2 };
  }
  const members = mesh.shards! * (mesh.replicas ?? 1);
  if (c.microBatches < members) return null;
  if (c.microBatches % members !== 0 || members < size) policy.schedule = "breadthFirst";
  const label = `seed ${seed}: ${c.label}, ${JSON.stringify({ ...mesh, size })}, ${JSON.stringify({ ...policy, dims: undefined })}`;
  return { c, policy, size, mesh, label };
}

const run = async (
  { c, policy, size, mesh, label }: Drawn,
  shared: boolean,
  plant?: (steps: Tape[]) => void,
  seed = 1,
) =>
  trainRanks(
    native!,
    await groups.of(size),
    simulated(c, shared ? seed : null),
    c,
    policy,
    { ...mesh, ...(shared ? ({ sharedHost: true } as const) : {}) },
    { plant },
  ).catch((error: Error) => {
    throw new Error(`${label}: ${error.message}`);
  });

const total = (list: readonly number[]): number => list.reduce((a, b) => a + b, 0);
const isWord = (i: Instruction): boolean => (i.op === "send" || i.op === "receive") && i.operand.kind === "updated";
const isOthers = (i: Instruction): boolean => i.op === "copy" && i.operand.kind === "param" && "shard" in i.operand;

describe.skipIf(!native)("ranks that share host memory", () => {
  it(`train what they train by messages, move what is planned: ${cases} random models, plans and meshes`, {
    timeout: cases * 9_000 + 60_000,
  }, async () => {
    const seen = new Set<string>();
    for (let seed = firstSeed, tried = 0; tried < cases; seed++) {
      const d = drawn(seed);
      if (d === null) continue;
      tried++;
      const gathered = await run(d, false);
      const shared = await run(d, true, undefined, seed);
      expect(differences(shared, gathered), d.label).toEqual([]);
      for (const [i, r] of gathered.results.entries())
        for (const theirs of [shared.results, ...shared.others]) {
          expect(theirs[i]!.loss, d.label).toBe(r.loss);
          expect(theirs[i]!.microBatchLosses, d.label).toEqual(r.microBatchLosses);
        }
      expect(shared.traffic, d.label).toEqual([]);
      expect(shared.sent, d.label).toEqual(shared.planned);
      expect(total(shared.sent), d.label).toBeLessThan(total(gathered.sent));
      seen
        .add(`update ${d.policy.update}`)
        .add(`clip ${d.c.clip}`)
        .add(`${d.c.state.storage} ${d.c.dtype}`)
        .add(d.c.state.optimizer);
      seen.add(`${d.size} ${d.mesh.shards}`);
    }
    if (cases >= 30) for (const what of WANTED) expect([...seen]).toContain(what);
    expect(readdirSync(folder)).toEqual([]);
  });

  it("are found out where one reads what it has not been told of", { timeout: 240_000 }, async () => {
    let found = 0;
    for (let seed = firstSeed + 1000, tried = 0; tried < 6; seed++) {
      const d = drawn(seed, "forward");
      if (d === null || d.policy.param !== "host") continue;
      tried++;
      const good = await run(d, true, undefined, seed);
      const bad = await run(
        d,
        true,
        (steps) => {
          for (const { instructions } of steps)
            for (const i of instructions) if (isOthers(i)) i.waits = i.waits.filter((w) => !isWord(instructions[w]!));
        },
        seed,
      ).catch(() => null);
      found += bad === null || differences(bad, good).length > 0 ? 1 : 0;
    }
    expect(found).toBeGreaterThan(0);
  });

  it("hold one copy of the parameters, and put on the wire what is planned", { timeout: 60_000 }, async () => {
    const c: LawCase = { ...lawCase(3), clip: "none", maxGradNorm: null };
    const zeros = c.graph.blocks.map(() => 0);
    const stages = { of: zeros, shards: 2, sharedHost: true } as const;
    const policy: Policy = {
      ...randomPolicy(random(5), c),
      ...{ schedule: "breadthFirst", update: "end", recompute: "all", clip: "none", boundary: "device" },
      ...{ param: "host", optimizer: "host", retained: "host" },
    };
    const ranks = await groups.of(2);
    const tapes = [0, 1].map((rank) => writeTape(c.graph, { ...policy, stages: { ...stages, rank, ranks: 2 } }).step);
    const { sharedBytes } = tapes[0]!.placement.arenas;
    const sessions = ranks.map((r) => native!.createSession({ ...simulated(c, 1), ranks: r }));
    const mapped = () => [
      ...readFileSync("/proc/self/smaps", "utf8").matchAll(
        /memfd:stroma[^\n]*\nSize: +(\d+) kB[\s\S]*?Rss: +(\d+) kB[\s\S]*?Pss: +(\d+)/g,
      ),
    ];
    expect(mapped()).toHaveLength(0);
    await Promise.all(sessions.map((s, r) => s.load(c.graph, tapes[r]!.placement)));
    await Promise.all(sessions.map((s) => s.initialize(7)));
    const before = ranks.map((r) => r.counts().sentBytes);
    for (const step of c.steps) await Promise.all(sessions.map((s, r) => s.step({ tape: tapes[r]!, ...step })));
    for (const [r, tape] of tapes.entries()) {
      const planned = tape.instructions.reduce((n, i) => n + (i.op === "send" ? i.bytes : 0), 0);
      // And a byte with which a step begins when all have ended the one before.
      expect(ranks[r]!.counts().sentBytes - before[r]!).toBe(c.steps.length * (planned + 1));
    }
    // Both ranks of this process map the same pages.
    const found = mapped();
    expect(found.map(([, kB]) => Number(kB) * 1024)).toEqual([sharedBytes, sharedBytes]);
    const pss = found.reduce((sum, [, , , kB]) => sum + Number(kB) * 1024, 0);
    expect(pss).toBeLessThanOrEqual(1.01 * sharedBytes! + 4096);
    await Promise.all(sessions.map((s) => s.dispose()));
    expect(mapped()).toHaveLength(0);
    expect(readdirSync("/dev/shm").filter((name) => name.includes("stroma"))).toEqual([]);
  });
});

describe.skipIf(!native)("host memory that cannot be shared", () => {
  it("is refused on all ranks alike, and they go on", { timeout: 60_000 }, async () => {
    const c = lawCase(3);
    const policy: Policy = { ...randomPolicy(random(5), c), recompute: "all", boundary: "device", param: "host" };
    const stages = { of: c.graph.blocks.map(() => 0), shards: 3, sharedHost: true } as const;
    const ranks = await groups.of(3);
    const placement = (rank: number, more: number) => {
      const { placement } = writeTape(c.graph, {
        ...policy,
        ...{ schedule: "breadthFirst", microBatches: 3, stages: { ...stages, rank, ranks: 3 } },
      }).step;
      const { arenas } = placement;
      return { ...placement, arenas: { ...arenas, sharedBytes: arenas.sharedBytes! + more } };
    };
    const load = (more: number) =>
      Promise.allSettled(
        ranks.map(async (r) => {
          const session = native!.createSession({ ...simulated(c, null), ranks: r });
          try {
            await session.load(c.graph, placement(r.rank, more));
          } finally {
            await session.dispose();
          }
        }),
      );
    for (const settled of await load(2 ** 50)) {
      expect(settled).toMatchObject({ status: "rejected", reason: { code: "OUT_OF_MEMORY" } });
      const { message } = (settled as PromiseRejectedResult).reason as Error;
      expect(message).toMatch(/bytes of host memory that ranks share were planned, and \d+ are available/);
    }
    for (const settled of await load(0)) expect(settled.status).toBe("fulfilled");
  });
});

/** What the cases of a whole run are made of. */
const WANTED = [
  ...["update end", "update backward", "update forward", "clip none", "clip block", "clip global"],
  ...["float32 float32", "bfloat16 float32", "float64 float64", "adamw", "adamw8bit"],
  ...["2 2", "3 3", "4 4", "4 2"],
];
