/** Readers: a file becomes rows, one at a time, with the line each stands on, and refusals with why. */
import { open } from "node:fs/promises";
import type { Readable } from "node:stream";
import { type CsvError, parse } from "csv-parse";
import { asyncBufferFromFile, parquetMetadataAsync, parquetReadObjects, parquetSchema } from "hyparquet";
import { compressors } from "hyparquet-compressors";
import { byteStream, type SourceFile, SourceRefused } from "./files.js";

export type Cell = string | number | boolean | null;
export type Row = Record<string, Cell>;
/** Without a prototype: a column may be called "__proto__" or "constructor". */
const emptyRow = (): Row => Object.create(null);
/** line: of the file (CSV, JSON lines, text), or the 1-based row (Parquet). */
export type RowEvent = { row: Row; line: number } | { refused: string; line: number };

export interface ReaderContext {
  file: SourceFile;
  gzip: boolean;
  /** Told the bytes read from disk, as they are read. */
  count: (bytes: number) => void;
  /** Text: what a document is. */
  documents: "paragraphs" | "files";
}

/** Words that mean "no value" in a cell, besides nothing at all. */
const MISSING = /^(?:nan|none|null|n\/a|NA|--)$/i;

/** Null for a missing cell, else the cell without white space around it. */
export function cleanCell(text: string): string | null {
  const trimmed = text.trim();
  return trimmed === "" || MISSING.test(trimmed) ? null : trimmed;
}

export function readRows(context: ReaderContext): AsyncIterable<RowEvent> {
  switch (context.file.format) {
    case "csv":
    case "tsv":
      return csvRows(context);
    case "parquet":
      return parquetRows(context);
    case "jsonl":
      return jsonRows(context);
    case "text":
      return textRows(context);
  }
}

const BAD_TEXT = /[\0\ufffd]/;

function badText(text: string): string | null {
  const match = BAD_TEXT.exec(text);
  if (match === null) return null;
  return match[0] === "\0" ? "a NUL byte" : "invalid UTF-8 (or the replacement character U+FFFD)";
}

/** Of the header line: the separator it uses most, outside quotes. */
export function guessDelimiter(header: string): string {
  const outside = header.replace(/"[^"]*"/g, "");
  let best = ",";
  let most = 0;
  for (const candidate of [",", "\t", ";", "|"]) {
    const n = outside.split(candidate).length - 1;
    if (n > most) {
      most = n;
      best = candidate;
    }
  }
  return best;
}

async function headerLine(context: ReaderContext): Promise<{ header: string; comments: boolean }> {
  let comments = false;
  for await (const { bytes } of lines(byteStream(context.file, context.gzip))) {
    const text = bytes.toString("utf8").replace(/^\ufeff/, "");
    if (text.startsWith("#")) comments = true;
    else if (text.trim() !== "") return { header: text, comments };
  }
  throw new SourceRefused("no header line");
}

async function* csvRows(context: ReaderContext): AsyncIterable<RowEvent> {
  const { header, comments } = await headerLine(context);
  const delimiter = context.file.format === "tsv" ? "\t" : guessDelimiter(header);
  const skipped: { refused: string; line: number }[] = [];
  const parser = parse({
    bom: true,
    delimiter,
    info: true,
    // We look at the number of cells ourselves, so that a ragged row is one refusal and not the end of the file.
    relax_column_count: true,
    skip_empty_lines: true,
    skip_records_with_error: true,
    // A quote that is never closed must not swallow a whole file.
    max_record_size: 1 << 20,
    ...(comments ? { comment: "#", comment_no_infix: true } : {}),
  });
  parser.on("skip", (error: CsvError | undefined) => {
    const at = (error as unknown as { lines?: number } | undefined)?.lines;
    skipped.push({ refused: csvReason(error), line: at ?? 0 });
  });
  const source = byteStream(context.file, context.gzip, context.count);
  source.on("error", (error) => parser.destroy(error));
  source.pipe(parser);
  let columns: string[] | null = null;
  let before = 0;
  let drift = 0;
  const count = (cell: string, what: string) => cell.split(what).length - 1;
  try {
    for await (const item of parser as AsyncIterable<{ record: string[]; info: { lines: number } }>) {
      const { record, info } = item;
      // info.lines is where a record ends, and counts a CRLF within quotes twice.
      for (const cell of record) drift += count(cell, "\r\n");
      const end = info.lines - drift;
      const line = Math.max(before + 1, end - record.reduce((n, cell) => n + count(cell, "\n"), 0));
      before = end;
      // The parser runs ahead of the records we have seen.
      while (skipped.length > 0 && skipped[0]!.line < line) yield skipped.shift()!;
      if (columns === null) {
        columns = checkHeader(record, line);
        continue;
      }
      if (record.length !== columns.length) {
        yield { refused: `${record.length} cells where the header has ${columns.length}`, line };
        continue;
      }
      const row = emptyRow();
      let bad: string | null = null;
      for (let i = 0; i < columns.length; i++) {
        const text = record[i]!;
        bad ??= badText(text);
        row[columns[i]!] = cleanCell(text);
      }
      yield bad === null ? { row, line } : { refused: bad, line };
    }
    while (skipped.length > 0) yield skipped.shift()!;
  } catch (error) {
    if (error instanceof SourceRefused) throw error;
    throw new SourceRefused(csvReason(error), before + 1);
  } finally {
    source.destroy();
    parser.destroy();
  }
  if (columns === null) throw new SourceRefused("no header line");
}

