import { fileURLToPath } from "node:url";
import { beforeAll, describe, expect, it } from "vitest";
import { CONTEXT_OPS } from "../../src/graph/context.js";
import { programCost } from "../../src/graph/costs.js";
import { evaluate } from "../../src/graph/dims.js";
import { model } from "../../src/graph/model.js";
import * as ops from "../../src/graph/ops.js";
import { type OpName, opByOverload, schemas } from "../../src/graph/schemas.js";
import { traceModel } from "../../src/graph/trace.js";
import type { Graph } from "../../src/graph/types.js";
import { type InferredValue, inferProgram } from "../../src/graph/validate.js";
import type { Value } from "../../src/graph/value.js";
import { decoderConfig } from "../../src/models/decoder/config.js";
import { fromHuggingFace, toHuggingFace } from "../../src/models/decoder/huggingface.js";
import { decoder } from "../../src/models/decoder/model.js";
import { currentBuild, packageRoot } from "../../src/native.js";
import { oraclePython, runPython } from "../support/python.js";

const kernels = `${packageRoot}/${currentBuild().kernels}`;
const script = fileURLToPath(new URL("./graph.py", import.meta.url));

/** Every op of the table, on shapes with named dims: x float32 [B, T, 8]. */
const everything = model<null>("everything", (m) => {
  const x = m.input("x", "float32", ["B", "T", 8]);
  const ids = m.input("ids", "int64", ["B", "T"]);
  const row = m.input("row", "int64", ["T"]);
  const y = m.block("all", (p) => {
    const w = p.param("w", [8, 8]);
    const b = p.param("b", [8]);
    const h = ops.linear(x, w, b);
    const [B, T] = h.shape as [Value["shape"][number], Value["shape"][number]];
    const positive = ops.add(ops.exp(h), 1);
    const flag = ops.gt(h, x);
    const seven = ops.div(ops.sub(ops.mul(h, 2), 3), 4);
    const elementwise = [
      ops.neg(h),
      ops.abs(h),
      ops.log(positive),
      ops.sqrt(positive),
      ops.rsqrt(positive),
      ops.reciprocal(positive),
      ops.sin(h),
      ops.cos(h),
      ops.tanh(h),
      ops.sigmoid(h),
      ops.relu(h),
      ops.silu(h),
      ops.gelu(h, "tanh"),
      ops.gelu(h),
      ops.sub(h, x),
      ops.mul(h, b),
      ops.div(h, positive),
      ops.maximum(h, x),
      ops.minimum(h, x),
      seven,
      ops.pow(h, 2),
      ops.pow(2.5, h),
      ops.where(flag, h, x),
      ops.maskedFill(h, flag, -1),
      ops.cumsum(h, 1),
      ops.softmax(h, -1),
      ops.logSoftmax(h, 1),
      ops.layerNorm(h, [8], b, b, 1e-5),
      ops.contiguous(h),
      ops.rmsNorm(h, b, 1e-5),
      ops.siluMul(h, x),
      ops.apply("dropout", h, 0.5, p.rngKey(), p.site()),
      ops.embedding(w, ids),
      ops.expand(ops.mean(h, [1], true), [B, T, 8]),
      ops.view(ops.sum(h, [1]), [B, 1, 8]),
      ops.unsqueeze(ops.amax(h, [0, 1]), 0),
      ops.squeeze(ops.view(h, [B, 1, T, 8]), 1),
      ops.permute(ops.permute(h, [2, 0, 1]), [1, 2, 0]),
      ops.select(ops.stack([h, x], 2), 2, 0),
      ops.indexSelect(h, 1, row),
      ops.slice(ops.repeatInterleave(h, 2, 1), 1, 0, null, 2),
      ops.slice(ops.cat([h, x], 1), 1, T, null),
      ops.reshape(ops.transpose(h, 0, 1), [B, T, 8]),
      ops.matmul(h, w),
    ];
    const integers = [
      ops.add(ids, 1),
      ops.mul(ids, row),
      ops.sum(ids, [0], true),
      ops.cumsum(ids, 1),
      ops.cumsum(flag, 1),
      ops.newOnes(ids, [B, T]),
      ops.newZeros(ids, [B, T], "int32"),
      ops.to(ops.eq(ids, row), "int64"),
      ops.div(ids, 2),
      ops.pow(2, ids),
      ops.reciprocal(ops.to(ids, "float32")),
    ];
    const flags = [
      ...[ops.eq, ops.ne, ops.lt, ops.le, ops.gt, ops.ge].flatMap((compare) => [compare(h, x), compare(h, 1)]),
      ops.logicalNot(ops.logicalOr(flag, ops.logicalAnd(flag, ops.lt(h, x)))),
    ];
    const all = [...elementwise, ...[...integers, ...flags].map((v) => ops.to(v, "float32"))];
    let total: Value = ops.newZeros(h, []);
    for (const v of all) total = ops.add(total, ops.sum(v, []));
    const q = ops.transpose(ops.view(h, [B, T, 4, 2]), 1, 2);
    const kv = ops.transpose(ops.view(ops.slice(h, 2, 0, 4), [B, T, 2, 2]), 1, 2);
    const table = ops.rotaryTable(ids, 2, { theta: 100 }, "float32");
    const attended = ops.scaledDotProductAttention(ops.rotate(q, table), kv, kv, {
      causal: true,
      grouped: true,
      scale: 0.3,
    });
    return ops.add(ops.reshape(ops.transpose(attended, 1, 2), [B, T, 8]), total);
  });
  m.block("head", (p) => {
    const flat = ops.reshape(y, ["B*T", 8]);
    const head = ops.apply(
      "crossEntropyHead",
      flat,
      p.param("w", [5, 8]),
      null,
      ops.reshape(ids, [-1]),
      p.lossScale("loss"),
      7,
      -100,
    );
    p.loss("loss", head, { count: ids, ignore: -100 });
    return head;
  });
  return undefined;
});

