/** A program's calls at given sizes: what the models of memory and time walk. */
import { evaluate } from "../graph/dims.js";
import type { Saved } from "../graph/rule.js";
import { rules } from "../graph/rules.js";
import type { OpName } from "../graph/schemas.js";
import type { Dim, DType, Graph } from "../graph/types.js";
import { type InferredValue, inferProgram } from "../graph/validate.js";
import { dtypeBytes, type TensorMeta } from "../graph/value.js";

export interface SizedValue {
  /** Id in the program: inputs, parameters, then outputs of calls. */
  id: number;
  dtype: DType;
  shape: number[];
  elements: number;
  bytes: number;
  grad: boolean;
}

export interface SizedCall {
  op: OpName;
  /** As in the schema; tensors are SizedValue, dims are evaluated where they are sizes. */
  args: unknown[];
  /** Tensor arguments in order. */
  tensors: SizedValue[];
  out: SizedValue;
  flops: number;
  /** Of the whole program, parameters and results: what passes between two uses of one parameter. */
  passBytes: number;
  /** What autograd holds of it: values at hand by id, and bytes of its own. */
  savedValues: number[];
  savedOwnBytes: number[];
}

export interface SizedProgram {
  inputs: SizedValue[];
  parameters: SizedValue[];
  calls: SizedCall[];
  outputs: number[];
  values: SizedValue[];
}

type Rule = {
  flops(args: unknown, out: TensorMeta): Dim;
  saved(args: unknown, out: TensorMeta): readonly Saved[];
};

/** The program of a block with every dim bound. Throws SHAPE for a dim without a size. */
export function sizedProgram(graph: Graph, block: number, dims: Readonly<Record<string, number>>): SizedProgram {
  const spec = graph.blocks[block]!;
  const program = graph.programs[spec.program]!;
  const dtype = graph.dtype ?? "float32";
  const byName = new Map(graph.parameters.map((p) => [p.name, p]));
  const trainable = spec.parameters.map((name) => byName.get(name)!.trainable);
  const values: SizedValue[] = [];
  const add = (type: DType, shape: readonly Dim[], grad: boolean): SizedValue => {
    const sizes = shape.map((d) => evaluate(d, dims));
    const elements = sizes.reduce((x, y) => x * y, 1);
    const value = { id: values.length, dtype: type, shape: sizes, elements, bytes: elements * dtypeBytes(type), grad };
    values.push(value);
    return value;
  };
  const inputs = program.inputs.map((i) => add(i.dtype, i.shape, i.grad));
  const parameters = program.parameters.map((p, i) => add(dtype, p.shape, trainable[i]!));
  const calls = inferProgram(program, dtype, trainable).map(({ op, args, out }): Omit<SizedCall, "passBytes"> => {
    const rule = rules[op] as unknown as Rule;
    const tensors: SizedValue[] = [];
    const sized = (arg: unknown): unknown => {
      if (Array.isArray(arg)) return arg.map(sized);
      if (typeof arg !== "object" || arg === null) return arg;
      const value = values[(arg as InferredValue).id]!;
      tensors.push(value);
      return value;
    };
    const given = args.map(sized);
    const saved = rule.saved(args, out);
    return {
      op,
      args: given,
      tensors,
      out: add(out.dtype, out.shape, out.grad),
      flops: evaluate(rule.flops(args, out), dims),
      savedValues: saved.flatMap((s) => ("own" in s ? [] : [(s as InferredValue).id])),
      savedOwnBytes: saved.flatMap((s) =>
        "own" in s ? [s.own.shape.reduce<number>((n, d) => n * evaluate(d, dims), 1) * dtypeBytes(s.own.dtype)] : [],
      ),
    };
  });
  const passBytes = values.slice(inputs.length).reduce((n, v) => n + v.bytes, 0);
  return {
    inputs,
    parameters,
    calls: calls.map((call) => ({ ...call, passBytes })),
    outputs: program.outputs.map((o) => o.value),
    values,
  };
}