function csvReason(error: unknown): string {
  const code = (error as { code?: string } | undefined)?.code;
  if (code === "CSV_QUOTE_NOT_CLOSED") return "a quote that is never closed";
  if (code === "CSV_INVALID_CLOSING_QUOTE") return "text after a closing quote";
  if (code === "INVALID_OPENING_QUOTE" || code === "CSV_INVALID_OPENING_QUOTE")
    return "a quote in the middle of a cell";
  if (code === "CSV_MAX_RECORD_SIZE") return "a record of more than 1 MiB (a quote that is never closed?)";
  return error instanceof Error ? error.message.split("\n", 1)[0]! : String(error);
}

function checkHeader(record: string[], line: number): string[] {
  const names = record.map((c) => c.trim());
  const bad = badText(names.join(""));
  if (bad !== null) throw new SourceRefused(`the header has ${bad}`, line);
  if (names.some((n) => n === "")) throw new SourceRefused("a column without a name in the header", line);
  if (names.length === 1 && /[<>]/.test(names[0]!)) throw new SourceRefused("markup where a header should stand", line);
  const seen = new Set<string>();
  const twice = names.find((n) => seen.size === seen.add(n).size);
  if (twice !== undefined) throw new SourceRefused(`the column ${JSON.stringify(twice)} twice in the header`, line);
  return names;
}

/** Lines as bytes, without their end (\n or \r\n). A line above 64 MiB is refused: the file has no lines. */
async function* lines(stream: Readable): AsyncIterable<{ bytes: Buffer; line: number }> {
  const parts: Buffer[] = [];
  let size = 0;
  let line = 0;
  const join = (last: Buffer): Buffer => {
    const whole = parts.length === 0 ? last : Buffer.concat([...parts, last]);
    parts.length = 0;
    size = 0;
    return whole.at(-1) === 13 ? whole.subarray(0, -1) : whole;
  };
  try {
    for await (const chunk of stream as AsyncIterable<Buffer>) {
      let from = 0;
      for (;;) {
        const end = chunk.indexOf(10, from);
        if (end < 0) break;
        yield { bytes: join(chunk.subarray(from, end)), line: ++line };
        from = end + 1;
      }
      if (from < chunk.length) {
        parts.push(chunk.subarray(from));
        size += chunk.length - from;
        if (size > 1 << 26) throw new SourceRefused("a line of more than 64 MiB", line + 1);
      }
    }
    if (parts.length > 0) yield { bytes: join(Buffer.alloc(0)), line: ++line };
  } catch (error) {
    if (error instanceof SourceRefused) throw error;
    throw new SourceRefused(`could not be read: ${(error as Error).message}`, line + 1);
  } finally {
    stream.destroy();
  }
}

function decodeLine(bytes: Buffer, line: number): string | { refused: string; line: number } {
  if (bytes.includes(0)) return { refused: "a NUL byte", line };
  try {
    return new TextDecoder("utf-8", { fatal: true, ignoreBOM: line !== 1 }).decode(bytes);
  } catch {
    return { refused: "invalid UTF-8", line };
  }
}

async function* jsonRows(context: ReaderContext): AsyncIterable<RowEvent> {
  for await (const { bytes, line } of lines(byteStream(context.file, context.gzip, context.count))) {
    const text = decodeLine(bytes, line);
    if (typeof text !== "string") {
      yield text;
      continue;
    }
    if (text.trim() === "") continue;
    let value: unknown;
    try {
      value = JSON.parse(text);
    } catch (error) {
      yield { refused: `not JSON: ${(error as Error).message.slice(0, 80)}`, line };
      continue;
    }
    if (typeof value === "string") yield { row: { text: value }, line };
    else if (value !== null && typeof value === "object" && !Array.isArray(value)) yield flattened(value, line);
    else yield { refused: "expected an object or a string", line };
  }
}

function flattened(value: object, line: number): RowEvent {
  try {
    return { row: flatten(value as Record<string, unknown>), line };
  } catch (error) {
    if (!(error instanceof RangeError)) throw error;
    return { refused: "values nested too deep", line };
  }
}

