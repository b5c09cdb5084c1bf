import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { beforeAll, describe, expect, it } from "vitest";
import { packageRoot, readBuildRecord } from "../../src/native.js";
import { nativeOrSkip } from "../support/native.js";
import { oraclePython, runPython } from "../support/python.js";

const native = nativeOrSkip();
const python = oraclePython();
const script = fileURLToPath(new URL("./optim.py", import.meta.url));

interface Codes {
  nearBoundaries: number;
  floats: number;
  codes: number;
  absmaxes: number;
  dequantized: number;
  tableNearer: number;
  tableFarther: number;
}
interface Masters {
  start: number;
  split: number;
  splitParam: number;
  master: number;
  masterParam: number;
  moments: number;
}
interface Apart {
  param: number;
  absmax: number;
  state: number;
}
/** Numbers of unequal elements unless the script says otherwise. */
interface Figures {
  maps: { signed: number; unsigned: number };
  codes: { signed: Codes; unsigned: Codes };
  step_codes: { first: number; second: number; floats: number };
  lost: { finite: number[]; tiny: number };
  exact: Record<"torch.float32" | "torch.float64", number>;
  masters: {
    "32": Masters;
    "8": Masters;
    everyLowHalf: number;
    odd: { nanParam: boolean[]; nan: boolean[]; others: number };
  };
  stochastic: {
    neither: number;
    exact: number;
    deviation: number;
    tenths: number[];
    lags: number[];
    mean: number;
    threads: number[];
    cuts: number[];
    otherSeed: number;
    otherTensor: number;
    odd: number[];
  };
  parity: Record<string, { outliers: number; error: number; relative: number }>;
  interchange: { there: Apart; back: Apart; maps: number; steps: [number, number] };
  beside: { ours: number; theirs: number };
  elements: { skippedParam: number; skippedState: number; others: number; signs: number[]; runs: number[] };
  head: Record<"torch.bfloat16" | "torch.float32", { weight: number; bias: number; narrowSums: number }>;
}

