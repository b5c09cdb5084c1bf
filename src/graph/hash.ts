/** Identity of a graph, whatever order its keys were written in. */
import { createHash } from "node:crypto";
import type { Graph } from "./types.js";

/** SHA-256 of the graph as JSON with sorted keys, in hexadecimal. Equal graphs have equal hashes. */
export function graphHash(graph: Graph): string {
  return createHash("sha256").update(canonicalJson(graph)).digest("hex");
}

/** JSON with the keys of every object sorted and nothing between. */
export function canonicalJson(value: unknown): string {
  return JSON.stringify(value, (_, v: unknown) => {
    if (v === null || typeof v !== "object" || Array.isArray(v)) return v;
    return Object.fromEntries(Object.entries(v).sort(([a], [b]) => (a < b ? -1 : a > b ? 1 : 0)));
  });
}

/** What we write is a dozen deep; what walks JSON by recursion would overflow the stack at some thousands. */
const MOST_DEPTH = 100;

/** Is this parsed JSON nested deeper than any of ours? To be asked of what comes from a file. */
export function isTooDeep(value: unknown): boolean {
  let level: unknown[] = [value];
  for (let depth = 0; level.length > 0; depth++) {
    if (depth > MOST_DEPTH) return true;
    const next: unknown[] = [];
    for (const v of level) if (v !== null && typeof v === "object") for (const w of Object.values(v)) next.push(w);
    level = next;
  }
  return false;
}
