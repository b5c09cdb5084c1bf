/** `stroma data inspect PATH` and `stroma data generate`: what a source holds, and planets to a file. */
import os from "node:os";
import logUpdate from "log-update";
import pc from "picocolors";
import type { CommandModule } from "yargs";
import { generatePlanets } from "../data/generate.js";
import { FileDataset, openDataset, type TextDataset } from "../data/index.js";
import type { SourceReport } from "../data/types.js";
import { StromaError } from "../errors.js";
import { formatBytes, formatDuration, formatInteger } from "./ui/format.js";

interface InspectArguments {
  path: string;
  json?: boolean;
  template?: string;
  splitKey?: string;
  skipBadSources?: boolean;
}

interface GenerateArguments {
  count: number;
  seed: number;
  output: string;
  force?: boolean;
  json?: boolean;
}

const inspectCommand: CommandModule<object, InspectArguments> = {
  command: "inspect <path>",
  describe: "Rows read and refused, columns, types, what is missing, a sample, tokens",
  builder: (yargs) =>
    yargs
      .positional("path", { type: "string", demandOption: true, describe: "A file, a folder, a glob, or planets" })
      .options({
        template: { type: "string", describe: "A row as text: 'planet {pl_name}: radius {pl_rade:.3}'" },
        "split-key": { type: "string", describe: "Column whose value decides the split (default: the host star)" },
        "skip-bad-sources": { type: "boolean", describe: "Leave refused files out instead of stopping" },
        json: { type: "boolean", describe: "One JSON object instead of a table" },
      }) as never,
  handler: async (args) => {
    const dataset = await openDataset({
      source: args.path,
      ...(args.path === "planets"
        ? {}
        : {
            ...(args.template === undefined ? {} : { template: args.template }),
            ...(args.splitKey === undefined ? {} : { splitKey: args.splitKey }),
            ...(args.skipBadSources === true ? { onBadSource: "skip" as const } : {}),
          }),
    });
    const described = await describeData(dataset);
    process.stdout.write(args.json === true ? `${JSON.stringify(described)}\n` : inspectTable(described));
  },
};

/** Everything `inspect` shows, as plain data. */
export async function describeData(dataset: TextDataset) {
  const files = dataset instanceof FileDataset ? dataset.describe() : null;
  const samples = files?.samples ?? [];
  if (files === null) for await (const text of dataset.texts("train", 1)) samples.push(text);
  return {
    data: dataset.name,
    fingerprint: dataset.fingerprint,
    tokenizer: "bytes",
    tokens: {
      train: await dataset.tokensPerEpoch("train"),
      validation: await dataset.tokensPerEpoch("validation"),
    },
    sources: dataset.report(),
    documents: files?.documents ?? null,
    splitKey: files === null ? "host star" : files.splitKey,
    columns: files?.columns ?? [],
    leftOut: files?.leftOut ?? {},
    samples,
    preparedIn: files?.folder ?? null,
  };
}

export type DataDescription = Awaited<ReturnType<typeof describeData>>;

const COLUMNS_SHOWN = 40;

export function inspectTable(d: DataDescription): string {
  const out: string[] = [];
  out.push(pc.bold(d.data));
  out.push(
    `${formatInteger(d.tokens.train ?? Number.NaN)} tokens to train on, ${formatInteger(d.tokens.validation ?? Number.NaN)} held out (bytes and one end-of-text a document)` +
      (d.documents === null
        ? ""
        : `; ${formatInteger(d.documents.train)} and ${formatInteger(d.documents.validation)} documents`),
  );
  out.push(`split by ${d.splitKey === null ? "the document itself" : d.splitKey}`, "");
  for (const source of d.sources) out.push(...reportLines(source));
  if (d.columns.length > 0) {
    out.push("");
    const shown = [...d.columns].sort((a, b) => a.missing - b.missing).slice(0, COLUMNS_SHOWN);
    const width = Math.max(6, ...shown.map((c) => c.name.length));
    out.push(pc.dim(`${"column".padEnd(width)}  type     missing  range or example`));
    for (const c of shown) {
      const range = c.minimum === null ? (c.example ?? "") : `${short(c.minimum)} .. ${short(c.maximum!)}`;
      const line = `${c.name.padEnd(width)}  ${c.type.padEnd(7)}  ${percent(c.missing)}  ${range.slice(0, 40)}`;
      out.push(!Object.hasOwn(d.leftOut, c.name) ? line : pc.dim(`${line}  (not in the text: ${d.leftOut[c.name]})`));
    }
    if (d.columns.length > shown.length)
      out.push(pc.dim(`... and ${d.columns.length - shown.length} emptier ones: --json shows all`));
  }
  if (d.samples.length > 0) {
    out.push("", pc.dim("the first document:"));
    const lines = d.samples[0]!.trimEnd().split("\n");
    for (const line of lines.slice(0, 24)) out.push(`  ${line.slice(0, 110)}`);
    if (lines.length > 24) out.push(pc.dim(`  ... ${lines.length - 24} more lines`));
  }
  return `${out.join("\n")}\n`;
}

