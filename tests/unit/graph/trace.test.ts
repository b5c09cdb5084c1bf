import { describe, expect, it } from "vitest";
import { graphHash } from "../../../src/graph/hash.js";
import { type BlockScope, type ModelScope, model } from "../../../src/graph/model.js";
import * as ops from "../../../src/graph/ops.js";
import { traceModel } from "../../../src/graph/trace.js";
import type { Mode } from "../../../src/graph/types.js";
import type { Value } from "../../../src/graph/value.js";
import * as nn from "../../../src/nn/index.js";

/** Traces a body over x float32 [B, 8]; `head` closes it with a loss. */
function trace(build: (m: ModelScope, x: Value, labels: Value) => void, mode: Mode = "train") {
  const definition = model<null>("small", (m) => {
    build(m, m.input("x", "float32", ["B", 8]), m.input("labels", "int64", ["B"]));
    return undefined;
  });
  return traceModel(definition, null, { mode });
}

function lossOf(p: BlockScope, x: Value, labels: Value, name = "loss"): Value {
  const loss = ops.mul(ops.sum(ops.mul(x, x), []), p.lossScale(name));
  p.loss(name, loss, { count: labels, ignore: -100 });
  return loss;
}

/** int64 [B, 1] */
const positions = (x: Value): Value => ops.to(ops.slice(x, -1, 0, 1), "int64");
const code = (c: string) => expect.objectContaining({ code: c });

describe("tracing", () => {
  it("traces a repeated body once and hands the carry on", () => {
    let traced = 0;
    const graph = trace((m, x, labels) => {
      const h = m.block("in", (p) => nn.linear(p, x, 8));
      const y = m.repeat("layers", 5, h, (p, v) => {
        traced++;
        return ops.add(v, nn.linear(p.sub("f"), v, 8));
      });
      m.block("head", (p) => lossOf(p, y, labels));
    });
    expect(traced).toBe(1);
    expect(graph.programs.map((p) => p.name)).toEqual(["in", "layers.*", "head"]);
    expect(graph.blocks.map((b) => b.name)).toEqual(["in", ...[0, 1, 2, 3, 4].map((i) => `layers.${i}`), "head"]);
    expect(graph.blocks.slice(1, 6).map((b) => b.inputs)).toEqual(
      [0, 1, 2, 3, 4].map((block) => [{ block, output: 0 }]),
    );
    expect(graph.blocks[3]!.parameters).toEqual(["layers.2.f.weight"]);
    expect(graph.parameters.find((p) => p.name === "layers.4.f.weight")!.owner).toBe(5);
  });

  it("traces a repeat again when its first layer reads the batch and the others a boundary", () => {
    const graph = trace((m, x, labels) => {
      const y = m.repeat("layers", 3, x, (p, v) => nn.linear(p, v, 8));
      m.block("head", (p) => lossOf(p, y, labels));
    });
    expect(graph.blocks.slice(0, 3).map((b) => b.program)).toEqual([0, 1, 1]);
    expect(graph.programs[0]!.inputs[0]).toMatchObject({ kind: "batch", grad: false });
    expect(graph.programs[1]!.inputs[0]).toMatchObject({ kind: "boundary", grad: true });
  });

  it("shares what a body captures among all layers, and numbers what is each layer's own", () => {
    const graph = trace((m, x) => {
      const context = m.block("encoder", (p) => nn.linear(p, x, 8));
      const h = m.block("in", (p) => nn.linear(p, x, 8));
      m.repeat("layers", 2, h, (p, v) => {
        const past = p.input("past", "float32", ["B", 8]);
        const y = ops.add(ops.add(v, past), ops.mul(context, nn.linear(p, v, 8)));
        p.output("present", y);
        return y;
      });
    }, "generate");
    const program = graph.programs[graph.blocks[2]!.program]!;
    expect(program.inputs.map((i) => i.name)).toEqual(["x", "past", "encoder:output"]);
    expect(graph.blocks[3]!.inputs).toEqual([{ block: 2, output: 0 }, { batch: "past.1" }, { block: 0, output: 0 }]);
    expect(graph.inputs.map((i) => i.name)).toEqual(["x", "past.0", "past.1"]);
    expect(graph.outputs).toEqual([
      { name: "present.0", block: 2, output: 0 },
      { name: "present.1", block: 3, output: 0 },
    ]);
  });

  it("ties a parameter that two blocks name, to its first user", () => {
    const graph = trace((m, x, labels) => {
      const h = m.block("a", (p) => ops.linear(x, p.param("weight", [8, 8])));
      m.block("b", (p) => lossOf(p, ops.linear(h, p.at("a").param("weight", [8, 8])), labels));
    });
    expect(graph.parameters).toHaveLength(1);
    expect(graph.parameters[0]).toMatchObject({ name: "a.weight", owner: 0 });
    expect(graph.blocks[1]!.parameters).toEqual(["a.weight"]);
  });

  it("records neither unused ops nor inputs that no block reads", () => {
    const graph = trace((m, x, labels) => {
      m.input("idle", "int64", ["B"]);
      m.block("head", (p) => {
        ops.exp(x);
        return lossOf(p, nn.linear(p, x, 8), labels);
      });
    });
    expect(graph.inputs.map((i) => i.name)).toEqual(["x", "labels"]);
    expect(graph.programs[0]!.nodes.map((n) => n.op)).not.toContain("aten::exp");
  });

  it("gives gradients to what trainable parameters reach, and to nothing else", () => {
    const graph = trace((m, x, labels) => {
      const [frozen, open] = m.block("two", (p) => [
        ops.linear(x, p.param("frozen", [8, 8], { trainable: false })),
        ops.linear(x, p.param("open", [8, 8])),
      ]) as Value[];
      m.block("head", (p) => lossOf(p, ops.add(frozen!, open!), labels));
    });
    expect(graph.programs[0]!.outputs.map((o) => o.grad)).toEqual([false, true]);
    expect(graph.programs[1]!.inputs.map((i) => [i.kind, i.grad])).toEqual([
      ["boundary", false],
      ["boundary", true],
      ["lossScale", false],
    ]);
  });

  it("hashes equal definitions alike and different ones apart", () => {
    const build = (width: number) =>
      trace((m, x, labels) => {
        const h = m.block("in", (p) => nn.linear(p, x, width));
        m.block("head", (p) => lossOf(p, h, labels));
      });
    expect(graphHash(build(8))).toBe(graphHash(build(8)));
    expect(graphHash(build(8))).not.toBe(graphHash(build(9)));
    const shuffled = JSON.parse(JSON.stringify(build(8)));
    const { format, ...rest } = shuffled;
    expect(graphHash({ ...rest, format })).toBe(graphHash(build(8)));
  });

  it("records dropout in train mode only, each call with its own site", () => {
    const build = (mode: Mode) =>
      trace((m, x, labels) => {
        m.block("head", (p) => {
          const h = nn.dropout(p, nn.dropout(p, nn.linear(p, x, 8), 0.1), 0.2);
          return lossOf(p, h, labels);
        });
      }, mode);
    const nodes = build("train").programs[0]!.nodes.filter((n) => n.op === "stroma::dropout");
    expect(nodes.map((n) => n.args[3])).toEqual([{ constant: 0 }, { constant: 1 }]);
    expect(build("train").blocks[0]!.inputs).toContainEqual({ rngKey: true });
    expect(build("eval").programs[0]!.nodes.map((n) => n.op)).not.toContain("stroma::dropout");
    expect(build("eval").blocks[0]!.inputs).not.toContainEqual({ rngKey: true });
  });
});

