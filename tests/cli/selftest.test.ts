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

  it("says that it is not there for a card", async () => {
    const ended = await stroma(["selftest", "memory", "--device", "cuda:0"]);
    expect(ended.code).toBe(2);
    expect(ended.stderr).toContain("not there yet");
  }, 120_000);
});
