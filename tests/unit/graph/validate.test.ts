import { describe, expect, it } from "vitest";
import { checkGraphForm } from "../../../src/graph/form.js";
import type { Graph } from "../../../src/graph/types.js";
import { validateGraph } from "../../../src/graph/validate.js";
import { findModel } from "../../../src/models/registry.js";

const good = findModel("tiny").graph();
const linear = good.programs[1]!.nodes.findIndex((n) => n.op === "aten::linear");

describe("a graph from a file", () => {
  it("is accepted as it was written", () => {
    validateGraph(JSON.parse(JSON.stringify(good)));
  });

  it.each<[string, RegExp, (g: Graph) => void]>([
    ["of another format", /not a stromatolite graph/, (g) => Object.assign(g, { format: "onnx" })],
    ["of a later version", /has version 2/, (g) => Object.assign(g, { version: 2 })],
    [
      "with an op that is not of the table",
      /aten::system is not an op/,
      (g) => Object.assign(g.programs[1]!.nodes[0]!, { op: "aten::system" }),
    ],
    ["with an argument too few", /expected 3 arguments, got 2/, (g) => g.programs[1]!.nodes[linear]!.args.pop()],
    [
      "with an unknown keyword",
      /no keyword argument out/,
      (g) => Object.assign(g.programs[1]!.nodes[linear]!, { kwargs: { out: { value: 0 } } }),
    ],
    [
      "with a string where a tensor stands",
      /argument input is malformed/,
      (g) => g.programs[1]!.nodes[linear]!.args.splice(0, 1, { constant: "x" }),
    ],
    [
      "that reads a value before it is there",
      /is used before it is defined/,
      (g) => g.programs[1]!.nodes[0]!.args.splice(0, 1, { value: 60 }),
    ],
    [
      "whose ids do not follow",
      /expected its output to be value/,
      (g) => g.programs[1]!.nodes[3]!.outputs.splice(0, 1, 2),
    ],
    [
      "that claims another output",
      /claims float32 \[B, T, 7\]/,
      (g) => g.programs[1]!.outputs[0]!.shape.splice(2, 1, 7),
    ],
    [
      "whose shapes do not fit",
      /expected input \[\.\.\., 191\]/,
      (g) => {
        g.programs[1]!.parameters.find((p) => p.name === "self_attn.q_proj.weight")!.shape[1] = 191;
        for (const p of g.parameters) if (p.name.endsWith("q_proj.weight")) p.shape[1] = 191;
      },
    ],
    [
      "with a block that reads a later one",
      /which is not before it/,
      (g) => g.blocks[1]!.inputs.splice(0, 1, { block: 3, output: 0 }),
    ],
    [
      "with an output that is not there",
      /has no output 1/,
      (g) => g.blocks[2]!.inputs.splice(0, 1, { block: 1, output: 1 }),
    ],
    ["with a missing batch input", /has no batch input position_ids/, (g) => g.inputs.pop()],
    [
      "with a missing parameter",
      /has no parameter model.norm.weight/,
      (g) =>
        g.parameters.splice(
          g.parameters.findIndex((p) => p.name === "model.norm.weight"),
          1,
        ),
    ],
    ["with two blocks of one name", /is there twice/, (g) => Object.assign(g.blocks[2]!, { name: g.blocks[1]!.name })],
    [
      "with a parameter in another block's hands",
      /its first user is 0/,
      (g) => Object.assign(g.parameters[0]!, { owner: 5 }),
    ],
    ["with a loss of a block that is not there", /has no block 77/, (g) => Object.assign(g.losses[0]!, { block: 77 })],
    [
      "with a loss weight that is not finite",
      /has weight Infinity/,
      (g) => Object.assign(g.losses[0]!, { weight: Number.POSITIVE_INFINITY }),
    ],
    [
      "with a loss counted by nothing",
      /counts answers/,
      (g) => Object.assign(g.losses[0]!.count, { input: "answers" }),
    ],
    [
      "with a dtype that does not compute",
      /int64 is not a floating dtype/,
      (g) => Object.assign(g, { dtype: "int64" }),
    ],
    [
      "whose shared layers differ in what trains",
      /trainable parameters differ/,
      (g) =>
        Object.assign(g.parameters.find((p) => p.name === "model.layers.2.mlp.up_proj.weight")!, { trainable: false }),
    ],
  ])("%s is refused", (_, message, change) => {
    const graph: Graph = structuredClone(good);
    change(graph);
    const validate = () => validateGraph(graph);
    expect(validate).toThrow(message);
    expect(validate).toThrow(expect.objectContaining({ code: "GRAPH" }));
  });
});

describe("the form of a graph from a file", () => {
  const written = (): Graph => JSON.parse(JSON.stringify(good)) as Graph;
  const edited = (edit: (g: Graph) => unknown) => (g: Graph) => {
    edit(g);
    return g;
  };

  it.each(["train", "eval", "generate"] as const)("is accepted as it was written, in mode %s", (mode) => {
    const graph = JSON.parse(JSON.stringify(findModel("tiny").graph({ mode }))) as unknown;
    expect(checkGraphForm(graph, "graph.json")).toBe(graph);
  });

  it.each<[string, RegExp, (g: Graph) => unknown]>([
    ["that is no object", /it: /, () => null],
    ["without parameters", /parameters: /, (g) => ({ ...g, parameters: null })],
    ["with a parameter that is nothing", /parameters\.0: /, (g) => ({ ...g, parameters: [null] })],
    ["with text for a shape", /parameters\.0\.shape: /, edited((g) => Object.assign(g.parameters[0]!, { shape: "x" }))],
    [
      "with a name for a program",
      /blocks\.0\.program: /,
      edited((g) => Object.assign(g.blocks[0]!, { program: "__proto__" })),
    ],
    [
      "with a source that is nothing",
      /blocks\.1\.inputs\.0: /,
      edited((g) => g.blocks[1]!.inputs.splice(0, 1, null as never)),
    ],
    [
      "with a block before the first",
      /blocks\.1\.inputs\.0(\.block)?: /,
      edited((g) => g.blocks[1]!.inputs.splice(0, 1, { block: -1, output: 0 })),
    ],
    [
      "with a node without arguments",
      /nodes\.0\.args: /,
      edited((g) => Object.assign(g.programs[1]!.nodes[0]!, { args: null })),
    ],
    ["with losses in words", /losses: /, (g) => ({ ...g, losses: "x" })],
    ["of an unknown dtype", /dtype: /, (g) => ({ ...g, dtype: "zork" })],
  ])("%s is refused by file and field", (_, message, change) => {
    const graph = change(written());
    expect(() => checkGraphForm(graph, "graph.json")).toThrow(message);
    expect(() => checkGraphForm(graph, "graph.json")).toThrow(/^\[graph\] graph\.json: /);
  });
});
