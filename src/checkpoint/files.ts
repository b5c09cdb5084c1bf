/** Files that survive a kill: written aside, synced, renamed. And who is alive to own the ones lying about. */
import { createHash } from "node:crypto";
import { createReadStream, readFileSync } from "node:fs";
import { type FileHandle, open, readFile, rename, rm, stat } from "node:fs/promises";
import { dirname } from "node:path";
import { StromaError } from "../errors.js";
import { isTooDeep } from "../graph/hash.js";

/** write() may write less than it was given, e.g. past 2 GiB. */
export async function writeAll(handle: FileHandle, bytes: Uint8Array): Promise<void> {
  for (let at = 0; at < bytes.length; ) at += (await handle.write(bytes, at, bytes.length - at)).bytesWritten;
}

/** A new file, whole and on the disk when the promise resolves. */
export async function writeNewFile(path: string, bytes: Uint8Array): Promise<{ bytes: number; sha256: string }> {
  const handle = await open(path, "wx");
  try {
    await writeAll(handle, bytes);
    await handle.sync();
  } finally {
    await handle.close();
  }
  return { bytes: bytes.length, sha256: createHash("sha256").update(bytes).digest("hex") };
}

/** Replaces a file so that a reader sees the old or the new one, never a part. */
export async function replaceFile(path: string, text: string): Promise<void> {
  const aside = `${path}.tmp-${processTag()}`;
  await rm(aside, { force: true });
  await writeNewFile(aside, Buffer.from(text, "utf8"));
  await rename(aside, path);
  await syncFolder(dirname(path));
}

/** Makes renames and new names in a folder last through a power cut. */
export async function syncFolder(path: string): Promise<void> {
  const handle = await open(path, "r");
  try {
    await handle.sync();
  } finally {
    await handle.close();
  }
}

export async function sha256File(path: string): Promise<string> {
  const hash = createHash("sha256");
  for await (const chunk of createReadStream(path, { highWaterMark: 1 << 20 })) hash.update(chunk as Uint8Array);
  return hash.digest("hex");
}

/** @throws CHECKPOINT naming the file when it is missing, no file, over `mostBytes`, too deep or not JSON of an object */
export async function readJson(path: string, mostBytes = 256 << 20): Promise<Record<string, unknown>> {
  let text: string;
  try {
    // A pipe would be waited on until somebody writes.
    if (!(await stat(path)).isFile()) throw new Error("it is not a file");
    const handle = await open(path, "r");
    try {
      const { size } = await handle.stat();
      if (size > mostBytes) throw new Error(`it has ${size} bytes, over ${mostBytes}`);
      text = await handle.readFile("utf8");
    } finally {
      await handle.close();
    }
    const value: unknown = JSON.parse(text);
    if (value === null || typeof value !== "object" || Array.isArray(value)) throw new Error("it is not a JSON object");
    if (isTooDeep(value)) throw new Error("it is nested too deep");
    return value as Record<string, unknown>;
  } catch (error) {
    throw new StromaError(
      "CHECKPOINT",
      `[checkpoint] cannot read ${path}: ${(error as Error).message}`,
      { path },
      {
        cause: error,
      },
    );
  }
}

/** DISK_FULL for what a full disk or quota makes of a write; any other error as it is. */
export function diskFull(error: unknown, path: string): unknown {
  const e = error as NodeJS.ErrnoException;
  const full =
    e?.code === "ENOSPC" || e?.code === "EDQUOT" || /ENOSPC|EDQUOT|No space left|quota exceeded/i.test(e?.message);
  if (!full || (e instanceof StromaError && e.code === "DISK_FULL")) return error;
  return new StromaError(
    "DISK_FULL",
    `[checkpoint] no space left while writing ${path}; what was begun is removed, earlier checkpoints are whole. Free space and resume`,
    { path },
    { cause: error },
  );
}

/** When the process of that id started, in kernel ticks; null when there is none. An id alone is used again. */
function startOf(pid: number): string | null {
  try {
    const stat = readFileSync(`/proc/${pid}/stat`, "utf8");
    // The command's name may hold spaces and parentheses; field 22 is the 20th after its closing one.
    const fields = stat.slice(stat.lastIndexOf(")") + 2).split(" ");
    return fields[0] === "Z" || fields[0] === "X" ? null : (fields[19] ?? null);
  } catch {
    return null;
  }
}

/** `<pid>-<start>`: names this process, in files that it owns. */
export function processTag(): string {
  return `${process.pid}-${startOf(process.pid) ?? "0"}`;
}

/** Whether the process that a tag names still runs on this machine. */
export function isAlive(tag: string): boolean {
  const match = /^(\d+)-(\d+)$/.exec(tag);
  return match !== null && startOf(Number(match[1])) === match[2];
}

/**
 * One trainer per output folder. The lock names process and machine; one of a dead process, or of another machine (a
 * container that is gone), is taken over.
 * @throws BUSY when a live process of this machine holds it
 */
export async function lockFolder(path: string): Promise<() => Promise<void>> {
  const file = `${path}/.lock`;
  const mine = JSON.stringify({ process: processTag(), boot: bootId() });
  for (let attempt = 0; attempt < 3; attempt++) {
    try {
      await writeNewFile(file, Buffer.from(mine, "utf8"));
      return async () => {
        if ((await readFile(file, "utf8").catch(() => "")) === mine) await rm(file, { force: true });
      };
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== "EEXIST") throw diskFull(error, file);
    }
    let holder: { process?: unknown; boot?: unknown } = {};
    try {
      holder = JSON.parse(await readFile(file, "utf8")) as typeof holder;
    } catch {
      // Half written by a process that was killed, or gone since.
    }
    if (holder.boot === bootId() && typeof holder.process === "string" && isAlive(holder.process))
      throw new StromaError(
        "BUSY",
        `[trainer] process ${holder.process.split("-")[0]} already trains into ${path}. Give another outputDir`,
        {
          path,
        },
      );
    await rm(file, { force: true });
  }
  throw new StromaError("BUSY", `[trainer] could not lock ${path}: others start there at the same time`, { path });
}

function bootId(): string {
  try {
    return readFileSync("/proc/sys/kernel/random/boot_id", "utf8").trim();
  } catch {
    return "";
  }
}
