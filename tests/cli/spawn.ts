/** Runs the real command in a process of its own. */
import { type ChildProcess, spawn } from "node:child_process";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { afterAll } from "vitest";

/** STROMA_BUILT=1: the compiled program (dist), which starts in half the time; for long series. */
const BUILT = process.env.STROMA_BUILT === "1";
const ENTRY = fileURLToPath(new URL(BUILT ? "../../bin/stroma.js" : "stroma.ts", import.meta.url));
const ROOT = fileURLToPath(new URL("../..", import.meta.url));

export interface Ended {
  code: number | null;
  signal: NodeJS.Signals | null;
  stdout: string;
  stderr: string;
}

export interface SpawnOptions {
  env?: Record<string, string>;
  cwd?: string;
  input?: string;
  /** A command and arguments before the program: `nsenter …`. */
  under?: readonly string[];
}

/** A running command: its lines as they come, and how it ended. */
export class Running {
  readonly ended: Promise<Ended>;
  private stdout = "";
  private stderr = "";
  private readonly waiting = new Set<() => void>();

  constructor(readonly child: ChildProcess) {
    child.stdout?.setEncoding("utf8").on("data", (text: string) => {
      this.stdout += text;
      for (const wake of this.waiting) wake();
    });
    child.stderr?.setEncoding("utf8").on("data", (text: string) => {
      this.stderr += text;
    });
    this.ended = new Promise((resolve) => {
      child.on("close", (code, signal) => {
        resolve({ code, signal, stdout: this.stdout, stderr: this.stderr });
        for (const wake of this.waiting) wake();
      });
    });
  }

  get output(): string {
    return this.stdout;
  }

  /** Resolves when stdout holds `pattern`; rejects when the command ends before. */
  async until(pattern: RegExp): Promise<void> {
    while (!pattern.test(this.stdout)) {
      if (this.child.exitCode !== null || this.child.signalCode !== null)
        throw new Error(`ended before ${pattern}: ${this.stdout}\n${this.stderr}`);
      await new Promise<void>((resolve) => {
        const wake = () => {
          this.waiting.delete(wake);
          resolve();
        };
        this.waiting.add(wake);
      });
    }
  }
}

export const start = (args: readonly string[], options?: SpawnOptions): Running => startScript(ENTRY, args, options);

/** Any TypeScript file of the repository. */
export function startScript(
  script: string,
  args: readonly string[],
  { env = {}, cwd = ROOT, input, under = [] }: SpawnOptions = {},
): Running {
  const clean: NodeJS.ProcessEnv = { ...process.env, NO_COLOR: "1" };
  // vitest's own would make the command believe that it is tested.
  for (const name of Object.keys(clean))
    if (/^(VITEST|NODE_ENV|NODE_OPTIONS|STROMA_DEBUG)/.test(name)) delete clean[name];
  const typescript = script.endsWith(".ts") ? ["--import", fileURLToPath(import.meta.resolve("tsx"))] : [];
  const [command, ...rest] = [...under, process.execPath, ...typescript, script, ...args] as [string, ...string[]];
  const child = spawn(command, rest, {
    cwd,
    env: { ...clean, ...env },
    stdio: ["pipe", "pipe", "pipe"],
  });
  child.stdin.on("error", () => {}); // a command that reads no input closes its end first
  child.stdin.end(input ?? "");
  return new Running(child);
}

export const stroma = (args: readonly string[], options?: SpawnOptions): Promise<Ended> => start(args, options).ended;

/** A folder for one test file, removed after it. */
export function scratch(): string {
  const folder = mkdtempSync(join(tmpdir(), "stroma-cli-"));
  afterAll(() => rmSync(folder, { recursive: true, force: true }));
  return folder;
}

/** A config file of a model so small that a step takes milliseconds. */
export function nanoConfig(folder: string): string {
  const path = join(folder, "nano.yaml");
  writeFileSync(
    path,
    [
      "# a decoder of one layer",
      "model:",
      "  config: { vocabSize: 258, dim: 16, layers: 1, heads: 2, ffn: 32 }",
      "batch-size: 4",
      "sequenceLength: 32",
      "learning-rate: 1e-2",
      "threads: 1",
      "save-every-n-steps: 0",
      "",
    ].join("\n"),
  );
  return path;
}

export const jsonLines = (stdout: string): Record<string, unknown>[] =>
  stdout
    .split("\n")
    .filter((line) => line !== "")
    .map((line) => JSON.parse(line) as Record<string, unknown>);
