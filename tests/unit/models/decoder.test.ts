import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, describe, expect, it } from "vitest";
import { graphCost } from "../../../src/graph/costs.js";
import { traceModel } from "../../../src/graph/trace.js";
import { type DecoderOptions, decoderConfig } from "../../../src/models/decoder/config.js";
import { fromHuggingFace, toHuggingFace } from "../../../src/models/decoder/huggingface.js";
import { decoder } from "../../../src/models/decoder/model.js";
import { findModel, modelNames } from "../../../src/models/registry.js";

const small: DecoderOptions = { vocabSize: 40, dim: 16, layers: 2, heads: 4, kvHeads: 2, ffn: 24 };
const code = (c: string) => expect.objectContaining({ code: c });
const count = (name: string): number => {
  const { parameters } = findModel(name).graph();
  return parameters.reduce((sum, p) => sum + p.shape.reduce((a, b) => a * b, 1), 0);
};

describe("presets", () => {
  it("have the sizes that their names say", () => {
    expect(modelNames()).toEqual(["tiny", "10m", "100m", "1b", "7b", "8b", "astro-13b"]);
    expect(modelNames().map(count)).toEqual([
      771_712, 9_984_384, 100_092_672, 1_038_682_112, 7_241_732_096, 8_030_261_248, 13_147_013_376,
    ]);
  });

  it("astro-13b is 13.14e9 parameters within 0.1 %: 56 layers, D 4352, 34 heads of 128, 2 key/value heads, untied", () => {
    expect(Math.abs(count("astro-13b") / 13.14e9 - 1)).toBeLessThan(1e-3);
    const graph = findModel("astro-13b").graph();
    const shape = (name: string) => graph.parameters.find((p) => p.name === name)?.shape;
    expect(graph.blocks).toHaveLength(58);
    expect(graph.programs).toHaveLength(3);
    expect(shape("model.layers.55.self_attn.q_proj.weight")).toEqual([34 * 128, 4352]);
    expect(shape("model.layers.0.self_attn.k_proj.weight")).toEqual([2 * 128, 4352]);
    expect(shape("model.layers.0.mlp.gate_proj.weight")).toEqual([14_528, 4352]);
    expect(shape("lm_head.weight")).toEqual([32_000, 4352]);
  });

  it("cost 2 operations a weight and token, and attention over half of all pairs", () => {
    const cost = graphCost(findModel("astro-13b").graph(), { B: 1, T: 512 });
    const layer = cost.blocks[1]!;
    const matrices = 229_794_304 - 2 * 4352;
    const attention = (2 * 512 * 512 * 34 * (128 + 128)) / 2;
    // Norms, rotation and activations are the rest: under half a percent.
    const rest = layer.forwardFlops - 2 * 512 * matrices - attention;
    expect(rest).toBeGreaterThan(0);
    expect(rest / layer.forwardFlops).toBeLessThan(0.005);
    expect(layer.trainingFlops).toBe(3 * layer.forwardFlops);
  });

  it("are found by name only, and a wrong name lists them", () => {
    expect(() => findModel("huge")).toThrow(/Presets: tiny, 10m, 100m, 1b, 7b, 8b, astro-13b/);
    expect(() => findModel("constructor")).toThrow(code("CONFIG"));
  });
});

