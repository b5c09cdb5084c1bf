/** From what the user names (a file, a folder, a glob) to files, each with its format found by looking into it. */
import { createReadStream } from "node:fs";
import { open, readdir, stat } from "node:fs/promises";
import path from "node:path";
import type { Readable } from "node:stream";
import { createGunzip } from "node:zlib";
import { StromaError } from "../../errors.js";

export type FileFormat = "csv" | "tsv" | "parquet" | "jsonl" | "text";

const EXTENSIONS: Record<string, FileFormat> = {
  ".csv": "csv",
  ".tsv": "tsv",
  ".tab": "tsv",
  ".parquet": "parquet",
  ".jsonl": "jsonl",
  ".ndjson": "jsonl",
  ".txt": "text",
  ".md": "text",
};
const SUPPORTED = `${Object.keys(EXTENSIONS).join(", ")}, each but .parquet also with .gz`;

export interface SourceFile {
  /** As reports name it: relative to the working folder where that is shorter. */
  name: string;
  path: string;
  format: FileFormat;
  size: number;
  modifiedMs: number;
}

function formatOf(file: string): FileFormat | undefined {
  return EXTENSIONS[path.extname(file.replace(/\.gz$/i, "")).toLowerCase()];
}

/** `*` and `?` within a name, `**` across folders, `{a,b}`. */
export function globToRegExp(pattern: string): RegExp {
  // More than two stars mean no more, and a row of `.*` would take the matcher ages.
  const glob = pattern.replace(/\*{3,}/g, "**");
  let out = "";
  let braces = 0;
  for (let i = 0; i < glob.length; i++) {
    const c = glob[i]!;
    if (c === "*" && glob[i + 1] === "*") {
      const slash = glob[i + 2] === "/";
      out += slash ? "(?:[^/]+/)*" : ".*";
      i += slash ? 2 : 1;
    } else if (c === "*") out += "[^/]*";
    else if (c === "?") out += "[^/]";
    else if (c === "{") {
      out += "(?:";
      braces++;
    } else if (c === "}" && braces > 0) {
      out += ")";
      braces--;
    } else if (c === "," && braces > 0) out += "|";
    else out += c.replace(/[.+^$()|[\]\\{}]/g, "\\$&");
  }
  return new RegExp(`^${out}$`);
}

