/** Several ranks in one process, each a session with a thread of its own, talking over Gloo and loopback. */
import { createServer } from "node:net";
import { dtypeBytes } from "../../src/graph/value.js";
import type { NativeAddon } from "../../src/native.js";
import { checkRanks } from "../../src/plan/check-ranks.js";
import { ownersOf } from "../../src/plan/layout.js";
import type { Policy } from "../../src/plan/policy.js";
import { assignStages, stretchesOf } from "../../src/plan/stages.js";
import type { Stages, Tape } from "../../src/plan/types.js";
import { writeTape } from "../../src/plan/write-tape.js";
import type { NativeRanks, SessionOptions } from "../../src/train/native-session.js";
import { bytesOf, type LawCase, type Outcome } from "./offload-case.js";
import { trafficDifferences } from "./trial.js";

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

/** Ranks by their number, joined when they are first asked for. */
export class RankGroups {
  readonly #groups = new Map<number, NativeRanks[]>();
  constructor(private readonly native: NativeAddon | null) {}

  async of(size: number): Promise<NativeRanks[]> {
    let ranks = this.#groups.get(size);
    if (ranks === undefined) {
      ranks = await joinAll(this.native!, size);
      this.#groups.set(size, ranks);
    }
    return ranks;
  }
  async leave(): Promise<void> {
    for (const ranks of this.#groups.values()) await Promise.all(ranks.map((r) => r.leave()));
  }
}

interface Part {
  key: string;
  /** Bytes of the whole tensor; where this part begins in it. */
  whole: number;
  begin: number;
  bytes: Buffer;
}

/** Whole tensors from the parts that ranks hold; replicas must agree. */
function assemble(parts: readonly Part[]): Map<string, string> {
  const tensors = new Map<string, { bytes: Buffer; known: Uint8Array }>();
  for (const { key, whole, begin, bytes } of parts) {
    let tensor = tensors.get(key);
    if (tensor === undefined) {
      tensor = { bytes: Buffer.alloc(whole), known: new Uint8Array(whole) };
      tensors.set(key, tensor);
    }
    const there = tensor.bytes.subarray(begin, begin + bytes.length);
    if (tensor.known[begin] === 1 && !there.equals(bytes)) throw new Error(`ranks hold different ${key}`);
    bytes.copy(there);
    tensor.known.fill(1, begin, begin + bytes.length);
  }
  for (const [key, { known }] of tensors) if (known.includes(0)) throw new Error(`no rank holds a part of ${key}`);
  return new Map([...tensors].map(([key, { bytes }]) => [key, bytes.toString("base64")]));
}

/** Steps and flushes of all ranks. */
export const plansOf = (c: LawCase, policy: Policy, size: number, stages: Omit<Stages, "rank" | "ranks">) =>
  Array.from({ length: size }, (_, rank) =>
    writeTape(c.graph, { ...policy, stages: { ...stages, rank, ranks: size } }),
  );

export interface RankOutcome extends Outcome {
  others: Outcome["results"][];
  /** Bytes that each rank sent in its last step, and that its tape says. */
  sent: number[];
  planned: number[];
  /** What ranks moved to and from their devices and disks otherwise than their tapes say. */
  traffic: string[];
}

interface Given {
  plans?: ReturnType<typeof plansOf>;
  plant?: ((steps: Tape[]) => void) | undefined;
}

/**
 * What all ranks hold after the steps; each rank's results must be those of rank 0. `plans`: other than the policy's.
 * `plant`: a fault in the tapes, which are then not proved.
 */
export async function trainRanks(
  native: NativeAddon,
  ranks: readonly NativeRanks[],
  options: SessionOptions,
  c: LawCase,
  policy: Policy,
  stages: Omit<Stages, "rank" | "ranks">,
  { plans = plansOf(c, policy, ranks.length, stages), plant }: Given = {},
): Promise<RankOutcome> {
  const steps = plans.map((p) => p.step);
  if (plant !== undefined) plant(steps);
  else
    checkRanks(
      c.graph,
      steps,
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
      const state: Part[] = [];
      for (const { kind, name, shape, dtype, begin } of await session.state()) {
        const bytes = Buffer.from(bytesOf(await session.read(kind, name)));
        const whole = shape.reduce((a, b) => a * b, dtypeBytes(dtype));
        state.push({ key: `${kind} ${name}`, whole, begin, bytes });
      }
      return { results, state };
    } finally {
      await session.dispose();
    }
  };
  const outcomes = await Promise.all(ranks.map(run));
  return {
    results: outcomes[0]!.results,
    others: outcomes.slice(1).map((o) => o.results),
    state: assemble(outcomes.flatMap((o) => o.state)),
    sent: outcomes.map((o) => o.results.at(-1)!.bytesSent),
    traffic: outcomes.flatMap((o, rank) =>
      trafficDifferences({ ...o, state: new Map() }, steps[rank]!).map((d) => `rank ${rank}: ${d}`),
    ),
    planned: plans.map((p) => p.step.instructions.reduce((n, i) => n + (i.op === "send" ? i.bytes : 0), 0)),
  };
}

/** Every rank with something, tied blocks together or wherever they fall; null where the draw left one without. */
export function randomStages(
  next: () => number,
  graph: LawCase["graph"],
  ranks: number,
  ties: "together" | "apart" = "together",
): number[] | null {
  const of: number[] = [];
  const inOrder = next() < 0.5;
  for (const b of graph.blocks.keys()) {
    const first = ownersOf(graph, b)[0];
    const drawn = inOrder ? Math.floor((b * ranks) / graph.blocks.length) : Math.floor(next() * ranks);
    of.push(ties === "together" && first !== undefined && first < b ? of[first]! : drawn);
  }
  return new Set(of).size === ranks ? of : null;
}

/** Whether stages share a parameter. */
export const shareAcross = (graph: LawCase["graph"], of: readonly number[]): boolean =>
  graph.blocks.some((_, b) => ownersOf(graph, b).some((owner) => of[owner] !== of[b]));

/** Two stretches of blocks a rank; null where the graph has too few for it. */
export function interleavedStages(graph: LawCase["graph"], ranks: number): number[] | null {
  if (graph.blocks.length < 2 * ranks) return null;
  const of = assignStages(graph, ranks, "interleaved");
  return stretchesOf({ rank: 0, ranks, of }) === null ? null : of;
}
