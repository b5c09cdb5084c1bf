/**
 * AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101; the arithmetic is torch.optim.AdamW's single-tensor form): options
 * only, the update is a kernel. Weight decay is for matrices: the graph marks norms and biases as not decaying.
 */
import { invalidArgument } from "../errors.js";
import type { SessionOptions } from "../train/native-session.js";

type Kind = SessionOptions["optimizer"]["kind"];

export interface AdamWOptions {
  /** Default 0.9, as in PyTorch. */
  beta1?: number;
  /** Default 0.95, the habit of language models (GPT-3, Llama); PyTorch's own default is 0.999. */
  beta2?: number;
  /** Default 1e-8, as in PyTorch. */
  epsilon?: number;
  /** Decoupled, times the learning rate. Default 0.01, as in PyTorch. */
  weightDecay?: number;
}

export const ADAMW_DEFAULTS: Required<AdamWOptions> = { beta1: 0.9, beta2: 0.95, epsilon: 1e-8, weightDecay: 0.01 };

/**
 * @param kind adamw8bit: moments quantized in blocks of 256 (Dettmers et al. 2022, arXiv 2110.02861), as in bitsandbytes
 * @throws INVALID_ARGUMENT for values that torch.optim.AdamW refuses too
 */
export function resolveAdamW(options: AdamWOptions = {}, kind: Kind = "adamw"): SessionOptions["optimizer"] {
  if (kind !== "adamw" && kind !== "adamw8bit")
    throw invalidArgument("AdamW", "one of adamw, adamw8bit", kind, "optimizer");
  const o = { ...ADAMW_DEFAULTS };
  for (const key of Object.keys(options) as (keyof AdamWOptions)[]) {
    if (!(key in ADAMW_DEFAULTS))
      throw invalidArgument("AdamW", `one of ${Object.keys(ADAMW_DEFAULTS).join(", ")}`, key, "options");
    const value = options[key];
    if (value !== undefined) o[key] = value;
  }
  for (const key of ["beta1", "beta2"] as const)
    if (!(o[key] >= 0 && o[key] < 1)) throw invalidArgument("AdamW", "a number in [0, 1)", o[key], key);
  for (const key of ["epsilon", "weightDecay"] as const)
    if (!(o[key] >= 0 && o[key] < Number.POSITIVE_INFINITY))
      throw invalidArgument("AdamW", "a finite number >= 0", o[key], key);
  return { kind, ...o };
}
