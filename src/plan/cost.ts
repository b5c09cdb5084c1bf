/**
 * Seconds of an instruction on a machine: each operator takes the longer of its arithmetic and of the bytes that it moves
 * (a roofline), with at least the time of a launch.
 */
import type { OpName } from "../graph/schemas.js";
import type { Graph } from "../graph/types.js";
import { type SizedCall, sizedProgram } from "./cost-calls.js";
import { type BlockLayout, blockLayouts } from "./layout.js";
import { type GemmRate, type MachineProfile, RANK_LINK } from "./profiles.js";
import type { Instruction, Tape } from "./types.js";
import { queueOf } from "./waits.js";

export interface Cost {
  seconds: number;
  /** Of those, seconds in which memory is the limit, not arithmetic. */
  memorySeconds: number;
  flops: number;
}

const VIEWS: ReadonlySet<OpName> = new Set([
  "view",
  "reshape",
  "transpose",
  "permute",
  "unsqueeze",
  "squeeze",
  "expand",
  "slice",
  "select",
  "contiguous",
]);

interface PassCost {
  forward: Cost;
  /** The forward that a backward runs before it: all of it, or without what was kept. */
  again: Cost;
  /** Without that. */
  backward: Cost;
  /** Forward and backward of a head, whose gradients are made with the logits at hand. */
  turn: Cost;
}

const add = (a: Cost, b: Cost): Cost => ({
  seconds: a.seconds + b.seconds,
  memorySeconds: a.memorySeconds + b.memorySeconds,
  flops: a.flops + b.flops,
});
const none: Cost = { seconds: 0, memorySeconds: 0, flops: 0 };

/** Costs of every instruction of tapes of one graph on one machine. `dims`: sizes of a device micro-batch. */
export class CostModel {
  readonly layouts: BlockLayout[];
  private readonly passes = new Map<number, PassCost>();
  private readonly rate: GemmRate;

  constructor(
    private readonly graph: Graph,
    private readonly tape: Pick<Tape, "state" | "recompute" | "kept">,
    private readonly dims: Readonly<Record<string, number>>,
    private readonly profile: MachineProfile,
  ) {
    this.layouts = blockLayouts(graph, tape.state);
    const dtype = graph.dtype ?? "float32";
    this.rate = profile.gemm[dtype === "bfloat16" || dtype === "float64" ? dtype : "float32"];
  }

  of(i: Instruction): Cost {
    const cost = this.work(i);
    return { ...cost, seconds: cost.seconds + (queueOf(i) === "compute" ? this.profile.instructionSeconds : 0) };
  }

  private work(i: Instruction): Cost {
    switch (i.op) {
      case "forward":
        return this.pass(i.block).forward;
      case "turn":
        return add(this.pass(i.block).turn, this.sum(i.block, i.first));
      case "backward": {
        const { again, backward } = this.pass(i.block);
        return add(add(again, backward), this.sum(i.block, i.first));
      }
      case "cast":
        return this.bytes(this.layouts[i.block]!.paramBytes + this.layouts[i.block]!.computeBytes);
      case "norm":
        return this.bytes(this.trainable(i.block) * 4 * (1 + 2 * Math.max(0, i.sums.length - 1)));
      case "report":
      case "agree":
      case "coefficient":
        return none;
      case "send":
      case "receive":
        return {
          seconds: i.bytes / (this.profile.rankLink ?? RANK_LINK) + this.profile.copySeconds,
          memorySeconds: 0,
          flops: 0,
        };
      case "pack":
        return this.bytes(this.trainable(i.block) * 4 + this.layouts[i.block]!.retainedBytes(i.dtype));
      case "update": {
        const layout = this.layouts[i.block]!;
        const grad = i.from === "retained" ? layout.retainedBytes(i.dtype) : this.trainable(i.block) * 4;
        return this.bytes(grad + 2 * (layout.trainableBytes + layout.stateBytes));
      }
      case "copy": {
        const { profile } = this;
        const rate = {
          in: profile.hostToDevice,
          out: profile.deviceToHost,
          load: profile.diskRead,
          save: profile.diskWrite,
        }[i.queue];
        return { seconds: i.bytes / rate + profile.copySeconds, memorySeconds: 0, flops: 0 };
      }
    }
  }

  private trainable(block: number): number {
    return this.layouts[block]!.trainable.reduce((sum, n) => sum + n, 0);
  }

  private bytes(n: number): Cost {
    const seconds = n / this.profile.deviceMemory;
    return { seconds, memorySeconds: seconds, flops: 0 };
  }

  /** Gradients into the fp32 sums: read, and read and written; the first overwrites. */
  private sum(block: number, first: boolean): Cost {
    const elements = this.layouts[block]!.used.reduce((sum, n) => sum + n, 0);
    const gradient = this.graph.dtype === "bfloat16" ? 2 : 4;
    return this.bytes(elements * (gradient + (first ? 4 : 8)));
  }

  private pass(block: number): PassCost {
    // Blocks of one program cost the same.
    const { program } = this.graph.blocks[block]!;
    let found = this.passes.get(program);
    if (found !== undefined) return found;
    const { recompute, kept } = this.tape;
    const known = new Set([...(kept?.values[program] ?? []), ...(kept?.shapes[program] ?? [])]);
    let [forward, again, backward, turn] = [none, none, none, none];
    for (const call of sizedProgram(this.graph, block, this.dims).calls) {
      const once = this.call(call, 1, 1);
      forward = add(forward, once);
      if (recompute !== "none" && !known.has(call.out.id)) again = add(again, once);
      turn = add(turn, once);
      if (!call.out.grad) continue;
      if (call.op === "crossEntropyHead") {
        // Two more products, and the softmax's gradient over logits in fp32.
        turn = add(turn, this.call(call, 2, 1));
        continue;
      }
      const after = this.call(call, 2, call.op === "linear" || call.op === "matmul" ? 2 : 1.5);
      backward = add(backward, after);
      turn = add(turn, after);
    }
    found = { forward, again, backward, turn };
    this.passes.set(program, found);
    return found;
  }

  private call(call: SizedCall, arithmetic: number, traffic: number): Cost {
    const { op, out, tensors } = call;
    if (VIEWS.has(op)) return none;
    const { profile, rate } = this;
    const rows = op === "crossEntropyHead" ? tensors[0]!.shape[0]! : out.elements / (out.shape.at(-1) ?? 1);
    const matrix = rate.flops * (rows / (rows + rate.halfRows));
    const flops = call.flops * arithmetic;
    const speed =
      op === "scaledDotProductAttention"
        ? rate.flops * profile.attention
        : op === "linear" || op === "matmul" || op === "crossEntropyHead"
          ? matrix
          : Number.POSITIVE_INFINITY;
    let moved = out.bytes;
    // A gather reads the rows that it takes.
    for (const t of tensors)
      moved += op === "embedding" || op === "indexSelect" ? Math.min(t.bytes, out.bytes) : t.bytes;
    if (op === "crossEntropyHead") moved += (tensors[0]!.shape[0]! * tensors[1]!.shape[0]! * 16) / traffic;
    const memory = (moved * traffic) / profile.deviceMemory;
    const seconds = Math.max(flops / speed, memory, profile.operatorSeconds);
    return { seconds, memorySeconds: memory >= flops / speed ? seconds : 0, flops };
  }
}
