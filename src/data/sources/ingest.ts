/**
 * One pass over the sources, in constant memory: rows are checked, counted, rendered to text, given to a split, and
 * written as shards to a cache folder that streams then read at random. The pass is what makes shuffling, exact
 * positions and a content hash possible for formats that can only be read from the front. The folder is written aside
 * and renamed when whole; an unchanged source with unchanged options is not read twice.
 *
 * The rule for bad input: a source that is refused whole (not what its name says, empty, damaged) stops the run, or with
 * onBadSource "skip" is left out. Bad rows are skipped and reported; more than maxRefusedShare of them, once 1,000 rows
 * of a source are read, refuse the whole source; of a shorter source, more than half do.
 */
import { createHash, type Hash } from "node:crypto";
import { type FileHandle, mkdir, open, readFile, rename, rm, writeFile } from "node:fs/promises";
import os from "node:os";
import path from "node:path";
import { StromaError } from "../../errors.js";
import type { SourceReport, Split } from "../types.js";
import { type ShardInfo, shardFiles, splitOf } from "../units.js";
import { type ColumnSummary, ColumnTable } from "./columns.js";
import { findFiles, type SourceFile, SourceRefused, sniff } from "./files.js";
import { type Row, type RowEvent, readRows } from "./rows.js";
import {
  guessSplitKey,
  leftOutColumns,
  parseTemplate,
  renderDefault,
  renderTemplate,
  templateColumns,
} from "./template.js";

export interface IngestOptions {
  template: string | null;
  splitKey: string | null;
  validationShare: number;
  splitSeed: number;
  documents: "paragraphs" | "files";
  maxRefusedShare: number;
  onBadSource: "stop" | "skip";
  /** Bytes of text after which a shard ends. */
  shardBytes: number;
  cacheFolder: string;
}

export interface Ingested {
  version: 1;
  folder: string;
  fingerprint: string;
  shards: ShardInfo[];
  reports: SourceReport[];
  columns: ColumnSummary[];
  /** Column whose value decides the split; null: the text itself does. */
  splitKey: string | null;
  /** Columns the default text leaves out, with why. */
  leftOut: Record<string, string>;
  /** The first documents, cut at 2,000 characters. */
  samples: string[];
  /** The most text held at once, bytes: two shards being filled and the longest row. */
  peakBufferedBytes: number;
}

const FORMAT_VERSION = 1;
const SHARE_RULE_ROWS = 1000;
const SAMPLED_ROWS = 64;
const EXAMPLES = 20;

/** Where prepared data lies: STROMA_CACHE, else XDG_CACHE_HOME, else ~/.cache; under stromatolite/data. */
export function defaultCacheFolder(): string {
  const own = process.env.STROMA_CACHE;
  if (own !== undefined && own !== "") return path.join(own, "data");
  const base = process.env.XDG_CACHE_HOME ?? path.join(os.homedir(), ".cache");
  return path.join(base, "stromatolite", "data");
}

export async function ingest(spec: string, options: IngestOptions): Promise<Ingested> {
  const files = await findFiles(spec);
  const { cacheFolder, ...content } = options;
  const key = createHash("sha256")
    .update(JSON.stringify([FORMAT_VERSION, content, files.map((f) => [f.path, f.size, f.modifiedMs])]))
    .digest("hex")
    .slice(0, 32);
  const folder = path.join(cacheFolder, key);
  const ready = await load(folder);
  if (ready !== null) return ready;
  const aside = path.join(cacheFolder, `${key}.${process.pid}.${Date.now().toString(36)}`);
  try {
    await mkdir(aside, { recursive: true });
    const made = await new Ingest(files, options, aside, folder).run();
    await writeFile(path.join(aside, "meta.json"), JSON.stringify(made));
    try {
      await rename(aside, folder);
    } catch (error) {
      // Another process was quicker: its folder holds the same.
      const other = await load(folder);
      if (other === null) throw error;
      await rm(aside, { recursive: true, force: true });
      return other;
    }
    return made;
  } catch (error) {
    await rm(aside, { recursive: true, force: true });
    if ((error as NodeJS.ErrnoException).code === "ENOSPC")
      throw new StromaError(
        "DISK_FULL",
        `[data] no space left in ${cacheFolder}. Free some, or set STROMA_CACHE`,
        {},
        { cause: error },
      );
    throw error;
  }
}

async function load(folder: string): Promise<Ingested | null> {
  try {
    const meta = JSON.parse(await readFile(path.join(folder, "meta.json"), "utf8")) as Ingested;
    return meta.version === FORMAT_VERSION ? { ...meta, folder } : null;
  } catch {
    return null;
  }
}

