/**
 * How a command fails: one readable message, a code for programs, an exit status for scripts. No stack, unless
 * STROMA_DEBUG is set.
 */
import { type ErrorCode, StromaError } from "../errors.js";
import { kebab, trainOptions } from "./options.js";
import { harmless } from "./ui/format.js";

/** Exit statuses of every command; `stroma --help` prints them. */
export const EXIT = {
  ok: 0,
  /** The work failed: data, disk, memory, a loss that is not finite. */
  failed: 1,
  /** The command line or the config file is wrong. */
  usage: 2,
  /** The native part is missing or does not fit: `stroma setup`, `stroma doctor`. */
  notSetUp: 3,
  /** Ctrl-C (128 + SIGINT): whatever was asked for did not come to its end, so `&&` in a shell stops. */
  interrupted: 130,
  /** SIGTERM (128 + SIGTERM): saved, and not at its end, so that a scheduler starts it again. */
  terminated: 143,
} as const;

const STATUS: Partial<Record<ErrorCode, number>> = {
  CONFIG: EXIT.usage,
  INVALID_ARGUMENT: EXIT.usage,
  NOT_SET_UP: EXIT.notSetUp,
  VERSION_MISMATCH: EXIT.notSetUp,
  ABORTED: EXIT.interrupted,
};

export function exitCodeOf(error: unknown): number {
  return (error instanceof StromaError && STATUS[error.code]) || EXIT.failed;
}

/** What the operating system says, for a person: the call is noise, the path and the cure are not. */
const SYSTEM: Record<string, string> = {
  ENOENT: "there is no such file or folder",
  EACCES: "permission denied. Choose a path that you may write to, or change its permissions",
  EPERM: "not permitted. Choose a path that you may write to",
  EROFS: "the file system is read-only. Choose another path",
  ENOTDIR: "a part of this path is a file, not a folder",
  EISDIR: "it is a folder, not a file",
  ERR_FS_EISDIR: "there is a folder where a file of that name is to be written. Move it away or choose another folder",
  EEXIST: "there is something else of that name. Move it away or choose another folder",
  ENAMETOOLONG: "the name is too long. Choose a shorter one",
  ELOOP: "its symbolic links go in a circle",
  ENOSPC: "no space left on the device. Free some and try again",
  EDQUOT: "the disk quota is used up. Free some space and try again",
};

/** Errors that name options, or the cure by one. */
const OF_OPTIONS: ReadonlySet<ErrorCode> = new Set(["CONFIG", "OUT_OF_MEMORY"]);

/** Code and message of anything that was thrown. */
export function describeError(error: unknown): { code: string; message: string } {
  if (error instanceof StromaError) {
    // The library speaks of its options; on the command line they are flags.
    return { code: error.code, message: OF_OPTIONS.has(error.code) ? flagged(error.message) : error.message };
  }
  const { code, path, message } = error as NodeJS.ErrnoException;
  const known = code === undefined ? undefined : SYSTEM[code];
  if (known !== undefined)
    return { code: code!, message: path === undefined ? `${known}: ${message}` : `${path}: ${known}` };
  return { code: code ?? "UNEXPECTED", message: message ?? String(error) };
}

/** `batchSize 8` -> `--batch-size 8`: option names of the library that have a flag's shape, outside of paths. */
function flagged(message: string): string {
  return message.replace(/(?<![\w./-])[a-z]+(?:[A-Z][a-zA-Z]*)+(?![\w./-])/g, (name) =>
    Object.hasOwn(trainOptions, name) ? `--${kebab(name)}` : name,
  );
}

export interface ErrorOutputs {
  json: boolean;
  out: { write(text: string): unknown };
  err: { write(text: string): unknown };
}

/** Reports a failure; the exit status to end with. */
export function reportError(error: unknown, { json, out, err }: ErrorOutputs): number {
  const { code, message } = describeError(error);
  if (json) out.write(`${JSON.stringify({ event: "error", code, message })}\n`);
  // A message may quote what a file or a command line holds: escape sequences never reach a terminal.
  else err.write(`stroma: ${harmless(message)} (${code})\n`);
  if (process.env.STROMA_DEBUG) err.write(`${(error as Error).stack ?? String(error)}\n`);
  else if (code === "UNEXPECTED") err.write("This is a defect. STROMA_DEBUG=1 shows where it happened.\n");
  return exitCodeOf(error);
}
