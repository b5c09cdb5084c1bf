/** Larger blocks, the same numbers: a model whose layers are merged in pairs or all trains as the unmerged one, to the bit. */
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { describe, expect, it } from "vitest";
import { mergeBlocks } from "../../src/plan/merge-blocks.js";
import { writeTape } from "../../src/plan/write-tape.js";
import { nativeOrSkip } from "../support/native.js";
import { trainCase } from "./offload-case.js";
import { describeTrial, differences, randomTrial, sessionOptions, trainResident } from "./trial.js";

const native = nativeOrSkip();
const CASES = 12;

describe.skipIf(!native)("merged blocks", () => {
  it(`give the numbers of single ones over ${CASES} random models and plans`, { timeout: 120_000 }, async () => {
    const diskFolder = mkdtempSync(join(tmpdir(), "stroma-laws-"));
    const failures: string[] = [];
    for (let seed = 40_000, n = 0; n < CASES; seed++) {
      const trial = randomTrial(seed);
      const { c, policy, sim } = trial;
      const graph = mergeBlocks(c.graph, 2 + (seed % 2));
      // A block's own norm is another number when the block is.
      if (graph === c.graph || c.clip === "block") continue;
      n++;
      const merged = await trainCase(
        native!,
        sessionOptions(c, { device: "sim", diskFolder, sim }),
        { ...c, graph },
        writeTape(graph, policy),
      );
      const unequal = differences(merged, await trainResident(native!, c));
      if (unequal.length > 0)
        failures.push(
          `seed ${seed}: ${graph.blocks.length} of ${c.graph.blocks.length} blocks, ${unequal.slice(0, 3).join(", ")}: ${describeTrial(trial)}`,
        );
    }
    rmSync(diskFolder, { recursive: true });
    expect(failures).toEqual([]);
  });
});