function inferred(graph: Graph): Map<string, InferredValue> {
  const all = new Map<string, InferredValue>();
  const trainable = new Map(graph.parameters.map((p) => [p.name, p.trainable]));
  for (const [b, block] of graph.blocks.entries()) {
    const flags = block.parameters.map((p) => trainable.get(p)!);
    for (const { out } of inferProgram(graph.programs[block.program]!, graph.dtype ?? "float32", flags)) {
      all.set(`${b}:${(out as InferredValue).id}`, out as InferredValue);
    }
  }
  return all;
}

type Seen = Record<string, [dtype: string, shape: number[], grad: boolean]>;
const metasJob = (graph: Graph, sizes: Record<string, number>) => {
  return { task: "metas", graph, sizes, limit: Math.min(...Object.values(sizes), 5) };
};

function compareMetas(graph: Graph, sizes: Record<string, number>, seen: Seen): void {
  const expected = inferred(graph);
  expect(Object.keys(seen).length).toBe(expected.size);
  for (const [id, v] of expected) {
    const ours = [v.dtype, v.shape.map((d) => evaluate(d, sizes)), v.grad];
    const [b, n] = id.split(":").map(Number) as [number, number];
    const program = graph.programs[graph.blocks[b]!.program]!;
    const node = program.nodes[n - program.inputs.length - program.parameters.length]!;
    expect([node.op, ...ours]).toEqual([node.op, ...seen[id]!]);
  }
}

describe.skipIf(oraclePython() === null)("against PyTorch", () => {
  it("every op's rule gives the dtype, shape and gradient flag that the op gives", async () => {
    const graph = traceModel(everything, null);
    const used = new Set(graph.programs.flatMap((p) => p.nodes.map((n) => opByOverload(n.op))));
    // Attention over ranks needs a group of them: tests/unit/graph/context.test.ts, tests/laws/context.test.ts.
    const apart: OpName[] = Object.values(CONTEXT_OPS);
    expect((Object.keys(schemas) as OpName[]).filter((op) => !used.has(op))).toEqual(apart);
    const sizes = { B: 3, T: 5 };
    compareMetas(graph, sizes, (await runPython<[Seen]>(script, [kernels], [metasJob(graph, sizes)]))[0]);
  });

  it("the decoder's shapes hold in all modes, with everything switched on, in bfloat16 too", async () => {
    const config = decoderConfig({
      vocabSize: 11,
      dim: 32,
      layers: 2,
      heads: 4,
      kvHeads: 2,
      ffn: 24,
      attentionBias: true,
      mlpBias: true,
      qkNorm: true,
      dropout: 0.1,
      documentMask: true,
      lossChunk: 5,
      ropeScaling: { type: "llama3", factor: 8, lowFreqFactor: 1, highFreqFactor: 4, originalMaxPositions: 16 },
    });
    const graphs = (["train", "eval", "generate"] as const).flatMap((mode) =>
      (["float32", "bfloat16", "float64"] as const).map((dtype) => traceModel(decoder, config, { mode, dtype })),
    );
    const sizes = { B: 2, T: 6 };
    const seen = await runPython<Seen[]>(
      script,
      [kernels],
      graphs.map((g) => metasJob(g, sizes)),
    );
    for (const [i, graph] of graphs.entries()) compareMetas(graph, sizes, seen[i]!);
  });

  it("saved bytes are what autograd saves, block by block", async () => {
    const config = decoderConfig({ vocabSize: 64, dim: 64, layers: 1, heads: 4, kvHeads: 2, ffn: 96 });
    const graphs = [{}, { qkNorm: true, attentionBias: true }].map((o) => traceModel(decoder, { ...config, ...o }));
    const sizes = { B: 2, T: 32 };
    const jobs = graphs.map((graph) => ({ task: "saved", graph, sizes, limit: 64 }));
    const counts = await runPython<number[][]>(script, [kernels], jobs);
    for (const [g, graph] of graphs.entries()) {
      // The head is the stand-in's business here, not the kernel's.
      for (const [b, block] of graph.blocks.slice(0, 2).entries()) {
        const program = graph.programs[block.program]!;
        const trainable = program.parameters.map(() => true);
        const ours = evaluate(programCost(program, "float32", trainable).savedBytes, sizes);
        expect([block.name, ours]).toEqual([block.name, counts[g]![b]]);
      }
    }
  });
});

