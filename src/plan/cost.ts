/**
 * Seconds of an instruction on a machine, from its block's operators: each by what the machine's profile knows of its kind, in
 * tables (cost-measured.ts) where the machine has been measured, else by large rates alone (cost-roofline.ts).
 */
import type { DType, Graph } from "../graph/types.js";
import { dtypeBytes } from "../graph/value.js";
import { sizedProgram } from "./cost-calls.js";
import { FusedRoofline } from "./cost-fused.js";
import { MeasuredTimes } from "./cost-measured.js";
import { Roofline } from "./cost-roofline.js";
import { type BlockSizes, type Cost, moving, none, plus, type Times, taken } from "./cost-times.js";
import { type BlockLayout, blockLayouts } from "./layout.js";
import { membersOf, shardOf } from "./mesh.js";
import { type MachineProfile, RANK_LINK } from "./profiles.js";
import type { Instruction, Tape } from "./types.js";
import { queueOf } from "./waits.js";

export type { Cost } from "./cost-times.js";

/** Of one micro-batch through a block, without what an instruction takes beside its work. */
export interface PassCost {
  /** Without autograd, and with. */
  forward: Cost;
  recorded: Cost;
  /** The forward that a backward runs before it: all of it, or without what was kept. */
  again: Cost;
  /** Without that. */
  backward: Cost;
  /** Forward and backward of a head, whose gradients are made with the logits at hand. */
  turn: Cost;
  /** Bytes that one backward passes through, without the block's parameters. */
  bytes: number;
}

/** Costs of every instruction of tapes of one graph on one machine. `dims`: sizes of a device micro-batch. */
export class CostModel {
  readonly layouts: BlockLayout[];
  private readonly passes = new Map<number, PassCost>();
  private readonly times: Times;

  constructor(
    private readonly graph: Graph,
    private readonly tape: Pick<Tape, "state" | "recompute" | "kept" | "stages">,
    private readonly dims: Readonly<Record<string, number>>,
    private readonly profile: MachineProfile,
  ) {
    this.layouts = blockLayouts(graph, tape.state, tape.stages);
    this.times = timesOf(profile, graph.dtype ?? "float32");
  }

  of(i: Instruction): Cost {
    const cost = this.work(i);
    return { ...cost, seconds: taken(cost) + (queueOf(i) === "compute" ? this.profile.instructionSeconds : 0) };
  }

  private work(i: Instruction): Cost {
    const { times } = this;
    switch (i.op) {
      case "forward":
        return i.keep ? this.pass(i.block).recorded : this.pass(i.block).forward;
      case "turn":
        return plus(this.pass(i.block).turn, times.sum(this.sizes(i.block), i.first));
      case "backward": {
        const { again, backward } = this.pass(i.block);
        return plus(again, backward, times.sum(this.sizes(i.block), i.first));
      }
      case "cast":
        return times.cast(this.sizes(i.block));
      case "norm":
        return times.norm(this.sizes(i.block), i.sums.length);
      case "partial": {
        // In place where sums are the gradient.
        const layout = this.layouts[i.block]!;
        const read = i.sums.length * layout.partialBytes(this.graph.dtype === "float64" ? "float64" : "float32");
        return i.sums.includes(i.to) ? none : moving((read + layout.partialBytes(i.dtype)) / this.profile.deviceMemory);
      }
      case "reduce": {
        const { begin, end } = this.layouts[i.block]!.shard(shardOf(this.tape.stages!)).partial;
        const bytes = i.parts.length * dtypeBytes(i.dtype) + dtypeBytes("float32");
        return moving(((end - begin) * bytes) / this.profile.deviceMemory);
      }
      case "report":
      case "agree":
      case "coefficient":
        return none;
      case "send":
      case "receive": {
        // What is gathered or reduced goes to all others at once, over one link.
        const atOnce = "shard" in i.operand ? membersOf(this.tape.stages) - 1 : 1;
        return {
          seconds: (atOnce * i.bytes) / (this.profile.rankLink ?? RANK_LINK) + this.profile.copySeconds,
          memorySeconds: 0,
          flops: 0,
        };
      }
      case "pack":
        return times.pack(this.sizes(i.block), i.dtype, this.layouts[i.block]!.retainedBytes(i.dtype));
      case "update": {
        const layout = this.layouts[i.block]!;
        const retained = i.from === "retained" ? i.dtype : null;
        const gradient = retained === null ? total(layout.trainable) * 4 : layout.retainedBytes(retained);
        return times.update(this.sizes(i.block), this.tape.state, retained, gradient);
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

  private sizes(block: number): BlockSizes {
    const layout = this.layouts[block]!;
    const gradientBytes = this.graph.dtype === "bfloat16" ? 2 : 4;
    return {
      used: layout.used,
      trainable: layout.trainable,
      paramBytes: layout.paramBytes,
      computeBytes: layout.computeBytes,
      stateBytes: layout.stateBytes,
      trainableBytes: layout.trainableBytes,
      workingBytes: total(layout.used) * (4 + 2 * gradientBytes) + this.pass(block).bytes,
      gradientBytes,
    };
  }

  /** The gradient of a micro-batch, the first or another, into the block's sums. */
  sum(block: number, first: boolean): Cost {
    return this.times.sum(this.sizes(block), first);
  }

  pass(block: number): PassCost {
    // Blocks of one program cost the same.
    const { program } = this.graph.blocks[block]!;
    let found = this.passes.get(program);
    if (found !== undefined) return found;
    const { times } = this;
    const { recompute, kept } = this.tape;
    const known = new Set([...(kept?.values[program] ?? []), ...(kept?.shapes[program] ?? [])]);
    const sized = sizedProgram(this.graph, block, this.dims);
    const [there, back] = [times.beside(sized, "forward"), times.beside(sized, "backward")];
    const again = recompute === "none" ? [none] : [there];
    const costs = { forward: [there], recorded: [there], backward: [back], turn: [back], again };
    for (const call of sized.calls) {
      costs.forward.push(times.forward(call, false));
      const recorded = times.forward(call, true);
      costs.recorded.push(recorded);
      if (recompute !== "none" && !known.has(call.out.id)) costs.again.push(recorded);
      if (call.op === "crossEntropyHead" && call.out.grad) {
        costs.turn.push(times.head(call));
        continue;
      }
      const after = call.out.grad ? times.backward(call) : none;
      costs.backward.push(after);
      costs.turn.push(recorded, after);
    }
    found = {
      forward: plus(...costs.forward),
      recorded: plus(...costs.recorded),
      again: plus(...costs.again),
      backward: plus(...costs.backward),
      turn: plus(...costs.turn),
      bytes: sized.calls.reduce((n, call) => n + call.out.bytes, 0),
    };
    this.passes.set(program, found);
    return found;
  }
}

function timesOf(profile: MachineProfile, dtype: DType): Times {
  if (profile.measured !== undefined) return new MeasuredTimes(profile.measured, profile, dtype);
  return profile.compiled ? new FusedRoofline(profile, dtype) : new Roofline(profile, dtype);
}

const total = (list: readonly number[]): number => list.reduce((sum, n) => sum + n, 0);
