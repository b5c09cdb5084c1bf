/**
 * Llama as PyTorch runs it without a compiler: norms, rotations and SwiGLU's product operator by operator, where our decoder has
 * one of its own for each. For predictions of what others measured; nothing trains it.
 */
import type { BlockScope } from "../../src/graph/model.js";
import { model } from "../../src/graph/model.js";
import * as ops from "../../src/graph/ops.js";
import type { Value } from "../../src/graph/value.js";
import type { DecoderConfig } from "../../src/models/decoder/config.js";
import * as nn from "../../src/nn/index.js";

export const plainLlama = model<DecoderConfig>("plain llama", (m, cfg) => {
  const tokens = m.input("input_ids", "int64", ["B", "T"]);
  const labels = m.input("labels", "int64", ["B", "T"]);
  const positions = m.input("position_ids", "int64", ["B", "T"]);
  let x = m.block("embed_tokens", (p) => nn.embedding(p, tokens, cfg.vocabSize, cfg.dim));
  x = m.repeat("layers", cfg.layers, x, (p, h) => {
    const attended = ops.add(h, attention(p.sub("self_attn"), rmsNorm(p.sub("norm_1"), h), positions, cfg));
    return ops.add(attended, swiGlu(p.sub("mlp"), rmsNorm(p.sub("norm_2"), attended), cfg));
  });
  return m.block("lm_head", (p) =>
    nn.crossEntropyHead(p, rmsNorm(p.sub("norm"), x), labels, {
      vocabSize: cfg.vocabSize,
      tied: null,
      chunk: cfg.lossChunk,
    }),
  );
});

function rmsNorm(p: BlockScope, x: Value): Value {
  const weight = p.param("weight", [nn.fixed(p, x, -1)], { init: { kind: "ones" }, decay: false });
  const wide = ops.to(x, "float32");
  const variance = ops.mean(ops.pow(wide, 2), [-1], true);
  return ops.mul(weight, ops.to(ops.mul(wide, ops.rsqrt(ops.add(variance, 1e-5))), x.dtype));
}

/** Cosines and sines [B, 1, T, H], made anew in each layer. */
function rotation(positions: Value, cfg: DecoderConfig, p: BlockScope): { cos: Value; sin: Value } {
  const even = ops.mul(ops.sub(ops.cumsum(ops.newOnes(positions, [cfg.headDim / 2]), 0), 1), 2);
  const frequency = ops.reciprocal(ops.pow(cfg.ropeTheta, ops.div(ops.to(even, "float32"), cfg.headDim)));
  const at = ops.mul(ops.unsqueeze(ops.to(positions, "float32"), -1), frequency);
  const both = (x: Value) => ops.unsqueeze(ops.to(ops.cat([x, x], -1), p.dtype), 1);
  return { cos: both(ops.cos(at)), sin: both(ops.sin(at)) };
}

function attention(p: BlockScope, x: Value, positions: Value, cfg: DecoderConfig): Value {
  const { heads, kvHeads, headDim, dim } = cfg;
  const [B, T] = [x.shape[0]!, x.shape[1]!];
  const { cos, sin } = rotation(positions, cfg, p);
  const split = (name: string, count: number): Value =>
    ops.transpose(ops.view(nn.linear(p.sub(name), x, count * headDim), [B, T, count, headDim]), 1, 2);
  const turned = (y: Value): Value => {
    const halves = [ops.neg(ops.slice(y, -1, headDim / 2)), ops.slice(y, -1, 0, headDim / 2)];
    return ops.add(ops.mul(y, cos), ops.mul(ops.cat(halves, -1), sin));
  };
  const y = ops.scaledDotProductAttention(turned(split("q", heads)), turned(split("k", kvHeads)), split("v", kvHeads), {
    mask: null,
    causal: true,
    grouped: heads !== kvHeads,
  });
  return nn.linear(p.sub("o"), ops.reshape(ops.transpose(y, 1, 2), [B, T, heads * headDim]), dim);
}

function swiGlu(p: BlockScope, x: Value, { ffn, dim }: DecoderConfig): Value {
  const gate = ops.silu(nn.linear(p.sub("gate"), x, ffn));
  return nn.linear(p.sub("down"), ops.mul(gate, nn.linear(p.sub("up"), x, ffn)), dim);
}
