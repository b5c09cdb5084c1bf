/** A trial of law 1: a random model under a random plan beside its plain resident run; and the simplest trial that fails. */
import { StromaError } from "../../src/errors.js";
import type { Graph } from "../../src/graph/types.js";
import type { NativeAddon } from "../../src/native.js";
import { checkTape } from "../../src/plan/checker.js";
import { residentPolicy } from "../../src/plan/planner.js";
import { checkPolicy, type Home, type Policy, type Space3 } from "../../src/plan/policy.js";
import type { CopyQueue, Tape } from "../../src/plan/types.js";
import { writeTape } from "../../src/plan/write-tape.js";
import type { SessionOptions, SimDeviceOptions } from "../../src/train/native-session.js";
import { random } from "../support/random-models.js";
import { type LawCase, lawCase, type Outcome, pick, trainCase } from "./offload-case.js";

export interface Trial {
  c: LawCase;
  policy: Policy;
  sim: SimDeviceOptions;
}

const SPACES = ["device", "host", "disk"] as const;

/** A plan of any kind for the case, with the same arithmetic as its resident one. */
export function randomPolicy(next: () => number, c: LawCase): Policy {
  const home = (): Home => {
    if (next() < 0.6) return pick(next, SPACES);
    const list = Array.from({ length: 5 }, () => pick(next, SPACES));
    return (b) => list[b % list.length]!;
  };
  const kind = next();
  const recompute = kind < 0.45 ? "all" : kind < 0.75 ? "selective" : "none";
  return {
    update: pick(next, c.clip === "global" ? ["end", "forward"] : ["end", "backward", "forward"]),
    schedule: pick(next, ["breadthFirst", "breadthFirst", "depthFirst"]),
    recompute,
    clip: c.clip,
    state: c.state,
    microBatches: c.microBatches,
    dims: c.dims,
    param: recompute === "none" ? "device" : home(),
    optimizer: home(),
    boundary: pick(next, recompute === "none" ? ["slot", "device"] : ["slot", "device", "host", "disk"]),
    retained: home(),
    // Lossless, so that the numbers may be equal: what is packed smaller is another rounding by nature.
    retainedDType: c.dtype === "float64" ? "float64" : "float32",
    prefetch: Math.floor(next() * 3),
    parts: 1 + Math.floor(next() * 4),
  };
}

/** The same seed, the same trial. */
export function randomTrial(seed: number): Trial {
  const c = lawCase(seed);
  const next = random(seed * 7919 + 13);
  const policy = randomPolicy(next, c);
  const adversary = next() < 0.6 ? seed : null;
  const hostToDevice = next() < 0.2 ? 2e8 : null;
  return { c, policy, sim: { memoryBytes: null, hostToDevice, deviceToHost: null, adversary } };
}

export function sessionOptions(c: LawCase, extra: Partial<SessionOptions> = {}): SessionOptions {
  const { storage, masterWeight, optimizer: kind } = c.state;
  const optimizer = { kind, beta1: 0.9, beta2: 0.95, epsilon: 1e-8, weightDecay: 0.1 };
  return { device: "cpu", dtype: c.dtype, storage, masterWeight, threads: 2, optimizer, ...extra };
}

/** The plain depth-first run in which nothing moves. */
export function trainResident(native: NativeAddon, c: LawCase, threads = 2): Promise<Outcome> {
  const policy = residentPolicy(c.graph, { microBatches: c.microBatches, clip: c.clip, state: c.state });
  return trainCase(native, sessionOptions(c, { threads }), c, { step: writeTape(c.graph, policy).step, flush: null });
}

/** What of `a` differs from `b`, by name. */
export function differences(a: Outcome, b: Outcome): string[] {
  const differing = [...b.state].filter(([key, data]) => a.state.get(key) !== data).map(([key]) => key);
  if (a.state.size !== b.state.size) differing.push(`${a.state.size} tensors of state for ${b.state.size}`);
  for (const [i, r] of b.results.entries())
    if (!Object.is(a.results[i]!.gradNorm, r.gradNorm))
      differing.push(`norm of step ${i}: ${a.results[i]!.gradNorm} for ${r.gradNorm}`);
  return differing;
}

const QUEUES = { in: "bytesToDevice", out: "bytesFromDevice", load: "bytesLoaded", save: "bytesSaved" } as const;

/** Bytes that the step's copies moved, where they are not those of its tape. */
export function trafficDifferences({ results }: Outcome, tape: Tape): string[] {
  return results.flatMap((r, step) =>
    (Object.keys(QUEUES) as CopyQueue[]).flatMap((queue) => {
      const planned = tape.instructions.reduce((n, i) => n + (i.op === "copy" && i.queue === queue ? i.bytes : 0), 0);
      const moved = r[QUEUES[queue]];
      return moved === planned ? [] : [`${QUEUES[queue]} of step ${step}: ${moved} for ${planned}`];
    }),
  );
}