describe.skipIf(!native || !python)("optimizer kernels", () => {
  let f: Figures;
  beforeAll(async () => {
    f = await runPython<Figures>(script, [], { kernels: join(packageRoot, readBuildRecord().kernels!) });
  }, 600_000);

  it("have bitsandbytes' dynamic maps, entry by entry", () => {
    expect(f.maps).toEqual({ signed: 0, unsigned: 0 });
  });

  it("give every value the nearest code, the lower one of two that are equally near, as argmin does", () => {
    for (const kind of [f.codes.signed, f.codes.unsigned]) {
      expect(kind.floats).toBeGreaterThan(100_000);
      expect(kind.nearBoundaries).toBe(0);
      expect([kind.codes, kind.absmaxes, kind.dequantized]).toEqual([0, 0, 0]);
    }
  });

  it("encode a step's moments with the nearest code too, and a negative first moment never with zero's", () => {
    expect(f.step_codes.floats).toBeGreaterThan(200_000);
    expect(f.step_codes).toMatchObject({ first: 0, second: 0 });
  });

  it("are nowhere farther from the value than bitsandbytes' table of 65,536 steps, which is up to a step farther", () => {
    for (const kind of [f.codes.signed, f.codes.unsigned]) {
      expect(kind.tableNearer).toBeLessThanOrEqual(0);
      expect(kind.tableFarther).toBeGreaterThan(1e-5);
      expect(kind.tableFarther).toBeLessThan(2 * (2 / 65535)); // half a step on either side of a boundary, twice
    }
  });

  it("lose no NaN and no infinity in a block", () => {
    expect(f.lost).toEqual({ finite: [0, 0, 256], tiny: 0 });
  });

  it("equal torch.optim.AdamW(foreach=False) to the bit with moments of float32 and float64", () => {
    expect(f.exact).toEqual({ "torch.float32": 0, "torch.float64": 0 });
  });

  it.each(["32", "8"] as const)(
    "run 120 steps on a float32 or split16 master as on float32, to the bit (%s-bit)",
    (k) => {
      expect(f.masters[k]).toEqual({ start: 0, split: 0, splitParam: 0, master: 0, masterParam: 0, moments: 0 });
    },
  );

  it("split and join every lower half exactly, and keep NaN and infinity", () => {
    expect(f.masters.everyLowHalf).toBe(0);
    const nan = [true, false, false, false, false, false, true, true];
    expect(f.masters.odd).toEqual({ nanParam: nan, nan, others: 0 });
  });

  it("round a bfloat16 weight stochastically without bias", () => {
    const s = f.stochastic;
    expect([s.neither, s.exact]).toEqual([0, 0]);
    // Sums of independent draws in their standard deviations: beyond 5 once in 1.7 million.
    for (const z of [s.deviation, s.mean, ...s.tenths, ...s.lags]) expect(Math.abs(z)).toBeLessThan(5);
    expect(s.odd).toEqual([100, 100, 100, 100]);
  });

  it("draw the same for every thread count and cut, and other numbers for another seed or tensor", () => {
    const s = f.stochastic;
    expect(s.threads).toEqual([0, 0, 0]);
    expect(s.cuts).toEqual([0, 0, 0, 0]);
    // Two independent draws differ with 2 c (1 - c): a third of the elements, c being spread evenly.
    for (const share of [s.otherSeed, s.otherTensor]) expect(Math.abs(share - 1 / 3)).toBeLessThan(0.03);
  });

  it("stay within bitsandbytes' own bounds over 50 steps with 8-bit moments", () => {
    expect(Object.keys(f.parity)).toHaveLength(11);
    for (const [name, worst] of Object.entries(f.parity)) {
      expect(worst.outliers, name).toBeLessThan(20);
      // A weight rounded at random lies a third of a step off in the mean, one rounded to nearest a quarter.
      const share = name.startsWith("stochastic") ? 4 / 3 : 1;
      const [error, relative] =
        name.startsWith("float32 ") && !name.includes("master") ? [6e-5, 6e-4] : [1.7e-4, 1.6e-3];
      expect(worst.error, name).toBeLessThan(error * share);
      expect(worst.relative, name).toBeLessThan(relative * share);
    }
  });

  it("exchange 8-bit state with bitsandbytes in both directions, and the next step agrees", () => {
    const { there, back, maps, steps } = f.interchange;
    for (const apart of [there, back]) {
      expect(apart.param).toBeLessThanOrEqual(2 ** -24); // one last bit of weights below 1
      expect(apart.absmax).toBeLessThan(4 * 2 ** -23); // of sums of two products, fused on one side only
      expect(apart.state).toBeLessThan(0.0141); // one code of the top decade, 0.9 / 64
    }
    expect(maps).toBe(0);
    expect(steps).toEqual([14, 14]);
  });

  it("drift no farther from float32 in 50 free steps than bitsandbytes does", () => {
    expect(f.beside.ours).toBeLessThan(1.05 * f.beside.theirs);
  });

  it("skip an element whose gradient is no number, and touch no other", () => {
    const { skippedParam, skippedState, others } = f.elements;
    expect({ skippedParam, skippedState, others }).toEqual({ skippedParam: 0, skippedState: 0, others: 0 });
  });

  it("keep the sign of first moments too small to have a code", () => {
    expect(f.elements.signs).toEqual([127, 128]);
  });

  it("give the same 8-bit bits for every thread count and dtype of the gradient", () => {
    expect(f.elements.runs).toEqual([0, 0, 0, 0]);
  });

  it("add a bfloat16 head's chunks in float32, and float32 ones as before", () => {
    expect(f.head["torch.bfloat16"]).toMatchObject({ weight: 0, bias: 0 });
    expect(f.head["torch.bfloat16"].narrowSums).toBeGreaterThan(0);
    expect(f.head["torch.float32"]).toEqual({ weight: 0, bias: 0, narrowSums: 0 });
  });
});
