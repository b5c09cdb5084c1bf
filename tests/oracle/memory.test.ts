import { fileURLToPath } from "node:url";
import { describe, expect, it } from "vitest";
import { traceModel } from "../../src/graph/trace.js";
import { decoderConfig } from "../../src/models/decoder/config.js";
import { decoder } from "../../src/models/decoder/model.js";
import { currentBuild, packageRoot } from "../../src/native.js";
import { type PassWorkspace, passWorkspace } from "../../src/plan/memory.js";
import { oraclePython, runPython } from "../support/python.js";

const python = oraclePython();
const script = fileURLToPath(new URL("./memory.py", import.meta.url));
type Measured = Omit<PassWorkspace, "backward">;

describe.skipIf(python === null)("workspace against libtorch's own profile", () => {
  it("is what the CPU allocates for embedding, layer and head, within 0.5 %", async () => {
    const sizes = { vocabSize: 1000, dim: 256, layers: 1, heads: 8, kvHeads: 2, ffn: 704 };
    // Few tokens in bfloat16: a CPU without units for it takes minutes for more.
    const graphs = [
      {
        config: decoderConfig({ ...sizes, documentMask: true, qkNorm: true, lossChunk: 256 }),
        dtype: "float32",
        T: 512,
      },
      {
        config: decoderConfig({ ...sizes, attentionBias: true, mlpBias: true, lossChunk: 48 }),
        dtype: "bfloat16",
        T: 128,
      },
      { config: decoderConfig({ ...sizes, attentionBias: true, mlpBias: true }), dtype: "bfloat16", T: 128 },
    ] as const;
    const jobs = graphs.flatMap(({ config, dtype, T }) => {
      const graph = traceModel(decoder, config, { mode: "train", dtype });
      return graph.blocks.map((_, block) => ({ graph, block, dims: { B: 1, T } }));
    });
    const kernels = `${packageRoot}/${currentBuild().kernels}`;
    const answers = await runPython<Measured[]>(script, [], { kernels, jobs });
    for (const [i, { graph, block, dims }] of jobs.entries()) {
      const planned = passWorkspace(graph, block, dims, { device: "cpu", unit: 1 });
      const isHead = block === graph.blocks.length - 1;
      for (const key of ["forward", "keepingForward", "kept", "keptBackward"] as const) {
        // Python clones a gradient that the head still holds; the engine takes it as it is.
        if (isHead && key === "keptBackward") continue;
        const measured = answers[i]![key];
        const what = `${graph.dtype} ${graph.blocks[block]!.name} ${key}: ${planned[key]} of ${measured}`;
        expect(Math.abs(planned[key] - measured) / measured, what).toBeLessThan(0.005);
      }
    }
  }, 300_000);
});
