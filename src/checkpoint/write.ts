/**
 * Writing a checkpoint: from a snapshot (a copy in memory) while training goes on. Written aside, every file and the
 * folder synced, then renamed; older ones are removed only after that.
 */
import { readFile, rm } from "node:fs/promises";
import { join } from "node:path";
import { StromaError } from "../errors.js";
import { graphHash } from "../graph/hash.js";
import type { Graph } from "../graph/types.js";
import type { FileEntry, NativeSnapshot, StateEntry } from "../train/native-session.js";
import { dealTensors, isParted } from "./deal.js";
import { diskFull, replaceFile, sha256File, syncFolder, writeNewFile } from "./files.js";
import { CHECKPOINT_FORMAT, CHECKPOINT_VERSION, type CheckpointState, encodeState, FILES } from "./format.js";
import { optimizerName } from "./read.js";
import { layoutSafetensors } from "./safetensors.js";
import type { CheckpointStore } from "./store.js";

export interface CheckpointContents {
  snapshot: NativeSnapshot;
  /** session.state() when the snapshot was taken. */
  entries: readonly StateEntry[];
  graph: Graph;
  /** The same model for evaluation and generation, so that a checkpoint can be used without the code that made it. */
  evalGraph: Graph | null;
  generateGraph: Graph | null;
  /** config.json as Hugging Face writes it, when the family has one. */
  huggingFaceConfig: Record<string, unknown> | null;
  /** Options of the trainer, plain JSON. */
  trainer: unknown;
  facts: Omit<CheckpointState, "format" | "version" | "sequence" | "files" | "graphHash">;
}

/**
 * Where several ranks write one checkpoint: each what it holds of the tensors, rank 0 all else and, when all have, the
 * name.
 */
export interface WriteAmong {
  rank: number;
  size: number;
  /** Rank 0's `store.temporary()`, the same on every rank: on a file system that all see. */
  folder: string;
  /** By rank: what it holds of the state. */
  all: readonly (readonly StateEntry[])[];
  /** Why the others will not come any more; null: they will. */
  lost(): string | null;
}

/**
 * @param beforePublish awaited last before the checkpoint gets its name
 * @returns the checkpoint's folder and the bytes of all its files; on ranks above 0 those of their own
 * @throws DISK_FULL, the partial folder removed; RANKS; the snapshot is disposed in every case
 */
