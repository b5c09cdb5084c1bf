/** What blocks compute in over parameters stored in bfloat16, where the user did not say. */
import { probeMachine } from "../native.js";
import type { SessionOptions } from "./native-session.js";

export interface ComputeDType {
  dtype: "float32" | "bfloat16";
  /** For the user: why this one. */
  why: string;
}

/**
 * bfloat16 on a card; on processors only where they multiply it in hardware and are seen to be faster so. Chosen once a
 * run: a checkpoint remembers it.
 */
export async function chooseComputeDType(device: SessionOptions["device"]): Promise<ComputeDType> {
  if (device.startsWith("cuda")) return { dtype: "bfloat16", why: "the card multiplies bfloat16" };
  const flags = probeMachine()?.cpuFlags;
  if (flags === undefined || !(flags.avx512Bf16 || flags.amxBf16))
    return { dtype: "float32", why: "this processor has no fast bfloat16" };
  const [narrow, wide] = [await timeProduct("bfloat16"), await timeProduct("float32")];
  return narrow < wide
    ? { dtype: "bfloat16", why: `${(wide / narrow).toFixed(1)} x as fast here as float32` }
    : { dtype: "float32", why: `bfloat16 is ${(narrow / wide).toFixed(1)} x as slow here` };
}

/** Seconds of the product of two matrices of 512 x 512, the best of five: some milliseconds in all. */
async function timeProduct(dtype: "float32" | "bfloat16"): Promise<number> {
  const { callOp, noGrad, scope } = await import("../tensor/index.js");
  return noGrad(() =>
    scope(() => {
      const x = callOp("aten::ones", [[512, 512]], { dtype });
      let best = Number.POSITIVE_INFINITY;
      for (let i = 0; i < 5; i++) {
        const begin = performance.now();
        scope(() => void callOp("aten::mm", [x, x]));
        best = Math.min(best, performance.now() - begin);
      }
      return best / 1000;
    }),
  );
}
