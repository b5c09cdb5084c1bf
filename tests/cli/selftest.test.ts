/** `stroma selftest memory`, the command itself. */
import { describe, expect, it } from "vitest";
import { hasNative } from "../support/native.js";
import { stroma } from "./spawn.js";

describe.skipIf(!hasNative())("stroma selftest memory", () => {
  it("tries six means, and all hold", async () => {
    const ended = await stroma(["selftest", "memory", "--json"]);
    const report = JSON.parse(ended.stdout) as { ok: boolean; checks: { name: string; ok: boolean; detail: string }[] };
    expect(report.checks.filter((c) => !c.ok)).toEqual([]);
    expect(report.checks.map((c) => c.name)).toEqual([
      "8bit optimizer",
      "gradient accumulation",
      "cpu offloading",
      "memory profiling",
      "mixed precision",
      "config integration",
    ]);
    expect([report.ok, ended.code]).toEqual([true, 0]);
  }, 600_000);

  it("refuses a card that is not there, with its cure, and what is no device", async () => {
    const card = await stroma(["selftest", "memory", "--device", "cuda:63"]);
    expect([2, 3]).toContain(card.code);
    expect(card.stderr).toMatch(/there is no NVIDIA driver\. Install|this is the CPU build|there is no cuda:63/);
    const none = await stroma(["selftest", "memory", "--device", "gpu"]);
    expect([none.code, none.stderr]).toEqual([2, expect.stringContaining("expected auto, cpu, cuda")]);
  }, 120_000);
});
