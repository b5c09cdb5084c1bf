/**
 * Times of a machine of which only large rates are known: each operator takes the longer of its arithmetic and of the bytes
 * that it moves, with at least the time of a kernel. A host asks for them one after the other: a pass takes the longer of
 * what its operators take and of what asking for them takes.
 */
import type { OpName } from "../graph/schemas.js";
import type { DType } from "../graph/types.js";
import { sequenceCall, sequenceTraffic, withTransfers } from "./context.js";
import type { SizedCall, SizedProgram, SizedValue } from "./cost-calls.js";
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

/** What a card takes for the smallest kernel, and the next one to begin. */
const KERNEL_SECONDS = 2e-6;
/**
 * Host seconds that libtorch takes for a call of a program, views too, over those of one plain operator (operatorSeconds):
 * forward with autograd, and backward with its gradients' sums. An H100 beside a Xeon: a layer of the 100m preset took 1.35
 * and 2.42 ms, with 2,048 tokens as with 4,096, and an operator 9.4 us (docs/gpu/h100-2026-11-28.md). It was 69 calls then;
 * of the 24 that it is with operators of our own it has not been timed.
 */
const LAUNCHES = { forward: 2.1, backward: 5.2 } as const;

/** Bytes that a backward moves, over those of its forward, where it is not half as many again. */
const BACKWARD_TRAFFIC: Partial<Record<OpName, number>> = {
  linear: 2,
  matmul: 2,
  rotate: 1,
  // Two more values written, or read, beside three.
  siluMul: 5 / 3,
  // Its input's gradient reads two values and writes one; its weight's reads the two again.
  rmsNorm: 5 / 2,
};

/** Moved for a logit, there and again back: as bfloat16, as float32, its softmax, the gradients of both (measured there too). */
const LOGIT_BYTES = 44;

export class Roofline implements Times {
  private readonly rate: GemmRate;
  /** Of any operator. */
  private readonly least: number;

  constructor(
    private readonly profile: MachineProfile,
    dtype: DType,
  ) {
    this.least =
      profile.device === "cuda" ? Math.min(KERNEL_SECONDS, profile.operatorSeconds) : profile.operatorSeconds;
    this.rate = profile.gemm[dtype === "bfloat16" || dtype === "float64" ? dtype : "float32"];
  }

  forward(call: SizedCall, _recorded = true): Cost {
    return this.launched(this.call(call, 1, 1), "forward");
  }

  backward(call: SizedCall): Cost {
    return this.launched(this.call(call, 2, BACKWARD_TRAFFIC[call.op] ?? 1.5), "backward");
  }

  /** Two more products, the softmax's gradient over logits in fp32, and the chunks' gradients of the weight into their sum. */
  head(call: SizedCall): Cost {
    const [x, w] = call.tensors as [SizedValue, SizedValue];
    const chunks = Math.ceil(x.shape[0]! / (call.args[5] as number));
    const sums = w.grad && chunks > 1 ? chunks * (w.bytes + 8 * w.elements) : 0;
    return plus(this.call(call, 1, 1), this.call(call, 2, 1), this.bytes(sums));
  }

  private launched(cost: Cost, pass: keyof typeof LAUNCHES): Cost {
    const { device, operatorSeconds } = this.profile;
    return device === "cuda" ? { ...cost, launchSeconds: LAUNCHES[pass] * operatorSeconds } : cost;
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
    if (op === "crossEntropyHead") moved += (tensors[0]!.shape[0]! * tensors[1]!.shape[0]! * LOGIT_BYTES) / traffic;
    const memory = (moved * traffic) / profile.deviceMemory;
    let seconds = Math.max(flops / speed, memory, this.least);
    if (over !== null) {
      const bytes = sequenceTraffic(over.kind, over.ranks, over.shape)[arithmetic === 1 ? "forward" : "backward"];
      seconds = withTransfers(over.kind, over.ranks, seconds, bytes / (profile.rankLink ?? RANK_LINK));
    }
    return { seconds, memorySeconds: memory >= flops / speed ? seconds : 0, flops };
  }
}

const total = (list: readonly number[]): number => list.reduce((sum, n) => sum + n, 0);
