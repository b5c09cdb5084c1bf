/**
 * Whether a Graph is whole and says one thing: every id is defined before it is used, every shape and dtype is what the
 * ops give, blocks read only earlier ones. For graphs from files as well as fresh ones.
 */
import { StromaError } from "../errors.js";
import { canonical, shapeEqual, showShape } from "./dims.js";
import { decodeCall } from "./encode.js";
import { RuleError } from "./rule.js";
import { rules } from "./rules.js";
import type { OpName } from "./schemas.js";
import type { BatchInput, Dim, DType, Graph, Program, ProgramInput, ProgramOutput, Source } from "./types.js";
import { DTYPES, isFloating, scaleDType, type TensorMeta } from "./value.js";

export interface InferredCall {
  op: OpName;
  /** With every tensor replaced by its meta. */
  args: unknown[];
  out: TensorMeta;
}

/** A value of a program while its shapes are inferred; `id` tells equal metas apart. */
export interface InferredValue extends TensorMeta {
  readonly id: number;
}

function fail(where: string, message: string): never {
  throw new StromaError("GRAPH", `[graph] ${where}: ${message}`, { at: where });
}

/** Runs the shape rules over a program as it is written. Throws GRAPH where it is malformed. */
export function inferProgram(program: Program, dtype: DType, trainable: readonly boolean[]): InferredCall[] {
  const at = `program ${program.name}`;
  const values: InferredValue[] = [];
  for (const i of program.inputs) {
    const { name: label, shape, grad } = i;
    values.push({ id: values.length, label, dtype: i.dtype, shape, grad });
  }
  for (const [i, p] of program.parameters.entries()) {
    values.push({ id: values.length, label: p.name, dtype, shape: p.shape, grad: trainable[i] ?? true });
  }
  const value = (id: number): InferredValue => values[id] ?? fail(at, `value ${id} is used before it is defined`);
  const calls: InferredCall[] = [];
  for (const [n, node] of program.nodes.entries()) {
    const where = `${at}, node ${n} (${node.op})`;
    const { op, args } = decodeCall(node, value);
    let out: TensorMeta;
    try {
      // The decoder gave arguments of this op's kinds.
      out = (rules[op] as { infer(args: unknown): TensorMeta }).infer(args);
    } catch (error) {
      if (error instanceof RuleError) return fail(where, error.message);
      throw error;
    }
    if (node.outputs.length !== 1 || node.outputs[0] !== values.length) {
      fail(where, `expected its output to be value ${values.length}, got ${JSON.stringify(node.outputs)}`);
    }
    const result: InferredValue = { ...out, shape: out.shape.map(canonical), id: values.length };
    values.push(result);
    calls.push({ op, args, out: result });
  }
  if (values.length !== program.values) fail(at, `has ${values.length} values and claims ${program.values}`);
  for (const o of program.outputs) {
    const v = value(o.value);
    if (v.dtype !== o.dtype || !shapeEqual(v.shape, o.shape) || v.grad !== o.grad) {
      fail(at, `output ${o.name} is ${v.dtype} ${showShape(v.shape)} and claims ${o.dtype} ${showShape(o.shape)}`);
    }
    if (o.value < program.inputs.length + program.parameters.length) fail(at, `output ${o.name} is an input`);
  }
  return calls;
}

