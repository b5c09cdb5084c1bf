/**
 * What a card does, timed in seconds: products over two heights, its memory, copies to and from pinned memory, attention, and
 * what it takes to begin a kernel or a copy. Through the eager operators, hence the kernels that training runs.
 */
import { mkdirSync } from "node:fs";
import { dirname } from "node:path";
import type { Device } from "../device.js";
import { door } from "../tensor/door.js";
import { callOp, noGrad, scope, type Tensor } from "../tensor/index.js";
import { gemmRate, timeDisk } from "./measure.js";
import { measuredFile, storeMeasured } from "./measured.js";
import { cardProfile, type GemmRate, type MachineProfile } from "./profiles.js";

export interface CardSizes {
  /** Rows and width of products: their rates at both heights give the one of a large product. */
  rows: readonly [low: number, high: number];
  width: number;
  /** Of float64, which most cards are slow at. */
  width64: number;
  /** Bytes of a copy on the card, and of one to and from the host. */
  deviceBytes: number;
  hostBytes: number;
  attention: { heads: number; tokens: number; dim: number };
  /** Seconds that a rate is measured over at the least. */
  budget: number;
  /** Host memory that the card reads by itself. */
  pin(x: Tensor): Tensor;
}

const LARGE: CardSizes = {
  rows: [512, 8192],
  width: 4096,
  width64: 2048,
  deviceBytes: 1 << 29,
  hostBytes: 1 << 28,
  attention: { heads: 16, tokens: 2048, dim: 128 },
  budget: 0.3,
  pin: (x) => callOp("aten::pin_memory", [x]) as Tensor,
};

/** Measures in half a minute, stores the profile under the card's name and returns it. Needs the addon. */
export function measureCard(device: Device, card: string): MachineProfile {
  const file = measuredFile(card);
  mkdirSync(dirname(file), { recursive: true });
  const profile = { ...cardRates(device, card), ...timeDisk(`${file}.measure`) };
  storeMeasured(profile, card);
  return profile;
}

const CALLS = 256;

export function cardRates(device: Device, card: string, sizes: CardSizes = LARGE): MachineProfile {
  const { rows, width, width64, deviceBytes, hostBytes, budget } = sizes;
  const full = (shape: readonly number[], dtype: string, on: Device = device): Tensor =>
    callOp("aten::full", [shape, 0.5], { dtype, device: on }) as Tensor;
  // A product of equal numbers takes less power, and is faster on a card that has no more of it to give.
  const random = (shape: readonly number[], dtype: string): Tensor =>
    callOp("aten::randn", [shape], { dtype, device }) as Tensor;
  const timed = <T>(of: (idle: () => void) => T): T =>
    noGrad(() =>
      scope(() => {
        const mark = full([1], "float32");
        // Reading one number waits for all that was begun before it.
        return of(() => void mark.item());
      }),
    );
  const products = (dtype: string, D: number): GemmRate => {
    const [low, high] = rows;
    const rate = (n: number): number =>
      timed((idle) => {
        const [x, w] = [random([n, D], dtype), random([D, D], dtype)];
        return (2 * n * D * D) / seconds(idle, budget, () => void callOp("aten::mm", [x, w]));
      });
    return gemmRate(low, rate(low), high, rate(high));
  };
  const copying = (bytes: number, from: (n: number) => Tensor, to: (n: number) => Tensor): number =>
    timed((idle) => {
      const [source, target] = [from(bytes / 4), to(bytes / 4)];
      return seconds(idle, budget, () => void callOp("aten::copy_", [target, source, true]));
    });
  const here = (n: number) => full([n], "float32");
  const pinned = (n: number) => sizes.pin(full([n], "float32", "cpu"));
  const gemm = {
    bfloat16: products("bfloat16", width),
    float32: products("float32", width),
    float64: products("float64", width64),
  };
  const beginning = copying(256, pinned, here);
  const largeCopy = (from: (n: number) => Tensor, to: (n: number) => Tensor): number =>
    hostBytes / Math.max(1e-9, copying(hostBytes, from, to) - beginning);
  return {
    ...cardProfile(card).profile,
    name: card,
    gemm,
    attention: timed((idle) => {
      const { heads, tokens, dim } = sizes.attention;
      const [q, k, v] = [0, 1, 2].map(() => random([1, heads, tokens, dim], "bfloat16"));
      const call = () => void callOp("aten::scaled_dot_product_attention", [q!, k!, v!, null, 0, /* causal */ true]);
      // Two products over half of all pairs.
      return (2 * heads * tokens * tokens * dim) / seconds(idle, budget, call) / gemm.bfloat16.flops;
    }),
    // Read and written.
    deviceMemory: (2 * deviceBytes) / copying(deviceBytes, here, here),
    hostToDevice: largeCopy(pinned, here),
    deviceToHost: largeCopy(here, pinned),
    copySeconds: beginning,
    operatorSeconds: timed((idle) => {
      // As the engine calls them, without JavaScript between two.
      const x = here(16);
      return seconds(idle, budget, () => void door().timeAdd(x.handle, x.handle, CALLS, true)) / CALLS;
    }),
    threads: 0,
  };
}

/** Of one call: of as many as take a while, between two moments at which nothing is under way. */
function seconds(idle: () => void, budget: number, call: () => void): number {
  const work = () => scope(call);
  work();
  idle();
  for (let times = 1; ; times *= 4) {
    const begin = performance.now();
    for (let i = 0; i < times; i++) work();
    idle();
    const taken = (performance.now() - begin) / 1e3;
    if (taken >= budget || times > 1 << 16) return taken / times;
  }
}