describe("the decoder's graph", () => {
  const graph = (options: Partial<DecoderOptions> = {}, mode: "train" | "eval" | "generate" = "train") =>
    traceModel(decoder, decoderConfig({ ...small, ...options }), { mode });

  it("ties the head to the embedding by name, and only when asked", () => {
    expect(graph({ tiedEmbeddings: true }).blocks.at(-1)!.parameters).toContain("model.embed_tokens.weight");
    expect(graph({ tiedEmbeddings: true }).parameters.map((p) => p.name)).not.toContain("lm_head.weight");
    expect(graph().blocks.at(-1)!.parameters).toContain("lm_head.weight");
  });

  it("decays matrices and the embedding, not norms and biases", () => {
    const decayed = graph({ attentionBias: true, mlpBias: true, qkNorm: true }).parameters;
    for (const p of decayed) expect([p.name, p.decay]).toEqual([p.name, p.shape.length === 2]);
    expect(decayed.some((p) => p.name.endsWith("q_norm.weight"))).toBe(true);
  });

  it("starts residual outputs at std / sqrt(2 L), norms at one, biases at zero", () => {
    const init = (name: string) => graph({ attentionBias: true }).parameters.find((p) => p.name === name)?.init;
    expect(init("model.layers.1.self_attn.o_proj.weight")).toEqual({ kind: "normal", std: 0.02 / 2 });
    expect(init("model.layers.0.mlp.down_proj.weight")).toEqual({ kind: "normal", std: 0.02 / 2 });
    expect(init("model.layers.0.mlp.up_proj.weight")).toEqual({ kind: "normal", std: 0.02 });
    expect(init("model.norm.weight")).toEqual({ kind: "ones" });
    expect(init("model.layers.0.self_attn.q_proj.bias")).toEqual({ kind: "zeros" });
  });

  it("takes segment_ids exactly when documents are masked, and never to generate", () => {
    const inputs = (g: ReturnType<typeof graph>) => g.inputs.map((i) => i.name);
    expect(inputs(graph())).toEqual(["input_ids", "labels", "position_ids"]);
    expect(inputs(graph({ documentMask: true }))).toEqual(["input_ids", "labels", "position_ids", "segment_ids"]);
    expect(inputs(graph({ documentMask: true }, "generate"))).toEqual(["input_ids", "position_ids"]);
  });

  it("returns the loss to train and eval, the last position's logits to generate", () => {
    expect(graph().losses).toEqual([
      { name: "loss", block: 3, output: 0, weight: 1, count: { input: "labels", ignore: -100 } },
    ]);
    expect(graph({}, "eval").outputs).toEqual([{ name: "loss", block: 3, output: 0 }]);
    const g = graph({}, "generate");
    expect(g.outputs.map((o) => o.name)).toEqual(["logits"]);
    expect(g.programs.at(-1)!.outputs[0]).toMatchObject({ name: "logits", dtype: "float32", shape: ["B", 40] });
  });

  it("draws dropout on the embedding and after both sublayers", () => {
    const drawn = (g: ReturnType<typeof graph>) =>
      g.programs.map((p) => p.nodes.filter((n) => n.op === "stroma::dropout").length);
    expect(drawn(graph({ dropout: 0.1 }))).toEqual([1, 2, 0]);
    expect(drawn(graph({ dropout: 0.1 }, "eval"))).toEqual([0, 0, 0]);
    expect(drawn(graph())).toEqual([0, 0, 0]);
  });

  it.each<[string, Partial<DecoderOptions>, string]>([
    ["heads that kvHeads does not divide", { heads: 4, kvHeads: 3 }, "heads 4 is not a multiple of kvHeads 3"],
    ["a width that heads do not divide", { dim: 18 }, "whole number of at least 1, got 4.5, at config.headDim"],
    ["an odd head dim", { headDim: 5 }, "even head dim"],
    ["a probability of 1", { dropout: 1 }, "config.dropout"],
    ["no layers", { layers: 0 }, "config.layers"],
    ["layers that take days to plan", { layers: 4097 }, "at most 4096 layers, got 4097, at config.layers"],
    ["a probability in words", { dropout: "0.1" as never }, "config.dropout"],
    ["an unknown field", { width: 3 } as never, "no field width"],
    ["NaN", { normEps: Number.NaN }, "config.normEps"],
  ])("refuses %s", (_, options, message) => {
    expect(() => decoderConfig({ ...small, ...options })).toThrow(message);
  });
});

const llama = {
  architectures: ["LlamaForCausalLM"],
  model_type: "llama",
  vocab_size: 128_256,
  hidden_size: 2048,
  intermediate_size: 8192,
  num_hidden_layers: 16,
  num_attention_heads: 32,
  num_key_value_heads: 8,
  head_dim: 64,
  hidden_act: "silu",
  rms_norm_eps: 1e-5,
  rope_theta: 500_000,
  rope_scaling: {
    factor: 32,
    low_freq_factor: 1,
    high_freq_factor: 4,
    original_max_position_embeddings: 8192,
    rope_type: "llama3",
  },
  max_position_embeddings: 131_072,
  tie_word_embeddings: true,
  attention_dropout: 0,
  pretraining_tp: 1,
  torch_dtype: "bfloat16",
};