/** Throws GRAPH naming the block or program at fault. */
export function validateGraph(graph: Graph): void {
  if (graph?.format !== "stromatolite.graph") fail("file", "is not a stromatolite graph");
  if (graph.version !== 1) fail("file", `has version ${graph.version}; this program reads version 1`);
  const dtype = graph.dtype ?? "float32";
  if (!isFloating(dtype)) fail("dtype", `${dtype} is not a floating dtype`);
  const parameters = unique("parameter", graph.parameters);
  const inputs = unique("batch input", graph.inputs);
  unique("block", graph.blocks);
  unique("loss", graph.losses);
  unique("output", graph.outputs);
  for (const i of graph.inputs) if (!DTYPES.includes(i.dtype)) fail(`batch input ${i.name}`, `has dtype ${i.dtype}`);

  const firstUse = new Map<string, number>();
  const inferred = new Map<number, string>();
  const used = new Set<string>();
  for (const [b, block] of graph.blocks.entries()) {
    const at = `block ${block.name}`;
    const program = graph.programs[block.program] ?? fail(at, `has no program ${block.program}`);
    if (block.inputs.length !== program.inputs.length) {
      fail(at, `gives ${block.inputs.length} inputs to a program of ${program.inputs.length}`);
    }
    if (block.parameters.length !== program.parameters.length) {
      fail(at, `gives ${block.parameters.length} parameters to a program of ${program.parameters.length}`);
    }
    for (const [i, source] of block.inputs.entries()) {
      checkSource(`${at}, input ${program.inputs[i]!.name}`, graph, inputs, b, source, program.inputs[i]!);
      if ("block" in source) used.add(`${source.block}`);
    }
    const trainable = block.parameters.map((name, i) => {
      const p = parameters.get(name) ?? fail(at, `has no parameter ${name}`);
      if (!shapeEqual(p.shape, program.parameters[i]!.shape)) {
        fail(
          at,
          `parameter ${name} is ${showShape(p.shape)}, its program wants ${showShape(program.parameters[i]!.shape)}`,
        );
      }
      if (!firstUse.has(name)) firstUse.set(name, b);
      return p.trainable;
    });
    // Layers that share a program agree in what trains, or their gradients would not be what it says.
    const key = JSON.stringify(trainable);
    const known = inferred.get(block.program);
    if (known === undefined) {
      inferProgram(program, dtype, trainable);
      inferred.set(block.program, key);
    } else if (known !== key) fail(at, "shares a program with a block whose trainable parameters differ");
  }
  for (const p of graph.parameters) {
    if (firstUse.get(p.name) !== p.owner) {
      fail(`parameter ${p.name}`, `belongs to block ${p.owner}, its first user is ${firstUse.get(p.name) ?? "none"}`);
    }
    if (p.shape.some((d) => !Number.isSafeInteger(d) || d < 1)) fail(`parameter ${p.name}`, `is ${showShape(p.shape)}`);
  }
  for (const loss of graph.losses) {
    const o = outputOf(graph, `loss ${loss.name}`, loss);
    if ((o.dtype !== "float32" && o.dtype !== dtype) || o.shape.length !== 0)
      fail(`loss ${loss.name}`, "is not a float32 scalar");
    if (!inputs.has(loss.count.input)) fail(`loss ${loss.name}`, `counts ${loss.count.input}, which is no batch input`);
    if (!Number.isFinite(loss.weight)) fail(`loss ${loss.name}`, `has weight ${loss.weight}`);
    used.add(`${loss.block}`);
  }
  for (const output of graph.outputs) {
    outputOf(graph, `output ${output.name}`, output);
    used.add(`${output.block}`);
  }
  const idle = graph.blocks.findIndex((_, b) => !used.has(`${b}`));
  if (idle >= 0) fail(`block ${graph.blocks[idle]!.name}`, "is used by no later block, loss or output");
}

function unique<T extends { name: string }>(what: string, list: readonly T[]): Map<string, T> {
  const map = new Map<string, T>();
  for (const item of list) {
    if (map.has(item.name)) fail(`${what} ${item.name}`, "is there twice");
    map.set(item.name, item);
  }
  return map;
}

function outputOf(graph: Graph, at: string, from: { block: number; output: number }): ProgramOutput {
  const block = graph.blocks[from.block] ?? fail(at, `has no block ${from.block}`);
  return (
    graph.programs[block.program]!.outputs[from.output] ?? fail(at, `block ${block.name} has no output ${from.output}`)
  );
}

function checkSource(
  at: string,
  graph: Graph,
  inputs: ReadonlyMap<string, BatchInput>,
  block: number,
  source: Source,
  input: ProgramInput,
): void {
  const is = (dtype: DType, shape: readonly Dim[], kind: ProgramInput["kind"], grad: boolean) => {
    if (input.kind !== kind) fail(at, `is of kind ${input.kind}, its source of kind ${kind}`);
    if (input.dtype !== dtype || !shapeEqual(input.shape, shape)) {
      fail(at, `wants ${input.dtype} ${showShape(input.shape)}, its source is ${dtype} ${showShape(shape)}`);
    }
    if (input.grad !== grad) fail(at, `says ${input.grad ? "a" : "no"} gradient flows back, its source says otherwise`);
  };
  if ("block" in source) {
    if (!(source.block < block)) fail(at, `reads block ${source.block}, which is not before it`);
    const o = outputOf(graph, at, source);
    is(o.dtype, o.shape, "boundary", o.grad);
  } else if ("batch" in source) {
    const b = inputs.get(source.batch) ?? fail(at, `has no batch input ${source.batch}`);
    is(b.dtype, b.shape, "batch", false);
  } else if ("lossScale" in source) {
    if (!graph.losses.some((l) => l.name === source.lossScale)) fail(at, `has no loss ${source.lossScale}`);
    is(scaleDType(graph.dtype ?? "float32"), [], "lossScale", false);
  } else {
    is("int64", [4], "rngKey", false);
  }
}
