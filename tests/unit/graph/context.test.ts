import { describe, expect, it } from "vitest";
import { type ContextOptions, contextOf, graphCost, graphHash, ops, validateGraph } from "../../../src/graph/index.js";
import { model } from "../../../src/graph/model.js";
import { traceModel } from "../../../src/graph/trace.js";
import type { Graph, Mode } from "../../../src/graph/types.js";
import { type DecoderOptions, decoderConfig } from "../../../src/models/decoder/config.js";
import { decoder } from "../../../src/models/decoder/model.js";
import { findModel } from "../../../src/models/registry.js";

const sizes = { vocabSize: 11, dim: 16, layers: 2, heads: 4, kvHeads: 2, ffn: 24 };
const trace = (context: ContextOptions | null, more: Partial<DecoderOptions> = {}, mode: Mode = "train"): Graph =>
  traceModel(decoder, decoderConfig({ ...sizes, ...more }), { context, mode });
const nodes = (graph: Graph, op: string) => graph.programs.flatMap((p) => p.nodes).filter((n) => n.op === op);
const layer = (graph: Graph, dims: Record<string, number>) =>
  graphCost(graph, dims).blocks.find((b) => b.name === "model.layers.0")!;

describe("a context of ranks", () => {
  it.each([
    ["ring", "stroma::ring_attention"],
    ["allToAll", "stroma::all_to_all_attention"],
  ] as const)("traces the same decoder with attention over them: %s", (kind, op) => {
    for (const documentMask of [false, true]) {
      const graph = trace({ ranks: 2, kind }, { documentMask });
      validateGraph(graph);
      expect(contextOf(graph)).toEqual({ ranks: 2, kind });
      expect(nodes(graph, "aten::scaled_dot_product_attention")).toEqual([]);
      const [node] = nodes(graph, op);
      expect(node!.args.slice(4)).toEqual([{ constant: true }, { constant: null }, { constant: "context:2" }]);
      expect("value" in node!.args[3]!).toBe(documentMask);
      expect(graph.parameters).toEqual(trace(null, { documentMask }).parameters);
      expect(graph.inputs).toEqual(trace(null, { documentMask }).inputs);
    }
  });

  it("changes nothing with one rank or none, for any preset", () => {
    for (const name of ["tiny", "1b", "astro-13b"]) {
      const hash = (context?: ContextOptions | null) => graphHash(findModel(name).graph({ context }));
      expect(hash({ ranks: 1, kind: "ring" })).toBe(hash());
      expect(hash(null)).toBe(hash());
      expect(hash({ ranks: 2, kind: "ring" })).not.toBe(hash());
    }
    expect(contextOf(trace(null))).toBeNull();
  });

  it("counts this rank's queries against the keys of all, and no dim of T squared", () => {
    const [T, R] = [96, 4];
    const whole = layer(trace(null), { B: 2, T });
    for (const kind of ["ring", "allToAll"] as const) {
      const share = layer(trace({ ranks: R, kind }), { B: 2, T: T / R });
      // But for the rotation's frequencies, which every rank makes.
      expect((share.forwardFlops * R) / whole.forwardFlops).toBeCloseTo(1, 4);
      // What a rank holds until backward is its share, and all to all the copies of keys and values that R asks for.
      expect(share.savedBytes * R).toBeGreaterThanOrEqual(whole.savedBytes);
      expect(share.savedBytes * R).toBeLessThan(whole.savedBytes * (kind === "ring" ? 1.001 : 1.2));
    }
    const packed = (T: number) =>
      layer(trace({ ranks: R, kind: "ring" }, { documentMask: true }), { B: 2, T }).savedBytes;
    expect(packed(2 * T)).toBe(2 * packed(T));
  });

  it("refuses heads that do not divide over the ranks, but in a ring", () => {
    expect(() => trace({ ranks: 3, kind: "allToAll" })).toThrow(
      expect.objectContaining({ code: "SHAPE", message: expect.stringMatching(/multiple of the 3 ranks.*use "ring"/) }),
    );
    expect(contextOf(trace({ ranks: 3, kind: "ring" }))).toEqual({ ranks: 3, kind: "ring" });
  });

  it("refuses generation, ranks that are none and kinds that are unknown", () => {
    expect(() => trace({ ranks: 2, kind: "ring" }, {}, "generate")).toThrow(
      expect.objectContaining({ code: "CONFIG" }),
    );
    expect(contextOf(trace({ ranks: 2, kind: "ring" }, {}, "eval"))).not.toBeNull();
    for (const ranks of [0, -1, 1.5]) expect(() => trace({ ranks, kind: "ring" })).toThrow(/context.ranks/);
    expect(() => trace({ ranks: 2, kind: "star" as "ring" })).toThrow(/"ring" or "allToAll", got "star"/);
  });

  /** One block with attention over `keys` tokens. */
  const attending = (keys: "T" | "P") =>
    model<null>("small", (m) => {
      const q = m.input("q", "float32", ["B", 2, "T", 8]);
      const k = m.input("k", "float32", ["B", 2, keys, 8]);
      const labels = m.input("labels", "int64", ["B", "T"]);
      return m.block("head", (p) => {
        const loss = ops.mul(ops.sum(ops.scaledDotProductAttention(q, k, k), []), p.lossScale("loss"));
        p.loss("loss", loss, { count: labels, ignore: -100 });
        return loss;
      });
    });

  it("refuses attention that would see this rank's tokens alone, and takes one over what is whole", () => {
    const context = { ranks: 2, kind: "ring" } as const;
    expect(() => traceModel(attending("T"), null, { context })).toThrow(
      expect.objectContaining({ code: "GRAPH", message: expect.stringContaining("this rank's tokens alone") }),
    );
    expect(traceModel(attending("P"), null, { context }).blocks).toHaveLength(1);
    expect(traceModel(attending("T"), null).blocks).toHaveLength(1);
  });

  it("refuses shapes that do not fit, as they are recorded", () => {
    const over = (k: [number, number], documents: boolean) => () =>
      traceModel(
        model<null>("small", (m) => {
          const q = m.input("q", "float32", ["B", 4, "T", 8]);
          const kv = m.input("k", "float32", ["B", k[0], "T", k[1]]);
          const ids = m.input("ids", "int64", ["T", "B"]);
          m.block("head", (p) => {
            const y = ops.sequenceAttention(m.context!, q, kv, kv, { documents: documents ? ids : null });
            const loss = ops.mul(ops.sum(y, []), p.lossScale("loss"));
            p.loss("loss", loss, { count: ids, ignore: -100 });
            return loss;
          });
          return undefined;
        }),
        null,
        { context: { ranks: 2, kind: "ring" } },
      );
    expect(over([3, 8], false)).toThrow(/query heads to be a multiple of the key heads/);
    expect(over([2, 6], false)).toThrow(/keys of the query's own tokens/);
    expect(over([2, 8], true)).toThrow(/document ids int64 \[B, T\], got ids int64 \[T, B\]/);
    expect(over([2, 8], false)().blocks).toHaveLength(1);
  });

  it("refuses a graph whose group is no group", () => {
    const graph = structuredClone(trace({ ranks: 2, kind: "ring" }));
    nodes(graph, "stroma::ring_attention")[0]!.args[6] = { constant: "everybody" };
    expect(() => validateGraph(graph)).toThrow(/expected a group of ranks "context:R", got "everybody"/);
  });
});
