/**
 * What machines can do, as plain data. Rates are what long kernels and copies reach, not the data sheet's peaks; the sheet's
 * number stands beside them. Named profiles are for planning without the machine; `measureMachine` (measure.ts) times one.
 */
import { StromaError } from "../errors.js";
import type { MeasuredRates } from "./rates.js";

export interface GemmRate {
  /** Floating-point operations a second of a large product. */
  flops: number;
  /** Rows at which half of it is reached: rate(rows) = flops x rows / (rows + halfRows). */
  halfRows: number;
}

export interface MachineProfile {
  name: string;
  /** Where blocks run: whose attention kernel, and whether there is a link between host and device. */
  device: "cpu" | "cuda";
  gemm: { float32: GemmRate; bfloat16: GemmRate; float64: GemmRate };
  /** Elementwise work runs in compiled kernels (cost-fused.ts), not a kernel for each operator. Not where `measured` is. */
  compiled?: boolean;
  /** Share of the products' rate that attention reaches. */
  attention: number;
  /** Bytes a second. */
  deviceMemory: number;
  hostToDevice: number;
  deviceToHost: number;
  diskRead: number;
  diskWrite: number;
  /** Between two ranks, each way; absent: RANK_LINK. */
  rankLink?: number;
  /** Seconds that pass before a kernel begins, at least, for every operator; for every instruction; for every copy. */
  operatorSeconds: number;
  instructionSeconds: number;
  copySeconds: number;
  /** Intra-op threads; 0 where that is not a matter. */
  threads: number;
  /** Tables of everything, where the machine has been measured; without them the rates above are all that is known. */
  measured?: MeasuredRates;
}

/** Two processes of one machine over loopback TCP, or machines on 40 Gbit/s Ethernet. */
export const RANK_LINK = 4e9;

const T = 1e12;
const G = 1e9;
const card = (
  name: string,
  rates: { bfloat16: number; float32: number; float64: number; halfRows: number; memory: number; link: number },
): MachineProfile => ({
  name,
  device: "cuda",
  gemm: {
    bfloat16: { flops: rates.bfloat16, halfRows: rates.halfRows },
    float32: { flops: rates.float32, halfRows: rates.halfRows / 4 },
    float64: { flops: rates.float64, halfRows: rates.halfRows / 4 },
  },
  attention: 0.5,
  deviceMemory: rates.memory,
  hostToDevice: rates.link,
  deviceToHost: rates.link,
  // One NVMe drive of PCIe 4.0, in long sequential requests.
  diskRead: 5 * G,
  diskWrite: 4 * G,
  operatorSeconds: 5e-6,
  instructionSeconds: 20e-6,
  copySeconds: 15e-6,
  threads: 0,
});

/**
 * Link: 24 GB/s of PCIe 4.0 x16's 32 and 50 of 5.0's 64 from pinned memory, each way. Memory: nine tenths of the sheet's.
 * halfRows is an assumption that small products fill a large card later. None of these is measured by us; one H100 that was
 * (docs/gpu/h100-2026-11-28.md) gave 633, 52 and 50 TFLOP/s, 2.99 TB/s, 48 to 55 GB/s, and 9.4 us an operator beside a slow host.
 */
const cards: Readonly<Record<string, MachineProfile>> = {
  // NVIDIA RTX A5000 data sheet: 768 GB/s, 27.8 TFLOP/s fp32, 111 bf16 (dense); long products at 230 W reach about 70.
  a5000: card("a5000", {
    bfloat16: 72 * T,
    float32: 20 * T,
    float64: 0.4 * T,
    halfRows: 48,
    memory: 690 * G,
    link: 24 * G,
  }),
  // NVIDIA Ada GPU architecture white paper: 1,008 GB/s, 82.6 TFLOP/s fp32, 165 bf16 with fp32 sums; LoHan (arXiv
  // 2403.06504) reports 155.8 of a 4090 in training 13B.
  rtx4090: card("rtx4090", {
    bfloat16: 155 * T,
    float32: 60 * T,
    float64: 1.2 * T,
    halfRows: 64,
    memory: 900 * G,
    link: 24 * G,
  }),
  // NVIDIA A100 80GB PCIe/SXM data sheet: 1,935-2,039 GB/s, 312 TFLOP/s bf16, 19.5 fp32 (TF32 is off by default).
  a100: card("a100", {
    bfloat16: 240 * T,
    float32: 17 * T,
    float64: 16 * T,
    halfRows: 80,
    memory: 1_780 * G,
    link: 24 * G,
  }),
  // NVIDIA H100 SXM data sheet: 3,350 GB/s, 989 TFLOP/s bf16 dense, 67 fp32.
  h100: card("h100", {
    bfloat16: 640 * T,
    float32: 50 * T,
    float64: 50 * T,
    halfRows: 128,
    memory: 3_000 * G,
    link: 50 * G,
  }),
  // NVIDIA H200 SXM data sheet: 4,800 GB/s, the H100's processors.
  h200: card("h200", {
    bfloat16: 640 * T,
    float32: 50 * T,
    float64: 50 * T,
    halfRows: 128,
    memory: 4_300 * G,
    link: 50 * G,
  }),
  // measureMachine on two shared cores with AVX2 and no bfloat16 unit; there is no link: the device is the process's memory.
  cpu: {
    name: "cpu",
    device: "cpu",
    gemm: {
      float32: { flops: 44e9, halfRows: 9 },
      bfloat16: { flops: 0.34e9, halfRows: 0 },
      float64: { flops: 22e9, halfRows: 12 },
    },
    attention: 0.4,
    deviceMemory: 12.5 * G,
    hostToDevice: 6.2 * G,
    deviceToHost: 6.2 * G,
    diskRead: 0.54 * G,
    diskWrite: 0.23 * G,
    operatorSeconds: 5e-6,
    instructionSeconds: 20e-6,
    copySeconds: 10e-6,
    threads: 2,
  },
};

export const profileNames = (): string[] => Object.keys(cards);

/** Throws CONFIG for a name that is not one of `profileNames()`. */
export function findProfile(name: string): MachineProfile {
  const found = Object.hasOwn(cards, name) ? cards[name] : undefined;
  if (found === undefined)
    throw new StromaError(
      "CONFIG",
      `[plan] there is no profile ${JSON.stringify(name)}. Profiles: ${profileNames().join(", ")}`,
    );
  return found;
}

/** The named profile of a card by the name that its driver gives, e.g. "NVIDIA GeForce RTX 4090"; null: not one we know. */
export function profileOfCard(name: string): MachineProfile | null {
  const plain = name.toLowerCase().replace(/[\s-]/g, "");
  // Longest first: an A5000 is no A500.
  const key = Object.keys(cards)
    .filter((k) => k !== "cpu")
    .sort((a, b) => b.length - a.length)
    .find((k) => plain.includes(k));
  return key === undefined ? null : cards[key]!;
}

/**
 * The speed to plan with for a card that has not been measured: that of its named profile, else a guess, which `guess` says
 * of whom. Plans for a card that is slower than the real one move less and never more than it can.
 */
export function cardProfile(name: string | null): { profile: MachineProfile; guess: string | null } {
  const known = name === null ? null : profileOfCard(name);
  if (known !== null) return { profile: known, guess: null };
  const guess = `${name ?? "this card"} has no profile: an RTX A5000's speed stands in. npx stroma doctor --measure measures it`;
  return { profile: cards.a5000!, guess };
}
