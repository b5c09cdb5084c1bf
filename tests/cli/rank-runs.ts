/** Runs over several ranks as processes: through our launcher, or each rank started by itself as a cluster does. */
import { readdirSync, readFileSync } from "node:fs";
import { readFile } from "node:fs/promises";
import { join } from "node:path";
import { freePort } from "../laws/rank-case.js";
import { type Ended, type SpawnOptions, start } from "./spawn.js";

export interface Run {
  pid: number;
  /** stdout and stderr so far. */
  text(): string;
  kill(signal: NodeJS.Signals): void;
  isOver(): boolean;
  ended: Promise<Ended>;
}

export function startRun(args: readonly string[], options?: SpawnOptions): Run {
  const { child, ended } = start(["train", ...args], options);
  let text = "";
  for (const stream of [child.stdout!, child.stderr!])
    stream.on("data", (chunk) => {
      text += chunk;
    });
  return {
    pid: child.pid!,
    text: () => text,
    kill: (signal) => void child.kill(signal),
    isOver: () => child.exitCode !== null || child.signalCode !== null,
    ended,
  };
}

export interface RankOptions {
  ranks: number;
  /** Where they meet. Default: this machine's loopback, a free port. */
  address?: string;
  port?: number;
  /** Of each rank. */
  each?(rank: number): SpawnOptions;
}

/** The variables that a cluster's job sets by hand. */
export const rankEnv = (rank: number, ranks: number, address: string, port: number): Record<string, string> => ({
  RANK: String(rank),
  WORLD_SIZE: String(ranks),
  LOCAL_RANK: "0",
  LOCAL_WORLD_SIZE: "1",
  MASTER_ADDR: address,
  MASTER_PORT: String(port),
  OMP_NUM_THREADS: "1",
});

export async function startRanks(args: readonly string[], { ranks, ...rest }: RankOptions): Promise<Run[]> {
  const { address = "127.0.0.1", port = await freePort(), each = (): SpawnOptions => ({}) } = rest;
  return Array.from({ length: ranks }, (_, rank) => {
    const { env, ...own } = each(rank);
    return startRun(args, { ...own, env: { ...rankEnv(rank, ranks, address, port), ...env } });
  });
}

/** Until the first step has been taken by rank 0, or the run is over. */
export const begun = (run: Run, step = 1): Promise<void> =>
  until(() => run.isOver() || new RegExp(`step +${step}/`).test(run.text()), 150, run.text);

export async function until(what: () => boolean, seconds: number, told: () => string = () => ""): Promise<void> {
  const end = Date.now() + seconds * 1000;
  while (!what()) {
    if (Date.now() > end) throw new Error(`waited ${seconds} s in vain ${told()}`);
    await new Promise((done) => setTimeout(done, 10));
  }
}

/** Processes of a launcher's run by their rank, from the environment that it gave them. */
export function ranksOf(outputDir: string): Map<number, number> {
  const found = new Map<number, number>();
  for (const name of readdirSync("/proc")) {
    if (!/^\d+$/.test(name)) continue;
    try {
      if (!readFileSync(`/proc/${name}/cmdline`, "utf8").includes(outputDir)) continue;
      const rank = /(?:^|\0)RANK=(\d+)/.exec(readFileSync(`/proc/${name}/environ`, "utf8"))?.[1];
      if (rank !== undefined) found.set(Number(rank), Number(name));
    } catch {
      // It has ended meanwhile.
    }
  }
  return found;
}

/** Loss and norm of every step, as they were written. */
export async function lossesOf(outputDir: string): Promise<unknown[][]> {
  const lines = (await readFile(join(outputDir, "metrics.jsonl"), "utf8")).trim().split("\n");
  return lines
    .map((line) => JSON.parse(line) as Record<string, unknown>)
    .filter(({ event }) => event === "step")
    .map(({ step, loss, gradNorm }) => [step, loss, gradNorm]);
}