class Report implements SourceReport {
  rowsRead = 0;
  rowsRefused = 0;
  bytesRead = 0;
  refusals: SourceReport["refusals"] = [];
  reasons: Record<string, number> = {};

  constructor(readonly source: string) {}

  refuse(line: number | null, reason: string, rows = 1): void {
    this.rowsRefused += rows;
    // Counts by kind: numbers in a reason would make every row its own kind.
    const kind = reason.replace(/\d+/g, "N").slice(0, 100);
    this.reasons[kind] = (this.reasons[kind] ?? 0) + 1;
    if (this.refusals.length < EXAMPLES) this.refusals.push({ file: this.source, line, reason });
  }
}

class Ingest {
  private readonly hash = createHash("sha256");
  private readonly columns = new ColumnTable();
  private readonly writer: ShardWriter;
  private readonly parts: ReturnType<typeof parseTemplate> | null;
  private splitKey: string | null = null;
  private readonly leftOut: Record<string, string> = Object.create(null);
  private readonly samples: string[] = [];

  constructor(
    private readonly files: SourceFile[],
    private readonly options: IngestOptions,
    aside: string,
    private readonly folder: string,
  ) {
    this.writer = new ShardWriter(aside, options.shardBytes, this.hash);
    this.parts = options.template === null ? null : parseTemplate(options.template);
  }

  async run(): Promise<Ingested> {
    const reports: SourceReport[] = [];
    for (const file of this.files) {
      const report = new Report(file.name);
      reports.push(report);
      try {
        await this.source(file, report);
      } catch (error) {
        if (!(error instanceof SourceRefused)) throw error;
        report.refuse(error.line, error.reason, 0);
        if (this.options.onBadSource === "stop") throw refusedError(report, error);
      }
    }
    await this.writer.close();
    const { shards } = this.writer;
    if (shards.every((s) => s.documents.train + s.documents.validation === 0))
      throw new StromaError("DATA", `[data] no document in ${this.files.map((f) => f.name).join(", ")}`, { reports });
    return {
      version: FORMAT_VERSION,
      folder: this.folder,
      fingerprint: this.hash.digest("hex"),
      shards,
      reports: reports.map((r) => ({ ...r })),
      columns: this.columns.summaries(),
      splitKey: this.splitKey,
      leftOut: this.leftOut,
      samples: this.samples,
      peakBufferedBytes: this.writer.peakBufferedBytes,
    };
  }

  private async source(file: SourceFile, report: Report): Promise<void> {
    const { gzip } = await sniff(file);
    const { documents, maxRefusedShare } = this.options;
    const count = (bytes: number) => {
      report.bytesRead += bytes;
    };
    // The first rows wait until there are enough of them to decide what the default text leaves out.
    const waiting: { row: Row; line: number }[] = [];
    let columns: string[] | null = null;
    const begin = async () => {
      columns = this.plan(
        file,
        waiting.map((w) => w.row),
      );
      for (const w of waiting) await this.row(w.row, w.line, columns, report);
      waiting.length = 0;
    };
    for await (const event of readRows({ file, gzip, count, documents }) as AsyncIterable<RowEvent>) {
      report.rowsRead++;
      if ("refused" in event) report.refuse(event.line, event.refused);
      else if (columns !== null) await this.row(event.row, event.line, columns, report);
      else {
        waiting.push(event);
        if (waiting.length === SAMPLED_ROWS) await begin();
      }
      if (report.rowsRead >= SHARE_RULE_ROWS && report.rowsRefused > maxRefusedShare * report.rowsRead)
        throw new SourceRefused(tooMany(report, maxRefusedShare));
    }
    if (columns === null && waiting.length > 0) await begin();
    if (report.rowsRead === 0) throw new SourceRefused("no row after the header");
    if (report.rowsRead < SHARE_RULE_ROWS && report.rowsRefused > report.rowsRead / 2)
      throw new SourceRefused(tooMany(report, 0.5));
  }