/** Nested objects become dotted columns; lists become JSON. */
export function flatten(value: Record<string, unknown>, prefix = "", row = emptyRow()): Row {
  for (const [key, cell] of Object.entries(value)) {
    const name = prefix + key;
    if (cell !== null && typeof cell === "object" && !Array.isArray(cell) && !(cell instanceof Date))
      flatten(cell as Record<string, unknown>, `${name}.`, row);
    else row[name] = plainCell(cell);
  }
  return row;
}

function plainCell(cell: unknown): Cell {
  if (cell === null || cell === undefined) return null;
  if (typeof cell === "number") return Number.isNaN(cell) ? null : cell;
  if (typeof cell === "boolean") return cell;
  if (typeof cell === "bigint")
    return cell >= Number.MIN_SAFE_INTEGER && cell <= Number.MAX_SAFE_INTEGER ? Number(cell) : cell.toString();
  if (typeof cell === "string") return cleanCell(cell) === null ? null : cell;
  if (cell instanceof Date) return cell.toISOString();
  return JSON.stringify(cell, (_, v) => (typeof v === "bigint" ? v.toString() : v));
}

const PARAGRAPH_LIMIT = 1 << 20;

/** Paragraphs: runs of lines between blank lines. Files: the whole text. Both are cut at 1 MiB. */
async function* textRows(context: ReaderContext): AsyncIterable<RowEvent> {
  let text: string[] = [];
  let size = 0;
  let start = 1;
  const whole = context.documents === "files";
  for await (const { bytes, line } of lines(byteStream(context.file, context.gzip, context.count))) {
    const decoded = decodeLine(bytes, line);
    if (typeof decoded !== "string") {
      yield decoded;
      continue;
    }
    const blank = decoded.trim() === "";
    if (size > 0 && ((blank && !whole) || size + decoded.length > PARAGRAPH_LIMIT)) {
      yield { row: { text: text.join("\n") }, line: start };
      text = [];
      size = 0;
    }
    if (blank && (!whole || size === 0)) continue;
    if (size === 0) start = line;
    text.push(decoded);
    size += decoded.length + 1;
  }
  if (size > 0) yield { row: { text: text.join("\n") }, line: start };
}

const PARQUET_ROWS_AT_ONCE = 4096;

async function* parquetRows(context: ReaderContext): AsyncIterable<RowEvent> {
  const { file } = context;
  const tail = Buffer.alloc(4);
  const head = Buffer.alloc(4);
  const handle = await open(file.path, "r");
  try {
    await handle.read(head, 0, 4, 0);
    await handle.read(tail, 0, 4, Math.max(0, file.size - 4));
  } finally {
    await handle.close();
  }
  if (head.toString("latin1") !== "PAR1")
    throw new SourceRefused(`not Parquet: it begins with ${JSON.stringify(head.toString("latin1"))}, not "PAR1"`, 1);
  if (file.size < 12 || tail.toString("latin1") !== "PAR1")
    throw new SourceRefused(`a truncated Parquet file: no footer at its end, byte ${file.size}`);
  const buffer = await asyncBufferFromFile(file.path);
  const counted = {
    byteLength: buffer.byteLength,
    slice: async (start: number, end?: number) => {
      const part = await buffer.slice(start, end);
      context.count(part.byteLength);
      return part;
    },
  };
  const metadata = await parquetMetadataAsync(counted).catch((error: Error) => {
    // The reader trips over what is missing in it: that says nothing to a person.
    const why = error instanceof TypeError || error instanceof RangeError ? "parts of it are missing" : error.message;
    throw new SourceRefused(`a damaged Parquet footer: ${why}`);
  });
  const names = parquetSchema(metadata).children.map((c) => c.element.name);
  let before = 0;
  for (const group of metadata.row_groups) {
    const rows = Number(group.num_rows);
    for (let start = 0; start < rows; start += PARQUET_ROWS_AT_ONCE) {
      const rowStart = before + start;
      const rowEnd = before + Math.min(rows, start + PARQUET_ROWS_AT_ONCE);
      const part = await parquetReadObjects({ file: counted, metadata, compressors, rowStart, rowEnd }).catch(
        (error: Error) => {
          throw new SourceRefused(`rows ${rowStart + 1} to ${rowEnd} cannot be read: ${error.message}`, rowStart + 1);
        },
      );
      for (let i = 0; i < part.length; i++) {
        const row = flatten(Object.fromEntries(names.map((n) => [n, part[i]![n]])));
        const line = rowStart + i + 1;
        const bad = Object.values(row)
          .map((c) => (typeof c === "string" ? badText(c) : null))
          .find((b) => b !== null);
        yield bad === undefined ? { row, line } : { refused: bad!, line };
      }
    }
    before += rows;
  }
}
