/**
 * Norm, rotation and SwiGLU's product as operators of our own, beside the operators of ATen in whose place they stand: on
 * the CPU results and gradients are theirs to the bit, in every dtype, size and layout.
 */
import { describe, expect, it } from "vitest";
import { callOp, enableGrad, grad, manualSeed, scope, type Tensor } from "../../src/tensor/index.js";
import { nativeOrSkip } from "../support/native.js";

const op = (name: string, args: unknown[], kwargs?: Record<string, unknown>) => callOp(name, args, kwargs) as Tensor;
const add = (a: Tensor, b: Tensor | number) =>
  op(typeof b === "number" ? "aten::add.Scalar" : "aten::add.Tensor", [a, b]);
const mul = (a: Tensor, b: Tensor | number) =>
  op(typeof b === "number" ? "aten::mul.Scalar" : "aten::mul.Tensor", [a, b]);
const div = (a: Tensor, b: number) => op("aten::div.Scalar", [a, b]);
const sub = (a: Tensor, b: number) => op("aten::sub.Scalar", [a, b]);
const neg = (a: Tensor) => op("aten::neg", [a]);
const reciprocal = (a: Tensor) => op("aten::reciprocal", [a]);
const to = (a: Tensor, dtype: string) => op("aten::to.dtype", [a, dtype]);
const slice = (a: Tensor, from: number, end: number) => op("aten::slice.Tensor", [a, -1, from, end, 1]);
const transpose = (a: Tensor, i: number, j: number) => op("aten::transpose.int", [a, i, j]);
const where = (c: Tensor, a: Tensor, b: Tensor) => op("aten::where.self", [c, a, b]);
const equal = (a: Tensor, b: Tensor) => callOp("aten::equal", [a, b]) as boolean;
const randn = (shape: readonly number[], dtype: string) => to(op("aten::randn", [shape], { dtype: "float64" }), dtype);

const dtypes = ["float32", "bfloat16", "float64", "float16"] as const;
const wide = (dtype: string) => (dtype === "float64" ? "float64" : "float32");

/** As layers wrote it before: Hugging Face's order. */
function norm(x: Tensor, weight: Tensor, eps: number): Tensor {
  const v = to(x, wide(String(x.dtype)));
  const variance = op("aten::mean.dim", [op("aten::pow.Tensor_Scalar", [v, 2]), [-1], true]);
  return mul(weight, to(mul(v, op("aten::rsqrt", [add(variance, eps)])), String(x.dtype)));
}

type Scaling = readonly [factor: number, low: number, high: number, original: number];

/** cos and sin [B, T, H], both halves alike. */
function turns(positions: Tensor, H: number, theta: number, s: Scaling | null, dtype: string): [Tensor, Tensor] {
  const even = to(mul(op("aten::arange", [H / 2], { dtype: "int64" }), 2), wide(dtype));
  let f = reciprocal(op("aten::pow.Scalar", [theta, div(even, H)]));
  if (s !== null) {
    const [factor, low, high, original] = s;
    const wavelength = mul(reciprocal(f), 2 * Math.PI);
    const slow = where(op("aten::gt.Scalar", [wavelength, original / low]), div(f, factor), f);
    const smooth = div(sub(mul(reciprocal(wavelength), original), low), high - low);
    const blended = add(div(mul(add(neg(smooth), 1), slow), factor), mul(smooth, slow));
    const [above, below] = [
      op("aten::ge.Scalar", [wavelength, original / high]),
      op("aten::le.Scalar", [wavelength, original / low]),
    ];
    f = where(op("aten::logical_and", [above, below]), blended, slow);
  }
  const at = mul(op("aten::unsqueeze", [to(positions, wide(dtype)), -1]), f);
  const both = (name: string) => {
    const half = op(name, [at]);
    return to(op("aten::cat", [[half, half], -1]), dtype);
  };
  return [both("aten::cos"), both("aten::sin")];
}

function rotated(x: Tensor, [cos, sin]: readonly [Tensor, Tensor]): Tensor {
  const H = x.shape[3]!;
  const turned = op("aten::cat", [[neg(slice(x, H / 2, H)), slice(x, 0, H / 2)], -1]);
  const heads = (t: Tensor) => op("aten::unsqueeze", [t, 1]);
  return add(mul(x, heads(cos)), mul(turned, heads(sin)));
}

