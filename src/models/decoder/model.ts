/**
 * The decoder: embedding, pre-norm layers of grouped-query attention and SwiGLU, norm and head (Llama, arXiv 2302.13971;
 * with qkNorm: Qwen3, arXiv 2505.09388). Parameters bear Hugging Face's names.
 */
import type { BlockScope } from "../../graph/model.js";
import { model } from "../../graph/model.js";
import * as ops from "../../graph/ops.js";
import type { Init } from "../../graph/types.js";
import type { Value } from "../../graph/value.js";
import * as nn from "../../nn/index.js";
import type { DecoderConfig } from "./config.js";

/**
 * Batch: input_ids, position_ids int64 [B, T]; labels int64 [B, T] in train and eval, already shifted, -100 for none;
 * segment_ids int64 [B, T] with documentMask (not in generate, where a row is one document).
 * Where rows are shared out to ranks (m.context), T is this rank's share in all of them, at the positions it stands at.
 * train: loss term "loss". eval: output "loss". generate: output "logits" float32 [B, V] of the last position.
 */
export const decoder = model<DecoderConfig>("decoder", (m, cfg) => {
  const tokens = m.input("input_ids", "int64", ["B", "T"]);
  const labels = m.input("labels", "int64", ["B", "T"]);
  const positions = m.input("position_ids", "int64", ["B", "T"]);
  const segments = cfg.documentMask && m.mode !== "generate" ? m.input("segment_ids", "int64", ["B", "T"]) : null;

  let x = m.block("model.embed_tokens", (p) => {
    const init: Init = { kind: "normal", std: cfg.initStd };
    return nn.dropout(p, nn.embedding(p, tokens, cfg.vocabSize, cfg.dim, { init }), cfg.dropout);
  });
  x = m.repeat("model.layers", cfg.layers, x, (p, x) => decoderLayer(p, x, { positions, segments }, cfg));
  return m.block("lm_head", (p) => {
    const tied = cfg.tiedEmbeddings ? { path: "model.embed_tokens", name: "weight" } : null;
    const normed = nn.rmsNorm(p.at("model.norm"), p.mode === "generate" ? lastPosition(x) : x, cfg.normEps);
    return nn.crossEntropyHead(p, normed, labels, {
      vocabSize: cfg.vocabSize,
      tied,
      chunk: cfg.lossChunk,
      init: { kind: "normal", std: cfg.initStd },
    });
  });
});

/** x [B, T, D] -> [B, T, D] */
function decoderLayer(
  p: BlockScope,
  x: Value,
  batch: { positions: Value; segments: Value | null },
  cfg: DecoderConfig,
): Value {
  const init: Init = { kind: "normal", std: cfg.initStd };
  const outputInit: Init = { kind: "normal", std: cfg.initStd / Math.sqrt(2 * cfg.layers) };
  const rotation = ops.rotaryTable(
    batch.positions,
    cfg.headDim,
    { theta: cfg.ropeTheta, scaling: cfg.ropeScaling },
    p.dtype,
  );
  const attended = nn.selfAttention(p.sub("self_attn"), nn.rmsNorm(p.sub("input_layernorm"), x, cfg.normEps), {
    heads: cfg.heads,
    kvHeads: cfg.kvHeads,
    headDim: cfg.headDim,
    bias: cfg.attentionBias,
    qkNormEps: cfg.qkNorm ? cfg.normEps : null,
    rotation,
    documents: batch.segments,
    init,
    outputInit,
  });
  const h = ops.add(x, nn.dropout(p, attended, cfg.dropout));
  const fed = nn.swiGlu(p.sub("mlp"), nn.rmsNorm(p.sub("post_attention_layernorm"), h, cfg.normEps), cfg.ffn, {
    bias: cfg.mlpBias,
    init,
    outputInit,
  });
  return ops.add(h, nn.dropout(p, fed, cfg.dropout));
}

const lastPosition = (x: Value): Value => ops.slice(x, 1, -1);
