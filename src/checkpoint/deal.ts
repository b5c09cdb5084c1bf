/**
 * One checkpoint from the parts of tensors that ranks hold. Every tensor is whole in one file, as Hugging Face reads them:
 * in that of the rank that holds its beginning. All ranks write into all files, each the byte ranges that it holds, so
 * nothing travels between them. Every rank computes the same deal from what all hold.
 */
import { dtypeBytes } from "../graph/value.js";
import type { StateEntry } from "../train/native-session.js";
import { layoutSafetensors } from "./safetensors.js";

/** One file, as one rank writes it. */
export interface DealtFile {
  /** The rank that writes the header, and hashes the file when all have written. */
  owner: number;
  header: Uint8Array;
  bytes: number;
  /** Names of its tensors. */
  names: string[];
  /** What this rank writes into it. */
  ranges: { entry: StateEntry; offset: number }[];
}

/** Whether a rank holds a tensor only in part: else each writes its own and no other. */
export const isParted = (all: readonly (readonly StateEntry[])[]): boolean =>
  all.some((entries) => entries.some((e) => e.bytes < tensorBytes(e))) || hasCopies(all);

/** @param all by rank: what it holds of the tensors that the files are for */
export function dealTensors(
  all: readonly (readonly StateEntry[])[],
  rank: number,
  nameOf: (e: StateEntry) => string,
  metadata: Record<string, string> = {},
): DealtFile[] {
  const owners = new Map<string, number>();
  const specs = all.map((): { name: string; dtype: StateEntry["dtype"]; shape: number[] }[] => []);
  for (const [r, entries] of all.entries())
    for (const e of entries) {
      const name = nameOf(e);
      if (e.begin > 0 || owners.has(name)) continue;
      owners.set(name, r);
      specs[r]!.push({ name, dtype: e.dtype, shape: e.shape });
    }
  const places = new Map<string, { file: DealtFile; offset: number }>();
  const files = specs.map((list, owner): DealtFile => {
    const { header, entries, fileBytes } = layoutSafetensors(list, metadata);
    const file = { owner, header, bytes: fileBytes, names: list.map((s) => s.name), ranges: [] };
    for (const { name, offset } of entries) places.set(name, { file, offset });
    return file;
  });
  // Of replicas the first writes.
  const written = new Set<string>();
  for (const [r, entries] of all.entries())
    for (const entry of entries) {
      const name = nameOf(entry);
      const key = `${name} ${entry.begin}`;
      if (written.has(key)) continue;
      written.add(key);
      const { file, offset } = places.get(name)!;
      if (r === rank) file.ranges.push({ entry, offset: offset + entry.begin });
    }
  for (const file of files) file.ranges.sort((a, b) => a.offset - b.offset);
  return files;
}

const hasCopies = (all: readonly (readonly StateEntry[])[]): boolean => {
  const seen = new Set<string>();
  for (const entries of all)
    for (const { kind, name } of entries) {
      if (seen.has(`${kind} ${name}`)) return true;
      seen.add(`${kind} ${name}`);
    }
  return false;
};

const tensorBytes = ({ dtype, shape }: StateEntry): number => shape.reduce((a, b) => a * b, dtypeBytes(dtype));
