/** Parameters are drawn piece by piece and by several threads: they have the values of one draw of ATen's. */
import { describe, expect, it } from "vitest";
import { traceModel } from "../../src/graph/index.js";
import { decoderConfig } from "../../src/models/decoder/config.js";
import { decoder } from "../../src/models/decoder/model.js";
import { planResident } from "../../src/plan/planner.js";
import { callOp, fromHost, manualSeed, noGrad, scope, type Tensor } from "../../src/tensor/index.js";
import { nativeOrSkip } from "../support/native.js";

const native = nativeOrSkip();

/** FNV-1a over the seed's bytes and the name: the parameter's own stream. */
function streamOf(seed: number, name: string): bigint {
  let h = 0xcbf29ce484222325n;
  const eat = (byte: number) => {
    h = ((h ^ BigInt(byte)) * 0x100000001b3n) & 0xffffffffffffffffn;
  };
  for (let i = 0; i < 8; i++) eat(Number((BigInt(seed) >> BigInt(8 * i)) & 255n));
  for (const byte of Buffer.from(name)) eat(byte);
  return h;
}

describe.skipIf(native === null)("the draw of parameters", () => {
  // Pieces have 2^20: less than one, one, one and four values more, two and some that are no whole sixteens.
  it.each([
    [8, 514],
    [2048, 512],
    [20_165, 52],
    [4099, 514],
  ])("of %i rows of %i is one draw's", async (vocabSize, dim) => {
    const config = decoderConfig({ vocabSize, dim, layers: 1, heads: 2, kvHeads: 1, headDim: 64, ffn: 64 });
    const graph = traceModel(decoder, config, { mode: "train", dtype: "float32" });
    const { placement } = planResident(graph, { microBatches: 1 });
    const optimizer = { kind: "adamw", beta1: 0.9, beta2: 0.95, epsilon: 1e-8, weightDecay: 0 } as const;
    const session = native!.createSession({ device: "cpu", dtype: "float32", threads: 2, optimizer });
    try {
      await session.load(graph, placement);
      await session.initialize(5);
      const parameter = graph.parameters.find((p) => p.shape[0] === vocabSize)!;
      const drawn = await session.read("param", parameter.name);
      noGrad(() =>
        scope(() => {
          manualSeed(streamOf(5, parameter.name));
          const whole = callOp("aten::empty.memory_format", [parameter.shape], { dtype: "float32" }) as Tensor;
          callOp("aten::normal_", [whole, 0, config.initStd]);
          expect(callOp("aten::equal", [whole, fromHost(drawn)])).toBe(true);
        }),
      );
    } finally {
      await session.dispose();
    }
  });
});
