/**
 * The CUDA twins of our own kernels beside the CPU's, on the same inputs. What says that it has the CPU's bits is compared
 * to the bit; AdamW's square root is another on the CPU (MKL's), so its parameters are compared within an ulp or two.
 */
import { describe, expect, it } from "vitest";
import { type Device, machineFacts, visibleCards, whyNoCard } from "../../src/device.js";
import { callOp, manualSeed, noGrad, scope, type Tensor } from "../../src/tensor/index.js";
import { hasNative } from "../support/native.js";

const none = hasNative() ? (whyNoCard(machineFacts())?.message ?? null) : "no addon";
if (none !== null) console.warn(`left out, a card is needed: ${none}`);
const devices: Device[] =
  none === null
    ? visibleCards(machineFacts())
        .filter((c) => c.unusable === null)
        .map((c) => c.device)
    : [];

/** Not a whole number of 256s, and more than one grid of thread blocks takes at once is not needed to be right. */
const N = 100_003;
const randn = (n = N): Tensor => callOp("aten::randn", [[n]], { dtype: "float32" }) as Tensor;
const zeros = (n: number, dtype: string): Tensor => callOp("aten::zeros", [[n]], { dtype }) as Tensor;
const twin = (x: Tensor | null, device: Device): Tensor | null => (x === null ? null : x.to({ device }));
const home = (x: Tensor): Tensor => x.to({ device: "cpu" });
const equal = (a: Tensor, b: Tensor): boolean => callOp("aten::equal", [home(a), home(b)]) as boolean;
const worst = (a: Tensor, b: Tensor): number =>
  Number(
    (callOp("aten::max", [callOp("aten::abs", [callOp("aten::sub.Tensor", [home(a), home(b)])])]) as Tensor).item(),
  );
const quarter = Math.ceil(N / 256);

describe.skipIf(none !== null).each(devices.length === 0 ? (["cuda:0"] as Device[]) : devices)("on %s", (device) => {
  const test = (name: string, check: () => void) =>
    it(name, () =>
      noGrad(() =>
        scope(() => {
          manualSeed(7);
          check();
        }),
      ),
    );

  test("8-bit codes and scales are the CPU's, and what they stand for", () => {
    for (const signed of [true, false]) {
      const x = signed ? randn() : (callOp("aten::abs", [randn()]) as Tensor);
      const results = (["cpu", device] as const).map((on) => {
        const [code, absmax] = [twin(zeros(N, "uint8"), on)!, twin(zeros(quarter, "float32"), on)!];
        const back = twin(zeros(N, "float32"), on)!;
        callOp("stroma::quantize_blockwise_", [twin(x, on), code, absmax, signed]);
        callOp("stroma::dequantize_blockwise_", [code, absmax, signed, back]);
        return [code, absmax, back];
      });
      for (const [i, t] of results[0]!.entries()) expect(equal(t, results[1]![i]!), `${signed} ${i}`).toBe(true);
    }
  });

  test("split masters are the CPU's, and join to the weight", () => {
    const x = randn();
    const [param, low, back] = [zeros(N, "bfloat16"), zeros(N, "int16"), zeros(N, "float32")].map(
      (t) => twin(t, device)!,
    );
    callOp("stroma::split16_", [twin(x, device), param, low]);
    callOp("stroma::join16_", [param, low, back]);
    expect(equal(back!, x)).toBe(true);
  });

  test("dropout draws what the CPU draws", () => {
    const key = callOp("aten::full", [[4], 3], { dtype: "int64" });
    const x = randn();
    const drop = (on: Device) => callOp("stroma::dropout", [twin(x, on), 0.3, key, 1]) as Tensor;
    expect(equal(drop("cpu"), drop(device))).toBe(true);
  });

  test("AdamW: with 8-bit moments the CPU's bits, else its numbers", () => {
    for (const [storage, master] of [
      ["float32", null],
      ["bfloat16", null],
      ["bfloat16", "int16"],
      ["bfloat16", "float32"],
    ] as const)
      for (const [eight, off, first] of [
        [true, 0, 0],
        [false, 0, 0],
        // From an address that is no multiple of 16, and from within a group of draws.
        [true, 3, 13],
        [false, 3, 13],
      ] as const) {
        const weight = randn();
        const gradients = [randn(), randn(), randn()];
        const run = (on: Device): Tensor[] => {
          let param = twin(weight, on)!;
          let held: Tensor | null = null;
          if (storage === "bfloat16") {
            param = callOp("aten::to.dtype", [param, "bfloat16"]) as Tensor;
            if (master === "float32") held = twin(weight, on)!;
            if (master === "int16") {
              held = twin(zeros(N, "int16"), on)!;
              callOp("stroma::split16_", [twin(weight, on), param, held]);
            }
          }
          /** A copy of its own that begins `off` elements behind where memory begins. */
          const moved = (t: Tensor): Tensor => {
            const room = callOp("aten::cat", [[callOp("aten::narrow", [t, 0, 0, off]), t]]) as Tensor;
            return callOp("aten::narrow", [room, 0, off, N]) as Tensor;
          };
          param = moved(param);
          if (held !== null) held = moved(held);
          const moments = [0, 1].map(() => moved(twin(zeros(N, eight ? "uint8" : "float32"), on)!));
          const scales = [0, 1].map(() => (eight ? twin(zeros(quarter, "float32"), on)! : null));
          for (const [i, g] of gradients.entries())
            callOp("stroma::adamw_", [
              ...[param, held, moved(twin(g, on)!), ...moments, ...scales],
              ...[1e-2, 0.9, 0.95, 1e-8, 0.1, i + 1, 0.7, [1, i + 1, 2, first]],
            ]);
          return [param, ...(held === null ? [] : [held]), ...moments];
        };
        const [cpu, card] = [run("cpu"), run(device)];
        const label = `${storage} ${master} ${eight ? "8 bits" : "32 bits"} ${off}`;
        for (const [i, t] of cpu.entries())
          if (eight || t.dtype === "float32") {
            if (eight) expect(equal(t, card[i]!), `${label} ${i}`).toBe(true);
            else expect(worst(t, card[i]!), `${label} ${i}`).toBeLessThan(1e-6);
          }
      }
  });
});
