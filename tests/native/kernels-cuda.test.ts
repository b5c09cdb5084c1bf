/**
 * The CUDA twins of our own kernels beside the CPU's, on the same inputs. What says that it has the CPU's bits is compared
 * to the bit; AdamW's square root is another on the CPU (MKL's), so its parameters are compared within an ulp or two. Norms
 * sum in another order, and SwiGLU's exponential is another: theirs are compared within roundings of the dtype.
 */
import { describe, expect, it } from "vitest";
import { type Device, machineFacts, visibleCards, whyNoCard } from "../../src/device.js";
import { callOp, enableGrad, grad, manualSeed, noGrad, scope, type Tensor } from "../../src/tensor/index.js";
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

  const cast = (t: Tensor, dtype: string) => callOp("aten::to.dtype", [t, dtype]) as Tensor;
  const shaped = (shape: number[], dtype: string) =>
    cast(callOp("aten::randn", [shape], { dtype: "float32" }) as Tensor, dtype);
  /** The largest difference, in parts of the largest value. */
  const off = (a: Tensor, b: Tensor): number => {
    const [x, y] = [a, b].map((t) => cast(home(t), "float64")) as [Tensor, Tensor];
    const most = Number((callOp("aten::max", [callOp("aten::abs", [x])]) as Tensor).item());
    return worst(x, y) / Math.max(most, 1e-30);
  };
  /** Result and gradients of an operator on each device, from the same values. */
  const both = (op: string, inputs: Tensor[], more: (on: Device) => unknown[]): [Tensor[], Tensor[]] => {
    // All of them return what is like their first.
    const seed = shaped([...inputs[0]!.shape], inputs[0]!.dtype);
    return (["cpu", device] as const).map((on) =>
      enableGrad(() => {
        const leaves = inputs.map((t) => {
          const leaf = noGrad(() => callOp("aten::clone", [twin(t, on)]) as Tensor);
          leaf.requiresGrad = true;
          return leaf;
        });
        const y = callOp(op, [...leaves, ...more(on)]) as Tensor;
        return [y, ...grad([y], leaves, { gradOutputs: [twin(seed, on)!] })];
      }),
    ) as [Tensor[], Tensor[]];
  };
  // A rounding of the result; a gradient's sum has a few.
  const bounds = { float32: 1e-5, bfloat16: 2e-2, float64: 1e-13, float16: 2e-3 } as const;

  test("norm and SwiGLU's product give the CPU's numbers, in every dtype and size", () => {
    // Rows for a warp, for a thread block, that packs do not divide, many short ones; one, and none.
    for (const [dtype, bound] of Object.entries(bounds))
      for (const [rows, width] of [
        [33, 64],
        [7, 4352],
        [5, 1031],
        [3, 7],
        [20_011, 128],
        [1, 2048],
        [0, 64],
      ] as const) {
        const [x, up, weight] = [shaped([rows, width], dtype), shaped([rows, width], dtype), shaped([width], dtype)];
        for (const [op, inputs, more] of [
          ["stroma::rms_norm", [x, weight], [1e-5]],
          ["stroma::silu_mul", [x, up], []],
        ] as const) {
          const [cpu, card] = both(op, [...inputs], () => [...more]);
          for (const [i, t] of cpu.entries()) {
            const label = `${op} ${dtype} ${rows} x ${width} ${i}`;
            if (t.shape.includes(0)) expect(card[i]!.shape, label).toEqual(t.shape);
            else expect(off(t, card[i]!), label).toBeLessThan(bound);
          }
        }
      }
  });

  test("a norm's sums do not depend on when they run", () => {
    const [x, weight] = [shaped([4099, 520], "bfloat16"), shaped([520], "bfloat16")];
    const runs = [0, 1, 2].map(() => {
      manualSeed(9);
      return both("stroma::rms_norm", [x, weight], () => [1e-5])[1];
    });
    for (const run of runs) for (const [i, t] of run.entries()) expect(equal(t, runs[0]![i]!), `${i}`).toBe(true);
  });

  test("a table of positions is the CPU's to a rounding of the angle, and a rotation by it has the CPU's bits", () => {
    for (const dtype of Object.keys(bounds))
      for (const [B, heads, T, H] of [
        [2, 6, 50, 64],
        [1, 3, 9, 6],
        [2, 34, 5, 128],
        [1, 1, 1, 2],
        [2, 2, 0, 8],
      ] as const)
        for (const scaling of [
          [null, null, null, null],
          [8, 1, 4, 32],
        ]) {
          const positions = callOp("aten::randint", [500, [B, T]], { dtype: "int64" }) as Tensor;
          const tables = (["cpu", device] as const).map(
            (on) => callOp("stroma::rotary_table", [twin(positions, on), H, 1e4, ...scaling, dtype]) as Tensor,
          );
          const label = `${dtype} ${[B, heads, T, H]} ${scaling}`;
          const rounding =
            dtype === "bfloat16" ? 8e-3 : dtype === "float16" ? 1e-3 : dtype === "float64" ? 1e-12 : 1e-4;
          if (T > 0)
            expect(worst(cast(tables[0]!, "float64"), cast(tables[1]!, "float64")), label).toBeLessThan(rounding);
          // As a layer has its heads: beside each other for a token.
          const x = callOp("aten::transpose.int", [shaped([B, T, heads, H], dtype), 1, 2]) as Tensor;
          const [cpu, card] = both("stroma::rotate", [x], (on) => [twin(tables[0]!, on)]);
          for (const [i, t] of cpu.entries()) expect(equal(t, card[i]!), `${label} ${i}`).toBe(true);
        }
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
