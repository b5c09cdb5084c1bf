/** Measuring a card, tried on the processors: every rate is a number that a plan can use. What a card says, only one can. */
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { describe, expect, it, vi } from "vitest";
import { cardRates } from "../../src/plan/measure-card.js";
import { readMeasured, storeMeasured } from "../../src/plan/measured.js";
import { findProfile } from "../../src/plan/profiles.js";
import { liveTensors } from "../../src/tensor/index.js";
import { hasNative } from "../support/native.js";

const SMALL = {
  rows: [8, 64],
  width: 64,
  width64: 32,
  deviceBytes: 1 << 16,
  hostBytes: 1 << 18,
  attention: { heads: 2, tokens: 32, dim: 16 },
  budget: 1e-3,
  pin: <T>(x: T) => x,
} as const;

describe.skipIf(!hasNative())("a card, measured", () => {
  it("has every rate, above nothing; what is not measured is the named card's", () => {
    const before = liveTensors();
    const profile = cardRates("cpu", "NVIDIA H100 80GB HBM3", SMALL);
    expect(liveTensors()).toBe(before);
    expect([profile.name, profile.device, profile.measured]).toEqual(["NVIDIA H100 80GB HBM3", "cuda", undefined]);
    const { gemm, attention, deviceMemory, hostToDevice, deviceToHost, operatorSeconds, copySeconds } = profile;
    const rates = [gemm.float32.flops, gemm.bfloat16.flops, gemm.float64.flops, attention, deviceMemory];
    for (const rate of [...rates, hostToDevice, deviceToHost, operatorSeconds, copySeconds])
      expect(rate).toBeGreaterThan(0);
    expect(operatorSeconds).toBeLessThan(1e-3);
    expect(profile.instructionSeconds).toBe(findProfile("h100").instructionSeconds);
  });

  it("is kept by its name, beside the processors and other cards", () => {
    const folder = mkdtempSync(join(tmpdir(), "stroma-measured-"));
    vi.stubEnv("STROMA_CACHE", folder);
    try {
      storeMeasured({ ...findProfile("a5000"), name: "one" }, "NVIDIA RTX A5000");
      storeMeasured({ ...findProfile("cpu"), name: "processors" });
      expect(readMeasured("NVIDIA RTX A5000")?.name).toBe("one");
      expect(readMeasured("NVIDIA L4")).toBeNull();
      expect(readMeasured()?.name).toBe("processors");
    } finally {
      vi.unstubAllEnvs();
      rmSync(folder, { recursive: true, force: true });
    }
  });
});