const llama = {
  model_type: "llama",
  vocab_size: 96,
  hidden_size: 64,
  intermediate_size: 96,
  num_hidden_layers: 3,
  num_attention_heads: 4,
  num_key_value_heads: 2,
  max_position_embeddings: 256,
  rms_norm_eps: 1e-5,
  rope_theta: 10_000,
  tie_word_embeddings: false,
};
const configs: Record<string, Record<string, unknown>> = {
  "Llama, untied": llama,
  "Llama 3.1, scaled rotary, tied, head dim of its own": {
    ...llama,
    head_dim: 24,
    tie_word_embeddings: true,
    rope_theta: 500_000,
    rope_scaling: {
      rope_type: "llama3",
      factor: 8,
      low_freq_factor: 1,
      high_freq_factor: 4,
      original_max_position_embeddings: 32,
    },
  },
  "Llama with biases": { ...llama, attention_bias: true, mlp_bias: true, num_key_value_heads: 4 },
  "Qwen3, tied": { ...llama, model_type: "qwen3", head_dim: 32, rms_norm_eps: 1e-6, tie_word_embeddings: true },
  "Qwen3 with biases": { ...llama, model_type: "qwen3", head_dim: 16, attention_bias: true },
};

describe.skipIf(oraclePython() === null)("against transformers", () => {
  interface Errors {
    loss: number;
    gradient: number;
    worst: string;
    logits: number | null;
  }
  const cases = (["float32", "float64"] as const).flatMap((dtype) =>
    Object.entries(configs).map(([name, config]) => ({
      name,
      config,
      dtype,
      bound: dtype === "float32" ? 1e-5 : 1e-10,
    })),
  );
  const packed = { ...fromHuggingFace(llama), documentMask: true };
  // One process for all: importing transformers takes longer than everything else. float64 last, it rewrites parts.
  let results: Errors[] = [];
  beforeAll(async () => {
    const jobs = cases.map(({ config, dtype }) => {
      const ours = fromHuggingFace(config);
      return {
        task: "compare",
        train: traceModel(decoder, { ...ours, lossChunk: 16 }, { dtype }),
        generate: traceModel(decoder, ours, { mode: "generate", dtype }),
        config: { ...config, ...toHuggingFace(ours) },
        dtype,
        seed: 1,
        B: 2,
        T: 40,
      };
    });
    const documents = {
      task: "compare",
      train: traceModel(decoder, packed, { dtype: "float64" }),
      config: toHuggingFace(packed),
      dtype: "float64",
      seed: 2,
      B: 2,
      T: 40,
      documents: [7, 1, 20, 12],
    };
    results = await runPython<Errors[]>(script, [kernels], [...jobs, documents]);
  });

  it.each(cases.map((c, i) => ({ ...c, i })))(
    "$name in $dtype: logits, loss and every gradient within $bound",
    ({ i, dtype, bound }) => {
      const { loss, gradient, logits } = results[i]!;
      expect(loss).toBeLessThan(bound);
      expect(gradient).toBeLessThan(bound);
      // Logits leave the graph in float32.
      expect(logits).toBeLessThan(dtype === "float64" ? 1e-7 : bound);
    },
  );

  it("packed documents do not see each other: equal to each document by itself", () => {
    const { loss, gradient } = results.at(-1)!;
    expect(loss).toBeLessThan(1e-10);
    expect(gradient).toBeLessThan(1e-10);
  });
});
