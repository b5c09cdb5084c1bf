/** Hugging Face's config.json for Llama and Qwen3, both ways. What we do not compute is refused by name. */
import { StromaError } from "../../errors.js";
import type { Llama3RopeScaling } from "../../graph/ops.js";
import { type DecoderConfig, decoderConfig } from "./config.js";

type Json = Readonly<Record<string, unknown>>;

const refuse = (key: string, value: unknown, supported: string): never => {
  throw new StromaError("CONFIG", `[config.json] ${key} is ${JSON.stringify(value)}; supported: ${supported}`, {
    key,
    value,
    supported,
  });
};

/** Fields that change the numbers, with the only values that we compute. */
const REQUIRED: readonly [key: string, values: readonly unknown[]][] = [
  ["hidden_act", ["silu"]],
  ["attention_dropout", [0]],
  ["pretraining_tp", [1]],
  ["partial_rotary_factor", [1]],
  ["use_sliding_window", [false]],
  ["quantization_config", []],
  ["is_encoder_decoder", [false]],
  ["add_cross_attention", [false]],
];

/**
 * A decoder of a parsed config.json (transformers 4 and 5 spellings). Throws CONFIG naming a model type or a value that
 * this decoder does not compute, and INVALID_ARGUMENT for sizes that are no sizes.
 */
export function fromHuggingFace(json: Json): DecoderConfig {
  const type = json.model_type;
  if (type !== "llama" && type !== "qwen3") return refuse("model_type", type, '"llama", "qwen3"');
  const architecture = (json.architectures as unknown[] | undefined | null)?.[0];
  if (architecture !== undefined && architecture !== "LlamaForCausalLM" && architecture !== "Qwen3ForCausalLM") {
    return refuse("architectures", json.architectures, "LlamaForCausalLM, Qwen3ForCausalLM");
  }
  for (const [key, values] of REQUIRED) {
    const value = json[key];
    if (value === undefined || value === null || values.includes(value)) continue;
    return refuse(key, value, values.length === 0 ? "none" : values.map((v) => JSON.stringify(v)).join(", "));
  }
  const kinds = json.layer_types;
  if (Array.isArray(kinds) && kinds.some((k) => k !== "full_attention")) {
    return refuse("layer_types", [...new Set(kinds)], '"full_attention" in every layer');
  }
  const heads = number(json, "num_attention_heads");
  const dim = number(json, "hidden_size");
  const { theta, scaling } = rope(json);
  return decoderConfig({
    vocabSize: number(json, "vocab_size"),
    dim,
    layers: number(json, "num_hidden_layers"),
    heads,
    kvHeads: number(json, "num_key_value_heads", heads),
    headDim: number(json, "head_dim", type === "qwen3" ? 128 : dim / heads),
    ffn: number(json, "intermediate_size"),
    ropeTheta: theta,
    ropeScaling: scaling,
    normEps: number(json, "rms_norm_eps", 1e-6),
    tiedEmbeddings: flag(json, "tie_word_embeddings"),
    attentionBias: flag(json, "attention_bias"),
    mlpBias: type === "llama" && flag(json, "mlp_bias"),
    qkNorm: type === "qwen3",
    maxPositions: number(json, "max_position_embeddings", type === "qwen3" ? 32_768 : 2048),
    initStd: number(json, "initializer_range", 0.02),
  });
}

function rope(json: Json): { theta: number; scaling: Llama3RopeScaling | null } {
  // transformers 5 puts theta and scaling into rope_parameters.
  const key = json.rope_parameters == null ? "rope_scaling" : "rope_parameters";
  const given = (json[key] ?? null) as Json | null;
  const theta = number(given?.rope_theta === undefined ? json : given, "rope_theta", 10_000);
  if (given === null) return { theta, scaling: null };
  if (typeof given !== "object") return refuse(key, given, "an object");
  const type = given.rope_type ?? given.type ?? "default";
  if (type === "default") return { theta, scaling: null };
  if (type !== "llama3") return refuse(`${key}.rope_type`, type, '"default", "llama3"');
  const scaling: Llama3RopeScaling = {
    type: "llama3",
    factor: number(given, "factor"),
    lowFreqFactor: number(given, "low_freq_factor"),
    highFreqFactor: number(given, "high_freq_factor"),
    originalMaxPositions: number(given, "original_max_position_embeddings"),
  };
  return { theta, scaling };
}

function number(json: Json, key: string, missing?: number): number {
  const value = json[key] ?? missing;
  return typeof value === "number" && Number.isFinite(value) ? value : refuse(key, value ?? null, "a number");
}

function flag(json: Json, key: string): boolean {
  const value = json[key] ?? false;
  return typeof value === "boolean" ? value : refuse(key, value, "true, false");
}

/**
 * The config.json with which transformers builds the same model (Qwen3 when queries and keys are normed, else Llama);
 * null where neither can: Qwen3 has no biases in its MLP. Dropout and document masks have no field there.
 */
export function toHuggingFace(config: DecoderConfig): Record<string, unknown> | null {
  if (config.qkNorm && config.mlpBias) return null;
  const s = config.ropeScaling;
  return {
    architectures: [config.qkNorm ? "Qwen3ForCausalLM" : "LlamaForCausalLM"],
    model_type: config.qkNorm ? "qwen3" : "llama",
    vocab_size: config.vocabSize,
    hidden_size: config.dim,
    intermediate_size: config.ffn,
    num_hidden_layers: config.layers,
    num_attention_heads: config.heads,
    num_key_value_heads: config.kvHeads,
    head_dim: config.headDim,
    hidden_act: "silu",
    max_position_embeddings: config.maxPositions,
    initializer_range: config.initStd,
    rms_norm_eps: config.normEps,
    tie_word_embeddings: config.tiedEmbeddings,
    attention_bias: config.attentionBias,
    attention_dropout: 0,
    ...(config.qkNorm ? { use_sliding_window: false } : { mlp_bias: config.mlpBias }),
    rope_theta: config.ropeTheta,
    rope_scaling:
      s === null
        ? null
        : {
            rope_type: "llama3",
            factor: s.factor,
            low_freq_factor: s.lowFreqFactor,
            high_freq_factor: s.highFreqFactor,
            original_max_position_embeddings: s.originalMaxPositions,
          },
  };
}