  /** Columns of this source's default text; checks the template and the split key against what is there. */
  private plan(file: SourceFile, rows: Row[]): string[] {
    const columns = [...new Set(rows.flatMap((r) => Object.keys(r)))];
    const must = (column: string, name: string) => {
      // JSON lines may have a column first seen later; a table's are all in its header.
      if (columns.includes(column) || file.format === "jsonl") return;
      throw new StromaError(
        "INVALID_ARGUMENT",
        `[data] ${name} names the column ${JSON.stringify(column)}, which ${file.name} does not have. ${nearest(column, columns)}`,
        { file: file.name, column, columns },
      );
    };
    if (this.parts !== null) for (const column of templateColumns(this.parts)) must(column, "the template");
    if (this.options.splitKey !== null) must(this.options.splitKey, "the split key");
    this.splitKey = this.options.splitKey ?? this.splitKey ?? guessSplitKey(columns);
    const leftOut = leftOutColumns(columns, rows);
    Object.assign(this.leftOut, leftOut);
    return columns.includes("text") && file.format !== "csv" && file.format !== "tsv"
      ? ["text"]
      : columns.filter((c) => leftOut[c] === undefined);
  }

  private async row(row: Row, line: number, columns: string[], report: Report): Promise<void> {
    this.columns.add(row);
    const text = this.parts === null ? renderDefault(columns, row) : renderTemplate(this.parts, row);
    if (text === "") {
      report.refuse(line, "nothing in the row");
      return;
    }
    const key = this.splitKey === null ? null : (row[this.splitKey] ?? null);
    const split = splitOf(key === null ? text : String(key), this.options.validationShare, this.options.splitSeed);
    if (this.samples.length < 3) this.samples.push(text.slice(0, 2000));
    await this.writer.add(split, Buffer.from(text, "utf8"));
  }
}

function tooMany(report: Report, share: number): string {
  const percent = ((100 * report.rowsRefused) / report.rowsRead).toFixed(1);
  const first = report.refusals[0];
  return `${report.rowsRefused} of ${report.rowsRead} rows refused (${percent} %, more than ${100 * share} %); the first at line ${first?.line}: ${first?.reason}`;
}

function refusedError(report: SourceReport, error: SourceRefused): StromaError {
  const where = error.line === null ? report.source : `${report.source}:${error.line}`;
  return new StromaError("FILE_FORMAT", `[data] ${where}: refused: ${error.reason}`, {
    file: report.source,
    line: error.line,
    reason: error.reason,
    report: { ...report },
  });
}

function nearest(column: string, columns: string[]): string {
  const wanted = column.toLowerCase();
  const like = columns.filter((c) => c.toLowerCase().includes(wanted) || wanted.includes(c.toLowerCase())).slice(0, 5);
  const shown = like.length > 0 ? like : columns.slice(0, 8);
  return `It has ${shown.join(", ")}${shown.length < columns.length ? ", ..." : ""}`;
}

const SPLITS: readonly Split[] = ["train", "validation"];

class ShardWriter {
  readonly shards: ShardInfo[] = [];
  peakBufferedBytes = 0;
  private parts: Record<Split, Buffer[]> = { train: [], validation: [] };
  private bytes: Record<Split, number> = { train: 0, validation: 0 };

  constructor(
    private readonly folder: string,
    private readonly shardBytes: number,
    private readonly hash: Hash,
  ) {}

  async add(split: Split, text: Buffer): Promise<void> {
    this.hash.update(`${split === "train" ? "t" : "v"}${text.length}:`).update(text);
    this.parts[split].push(text);
    this.bytes[split] += text.length;
    const held = this.bytes.train + this.bytes.validation;
    if (held > this.peakBufferedBytes) this.peakBufferedBytes = held;
    if (held >= this.shardBytes) await this.flush();
  }

  private async flush(): Promise<void> {
    const shard = this.shards.length;
    const info: ShardInfo = { documents: { train: 0, validation: 0 }, bytes: { train: 0, validation: 0 } };
    for (const split of SPLITS) {
      const parts = this.parts[split];
      info.documents[split] = parts.length;
      info.bytes[split] = this.bytes[split];
      if (parts.length === 0) continue;
      const lengths = Buffer.alloc(4 * parts.length);
      parts.forEach((p, i) => {
        lengths.writeUInt32LE(p.length, 4 * i);
      });
      const files = shardFiles(this.folder, shard, split);
      await writeAll(files.text, Buffer.concat(parts));
      await writeAll(files.lengths, lengths);
    }
    this.shards.push(info);
    this.parts = { train: [], validation: [] };
    this.bytes = { train: 0, validation: 0 };
  }

  async close(): Promise<void> {
    if (this.bytes.train + this.bytes.validation > 0) await this.flush();
  }
}

async function writeAll(file: string, bytes: Buffer): Promise<void> {
  const handle: FileHandle = await open(file, "w");
  try {
    await handle.writeFile(bytes);
    await handle.datasync();
  } finally {
    await handle.close();
  }
}
