/**
 * Times of a machine of which only large rates are known: each operator takes the longer of its arithmetic and of the bytes
 * that it moves, with at least the time of a launch.
 */
import type { OpName } from "../graph/schemas.js";
import type { DType } from "../graph/types.js";
import { sequenceCall, sequenceTraffic, withTransfers } from "./context.js";
import type { SizedCall, SizedProgram } from "./cost-calls.js";
import { type BlockSizes, type Cost, moving, none, plus, type Times } from "./cost-times.js";
import { type GemmRate, type MachineProfile, RANK_LINK } from "./profiles.js";
import type { RetainedDType, StateFormat } from "./types.js";

/** Make no bytes of their own. */
export const VIEWS: ReadonlySet<OpName> = new Set([
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

export class Roofline implements Times {
  private readonly rate: GemmRate;

  constructor(
    private readonly profile: MachineProfile,
    dtype: DType,
  ) {
    this.rate = profile.gemm[dtype === "bfloat16" || dtype === "float64" ? dtype : "float32"];
  }

  forward(call: SizedCall): Cost {
    return this.call(call, 1, 1);
  }

  backward(call: SizedCall): Cost {
    return this.call(call, 2, call.op === "linear" || call.op === "matmul" ? 2 : 1.5);
  }

  /** Two more products, and the softmax's gradient over logits in fp32. */
  head(call: SizedCall): Cost {
    return plus(this.call(call, 1, 1), this.call(call, 2, 1));
  }

  beside(_: SizedProgram, __: "forward" | "backward"): Cost {
    return none;
  }

  /** Gradients into the fp32 sums: read, and read and written; the first overwrites. */
  sum({ used, gradientBytes }: BlockSizes, first: boolean): Cost {
    return this.bytes(total(used) * (gradientBytes + (first ? 4 : 8)));
  }

  cast({ paramBytes, computeBytes }: BlockSizes): Cost {
    return this.bytes(paramBytes + computeBytes);
  }

  norm({ trainable }: BlockSizes, uses: number): Cost {
    return this.bytes(total(trainable) * 4 * (1 + 2 * Math.max(0, uses - 1)));
  }

  pack({ trainable }: BlockSizes, _: RetainedDType, bytes: number): Cost {
    return this.bytes(total(trainable) * 4 + bytes);
  }

  update(block: BlockSizes, _: StateFormat, __: RetainedDType | null, gradientBytes: number): Cost {
    return this.bytes(gradientBytes + 2 * (block.trainableBytes + block.stateBytes));
  }

  protected bytes(n: number): Cost {
    return moving(n / this.profile.deviceMemory);
  }

  private call(call: SizedCall, arithmetic: number, traffic: number): Cost {
    const { op, out, tensors } = call;
    if (VIEWS.has(op)) return none;
    const { profile, rate } = this;
    const rows = op === "crossEntropyHead" ? tensors[0]!.shape[0]! : out.elements / (out.shape.at(-1) ?? 1);
    const matrix = rate.flops * (rows / (rows + rate.halfRows));
    const flops = call.flops * arithmetic;
    const over = sequenceCall(call);
    const speed =
      op === "scaledDotProductAttention" || over !== null
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
    let seconds = Math.max(flops / speed, memory, profile.operatorSeconds);
    if (over !== null) {
      const bytes = sequenceTraffic(over.kind, over.ranks, over.shape)[arithmetic === 1 ? "forward" : "backward"];
      seconds = withTransfers(over.kind, over.ranks, seconds, bytes / (profile.rankLink ?? RANK_LINK));
    }
    return { seconds, memorySeconds: memory >= flops / speed ? seconds : 0, flops };
  }
}

const total = (list: readonly number[]): number => list.reduce((sum, n) => sum + n, 0);
