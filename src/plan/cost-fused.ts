/**
 * Times of a machine whose elementwise work is compiled (torch.compile's Inductor, or kernels written for the purpose):
 * products, attention and gathers stay calls of their own; all calls between two of them run as one kernel, which reads what
 * it is given once and writes what others need once. Without compiling each of those calls reads and writes memory.
 */
import type { OpName } from "../graph/schemas.js";
import type { SizedCall, SizedProgram, SizedValue } from "./cost-calls.js";
import { Roofline, VIEWS } from "./cost-roofline.js";
import { type Cost, none } from "./cost-times.js";

/** Kernels of their own also where the rest is compiled. */
const ALONE: ReadonlySet<OpName> = new Set([
  "linear",
  "matmul",
  "scaledDotProductAttention",
  "crossEntropyHead",
  "embedding",
  "indexSelect",
]);

/** Bytes that a program's fused calls move through memory. */
export interface FusedTraffic {
  forward: number;
  backward: number;
}

export class FusedRoofline extends Roofline {
  override forward(call: SizedCall): Cost {
    return ALONE.has(call.op) ? super.forward(call) : none;
  }

  override backward(call: SizedCall): Cost {
    return ALONE.has(call.op) ? super.backward(call) : none;
  }

  override beside(program: SizedProgram, pass: "forward" | "backward"): Cost {
    const traffic = fusedTraffic(program);
    // A head goes forward and back in one; what stands beside its turn is asked for as a backward.
    const turns = program.calls.some((call) => call.op === "crossEntropyHead");
    return this.bytes(traffic[pass] + (turns && pass === "backward" ? traffic.forward : 0));
  }
}

/**
 * Calls between the same calls that stand alone make a stage: a call's stage is the most of such calls on a way to it. A
 * stage reads each value of others once, and writes each of its own that others read. Its backward reads the gradients of
 * what it wrote and, to compute itself anew, what it read; it writes the gradients of what it read.
 */
export function fusedTraffic({ calls, inputs, parameters, outputs, values }: SizedProgram): FusedTraffic {
  const stages: number[] = [];
  const base: SizedValue[] = [];
  for (const value of [...inputs, ...parameters]) [stages[value.id], base[value.id]] = [0, value];
  /** Stages of calls that read it, by value; a call that stands alone is none of them. */
  const reads = new Map<SizedValue, Set<number>>();
  const read = (value: SizedValue, by: number) => {
    const of = base[value.id]!;
    reads.set(of, (reads.get(of) ?? new Set()).add(by));
  };
  const ALONE_STAGE = -1;
  const light: SizedValue[] = [];
  for (const { op, tensors, out } of calls) {
    const stage = Math.max(0, ...tensors.map((t) => stages[t.id]!));
    const view = VIEWS.has(op);
    base[out.id] = view ? base[tensors[0]!.id]! : out;
    stages[out.id] = ALONE.has(op) ? stage + 1 : stage;
    if (view) continue;
    if (!ALONE.has(op)) light.push(out);
    for (const t of tensors) read(t, ALONE.has(op) ? ALONE_STAGE : stage);
  }
  const made = new Map(light.map((value) => [value, stages[value.id]!]));
  const left = new Set(outputs.map((id) => base[id] ?? values[id]!));
  let [forward, backward] = [0, 0];
  for (const [value, by] of reads) {
    const own = made.get(value);
    for (const stage of by) {
      if (stage === ALONE_STAGE || stage === own) continue;
      forward += value.bytes;
      backward += value.bytes * (value.grad ? 2 : 1);
    }
  }
  for (const [value, own] of made) {
    const needed = left.has(value) || [...(reads.get(value) ?? [])].some((stage) => stage !== own);
    if (!needed) continue;
    forward += value.bytes;
    backward += value.grad ? value.bytes : 0;
  }
  return { forward, backward };
}
