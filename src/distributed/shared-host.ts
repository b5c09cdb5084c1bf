/**
 * Whether ranks that share a block's state read its parameters from host memory that they have in common: where the ranks
 * of each replica run on one machine, under one user and in one container, and the device is not that memory itself.
 */
import { readFileSync, readlinkSync } from "node:fs";
import { hostname } from "node:os";
import { StromaError } from "../errors.js";
import type { NativeRanks, SessionOptions } from "../train/native-session.js";

export const SHARED_HOST = ["auto", "on", "off"] as const;
export type SharedHostMode = (typeof SHARED_HOST)[number];

/** Where a rank runs, as far as it decides whether another can open its memory. */
export interface MachineFacts {
  asked: SharedHostMode;
  device: SessionOptions["device"];
  host: string;
  /** Names may repeat among machines; this does not. */
  boot: string;
  /** The namespace that its process has its number in: a container's. */
  processes: string;
  user: number;
}

export function machineFacts(asked: SharedHostMode, device: SessionOptions["device"]): MachineFacts {
  return {
    ...{ asked, device, host: hostname(), user: process.getuid?.() ?? -1 },
    boot: readOr(() => readFileSync("/proc/sys/kernel/random/boot_id", "utf8").trim()),
    processes: readOr(() => readlinkSync("/proc/self/ns/pid")),
  };
}

/** What is not known is nobody else's: no two ranks then share memory. */
function readOr(read: () => string): string {
  try {
    return read();
  } catch {
    return `unknown to process ${process.pid}`;
  }
}

/**
 * The same on all ranks, from the facts of all by rank; `shards`: neighbours that share the state of a block.
 * @throws RANKS where they ask for different things; CONFIG where they ask for it and it cannot be, saying why
 */
export function chooseSharedHost(all: readonly MachineFacts[], shards: number): boolean {
  const { asked } = all[0]!;
  const other = all.findIndex((facts) => facts.asked !== asked);
  if (other > 0)
    throw new StromaError(
      "RANKS",
      `[ranks] the ranks do not run the same:\n  sharedHost: ${asked} on rank 0, ${all[other]!.asked} on rank ${other}\nStart all of them with the same command`,
    );
  if (asked === "off") return false;
  const why = whyNot(all, shards);
  if (asked === "auto") return why === null && all.every(({ device }) => device !== "cpu");
  if (why === null) return true;
  throw new StromaError("CONFIG", `[ranks] sharedHost "on": ${why}. Leave it out: parts then go from rank to rank`);
}

function whyNot(all: readonly MachineFacts[], shards: number): string | null {
  if (shards < 2) return "no two ranks share the state of a block (--shards)";
  for (const [rank, facts] of all.entries()) {
    const first = Math.floor(rank / shards) * shards;
    const { host, boot, processes, user } = all[first]!;
    const pair = `ranks ${first} and ${rank} share the state of a block`;
    if (facts.boot !== boot) return `${pair} and are on two machines, ${host} and ${facts.host}`;
    if (facts.processes !== processes) return `${pair} and are in two containers of ${host}`;
    if (facts.user !== user) return `${pair} and run under two users of ${host}`;
  }
  return null;
}

/** Collective. @throws as chooseSharedHost() */
export async function agreeOnSharedHost(ranks: NativeRanks, mine: MachineFacts, shards: number): Promise<boolean> {
  const all = await ranks.gather(JSON.stringify(mine));
  return chooseSharedHost(
    all.map((text) => JSON.parse(text) as MachineFacts),
    shards,
  );
}
