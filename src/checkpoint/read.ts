/** Opening a checkpoint: every file is checked against state.json before a byte of it is used. */
import { readFile, stat } from "node:fs/promises";
import { basename, join, resolve } from "node:path";
import { StromaError } from "../errors.js";
import { checkGraphForm } from "../graph/form.js";
import { graphHash } from "../graph/hash.js";
import type { Graph } from "../graph/types.js";
import type { FileEntry, NativeSession, StateEntry, StateKind } from "../train/native-session.js";
import { readJson, sha256File } from "./files.js";
import { type CheckpointState, decodeState, FILES } from "./format.js";
import { readSafetensorsHeader, type TensorEntry } from "./safetensors.js";
import { CheckpointStore } from "./store.js";

export interface Checkpoint {
  path: string;
  state: CheckpointState;
}

/**
 * @param options.hashes false: sizes only, for when the files were hashed a moment ago
 * @throws CHECKPOINT naming the file that is missing, of another size or of another hash; VERSION_MISMATCH
 */
export async function verifyCheckpoint(path: string, options: { hashes?: boolean } = {}): Promise<Checkpoint> {
  const file = join(path, FILES.state);
  const state = decodeState(await readJson(file), file);
  for (const required of [FILES.graph, FILES.trainer])
    if (state.files[required] === undefined) throw damaged(file, `it does not list ${required}`);
  for (const whole of [FILES.model, FILES.optimizer]) {
    const shards = shardsOf(state, whole);
    if (shards.length === 0) throw damaged(file, `it does not list ${whole}`);
    const of = shardCount(shards[0]!);
    if (shards.length !== of) throw damaged(file, `it lists ${shards.length} of ${of} parts of ${whole}`);
  }
  for (const [name, facts] of Object.entries(state.files)) {
    if (name !== basename(name) || name === "." || name === "..")
      throw damaged(file, `file name ${JSON.stringify(name)}`);
    const at = join(path, name);
    const found = await stat(at).catch(() => null);
    if (found === null || !found.isFile()) throw damaged(at, "it is missing");
    if (found.size !== facts.bytes) throw damaged(at, `expected ${facts.bytes} bytes, got ${found.size}`);
    if (options.hashes !== false && (await sha256File(at)) !== facts.sha256)
      throw damaged(at, "its bytes do not match the hash in state.json: it was altered or is damaged");
  }
  return { path, state };
}

/**
 * A checkpoint by any of its names: its own folder, `checkpoints/latest`, the `checkpoints` folder, or the output folder.
 * @throws CHECKPOINT when nothing there is a checkpoint, or the one named is damaged
 */
export async function openCheckpoint(path: string): Promise<Checkpoint & { skipped: StromaError[] }> {
  const at = resolve(path);
  const found = await stat(at).catch(() => null);
  if (found === null) throw damaged(path, "there is nothing of that name");
  if (found.isFile() && basename(at) === "latest")
    return openCheckpoint(join(at, "..", (await readFile(at, "utf8")).trim()));
  if (await isFile(join(at, FILES.state))) return { ...(await verifyCheckpoint(at)), skipped: [] };
  for (const outputDir of [at, join(at, "..")]) {
    const store = new CheckpointStore(outputDir);
    if (outputDir !== at && store.folder !== at) continue;
    const latest = await store.latest();
    if (latest !== null) return { ...latest.checkpoint, skipped: latest.skipped };
  }
  throw damaged(path, "no checkpoint in it: expected state.json, or a folder `checkpoints` of a training run");
}

/** @throws CHECKPOINT when the graph's hash is not the one that state.json gives; GRAPH for what is no graph */
export async function readGraph(checkpoint: Checkpoint, file: string = FILES.graph): Promise<Graph> {
  const graph = checkGraphForm(await readJson(join(checkpoint.path, file)), join(checkpoint.path, file));
  if (file === FILES.graph && graphHash(graph) !== checkpoint.state.graphHash)
    throw damaged(join(checkpoint.path, file), "it is not the graph that state.json names");
  return graph;
}

