/** What needs no native part: help, names, refused command lines. */
import { existsSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { describe, expect, it } from "vitest";
import { COMMANDS } from "../../src/cli/commands.js";
import { kebab, trainOptions } from "../../src/cli/options.js";
import { jsonLines, scratch, stroma } from "./spawn.js";

const folder = scratch();

describe("help", () => {
  it("lists every command, and what the list says is what each module says", async () => {
    const { stdout, code } = await stroma(["--help"]);
    expect(code).toBe(0);
    for (const entry of COMMANDS) {
      expect(stdout).toContain(`stroma ${entry.command} `);
      const module = await entry.load();
      expect([module.command, module.describe]).toEqual([entry.command, entry.describe]);
    }
    expect(stdout).toContain("Exit status: 0 done, 1 failed, 2 wrong");
  });

  it("of train lists every option with its default, and examples", async () => {
    const { stdout, code } = await stroma(["train", "--help"]);
    expect(code).toBe(0);
    for (const name of Object.keys(trainOptions)) expect(stdout).toMatch(new RegExp(`--${kebab(name)}\\s`));
    const joined = stdout.replace(/\s+/g, " ");
    for (const spec of Object.values(trainOptions))
      if (spec.default !== null && spec.default !== false) expect(joined).toContain(`[default: ${spec.default}]`);
    expect(stdout).toContain("stroma train --batch-size 32 --micro-batch-size 1");
  });

  it("--version is the package's", async () => {
    const { version } = JSON.parse(readFileSync(new URL("../../package.json", import.meta.url), "utf8")) as {
      version: string;
    };
    expect((await stroma(["--version"])).stdout).toBe(`${version}\n`);
  });
});

describe("a wrong command line ends with status 2, one line, no stack", () => {
  it.each([
    [["trian"], 'there is no command "trian". Did you mean stroma train?'],
    [["train", "--stpes", "4"], "there is no option --stpes. Did you mean --steps?"],
    [["train", "--steps"], "--steps takes a value"],
    [["train", "extra"], '"extra" is one word too many'],
    [["toString"], 'there is no command "toString". See'],
    [["train", "--zork"], "there is no option --zork. See"],
    [["train", "--threads", "100000000"], 'expected a whole number from 0 to 1024, got "100000000", at --threads'],
    [["train", "--model", "\x1b[2Jtiny"], 'no folder "\ufffd[2Jtiny"'],
    [["train", "--steps", "ten"], 'expected a whole number of at least 1, got "ten", at --steps'],
    [
      ["train", "--batch-size", "32", "--micro-batch-size", "5"],
      "--batch-size 32 is not a multiple of --micro-batch-size 5: 32 = 6 x 5 + 2",
    ],
    [
      ["train", "--batch-size", "32", "--micro-batch-size", "4", "--gradient-accumulation-steps", "4"],
      "--batch-size 32 is not --micro-batch-size 4 x --gradient-accumulation-steps 4 = 16",
    ],
    [["train", "--steps", "5", "--epochs", "1"], "steps 5 and epochs 1 are both given"],
    [["train", "--model", "astro-13"], "Did you mean astro-13b?"],
    [["train", "--sample-every-n-steps", "5"], "--sample-every-n-steps is given without"],
    [["generate", "--checkpoint", "x"], "--prompt is needed"],
    [["eval"], "--checkpoint is needed"],
    [[], "which command?"],
  ])("stroma %j", async (args, message) => {
    const { code, stdout, stderr } = await stroma(args, { cwd: folder });
    expect(stderr).toContain(message);
    expect(stderr.trimEnd().split("\n")).toHaveLength(1);
    expect([code, stdout]).toEqual([2, ""]);
    // Nothing was left behind by what did not run.
    expect(existsSync(join(folder, "runs"))).toBe(false);
  });

  it("with --json it is one object on stdout and nothing on stderr", async () => {
    const { code, stdout, stderr } = await stroma(["train", "--json", "--steps", "0"]);
    expect([code, stderr]).toEqual([2, ""]);
    expect(jsonLines(stdout)).toEqual([
      { event: "error", code: "INVALID_ARGUMENT", message: expect.stringContaining("--steps") },
    ]);
  });

  it("STROMA_DEBUG=1 adds the stack", async () => {
    const { stderr } = await stroma(["train", "--steps", "0"], { env: { STROMA_DEBUG: "1" } });
    expect(stderr).toMatch(/\n {4}at /);
  });
});

describe("paths that cannot be", () => {
  const file = join(folder, "a-file");
  writeFileSync(file, "x");

  it.each([
    [["train", "--output-dir", join(file, "run")], 2, "is a file, not a folder"],
    // Refuses every mkdir, also root's.
    [["train", "--output-dir", "/proc/stroma"], 2, "cannot write to /proc/stroma"],
    [["train", "--data", join(folder, "nothing.csv"), "--output-dir", join(folder, "b")], 1, "nothing.csv"],
    [["train", "--resume", join(folder, "nothing")], 1, "there is nothing of that name"],
    [["train", "--config", join(folder, "nothing.yaml")], 2, "there is no such file"],
    [["eval", "--checkpoint", folder], 1, "no checkpoint in it"],
    [["generate", "--checkpoint", file, "--prompt", "x"], 1, "a-file"],
  ])("stroma %j", async (args, status, message) => {
    const { code, stderr } = await stroma(args);
    expect(stderr).toContain(message);
    expect(stderr.trimEnd().split("\n")).toHaveLength(1);
    expect(code).toBe(status);
  });
});
