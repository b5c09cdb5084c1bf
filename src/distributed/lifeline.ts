/**
 * A rank's side of the channel to the launcher that started it. The launcher may be killed at any instant without a word
 * to its ranks; they would train on, unseen, on cards that somebody else now counts as free. So a rank ends itself when
 * its launcher is gone:
 *
 * - the channel of Node's own between parent and child closes with the parent: seen at once, while this thread is free;
 * - a second thread looks every half second whether the parent is still the same: seen also while this one is busy.
 *
 * It ends by SIGKILL: no destructor has to run for checkpoints to be whole, and none may wait for a collective whose
 * other ranks are ending too.
 */
import { writeSync } from "node:fs";
import { Worker } from "node:worker_threads";
import { ATTEMPT } from "./environment.js";

/** Set by the launcher for its ranks: its process id. */
export const LAUNCHER = "STROMA_LAUNCHER";

/** From rank 0 to its launcher. */
export type RankMessage =
  /** The view on the terminal is live (redrawn in place): lines of others are to go through it. */
  | { stroma: "view"; live: boolean }
  /** The run has begun, and this is the folder that its checkpoints are in. */
  | { stroma: "run"; folder: string };

/** From the launcher to rank 0: lines to be shown above its live view. */
export interface LauncherMessage {
  stroma: "note";
  text: string;
}

/** Ends this process when the launcher that started it is gone. Nothing where none did. Call it early, once. */
export function followLauncher(): void {
  const launcher = Number(process.env[LAUNCHER] ?? "");
  // This process's own children have another parent.
  delete process.env[LAUNCHER];
  if (!Number.isSafeInteger(launcher) || launcher <= 0) return;
  const end = (): void => {
    try {
      writeSync(2, `stroma: the launcher (process ${launcher}) is gone: this rank ends\n`);
    } catch {} // nobody reads any more
    // Also what this process started: it leads a group of its own.
    for (const target of [-process.pid, process.pid])
      try {
        process.kill(target, "SIGKILL");
      } catch {} // no such group
  };
  if (process.ppid !== launcher || !process.connected) end();
  process.once("disconnect", end);
  process.channel?.unref();
  const watch = new Worker(WATCH, { eval: true, workerData: launcher, execArgv: [], env: {}, name: "launcher watch" });
  watch.unref();
}

const LOOK_MS = 500;
const WATCH = `
  const launcher = require("node:worker_threads").workerData;
  setInterval(() => {
    if (process.ppid === launcher) return;
    try { process.kill(-process.pid, "SIGKILL"); } catch {}
    process.kill(process.pid, "SIGKILL");
  }, ${LOOK_MS});
`;

/** Whether a launcher of ours is at the other end: a program that forks this one for its own ends is not told anything. */
const launched = (): boolean => process.connected && Boolean(process.env[ATTEMPT]);

/** Resolves when the message is on its way; false where there is no launcher. */
export function tellLauncher(message: RankMessage): Promise<boolean> {
  return new Promise((resolve) => {
    if (!launched()) resolve(false);
    else process.send!(message, undefined, undefined, (error) => resolve(error === null));
  });
}

/** Calls `show` with every text that the launcher sends. */
export function onLauncherNote(show: (text: string) => void): void {
  if (!launched()) return;
  process.on("message", (message: Partial<LauncherMessage> | null) => {
    if (message?.stroma === "note" && typeof message.text === "string") show(message.text);
  });
  process.channel?.unref(); // listening is no reason to stay
}