describe("config.json of Hugging Face", () => {
  it("is read for Llama 3.2 1B", () => {
    expect(fromHuggingFace(llama)).toEqual({
      vocabSize: 128_256,
      dim: 2048,
      layers: 16,
      heads: 32,
      kvHeads: 8,
      headDim: 64,
      ffn: 8192,
      ropeTheta: 500_000,
      ropeScaling: { type: "llama3", factor: 32, lowFreqFactor: 1, highFreqFactor: 4, originalMaxPositions: 8192 },
      normEps: 1e-5,
      tiedEmbeddings: true,
      attentionBias: false,
      mlpBias: false,
      qkNorm: false,
      dropout: 0,
      documentMask: false,
      maxPositions: 131_072,
      initStd: 0.02,
      lossChunk: 1024,
    });
  });

  it("is read in the spelling of transformers 5, where rope_parameters holds theta and scaling", () => {
    const { rope_theta, rope_scaling, ...rest } = llama;
    expect(fromHuggingFace({ ...rest, rope_parameters: { rope_theta, ...rope_scaling } })).toEqual(
      fromHuggingFace(llama),
    );
    const plain = fromHuggingFace({ ...rest, rope_parameters: { rope_theta: 7, rope_type: "default" } });
    expect([plain.ropeTheta, plain.ropeScaling]).toEqual([7, null]);
  });

  it("is read for Qwen3 with its own defaults: normed heads of 128", () => {
    const { head_dim: _, rope_scaling: __, ...rest } = llama;
    const config = fromHuggingFace({
      ...rest,
      architectures: ["Qwen3ForCausalLM"],
      model_type: "qwen3",
      layer_types: ["full_attention"],
    });
    expect([config.qkNorm, config.headDim, config.ropeScaling]).toEqual([true, 128, null]);
  });

  it("comes back the same after writing and reading", () => {
    for (const options of [{}, { qkNorm: true, attentionBias: true }, { mlpBias: true, tiedEmbeddings: true }]) {
      const config = decoderConfig({ ...small, ...options });
      expect(fromHuggingFace(toHuggingFace(config)!)).toEqual(config);
    }
    expect(fromHuggingFace(toHuggingFace(fromHuggingFace(llama))!)).toEqual(fromHuggingFace(llama));
    expect(toHuggingFace(decoderConfig({ ...small, qkNorm: true, mlpBias: true }))).toBeNull();
  });

  it.each<[Record<string, unknown>, string]>([
    [{ model_type: "mistral" }, 'model_type is "mistral"; supported: "llama", "qwen3"'],
    [{ architectures: ["LlamaForSequenceClassification"] }, "architectures is"],
    [{ hidden_act: "gelu" }, 'hidden_act is "gelu"; supported: "silu"'],
    [{ attention_dropout: 0.1 }, "attention_dropout is 0.1; supported: 0"],
    [{ rope_scaling: { rope_type: "yarn", factor: 4 } }, 'rope_scaling.rope_type is "yarn"'],
    [{ rope_scaling: { type: "linear", factor: 2 } }, 'rope_scaling.rope_type is "linear"'],
    [{ rope_scaling: { rope_type: "llama3", factor: 4 } }, "low_freq_factor is null"],
    [{ use_sliding_window: true }, "use_sliding_window is true"],
    [{ layer_types: ["full_attention", "sliding_attention"] }, "layer_types is"],
    [{ quantization_config: { bits: 4 } }, 'quantization_config is {"bits":4}; supported: none'],
    [{ partial_rotary_factor: 0.5 }, "partial_rotary_factor is 0.5"],
    [{ pretraining_tp: 2 }, "pretraining_tp is 2"],
    [{ hidden_size: "2048" }, 'hidden_size is "2048"; supported: a number'],
    [{ tie_word_embeddings: 1 }, "tie_word_embeddings is 1"],
  ])("is refused by the name of its value: %j", (change, message) => {
    expect(() => fromHuggingFace({ ...llama, ...change })).toThrow(message);
    expect(() => fromHuggingFace({ ...llama, ...change })).toThrow(code("CONFIG"));
  });

  const folder = mkdtempSync(join(tmpdir(), "stroma-model-"));
  afterAll(() => rmSync(folder, { recursive: true }));

  it("is found by the path of its folder; what is no JSON is refused", () => {
    writeFileSync(join(folder, "config.json"), JSON.stringify(llama));
    expect(findModel(folder).config).toEqual(fromHuggingFace(llama));
    const page = join(folder, "page.json");
    writeFileSync(page, "<html>404</html>");
    expect(() => findModel(page)).toThrow(code("FILE_FORMAT"));
    writeFileSync(page, "[1]");
    expect(() => findModel(page)).toThrow(/not a JSON object/);
  });
});