/** Proves the trial's tapes and runs them; what is not as in the resident run. What the engine throws is a difference. */
export async function failuresOf(
  native: NativeAddon,
  { c, policy, sim }: Trial,
  diskFolder: string,
): Promise<string[]> {
  try {
    const plan = writeTape(c.graph, policy);
    checkTape(c.graph, plan.step);
    if (plan.flush !== null) checkTape(c.graph, plan.flush, { after: plan.step });
    const plain = await trainResident(native, c);
    const other = await trainCase(native, sessionOptions(c, { device: "sim", diskFolder, sim }), c, plan);
    return [...differences(other, plain), ...trafficDifferences(other, plan.step)];
  } catch (error) {
    if (!(error instanceof StromaError)) throw error;
    return [`${error.code}: ${error.message}`];
  }
}

/** Each takes one thing off a trial; null where there is nothing to take. Whole steps before halves. */
const simplifications: ((t: Trial) => Trial | null)[] = [
  ...["param", "optimizer", "retained"].flatMap((kind) => [
    (t: Trial) => place(t, kind as "param", "device"),
    (t: Trial) => place(t, kind as "param", "host"),
  ]),
  (t) => policed(t, { boundary: "slot" }),
  (t) => policed(t, { boundary: "device" }),
  (t) => policed(t, { boundary: "host" }),
  (t) => policed(t, { prefetch: 0 }),
  (t) => policed(t, { prefetch: 1 }),
  (t) => policed(t, { parts: 1 }),
  (t) => policed(t, { update: "end" }),
  (t) => policed(t, { recompute: "all" }),
  (t) => policed(t, { recompute: "none" }),
  (t) => policed(t, { schedule: "depthFirst" }),
  (t) => (t.sim.adversary === null ? null : { ...t, sim: { ...t.sim, adversary: null } }),
  (t) => (t.sim.hostToDevice === null ? null : { ...t, sim: { ...t.sim, hostToDevice: null } }),
  (t) => (t.c.steps.length === 1 ? null : { ...t, c: { ...t.c, steps: t.c.steps.slice(0, -1) } }),
  ({ c, policy, sim }) => {
    const microBatches = c.microBatches - 1;
    if (microBatches === 0) return null;
    const steps = c.steps.map((s) => ({ ...s, microBatches: s.microBatches.slice(0, microBatches) }));
    return { c: { ...c, microBatches, steps }, policy: { ...policy, microBatches }, sim };
  },
];

/** How far from the resident plan; a shrink only goes down. */
const RANKS: Record<string, number> = { slot: 0, device: 0.5, host: 1, disk: 2 };
const rank = (home: Home | "slot" | number | undefined): number =>
  typeof home === "number" ? home : typeof home === "string" ? (RANKS[home] ?? 0) : 3;

function place(t: Trial, kind: "param" | "optimizer" | "retained", home: Space3): Trial | null {
  return rank(t.policy[kind]) <= rank(home) ? null : { ...t, policy: { ...t.policy, [kind]: home } };
}

function policed(t: Trial, change: Partial<Policy>): Trial | null {
  const [[key, value]] = Object.entries(change) as [[keyof Policy, string | number]];
  const now = t.policy[key];
  if (now === value) return null;
  if (key === "recompute" && now === "none") return null;
  if ((key === "boundary" || key === "prefetch") && rank(now as number) <= rank(value as number)) return null;
  return { ...t, policy: { ...t.policy, ...change } };
}

const valid = (graph: Graph, policy: Policy): boolean => {
  try {
    checkPolicy(graph, policy);
    return true;
  } catch {
    return false;
  }
};

/** Simplifies as long as `fails` says so, one thing after another; nothing more can be taken off what it returns. */
export async function shrink(trial: Trial, fails: (t: Trial) => Promise<boolean>): Promise<Trial> {
  for (let least = trial; ; ) {
    let simpler: Trial | null = null;
    for (const simplify of simplifications) {
      const next = simplify(least);
      if (next === null || !valid(next.c.graph, next.policy) || !(await fails(next))) continue;
      simpler = next;
      break;
    }
    if (simpler === null) return least;
    least = simpler;
  }
}

/** On one line. */
export function describeTrial({ c, policy, sim }: Trial): string {
  const home = (h: Home) => (typeof h === "string" ? h : c.graph.blocks.map((_, b) => h(b)).join(" "));
  const { dims: _, state: __, clip: ___, ...rest } = policy;
  const [param, optimizer, retained] = [policy.param, policy.optimizer, policy.retained].map(home);
  const plan = { ...rest, param, optimizer, retained, clip: c.clip, steps: c.steps.length };
  return `${c.label}; ${JSON.stringify({ ...plan, adversary: sim.adversary, hostToDevice: sim.hostToDevice })}`;
}
