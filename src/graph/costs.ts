/** What a graph costs, from the op table: parameters, floating-point operations, bytes. */
import { dimAdd, dimMul, evaluate } from "./dims.js";
import { numel, type Saved } from "./rule.js";
import { rules } from "./rules.js";
import type { Dim, DType, Graph, Program } from "./types.js";
import { type InferredValue, inferProgram } from "./validate.js";
import { dtypeBytes, type TensorMeta } from "./value.js";

export interface ProgramCost {
  parameters: number;
  parameterBytes: number;
  /** Of one micro-batch, as expressions over its dims. */
  forwardFlops: Dim;
  /** What autograd holds from forward to backward when nothing is recomputed; parameters and inputs not counted. */
  savedBytes: Dim;
  /** The boundaries that the program writes. */
  outputBytes: Dim;
}

type Rule = {
  flops(args: unknown, out: TensorMeta): Dim;
  saved(args: unknown, out: TensorMeta): readonly Saved[];
  view?: true;
};

/** Cost of one program. `trainable` as in its first block. */
export function programCost(program: Program, dtype: DType, trainable: readonly boolean[]): ProgramCost {
  const calls = inferProgram(program, dtype, trainable);
  const given = program.inputs.length + program.parameters.length;
  /** Value -> the value whose memory it shares. */
  const base = new Map<number, number>();
  const memory = (id: number): number => base.get(id) ?? id;
  const kept = new Set<number>();
  let forwardFlops: Dim = 0;
  let savedBytes: Dim = 0;
  const bytes = (d: DType, shape: readonly Dim[]): Dim => dimMul(numel(shape), dtypeBytes(d));
  for (const { op, args, out } of calls) {
    const rule = rules[op] as unknown as Rule;
    forwardFlops = dimAdd(forwardFlops, rule.flops(args, out));
    const self = args[0] as InferredValue;
    if (rule.view && self.dtype === out.dtype) base.set((out as InferredValue).id, memory(self.id));
    for (const saved of rule.saved(args, out)) {
      if ("own" in saved) {
        savedBytes = dimAdd(savedBytes, bytes(saved.own.dtype, saved.own.shape));
        continue;
      }
      const id = memory((saved as InferredValue).id);
      if (id < given || kept.has(id)) continue;
      kept.add(id);
      savedBytes = dimAdd(savedBytes, bytes(saved.dtype, saved.shape));
    }
  }
  const parameters = program.parameters.reduce((sum, p) => sum + p.shape.reduce((a, b) => a * b, 1), 0);
  let outputBytes: Dim = 0;
  for (const o of program.outputs) outputBytes = dimAdd(outputBytes, bytes(o.dtype, o.shape));
  return { parameters, parameterBytes: parameters * dtypeBytes(dtype), forwardFlops, savedBytes, outputBytes };
}

export interface BlockCost {
  name: string;
  program: string;
  /** Own parameters only: a tied one counts where it lives. */
  parameters: number;
  trainable: number;
  parameterBytes: number;
  forwardFlops: number;
  /** Backward counted as twice the forward; 0 where none runs. Recompute is not in it. */
  trainingFlops: number;
  savedBytes: number;
  outputBytes: number;
}

export interface GraphCost {
  blocks: BlockCost[];
  parameters: number;
  trainable: number;
  parameterBytes: number;
  forwardFlops: number;
  trainingFlops: number;
  savedBytes: number;
}

/** Costs at given sizes ({ B: 1, T: 512 }). Throws SHAPE for a dim without a size. */
export function graphCost(graph: Graph, sizes: Readonly<Record<string, number>>): GraphCost {
  const dtype = graph.dtype ?? "float32";
  const byName = new Map(graph.parameters.map((p) => [p.name, p]));
  const programs = new Map<number, ProgramCost>();
  const blocks = graph.blocks.map((block, b): BlockCost => {
    const program = graph.programs[block.program]!;
    const uses = block.parameters.map((name) => byName.get(name)!);
    let cost = programs.get(block.program);
    if (cost === undefined) {
      cost = programCost(
        program,
        dtype,
        uses.map((p) => p.trainable),
      );
      programs.set(block.program, cost);
    }
    const own = uses.filter((p) => p.owner === b);
    const count = (list: typeof own) => list.reduce((sum, p) => sum + p.shape.reduce((x, y) => x * y, 1), 0);
    const forwardFlops = evaluate(cost.forwardFlops, sizes);
    const backward = program.inputs.some((i) => i.grad) || uses.some((p) => p.trainable);
    const parameters = count(own);
    return {
      name: block.name,
      program: program.name,
      parameters,
      trainable: count(own.filter((p) => p.trainable)),
      parameterBytes: parameters * dtypeBytes(dtype),
      forwardFlops,
      trainingFlops: forwardFlops * (backward ? 3 : 1),
      savedBytes: evaluate(cost.savedBytes, sizes),
      outputBytes: evaluate(cost.outputBytes, sizes),
    };
  });
  const sum = (key: Exclude<keyof BlockCost, "name" | "program" | "outputBytes">) =>
    blocks.reduce((s, b) => s + b[key], 0);
  return {
    blocks,
    parameters: sum("parameters"),
    trainable: sum("trainable"),
    parameterBytes: sum("parameterBytes"),
    forwardFlops: sum("forwardFlops"),
    trainingFlops: sum("trainingFlops"),
    savedBytes: sum("savedBytes"),
  };
}
