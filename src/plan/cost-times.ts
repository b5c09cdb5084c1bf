/** What an instruction's parts cost: by measured tables (cost-measured.ts) or a roofline (cost-roofline.ts). */
import type { SizedCall, SizedProgram } from "./cost-calls.js";
import type { RetainedDType, StateFormat } from "./types.js";

export interface Cost {
  seconds: number;
  /** Of those, seconds in which memory is the limit, not arithmetic. */
  memorySeconds: number;
  flops: number;
  /** Of the host, to ask a card for it: work that is asked for more slowly than it is done takes so long. Absent: 0. */
  launchSeconds?: number;
}

export const none: Cost = { seconds: 0, memorySeconds: 0, flops: 0 };
export const plus = (...costs: readonly Cost[]): Cost => ({
  seconds: costs.reduce((n, c) => n + c.seconds, 0),
  memorySeconds: costs.reduce((n, c) => n + c.memorySeconds, 0),
  flops: costs.reduce((n, c) => n + c.flops, 0),
  launchSeconds: costs.reduce((n, c) => n + (c.launchSeconds ?? 0), 0),
});
/** What work takes that nothing else stands before. */
export const taken = ({ seconds, launchSeconds = 0 }: Cost): number => Math.max(seconds, launchSeconds);
/** Work that moves bytes and computes next to nothing. */
export const moving = (seconds: number): Cost => ({ seconds, memorySeconds: seconds, flops: 0 });

/** A block's tensors, in elements; bytes as they are stored. */
export interface BlockSizes {
  /** What it uses and has a gradient of, and what it owns and updates. */
  used: readonly number[];
  trainable: readonly number[];
  paramBytes: number;
  computeBytes: number;
  stateBytes: number;
  trainableBytes: number;
  /** What one micro-batch's backward passes through: parameters, gradients, sums, what the passes hold. */
  workingBytes: number;
  /** Of a gradient as autograd makes it. */
  gradientBytes: number;
}

export interface Times {
  /** recorded: autograd notes the call down. */
  forward(call: SizedCall, recorded: boolean): Cost;
  backward(call: SizedCall): Cost;
  /** A head that makes its gradients with its loss. */
  head(call: SizedCall): Cost;
  /** What a pass costs beside its calls: boundaries into their places, gradients of values with several uses. */
  beside(program: SizedProgram, pass: "forward" | "backward"): Cost;
  sum(block: BlockSizes, first: boolean): Cost;
  cast(block: BlockSizes): Cost;
  /** uses: sums of one parameter that are added first. */
  norm(block: BlockSizes, uses: number): Cost;
  pack(block: BlockSizes, dtype: RetainedDType, bytes: number): Cost;
  /** gradientBytes: in all. */
  update(block: BlockSizes, state: StateFormat, retained: RetainedDType | null, gradientBytes: number): Cost;
}
