/**
 * One rank that opens a checkpoint for training and prints, as a line of JSON, what that took: bytes of its share of the
 * state, bytes read (/proc/self/io), growth of the most memory held (VmHWM) and of memory in the end (VmRSS).
 */
import { readFileSync } from "node:fs";
import { verifyCheckpoint } from "../../src/checkpoint/read.js";
import { dtypeBytes } from "../../src/checkpoint/safetensors.js";
import { resolveOptions, type SettledOptions, type TrainerOptions } from "../../src/train/options.js";
import { realParts } from "../../src/train/parts.js";
import { openTrainingSession } from "../../src/train/training-session.js";

const [path, text, rank, size, port] = process.argv.slice(2) as [string, string, string, string, string];
const spec = {
  ...{ rank: Number(rank), size: Number(size), address: "127.0.0.1", port: Number(port), serve: true, prefix: "" },
  ...{ joinSeconds: 60, silenceSeconds: 60 },
};
const options = resolveOptions({ ...(JSON.parse(text) as TrainerOptions), ranks: spec }) as SettledOptions;
const of = (file: string, field: string): number =>
  Number(new RegExp(`^${field}:\\s+(\\d+)`, "m").exec(readFileSync(`/proc/self/${file}`, "utf8"))![1]);
const now = () => ({ read: of("io", "rchar"), most: of("status", "VmHWM") * 1024, held: of("status", "VmRSS") * 1024 });

const dataset = await realParts.openDataset(options.data as string);
const model = realParts.resolveModel(options.model);
const ranks = await realParts.joinRanks(spec, new AbortController().signal);
const resumed = { ...(await verifyCheckpoint(path, { hashes: false })), skipped: [] };
const before = now();
const open = await openTrainingSession(options, path, model, dataset, resumed, realParts, ranks);
const after = now();
const entries = await open.session.state();
const share = entries.reduce((sum, e) => sum + e.shape.reduce((a, b) => a * b, dtypeBytes(e.dtype)), 0);
const largest = Math.max(...entries.map((e) => e.shape.reduce((a, b) => a * b, dtypeBytes(e.dtype))));
process.stdout.write(
  `${JSON.stringify({ share, largest, read: after.read - before.read, most: after.most - before.most, held: after.held - before.held })}\n`,
);
await open.session.dispose();
await ranks.leave();
