/** Where every byte of a plan lives: kind x space, read off its tape. */
import { sharedPart, type TapePeaks } from "./simulate.js";
import type { Instruction, P, Place, Tape } from "./types.js";

export const PLACED_KINDS = ["parameters", "optimizer", "retained", "boundaries", "slabs", "workspace"] as const;
export type PlacedKind = (typeof PLACED_KINDS)[number];
type Spaces = Record<"device" | "host" | "disk", number>;
/**
 * Bytes. Homes of parameters, optimizer state and retained gradients; boundaries beside what retained gradients lend them;
 * slabs: blocks on their way, gradient sums, what is being read from or written to a disk; workspace: libtorch's.
 */
export type PlacementTable = Record<PlacedKind, Spaces>;

export function describePlacement(tape: Tape, peaks: TapePeaks): PlacementTable {
  const kinds: Record<"parameters" | "optimizer" | "retained" | "boundaries", Set<Place>> = {
    parameters: new Set(tape.placement.homes.flatMap(({ param }) => param ?? [])),
    optimizer: new Set(tape.placement.homes.flatMap(({ state }) => state ?? [])),
    retained: new Set(),
    boundaries: new Set(),
  };
  const place = (p: P): Place[] => (p < 0 ? [] : [tape.places[p]!]);
  const homes = retainedHomes(tape);
  for (const p of homes) kinds.retained.add(tape.places[p]!);
  for (const i of tape.instructions) for (const p of boundariesOf(i)) for (const x of place(p)) kinds.boundaries.add(x);
  const table = Object.fromEntries(
    PLACED_KINDS.map((kind) => [kind, { device: 0, host: 0, disk: 0 }]),
  ) as PlacementTable;
  const arenas = {
    device: tape.placement.arenas.deviceBytes,
    host: peaks.hostBytes - sharedPart(tape),
    disk: peaks.diskBytes,
  };
  for (const space of ["device", "host", "disk"] as const) {
    const taken: Interval[] = [];
    for (const kind of ["parameters", "optimizer", "retained", "boundaries"] as const) {
      const before = length(union(taken));
      for (const p of kinds[kind]) if (p.space === space) taken.push([p.offset, p.offset + p.bytes]);
      table[kind][space] = length(union(taken)) - before;
    }
    table.slabs[space] = arenas[space] - length(union(taken));
  }
  table.parameters.host += sharedPart(tape);
  table.workspace.device = peaks.workspaceBytes;
  return table;
}

/** Of several ranks together. */
export function addPlacements(tables: readonly PlacementTable[]): PlacementTable {
  const total = structuredClone(tables[0]!);
  for (const table of tables.slice(1))
    for (const kind of PLACED_KINDS)
      for (const space of ["device", "host", "disk"] as const) total[kind][space] += table[kind][space];
  return total;
}

/** Where a retained gradient waits: what pack writes, or what that is copied to in the end. */
function retainedHomes(tape: Tape): Set<P> {
  const last = new Map<number, P>();
  for (const i of tape.instructions) {
    if (i.op === "pack") last.set(i.block, i.to);
    else if (i.op === "copy" && i.operand.kind === "retained" && (i.queue === "out" || i.queue === "save"))
      last.set(i.operand.block, i.to);
  }
  return new Set(last.values());
}

function boundariesOf(i: Instruction): P[] {
  switch (i.op) {
    case "forward":
      return [...i.in, ...i.out];
    case "turn":
      return [...i.in, ...i.dIn];
    case "backward":
      return [...i.in, ...i.dOut, ...i.dIn];
    case "copy":
      return i.operand.kind === "x" || i.operand.kind === "dx" ? [i.from, i.to] : [];
    case "send":
    case "receive":
      return [i.place];
    default:
      return [];
  }
}

type Interval = [from: number, to: number];

function union(intervals: readonly Interval[]): Interval[] {
  const out: Interval[] = [];
  for (const [from, to] of intervals.toSorted((a, b) => a[0] - b[0])) {
    const last = out.at(-1);
    if (last !== undefined && from <= last[1]) last[1] = Math.max(last[1], to);
    else out.push([from, to]);
  }
  return out;
}
const length = (intervals: readonly Interval[]): number => intervals.reduce((sum, [from, to]) => sum + to - from, 0);