function reportLines(r: SourceReport): string[] {
  const refused = r.rowsRefused === 0 ? pc.green("none refused") : pc.yellow(`${formatInteger(r.rowsRefused)} refused`);
  const size = r.bytesRead > 0 ? `, ${formatBytes(r.bytesRead)}` : "";
  const out = [`${r.source}: ${formatInteger(r.rowsRead)} rows${size}, ${refused}`];
  for (const [reason, n] of Object.entries(r.reasons)) out.push(`  ${formatInteger(n)} x ${reason}`);
  for (const x of r.refusals.slice(0, 5))
    out.push(pc.dim(`    ${x.file}${x.line === null ? "" : `:${x.line}`}: ${x.reason}`));
  if (r.refusals.length > 5) out.push(pc.dim("    ..."));
  return out;
}

function percent(share: number): string {
  return share === 0 ? "      -" : `${(100 * share).toFixed(1)} %`.padStart(7);
}

function short(value: number): string {
  return Number.isInteger(value) && Math.abs(value) < 1e7 ? String(value) : String(Number(value.toPrecision(4)));
}

const generateCommand: CommandModule<object, GenerateArguments> = {
  command: "generate",
  describe: "Simulated planets into a file of JSON lines",
  builder: (yargs) =>
    yargs.options({
      count: { type: "number", demandOption: true, describe: "How many planets" },
      seed: { type: "number", default: 0, describe: "Which universe" },
      output: { type: "string", demandOption: true, describe: "FILE.jsonl" },
      force: { type: "boolean", describe: "Write over a file that is there" },
      json: { type: "boolean", describe: "One JSON object at the end instead of progress" },
    }) as never,
  handler: async (args) => {
    if (!/\.(jsonl|ndjson)$/.test(args.output))
      throw new StromaError("CONFIG", `[data] expected --output to end in .jsonl, got ${args.output}`);
    const stop = new AbortController();
    const interrupt = () => stop.abort();
    process.once("SIGINT", interrupt);
    const live = args.json !== true && process.stdout.isTTY === true;
    const began = performance.now();
    let shown = 0;
    try {
      const result = await generatePlanets({
        count: args.count,
        seed: args.seed,
        output: args.output,
        force: args.force === true,
        workers: os.availableParallelism(),
        signal: stop.signal,
        onProgress: (done, bytes) => {
          if (!live || performance.now() - shown < 100) return;
          shown = performance.now();
          const rate = done / ((shown - began) / 1000);
          const left = formatDuration((args.count - done) / rate);
          const bar = "█".repeat(Math.round((24 * done) / args.count)).padEnd(24, "░");
          logUpdate(
            `${bar} ${formatInteger(done)} of ${formatInteger(args.count)} planets, ${formatInteger(Math.round(rate))}/s, ${formatBytes(bytes)}, ${left} left`,
          );
        },
      });
      if (live) logUpdate.clear();
      const seconds = (performance.now() - began) / 1000;
      process.stdout.write(
        args.json === true
          ? `${JSON.stringify({ output: args.output, seed: args.seed, ...result, seconds, perSecond: result.count / seconds })}\n`
          : `${args.output}: ${formatInteger(result.count)} synthetic planets, ${formatBytes(result.bytes)}, in ${formatDuration(seconds)} (${formatInteger(Math.round(result.count / seconds))}/s)\n`,
      );
    } finally {
      process.removeListener("SIGINT", interrupt);
    }
  },
};

// biome-ignore lint/suspicious/noExplicitAny: each command knows its own arguments
const any = (module: CommandModule<any, any>): CommandModule => module;

export const dataCommand: CommandModule = {
  command: "data",
  describe: "Look into data, or simulate planets",
  builder: (yargs) =>
    yargs
      .command(any(inspectCommand))
      .command(any(generateCommand))
      .demandCommand(1, "data wants to know what to do: inspect or generate"),
  handler: () => {},
};
