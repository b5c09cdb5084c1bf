/** The output folder, made before anything slow begins: a wrong path is told at once. */
import { access, constants, mkdir, rmdir, stat } from "node:fs/promises";
import { dirname, resolve } from "node:path";
import { StromaError } from "../errors.js";

/**
 * Makes the folder and those above it that are missing, one by one: Node's recursive mkdir never returns where the
 * system answers ENOENT to every mkdir, as under /proc.
 * @returns those that were missing, outermost first
 * @throws CONFIG for a path that goes through a file, is not writable or cannot be made
 */
export async function makeOutputDir(path: string): Promise<string[]> {
  const missing: string[] = [];
  let at = resolve(path);
  for (;;) {
    const found = await stat(at).catch((error: NodeJS.ErrnoException) => {
      if (error.code === "ENOENT") return null;
      if (error.code === "ENOTDIR") return undefined;
      throw refused(path, at, error);
    });
    if (found?.isFile())
      throw new StromaError("CONFIG", `[cli] --output-dir ${path}: ${at} is a file, not a folder`, { path });
    if (found) break;
    missing.unshift(at);
    at = dirname(at);
  }
  try {
    await access(at, constants.W_OK | constants.X_OK);
    for (const folder of missing) {
      at = folder;
      await mkdir(folder);
    }
    return missing;
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === "EEXIST") return makeOutputDir(path);
    throw refused(path, at, error as NodeJS.ErrnoException);
  }
}

/** Of folders as makeOutputDir() gave them those that are empty: a run that was refused leaves none behind. */
export async function removeEmpty(made: readonly string[]): Promise<void> {
  for (const folder of made.toReversed()) await rmdir(folder).catch(() => {});
}

function refused(path: string, at: string, cause: NodeJS.ErrnoException): StromaError {
  const why =
    cause.code === "EROFS"
      ? "the file system is read-only"
      : cause.code === "EACCES" || cause.code === "EPERM"
        ? "you may not write there"
        : cause.message;
  return new StromaError(
    "CONFIG",
    `[cli] --output-dir ${path}: cannot write to ${at}: ${why}. Choose another folder`,
    { path },
    { cause },
  );
}