/** Tensor of optimizer.safetensors for a piece of state; model.safetensors holds parameters by their own names. */
export const optimizerName = (kind: StateKind, name: string): string => `${kind}.${name}`;

/** Files of a checkpoint that hold `whole` (FILES.model, FILES.optimizer): itself, or its parts by rank, in order. */
export const shardsOf = (state: CheckpointState, whole: string): string[] =>
  Object.keys(state.files)
    .filter((name) => name === whole || (shardCount(name) > 1 && name.startsWith(whole.replace(".safetensors", "-"))))
    .sort();

/** `model-00001-of-00004.safetensors` -> 4; 1 for a file that is no part. */
function shardCount(name: string): number {
  const match = /-\d{5}-of-(\d{5})\.safetensors$/.exec(name);
  return match === null ? 1 : Number(match[1]);
}

/**
 * Fills a session that has loaded the same graph: parameters, and with `optimizer` its state and update counts too.
 * `part`: the session holds some of the model's blocks, and reads no more than those.
 * @throws CHECKPOINT listing what is missing, unexpected or of another shape or dtype
 */
export async function restoreSession(
  session: NativeSession,
  checkpoint: Checkpoint,
  options: { optimizer: boolean; part?: boolean },
): Promise<void> {
  const wanted = await session.state();
  const model = wanted.filter((e) => e.kind === "param");
  const rest = wanted.filter((e) => e.kind !== "param");
  const { part = false } = options;
  const reads = await match(checkpoint, FILES.model, model, (e) => e.name, part);
  if (options.optimizer)
    reads.push(...(await match(checkpoint, FILES.optimizer, rest, (e) => optimizerName(e.kind, e.name), part)));
  for (const { file, entries } of reads) if (entries.length > 0) await session.readFile(file, entries);
}

async function match(
  checkpoint: Checkpoint,
  whole: string,
  wanted: StateEntry[],
  nameOf: (e: StateEntry) => string,
  part: boolean,
): Promise<{ file: string; entries: FileEntry[] }[]> {
  const file = join(checkpoint.path, whole);
  const reads: { file: string; entries: FileEntry[] }[] = [];
  const held = new Map<string, TensorEntry & { read: FileEntry[] }>();
  for (const name of shardsOf(checkpoint.state, whole)) {
    const at = join(checkpoint.path, name);
    const read = { file: at, entries: [] as FileEntry[] };
    reads.push(read);
    for (const [tensor, entry] of (await readSafetensorsHeader(at)).entries)
      held.set(tensor, { ...entry, read: read.entries });
  }
  const problems: string[] = [];
  const names = new Set<string>();
  for (const e of wanted) {
    const name = nameOf(e);
    names.add(name);
    const found = held.get(name);
    if (found === undefined) problems.push(`missing ${name}`);
    else if (found.dtype !== e.dtype || found.shape.join() !== e.shape.join())
      problems.push(
        `${name}: expected ${e.dtype} [${e.shape.join(", ")}], got ${found.dtype} [${found.shape.join(", ")}]`,
      );
    else
      found.read.push({ kind: e.kind, name: e.name, dtype: e.dtype, offset: found.offset + e.begin, bytes: e.bytes });
  }
  if (!part) for (const name of held.keys()) if (!names.has(name)) problems.push(`unexpected ${name}`);
  if (problems.length > 0)
    throw new StromaError("CHECKPOINT", `[checkpoint] ${file} is of another model:${listed(problems)}`, {
      path: file,
      problems,
    });
  return reads;
}

/** The first twenty, one a line. */
export function listed(problems: readonly string[]): string {
  const more = problems.length > 20 ? `\n  and ${problems.length - 20} more` : "";
  return (
    problems
      .slice(0, 20)
      .map((p) => `\n  ${p}`)
      .join("") + more
  );
}

async function isFile(path: string): Promise<boolean> {
  return (await stat(path).catch(() => null))?.isFile() ?? false;
}

function damaged(where: string, why: string): StromaError {
  return new StromaError("CHECKPOINT", `[checkpoint] ${where}: ${why}`, { path: where });
}
