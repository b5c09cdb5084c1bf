/** Workspaces worked out by hand; tests/oracle/memory.test.ts compares with libtorch's own profile. */
import { describe, expect, it } from "vitest";
import { model } from "../../../src/graph/model.js";
import * as ops from "../../../src/graph/ops.js";
import { traceModel } from "../../../src/graph/trace.js";
import type { Value } from "../../../src/graph/value.js";
import { findModel } from "../../../src/models/registry.js";
import * as nn from "../../../src/nn/index.js";
import { passWorkspace } from "../../../src/plan/memory.js";

const UNIT = 64 << 10;
/** float32 [B, T, 64] of B x T = 1,024: four units of the allocator. */
const X = 1024 * 64 * 4;
const dims = { B: 2, T: 512 };

/** Block 1 of embed -> body -> head, the body as given. */
function body(f: (x: Value, weight: Value, vector: Value) => Value, matrix: [number, number] = [64, 64]) {
  const definition = model<null>("hand", (m) => {
    const ids = m.input("ids", "int64", ["B", "T"]);
    const labels = m.input("labels", "int64", ["B", "T"]);
    const x = m.block("embed", (p) => nn.embedding(p, ids, 32, 64));
    const y = m.block("body", (p) => f(x, p.param("weight", matrix), p.param("vector", [64])));
    return m.block("head", (p) => nn.crossEntropyHead(p, y, labels, { vocabSize: 32 }));
  });
  return passWorkspace(traceModel(definition, null, { mode: "train" }), 1, dims);
}

describe("workspace of a pass", () => {
  it("lets a value go after its last reader, and keeps what autograd saved", () => {
    // a = silu(x), b = silu(a), c = silu(b): without autograd two at a time; with it a and b stay, and c is the output.
    const w = body((x, _, vector) => ops.add(ops.silu(ops.silu(ops.silu(x))), vector));
    expect(w.forward).toBe(2 * X);
    expect(w.kept).toBe(3 * X);
  });

  it("takes views for nothing, and a reshape that needs a copy for a copy", () => {
    const view = body((x, weight) =>
      ops.linear(ops.reshape(ops.transpose(ops.transpose(x, 1, 2), 1, 2), x.shape), weight, null),
    );
    expect(view.forward).toBe(X);
    const copied = body((x, weight) => ops.linear(ops.reshape(ops.transpose(x, 1, 2), x.shape), weight, null));
    expect(copied.forward).toBe(2 * X);
  });

  it("adds a parameter's gradient to the sums as it appears", () => {
    // y = x W: in the backward dx and dW beside each other, then dW goes; the output stays with the caller.
    const w = body((x, weight) => ops.linear(x, weight, null));
    expect(w.kept).toBe(X);
    expect(w.keptBackward).toBe(X + X + 64 * 64 * 4);
    // Two in a row: the second dW is gone before the first appears.
    const two = body((x, weight) => ops.linear(ops.linear(x, weight, null), weight, null));
    // y and h saved, dh; then dx and dW beside it, h gone with the second product.
    expect(two.kept).toBe(2 * X);
    expect(two.keptBackward).toBe(3 * X + X / 16);
  });

  it("adds gradients of one value in place where nobody else holds them", () => {
    // Kept: y and relu's result. Beside y the sum so far, then another gradient of x, at last with the weight's.
    const w = body((x, weight) => ops.add(ops.linear(x, weight, null), ops.add(ops.silu(x), ops.relu(x))));
    expect(w.kept).toBe(2 * X);
    expect(w.keptBackward).toBe(3 * X + X / 16);
  });

  it("rounds blocks as the engine's allocator does", () => {
    const tiny = findModel("tiny").graph({ mode: "train" });
    const rows = (T: number) => passWorkspace(tiny, 0, { B: 1, T }).forward;
    expect([3, 127, 128, 129].map(rows)).toEqual([3 * 512, 127 * 512, UNIT, 2 * UNIT]);
  });

  it("of a head grows with the chunk of logits, not with the rows", () => {
    const astro = findModel("astro-13b").graph({ mode: "train", dtype: "bfloat16" });
    const head = astro.blocks.length - 1;
    const [one, two, four] = [1024, 2048, 4096].map((T) => passWorkspace(astro, head, { B: 1, T }).backward);
    const rows = 4352 * 2 * 1024;
    // A second chunk brings a second weight gradient, and the sum in float32; from then on only rows of x and dx.
    expect(two! - one!).toBeLessThan(2 * 32_000 * 4352 * 2 + 12 * rows);
    expect(four! - two!).toBeLessThan(2 * 12 * rows);
  });

  it("is the same for every block of a program, and needs every dim", () => {
    const tiny = findModel("tiny").graph({ mode: "train" });
    expect(passWorkspace(tiny, 1, dims)).toBe(passWorkspace(tiny, 3, dims));
    expect(() => passWorkspace(tiny, 1, { B: 1 })).toThrow(/T is not bound/);
  });
});