/** [B, N, T, H]: a token alone, no tokens, odd sizes, whole vectors, more than one thread's share. */
const sizes = [
  [2, 3, 7, 8],
  [1, 1, 1, 2],
  [0, 2, 3, 8],
  [2, 2, 0, 8],
  [1, 2, 33, 18],
  [2, 4, 96, 64],
] as const;

/** Results and gradients of `f` and `g` agree in every bit; where x flows past them too, as past a layer's norm, its sum. */
function sameBits(label: string, f: (...x: Tensor[]) => Tensor, g: typeof f, inputs: Tensor[], past = false): void {
  const [a, b] = [f, g].map((run) => {
    const leaves = inputs.map((t) => {
      // Detached, not cloned: what is no dense block of memory stays so.
      const leaf = op("aten::detach", [t]);
      leaf.requiresGrad = true;
      return leaf;
    });
    const x = mul(leaves[0]!, 1);
    const y = run(x, ...leaves.slice(1));
    manualSeed(5);
    const gradOutputs = [randn(y.shape, String(y.dtype))];
    const through = past ? add(y, mul(x, 0.3)) : y;
    return [y, ...grad([through], leaves, { gradOutputs })];
  }) as [Tensor[], Tensor[]];
  for (const [i, t] of a.entries()) expect([label, i, equal(t, b[i]!)]).toEqual([label, i, true]);
}

const each = (check: (dtype: string, B: number, N: number, T: number, H: number) => void) => {
  for (const dtype of dtypes)
    for (const [B, N, T, H] of sizes)
      enableGrad(() =>
        scope(() => {
          manualSeed(1);
          check(dtype, B, N, T, H);
        }),
      );
};

describe.skipIf(nativeOrSkip() === null)("on the CPU, to the bit:", () => {
  it("a norm", () => {
    each((dtype, B, N, T, H) => {
      const layouts = {
        rows: randn([B, T, N * H], dtype),
        columns: transpose(randn([B, N * H, T], dtype), 1, 2),
        heads: randn([B, T, N, H], dtype),
        turned: transpose(randn([B, T, N, H], dtype), 1, 2),
        part: slice(randn([B, T, 2 * H], dtype), 0, H),
      };
      for (const [name, x] of Object.entries(layouts)) {
        const weight = randn([x.shape.at(-1)!], dtype);
        const ours = (x: Tensor, w: Tensor) => op("stroma::rms_norm", [x, w, 1e-5]);
        sameBits(`${dtype} ${name} ${x.shape}`, (x, w) => norm(x!, w!, 1e-5), ours as never, [x, weight], true);
      }
    });
  });

  it("SwiGLU's product", () => {
    each((dtype, B, N, T, H) => {
      const up = randn([B, T, N * H], dtype);
      for (const gate of [randn([B, T, N * H], dtype), transpose(randn([B, N * H, T], dtype), 1, 2)]) {
        const ours = (g: Tensor, u: Tensor) => op("stroma::silu_mul", [g, u]);
        const theirs = (g: Tensor, u: Tensor) => mul(op("aten::silu", [g]), u);
        sameBits(`${dtype} ${gate.shape}`, theirs as never, ours as never, [gate, up]);
      }
    });
  });

  it("a table of positions, and a rotation by it", () => {
    each((dtype, B, N, T, H) => {
      const positions = op("aten::randint", [5000, [B, T]], { dtype: "int64" });
      for (const scaling of [null, [8, 1, 4, 32], [32, 1, 4, 8192]] as const) {
        const both = turns(positions, H, 10_000, scaling, dtype);
        const table = op("stroma::rotary_table", [
          positions,
          H,
          10_000,
          ...(scaling ?? [null, null, null, null]),
          dtype,
        ]);
        const halves = op("aten::cat", [both.map((t) => slice(t, 0, H / 2)), -1]);
        expect(equal(table, halves), `table ${dtype} ${[B, T, H]} ${scaling}`).toBe(true);
        const layouts = {
          plain: randn([B, N, T, H], dtype),
          heads: transpose(randn([B, T, N, H], dtype), 1, 2),
          columns: transpose(randn([B, N, H, T], dtype), 2, 3),
          part: slice(randn([B, N, T, 2 * H], dtype), H, 2 * H),
        };
        for (const [name, x] of Object.entries(layouts))
          sameBits(
            `${dtype} ${name} ${[B, N, T, H]}`,
            (x) => rotated(x!, both),
            ((x: Tensor) => op("stroma::rotate", [x, table])) as never,
            [x],
          );
      }
    });
  });
});

