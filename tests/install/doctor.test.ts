import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, it, vi } from "vitest";
import { type Check, childLinks, type DoctorReport, runDoctor } from "../../src/cli/doctor.js";
import { packageRoot, readBuildRecord } from "../../src/native.js";
import { nativeOrSkip } from "../support/native.js";

const native = nativeOrSkip();
const check = (report: DoctorReport, name: string): Check => {
  const found = report.checks.find((c) => c.name === name);
  if (!found) throw new Error(`no check ${name}`);
  return found;
};

describe.skipIf(!native)("stroma doctor", () => {
  const id = "test-doctor";
  let folder: string;
  beforeEach(() => {
    folder = mkdtempSync(join(tmpdir(), "stroma-doctor-"));
  });
  afterEach(() => {
    vi.unstubAllEnvs();
    rmSync(folder, { recursive: true, force: true });
    rmSync(join(packageRoot, "build", id), { recursive: true, force: true });
  });

  /** A child that says these lines and then runs this code. */
  const child = (code: string) => {
    const file = join(folder, "child.mjs");
    writeFileSync(file, code);
    return file;
  };

  it("finds every link sound where the native tests run, and takes two steps that lower the loss", async () => {
    const report = await runDoctor();
    expect(report.checks.filter((c) => !c.ok)).toEqual([]);
    expect(report.ok).toBe(true);
    expect(check(report, "training step").detail).toMatch(/loss \d/);
    expect(report.devices[0]).toMatchObject({ device: "cpu", usable: true });
    expect(report.libtorch).toEqual(readBuildRecord().libtorch);
  });

  it("has the shape that programs read", async () => {
    const report = await runDoctor();
    expect(Object.keys(report).sort()).toEqual(["checks", "devices", "libtorch", "ok"]);
    for (const each of report.checks) {
      expect(Object.keys(each).sort()).toEqual(["cure", "detail", "name", "ok"]);
      if (!each.ok) expect(each.cure).toMatch(/\S/);
    }
  });

  it("refuses a libtorch of another minor without starting what would crash", async () => {
    const record = readBuildRecord();
    mkdirSync(join(packageRoot, "build", id), { recursive: true });
    const wrong = { ...record, id, libtorch: { ...record.libtorch, version: "2.12.1+cpu" } };
    writeFileSync(join(packageRoot, "build", id, "build.json"), JSON.stringify(wrong));
    vi.stubEnv("STROMA_BUILD", id);
    const report = await runDoctor({ child: child("throw new Error('must not run')") });
    expect(report.ok).toBe(false);
    expect(check(report, "libtorch")).toMatchObject({ ok: false, cure: expect.stringContaining("npx stroma setup") });
    expect(check(report, "addon").detail).toContain("not tried");
    expect(report.devices.every((device) => !device.usable)).toBe(true);
  });

  it("says that there is no build, and the cure", async () => {
    vi.stubEnv("STROMA_BUILD", "cuda-0.0.0");
    const report = await runDoctor();
    expect(report.ok).toBe(false);
    expect(report.libtorch).toBeNull();
    expect(check(report, "build").cure).toContain("npx stroma setup --cuda");
  });

  it("names the link in which the child process crashed, and the signal", async () => {
    const report = await runDoctor({
      child: child(`
        import { writeSync } from "node:fs";
        writeSync(1, '{"begin":"addon"}\\n{"end":"addon","ok":true,"detail":"loads","cure":null}\\n{"begin":"operator"}\\n{"en');
        process.kill(process.pid, "SIGSEGV");
        setInterval(() => {}, 1000);`),
    });
    expect(report.ok).toBe(false);
    expect(check(report, "addon").ok).toBe(true);
    expect(check(report, "operator")).toMatchObject({ ok: false, detail: expect.stringContaining("SIGSEGV") });
    expect(check(report, "training step").detail).toContain("not tried");
  });

  it("fails every link where the child says nothing", async () => {
    const report = await runDoctor({ child: child("process.exit(0)") });
    for (const name of childLinks(null)) expect(check(report, name).ok).toBe(false);
  });
});