export async function writeCheckpoint(
  store: CheckpointStore,
  contents: CheckpointContents,
  keepLast: number,
  beforePublish: () => Promise<void> = async () => {},
  among: WriteAmong | null = null,
): Promise<{ path: string; bytes: number }> {
  const { snapshot, entries, graph, facts } = contents;
  let folder: string | undefined = among?.folder;
  try {
    folder ??= await store.temporary();
    const files: CheckpointState["files"] = {};
    const held: Record<string, string[]> = {};
    const fileOf = (whole: string, rank: number) => (among === null ? whole : shardName(whole, rank, among.size));
    const tensors = async (whole: string, wanted: Wanted, nameOf: (e: StateEntry) => string, metadata = {}) => {
      const file = fileOf(whole, among?.rank ?? 0);
      const some = entries.filter(wanted);
      const byName = new Map(some.map((e) => [nameOf(e), e]));
      const specs = some.map((e) => ({ name: nameOf(e), dtype: e.dtype, shape: e.shape }));
      const { header, entries: places } = layoutSafetensors(specs, metadata);
      const ranges: FileEntry[] = places.map(({ name, dtype, offset, bytes }) => {
        const e = byName.get(name)!;
        return { kind: e.kind, name: e.name, dtype, offset, bytes };
      });
      files[file] = await snapshot.write(join(folder!, file), header, ranges);
      held[file] = specs.map((s) => s.name);
    };
    const json = async (file: string, value: unknown, indent = 0) => {
      files[file] = await writeNewFile(join(folder!, file), Buffer.from(`${JSON.stringify(value, null, indent)}\n`));
    };
    const isParameter = (e: StateEntry): boolean => e.kind === "param";
    // Parts of tensors go where those are whole; each rank hashes the file that it owns, once all have written.
    const hashes: (() => Promise<void>)[] = [];
    const parts = async (whole: string, wanted: Wanted, nameOf: (e: StateEntry) => string, metadata = {}) => {
      const all = among!.all.map((list) => list.filter(wanted));
      for (const { owner, header, bytes, names, ranges } of dealTensors(all, among!.rank, nameOf, metadata)) {
        const file = fileOf(whole, owner);
        const path = join(folder!, file);
        const own = owner === among!.rank;
        const entries = ranges.map(({ entry: { kind, name, dtype, bytes }, offset }) => {
          return { kind, name, dtype, offset, bytes };
        });
        if (own || ranges.length > 0) await snapshot.writeParts(path, own ? header : new Uint8Array(0), entries);
        if (!own) continue;
        held[file] = names;
        hashes.push(async () => {
          files[file] = { bytes, sha256: await sha256File(path) };
        });
      }
    };
    const write = among !== null && isParted(among.all) ? parts : tensors;
    // transformers refuses a file whose metadata does not name the framework.
    await write(FILES.model, isParameter, (e) => e.name, { format: "pt" });
    await write(
      FILES.optimizer,
      (e) => !isParameter(e),
      (e) => optimizerName(e.kind, e.name),
    );
    snapshot.dispose();
    if (among !== null && hashes.length > 0) {
      await writeNewFile(join(folder, `written-${among.rank}`), new Uint8Array(0));
      for (let rank = 0; rank < among.size; rank++) await waitFor(join(folder, `written-${rank}`), among);
      for (const hash of hashes) await hash();
    }
    const size = () => Object.values(files).reduce((sum, f) => sum + f.bytes, 0);
    if (among !== null && among.rank > 0) {
      await replaceFile(join(folder, partName(among.rank)), JSON.stringify({ files, held }));
      await syncFolder(folder);
      return { path: store.pathOf(facts.step), bytes: size() };
    }
    if (among !== null) {
      for (let rank = 1; rank < among.size; rank++) {
        const part = await takePart(folder, rank, among);
        Object.assign(files, part.files);
        Object.assign(held, part.held);
      }
      for (let rank = 0; rank < among.size; rank++) await rm(join(folder, `written-${rank}`), { force: true });
      const shards = Object.entries(held).filter(([file]) => file.startsWith("model"));
      const weight_map = Object.fromEntries(shards.flatMap(([file, names]) => names.map((name) => [name, file])));
      const total_size = shards.reduce((sum, [file]) => sum + files[file]!.bytes, 0);
      await json(`${FILES.model}.index.json`, { metadata: { total_size }, weight_map });
    }
    await json(FILES.graph, graph);
    if (contents.evalGraph !== null) await json(FILES.evalGraph, contents.evalGraph);
    if (contents.generateGraph !== null) await json(FILES.generateGraph, contents.generateGraph);
    if (contents.huggingFaceConfig !== null) await json(FILES.config, contents.huggingFaceConfig, 2);
    await json(FILES.trainer, contents.trainer, 2);
    const state: CheckpointState = {
      format: CHECKPOINT_FORMAT,
      version: CHECKPOINT_VERSION,
      sequence: store.nextSequence(),
      ...facts,
      graphHash: graphHash(graph),
      files,
    };
    await writeNewFile(join(folder, FILES.state), Buffer.from(encodeState(state)));
    await syncFolder(folder);
    await beforePublish();
    const path = await store.publish(folder, facts.step);
    await store.prune(keepLast);
    return { path, bytes: size() };
  } catch (error) {
    if (folder !== undefined && (among?.rank ?? 0) === 0)
      await rm(folder, { recursive: true, force: true }).catch(() => {});
    throw diskFull(error, folder ?? store.folder);
  } finally {
    snapshot.dispose();
  }
}

/** As Hugging Face names the parts of a model: counted from 1. */
const shardName = (whole: string, rank: number, size: number): string => {
  const digits = (n: number) => String(n).padStart(5, "0");
  return size === 1 ? whole : whole.replace(".safetensors", `-${digits(rank + 1)}-of-${digits(size)}.safetensors`);
};

const partName = (rank: number): string => `rank-${rank}.json`;

type Wanted = (e: StateEntry) => boolean;

interface Part {
  files: CheckpointState["files"];
  /** Names of tensors, by file. */
  held: Record<string, string[]>;
}

/** What a rank has written, once it has; the note itself goes. */
async function takePart(folder: string, rank: number, among: WriteAmong): Promise<Part> {
  const file = join(folder, partName(rank));
  const text = await waitFor(file, among);
  await rm(file);
  return JSON.parse(text) as Part;
}

/** What a file holds, once another rank has put it there. */
async function waitFor(file: string, among: WriteAmong): Promise<string> {
  for (;;) {
    const text = await readFile(file, "utf8").catch((error: NodeJS.ErrnoException) => {
      if (error.code === "ENOENT") return null;
      throw error;
    });
    if (text !== null) return text;
    const lost = among.lost();
    if (lost !== null) throw new StromaError("RANKS", lost);
    await new Promise((done) => setTimeout(done, 20));
  }
}