describe.skipIf(nativeOrSkip() === null)("operators of a layer", () => {
  it("have the gradients that differences give, in float64", () => {
    enableGrad(() =>
      scope(() => {
        manualSeed(3);
        const positions = op("aten::arange", [3], { dtype: "int64" }).view([1, 3]);
        const table = op("stroma::rotary_table", [positions, 4, 100, null, null, null, null, "float64"]);
        const cases: [string, (...x: Tensor[]) => Tensor, number[][]][] = [
          ["rms_norm", (x, w) => op("stroma::rms_norm", [x, w, 1e-3]), [[2, 5], [5]]],
          [
            "silu_mul",
            (g, u) => op("stroma::silu_mul", [g, u]),
            [
              [2, 3],
              [2, 3],
            ],
          ],
          ["rotate", (x) => op("stroma::rotate", [x, table]), [[1, 2, 3, 4]]],
        ];
        for (const [name, f, shapes] of cases) {
          const inputs = shapes.map((shape) => randn(shape, "float64"));
          const seed = randn(f(...inputs).shape, "float64");
          const value = (xs: Tensor[]) => Number(op("aten::sum", [mul(f(...xs), seed)]).item());
          const leaves = inputs.map((t) => {
            const leaf = op("aten::clone", [t]);
            leaf.requiresGrad = true;
            return leaf;
          });
          const gradients = grad([f(...leaves)], leaves, { gradOutputs: [seed] }) as Tensor[];
          for (const [i, x] of inputs.entries()) {
            const n = x.shape.reduce((a, b) => a * b, 1);
            const flat = gradients[i]!.reshape([n]);
            for (let e = 0; e < n; e++) {
              const step = op("aten::one_hot", [op("aten::full", [[], e], { dtype: "int64" }), n]);
              const moved = (h: number) =>
                value(inputs.map((t, j) => (j === i ? add(t, mul(to(step, "float64"), h).reshape(x.shape)) : t)));
              const difference = (moved(1e-5) - moved(-1e-5)) / 2e-5;
              const ours = Number(op("aten::select.int", [flat, 0, e]).item());
              expect(Math.abs(difference - ours), `${name} ${i} ${e}`).toBeLessThan(1e-8);
            }
          }
        }
      }),
    );
  });

  it("refuse a second derivative, and say so", () => {
    enableGrad(() =>
      scope(() => {
        const leaf = (shape: number[]) => {
          const t = randn(shape, "float32");
          t.requiresGrad = true;
          return t;
        };
        const [x, w, heads] = [leaf([2, 4]), leaf([4]), leaf([1, 1, 2, 4])];
        const table = randn([1, 2, 4], "float32");
        for (const y of [
          op("stroma::rms_norm", [x, w, 1e-5]),
          op("stroma::silu_mul", [x, x]),
          op("stroma::rotate", [heads, table]),
        ]) {
          const of = y.shape.length === 4 ? heads : x;
          const gradOutputs = [op("aten::ones_like", [y])];
          expect(() => grad([y], [of], { gradOutputs, createGraph: true })).toThrow(/has no second derivative/);
        }
      }),
    );
  });

  it("refuse what does not fit together, by name", () => {
    scope(() => {
      const f = (shape: number[], dtype = "float32") => randn(shape, dtype);
      const positions = op("aten::zeros", [[1, 2]], { dtype: "int64" });
      const refused: [string, unknown[], RegExp][] = [
        ["rms_norm", [f([2, 4]), f([3]), 1e-5], /expected weight Float \[4\].*got Float \[3\]/],
        ["rms_norm", [f([2, 4]), f([4], "float64"), 1e-5], /expected weight Float \[4\].*got Double/],
        ["silu_mul", [f([2, 4]), f([2, 3])], /one shape.*\[2, 4\].*\[2, 3\]/],
        ["rotate", [f([1, 2, 3, 5]), f([1, 3, 5])], /even H, got Float \[1, 2, 3, 5\]/],
        ["rotate", [f([1, 2, 3, 4]), f([1, 2, 4])], /expected a table Float .*\[1, 3, 4\].*got Float \[1, 2, 4\]/],
        ["rotary_table", [positions, 5, 100, null, null, null, null, "float32"], /even head_dim, got 5/],
        ["rotary_table", [f([1, 2]), 4, 100, null, null, null, null, "float32"], /positions int64 \[B, T\], got Float/],
      ];
      for (const [name, args, message] of refused) expect(() => op(`stroma::${name}`, args), name).toThrow(message);
    });
  });
});