describe("errors while a model is defined", () => {
  it("name model, layer, op, parameter and the named dims", () => {
    const build = () =>
      trace((m, x, labels) => {
        const h = m.block("in", (p) => nn.linear(p, x, 8));
        const y = m.repeat("model.layers", 3, h, (p, v) => ops.linear(v, p.sub("mlp").param("weight", [8, 12])));
        m.block("head", (p) => lossOf(p, y, labels));
      });
    expect(build).toThrow(code("SHAPE"));
    expect(build).toThrow(
      "[small] model.layers.0: aten::linear: expected input [..., 12] for model.layers.0.mlp.weight float32 [8, 12], got in:output float32 [B, 8]",
    );
  });

  it("show both shapes of a broadcast that fails", () => {
    expect(() =>
      trace((m, x) => {
        m.block("b", (p) => ops.add(x, p.param("bias", [9])));
      }),
    ).toThrow(
      "[small] b: aten::add.Tensor: shapes do not broadcast: x float32 [B, 8] and b.bias float32 [9] differ in 8 and 9",
    );
  });

  it.each<[string, string, (m: ModelScope, x: Value, labels: Value) => void]>([
    ["an op outside of a block", "stand inside m.block", (_m, x) => ops.exp(x)],
    [
      "a block inside a block",
      "blocks do not nest",
      (m, x) => m.block("a", () => m.block("b", (p) => nn.linear(p, x, 8))),
    ],
    [
      "a value that leaks out of its block",
      "uses a value from inside a",
      (m, x) => {
        let leaked: Value | undefined;
        m.block("a", (p) => {
          leaked = nn.linear(p, x, 8);
          return ops.exp(leaked);
        });
        m.block("b", () => ops.exp(leaked!));
      },
    ],
    [
      "two blocks of one name",
      "two blocks are named a",
      (m, x) => {
        m.block("a", (p) => nn.linear(p, x, 8));
        m.block("a", (p) => nn.linear(p, x, 8));
      },
    ],
    [
      "a block that nothing uses",
      "is used by no later block, loss or output",
      (m, x, labels) => {
        m.block("idle", (p) => nn.linear(p, x, 8));
        m.block("head", (p) => lossOf(p, nn.linear(p, x, 8), labels));
      },
    ],
    [
      "an output in train mode",
      "a training graph returns losses only",
      (m, x) => m.block("a", (p) => p.output("y", nn.linear(p, x, 8)) as undefined),
    ],
    [
      "a loss counted by something else than a batch input",
      "expected a batch input as its count",
      (m, x) => {
        const h = m.block("a", (p) => nn.linear(p, x, 8));
        m.block("b", (p) => {
          const loss = ops.mul(ops.sum(h, []), p.lossScale("loss"));
          p.loss("loss", loss, { count: h, ignore: 0 });
          return loss;
        });
      },
    ],
    ["a block that returns its input", "pass it around the block", (m, x) => m.block("a", () => x)],
    [
      "a block that returns nothing",
      "returns nothing",
      (m, x) => m.block("a", (p) => void nn.linear(p, x, 8) as undefined),
    ],
    [
      "one input defined twice and differently",
      "defined twice and differently",
      (m) => m.input("x", "int64", ["B", 8]),
    ],
  ])("refuse %s", (_, message, build) => {
    expect(() => trace((m, x, labels) => build(m, x, labels))).toThrow(message);
    expect(() => trace((m, x, labels) => build(m, x, labels))).toThrow(code("GRAPH"));
  });

  it.each<[string, string, (m: ModelScope, x: Value) => void]>([
    [
      "a tied parameter of another shape",
      "parameter a.weight is [8, 9] here and [8, 8] in a",
      (m, x) => {
        const h = m.block("a", (p) => ops.linear(x, p.param("weight", [8, 8])));
        m.block("b", (p) => ops.linear(h, ops.transpose(p.at("a").param("weight", [8, 9]), 0, 1)));
      },
    ],
    [
      "a carry that changes its shape",
      "carries float32 [B, 8] in and float32 [B, 4] out",
      (m, x) => m.repeat("layers", 2, x, (p, v) => nn.linear(p, v, 4)),
    ],
    [
      "a view that does not come out even",
      "does not come out even",
      (m, x) => m.block("a", () => ops.view(x, [-1, 3])),
    ],
    [
      "a norm over a dim that is not fixed",
      "fixed dim -1",
      (m) => {
        const y = m.input("y", "float32", ["B", "T"]);
        m.block("a", (p) => nn.rmsNorm(p, y, 1e-5));
      },
    ],
    [
      "a norm's weight of another width",
      "expected a weight of [8]",
      (m, x) => m.block("a", (p) => ops.rmsNorm(x, p.param("weight", [4]), 1e-5)),
    ],
    [
      "a gate of another shape than what it gates",
      "expected gate and up of one shape",
      (m, x) => m.block("a", () => ops.siluMul(x, ops.slice(x, -1, 0, 4))),
    ],
    [
      "a table of positions that are not whole",
      "expected positions int64 [B, T], got",
      (m, x) => m.block("a", () => ops.rotaryTable(x, 4, { theta: 1e4 }, "float32")),
    ],
    [
      "a table of an odd head dim",
      "expected an even head dim, got 5",
      (m, x) => m.block("a", () => ops.rotaryTable(positions(x), 5, { theta: 1e4 }, "float32")),
    ],
    [
      "a rotation by a table of other sizes",
      "expected a table of [B, 1, 8], got",
      (m, x) =>
        m.block("a", () =>
          ops.rotate(ops.view(x, ["B", 1, 1, 8]), ops.rotaryTable(positions(x), 4, { theta: 1e4 }, "float32")),
        ),
    ],
    [
      "a rotation by what is learned",
      "expected a table without a gradient",
      (m, x) =>
        m.block("a", (p) =>
          ops.rotate(ops.view(x, ["B", 1, 1, 8]), ops.view(ops.linear(x, p.param("w", [8, 8])), ["B", 1, 8])),
        ),
    ],
    [
      "heads that do not divide",
      "multiple of key/value heads",
      (m, x) =>
        m.block("a", (p) =>
          nn.selfAttention(p, ops.view(x, ["B", 1, 8]), { heads: 3, kvHeads: 2, headDim: 4, rotation: null }),
        ),
    ],
  ])("refuse %s", (_, message, build) => {
    expect(() => trace(build)).toThrow(message);
    expect(() => trace(build)).toThrow(code("SHAPE"));
  });
});
