/** Law 1 without a step between: an offloaded plan's losses, norms, parameters and moments against stock PyTorch's. */
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { describe, expect, it } from "vitest";
import { packageRoot, readBuildRecord } from "../../src/native.js";
import type { Home } from "../../src/plan/policy.js";
import { writeTape } from "../../src/plan/write-tape.js";
import type { HostTensor } from "../../src/train/native-session.js";
import { nativeOrSkip } from "../support/native.js";
import { oraclePython, runPython } from "../support/python.js";
import { bytesOf, type LawCase, trainCase } from "./offload-case.js";
import { describeTrial, randomTrial, sessionOptions, type Trial } from "./trial.js";

const native = nativeOrSkip();
const python = oraclePython();
const CASES = 12;

const encode = (t: HostTensor) => ({ dtype: t.dtype, shape: t.shape, data: bytesOf(t).toString("base64") });

/** Of what PyTorch has its own of: AdamW, parameters in the dtype of the arithmetic, the norm of all gradients. */
function isStock({ c, policy }: Trial): boolean {
  const away = (home: Home) => c.graph.blocks.some((_, b) => (typeof home === "string" ? home : home(b)) !== "device");
  const plain = c.state.optimizer === "adamw" && c.state.storage === c.dtype && c.clip !== "block";
  return (
    plain && away(policy.param) && away(policy.optimizer) && (policy.boundary === "host" || policy.boundary === "disk")
  );
}

/** What the session's initialize() draws. */
async function initial(c: LawCase): Promise<Record<string, unknown>> {
  const session = native!.createSession(sessionOptions(c));
  await session.load(c.graph);
  await session.initialize(7);
  const parameters: Record<string, unknown> = {};
  for (const { name } of c.graph.parameters) parameters[name] = encode(await session.read("param", name));
  await session.dispose();
  return parameters;
}

describe.skipIf(!native || !python)("an offloaded plan", () => {
  it(`equals stock PyTorch over ${CASES} random models, to the bit`, { timeout: 300_000 }, async () => {
    const trials: Trial[] = [];
    for (let seed = 20_000; trials.length < CASES; seed++) {
      const trial = randomTrial(seed);
      if (isStock(trial)) trials.push(trial);
    }
    const diskFolder = mkdtempSync(join(tmpdir(), "stroma-laws-"));
    const stock = runPython<
      { losses: number[]; norms: number[]; state: Record<string, Record<string, { data: string }>> }[]
    >(fileURLToPath(new URL("../oracle/stock.py", import.meta.url)), [], {
      kernels: join(packageRoot, readBuildRecord().kernels!),
      cases: await Promise.all(
        trials.map(async ({ c }) => ({
          graph: c.graph,
          dtype: c.dtype,
          threads: 2,
          optimizer: sessionOptions(c).optimizer,
          parameters: await initial(c),
          steps: c.steps.map((s) => ({
            ...s,
            microBatches: s.microBatches.map((b) =>
              Object.fromEntries(Object.entries(b).map(([name, t]) => [name, encode(t)])),
            ),
          })),
        })),
      ),
    });
    const theirs = await stock;
    const failures: string[] = [];
    for (const [i, trial] of trials.entries()) {
      const { c, policy, sim } = trial;
      const ours = await trainCase(
        native!,
        sessionOptions(c, { device: "sim", diskFolder, sim }),
        c,
        writeTape(c.graph, policy),
      );
      const rows = Object.entries(theirs[i]!.state).flatMap(([kind, tensors]) =>
        Object.entries(tensors).map(([name, t]) => [`${kind} ${name}`, t.data] as const),
      );
      expect(rows.length).toBeGreaterThan(3);
      const unequal = rows.filter(([key, data]) => ours.state.get(key) !== data).map(([key]) => key);
      for (const [s, norm] of theirs[i]!.norms.entries())
        if (norm !== ours.results[s]!.gradNorm) unequal.push(`norm of step ${s}`);
      // Terms of the loss add in the order of the passes.
      for (const [s, loss] of theirs[i]!.losses.entries()) expect(ours.results[s]!.loss).toBeCloseTo(loss, 5);
      if (unequal.length > 0) failures.push(`${unequal.slice(0, 3).join(", ")}: ${describeTrial(trial)}`);
    }
    rmSync(diskFolder, { recursive: true });
    expect(failures).toEqual([]);
  });
});