/** Files in order of name, so that the data does not depend on how a folder happens to be listed. Throws DATA. */
export async function findFiles(spec: string): Promise<SourceFile[]> {
  const found: string[] = [];
  const info = await stat(spec).catch(() => null);
  if (info?.isFile()) found.push(path.resolve(spec));
  else if (info?.isDirectory()) {
    for (const entry of await readdir(spec, { recursive: true, withFileTypes: true }))
      if (entry.isFile() && formatOf(entry.name) !== undefined) found.push(path.resolve(entry.parentPath, entry.name));
  } else if (/[*?{]/.test(spec)) {
    const absolute = path.resolve(spec);
    const parts = absolute.split("/");
    const fixed = parts.findIndex((part) => /[*?{]/.test(part));
    const base = parts.slice(0, fixed).join("/") || "/";
    const pattern = globToRegExp(absolute);
    const entries = await readdir(base, { recursive: true, withFileTypes: true }).catch(() => []);
    for (const entry of entries) {
      const file = path.join(entry.parentPath, entry.name);
      if (entry.isFile() && pattern.test(file)) found.push(file);
    }
  }
  if (found.length === 0)
    throw new StromaError(
      "DATA",
      `[data] found no file for ${JSON.stringify(spec)}. Give a file, a folder, a glob or "planets"`,
      {
        spec,
      },
    );
  found.sort();
  const files: SourceFile[] = [];
  for (const file of found) {
    const format = formatOf(file);
    const relative = path.relative(process.cwd(), file);
    const name = relative.length < file.length ? relative : file;
    if (format === undefined)
      throw new StromaError("FILE_FORMAT", `[data] ${name}: expected a file of ${SUPPORTED}`, { file: name });
    const s = await stat(file);
    files.push({ name, path: file, format, size: s.size, modifiedMs: s.mtimeMs });
  }
  return files;
}

const HEAD_BYTES = 4096;

/** Why a whole file is refused; `line` where it can be named. */
export class SourceRefused extends Error {
  constructor(
    readonly reason: string,
    readonly line: number | null = null,
  ) {
    super(reason);
  }
}

const NOT_DATA = /^\s*(<!doctype|<html|<head|<body|<\?xml|<votable|<error|<script|error\s*<br)/i;

/**
 * Looks at a file's first bytes. Throws SourceRefused for an empty file, HTML or XML saved as data, an archive's error
 * message, binary content, or another format than the name says. Returns whether it is gzip (by its magic, not its name).
 */
export async function sniff(file: SourceFile): Promise<{ gzip: boolean }> {
  if (file.size === 0) throw new SourceRefused("the file is empty");
  const head = Buffer.alloc(Math.min(HEAD_BYTES, file.size));
  const handle = await open(file.path, "r");
  try {
    await handle.read(head, 0, head.length, 0);
  } finally {
    await handle.close();
  }
  if (file.format === "parquet") return { gzip: false };
  const gzip = head[0] === 0x1f && head[1] === 0x8b;
  const text = gzip ? await firstBytes(file) : head;
  if (text.length === 0) throw new SourceRefused("the file is empty once decompressed");
  if (text.subarray(0, 4).equals(Buffer.from("PAR1")))
    throw new SourceRefused(`a Parquet file named ${path.extname(file.path)}: rename it to .parquet`, 1);
  const string = text.toString("utf8").replace(/^\ufeff/, "");
  if (string.trim() === "" && text.length < HEAD_BYTES) throw new SourceRefused("the file holds only white space");
  if (text[0] === 0xff && text[1] === 0xfe) throw new SourceRefused("UTF-16, not UTF-8: convert it", 1);
  const nul = text.indexOf(0);
  if (nul >= 0 && nul < 512 && text.subarray(0, 512).filter((b) => b === 0).length > 16)
    throw new SourceRefused("binary content (NUL bytes), not text", lineAt(text, nul));
  if (file.format !== "text" || /^\s*(<!doctype html|<html)/i.test(string)) {
    const match = NOT_DATA.exec(string);
    if (match !== null)
      throw new SourceRefused(
        `HTML or XML, or an archive's error page, saved as data: it begins with ${JSON.stringify(firstLine(string))}`,
        lineAt(text, match[0].length - match[0].trimStart().length),
      );
    if (/\bORA-\d{5}\b/.test(firstLine(string)))
      throw new SourceRefused(`a database's error message saved as data: ${JSON.stringify(firstLine(string))}`, 1);
  }
  if ((file.format === "csv" || file.format === "tsv") && /^\s*[{[]/.test(string))
    throw new SourceRefused(`JSON saved as ${file.format.toUpperCase()}: rename it to .jsonl (one object a line)`, 1);
  return { gzip };
}

function firstLine(text: string): string {
  return text.trimStart().split(/\r?\n/, 1)[0]!.slice(0, 60);
}

function lineAt(bytes: Uint8Array, offset: number): number {
  let line = 1;
  for (let i = 0; i < offset; i++) if (bytes[i] === 10) line++;
  return line;
}

async function firstBytes(file: SourceFile): Promise<Buffer> {
  const chunks: Buffer[] = [];
  let size = 0;
  const stream = byteStream(file, true);
  try {
    for await (const chunk of stream) {
      chunks.push(chunk as Buffer);
      size += (chunk as Buffer).length;
      if (size >= HEAD_BYTES) break;
    }
  } catch (error) {
    throw new SourceRefused(`damaged gzip: ${(error as Error).message}`);
  } finally {
    stream.destroy();
  }
  return Buffer.concat(chunks);
}

/** The (decompressed) bytes of a file as a stream with back-pressure. `count` is told the bytes read from disk. */
export function byteStream(file: SourceFile, gzip: boolean, count?: (bytes: number) => void): Readable {
  const raw = createReadStream(file.path, { highWaterMark: 1 << 16 });
  if (count !== undefined) raw.on("data", (chunk) => count(chunk.length));
  if (!gzip) return raw;
  const gunzip = createGunzip();
  raw.on("error", (error) => gunzip.destroy(error));
  gunzip.on("close", () => raw.destroy());
  return raw.pipe(gunzip);
}
