import { setTimeout as delay } from "node:timers/promises";
import { setFlagsFromString } from "node:v8";
import { runInNewContext } from "node:vm";
import { Worker } from "node:worker_threads";
import { describe, expect, it } from "vitest";
import type { StromaError } from "../../src/errors.js";
import {
  collectedTensors,
  dispose,
  grad,
  keep,
  liveBytes,
  liveTensors,
  ops,
  scope,
  type Tensor,
  tensor,
} from "../../src/tensor/index.js";
import { hasNative } from "../support/native.js";

const gc = (globalThis as { gc?: () => void }).gc ?? enableGc();
function enableGc(): () => void {
  setFlagsFromString("--expose-gc");
  return runInNewContext("gc") as () => void;
}

describe.skipIf(!hasNative())("lifetime", () => {
  it("returns to the baseline after scopes, using, dispose, errors and backward", () => {
    const [tensors, bytes] = [liveTensors(), liveBytes()];
    scope(() => {
      const w = tensor([1, 2, 3], { requiresGrad: true });
      const loss = w.mul(w).sum();
      loss.backward();
      expect(w.grad!.toArray()).toEqual([2, 4, 6]);
      grad(w.exp().sum(), w);
      expect(liveTensors()).toBeGreaterThan(tensors + 3);
      expect(liveBytes()).toBeGreaterThan(bytes);
    });
    {
      using x = ops.zeros([100]);
      using y = x.add(1);
      expect(liveBytes() - bytes).toBe(800);
      expect(y.at(0).dispose()).toBeUndefined();
    }
    dispose({ a: [ops.zeros([2])], b: new Map([["x", ops.zeros([2])]]) });
    expect(() => scope(() => ops.mm(ops.zeros([2, 3]), ops.zeros([2, 3])))).toThrow("mm");
    expect([liveTensors(), liveBytes()]).toEqual([tensors, bytes]);
  });

  it("counts shared memory once", () => {
    const bytes = liveBytes();
    scope(() => {
      const x = ops.zeros([10, 10]);
      x.transpose(0, 1);
      x.at(0);
      expect(liveBytes() - bytes).toBe(400);
    });
  });

  it("reuses the memory of what came last, also after other sizes filled the cache", () => {
    const faults = (elements: number): number => {
      const before = process.resourceUsage().minorPageFault;
      // 100 at once, each too small for a huge page.
      scope(() => void Array.from({ length: 100 }, () => ops.zeros([elements])));
      return process.resourceUsage().minorPageFault - before;
    };
    faults(250_000);
    const first = faults(210_000);
    const again = Math.min(faults(210_000), faults(210_000));
    // A few are JavaScript's own; where the kernel joins blocks to huge pages there are few to begin with.
    expect(again).toBeLessThan(Math.max(first / 10, 200));
  });

  it("lets what a scope returns escape, through nested scopes, and keeps what keep() was given", () => {
    const before = liveTensors();
    let kept: Tensor | undefined;
    const out = scope(() => {
      const inner = scope(() => ({ list: [tensor([1]), tensor([2])], lost: tensor([3]).shape }));
      kept = keep(tensor([9]));
      tensor([4]);
      return inner.list[1]!;
    });
    expect(out.toArray()).toEqual([2]);
    expect(kept!.toArray()).toEqual([9]);
    expect(liveTensors() - before).toBe(2);
    dispose(out, kept);
    expect(liveTensors()).toBe(before);
  });

  it("refuses a scope over a promise and disposes what it made", () => {
    const before = liveTensors();
    let error: StromaError | undefined;
    try {
      scope(async () => ops.zeros([1]));
    } catch (caught) {
      error = caught as StromaError;
    }
    expect(error?.code).toBe("INVALID_ARGUMENT");
    expect(liveTensors()).toBe(before);
  });

  it("never takes a handle for a later tensor in the same slot", () => {
    const old = ops.zeros([1]);
    const handle = old.handle;
    old.dispose();
    using later = ops.ones([1]);
    const stale = scope(() => {
      const x = ops.zeros([1]);
      const mine = x.handle;
      x.dispose();
      x.handle = handle;
      expect(() => x.shape).toThrow("disposed");
      return mine;
    });
    expect(stale).not.toBe(later.handle);
    expect(later.item()).toBe(1);
  });

  it("releases and counts what the program forgot, when the garbage collector finds it", async () => {
    const [before, counted] = [liveTensors(), collectedTensors()];
    (() => {
      for (let i = 0; i < 100; i++) ops.zeros([1000]);
    })();
    for (let i = 0; i < 50 && liveTensors() > before; i++) {
      gc();
      await delay(5);
    }
    expect(liveTensors()).toBe(before);
    expect(collectedTensors() - counted).toBe(100);
  });

  it("works in several worker threads at once, each with its own handles", async () => {
    const before = liveTensors();
    const source = `
      const { parentPort, workerData } = require("node:worker_threads");
      (async () => {
        const { register } = await import("tsx/esm/api");
        register();
        const t = await import(workerData.module);
        const before = t.liveTensors();
        let sum = 0;
        for (let i = 0; i < 200; i++) {
          sum += t.scope(() => {
            const w = t.tensor([workerData.n, 2, 3], { requiresGrad: true });
            w.mul(w).sum().backward();
            return w.grad.sum().item();
          });
        }
        let code = "";
        try { t.ops.mm(t.tensor([1]), t.tensor([1])); } catch (error) { code = error.code + " " + error.name; }
        const leaked = t.tensor([1, 2]);
        parentPort.postMessage({ sum, code, live: t.liveTensors() - before, leaked: leaked.toArray() });
      })();
    `;
    const module = new URL("../../src/tensor/index.ts", import.meta.url).href;
    const answers = await Promise.all(
      [1, 2, 3].map(
        (n) =>
          new Promise((resolve, reject) => {
            const worker = new Worker(source, { eval: true, workerData: { n, module } });
            let answer: unknown;
            worker.once("message", (message) => {
              answer = message;
            });
            worker.once("error", reject);
            worker.once("exit", (code) => (code === 0 ? resolve(answer) : reject(new Error(`worker exit ${code}`))));
          }),
      ),
    );
    expect(answers).toEqual(
      [1, 2, 3].map((n) => ({ sum: 200 * 2 * (n + 5), code: "NATIVE StromaError", live: 3, leaked: [1, 2] })),
    );
    expect(liveTensors()).toBe(before);
  });
});
