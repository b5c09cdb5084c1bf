/**
 * What the arenas hold and when, read off a tape alone. A value begins with the instruction that writes it over what was
 * there and ends with the last one that uses it; homes of parameters and optimizer state are held always. Places may
 * overlap in part, so values are followed over the pieces into which all ends of places and copies cut an arena.
 */
import type { Graph } from "../graph/types.js";
import { Flow } from "../plan/flow.js";
import { blockLayouts, ownersOf, PAGE, roundUp, usersOf } from "../plan/layout.js";
import { passWorkspace } from "../plan/memory.js";
import type { MemoryDevice } from "../plan/memory-gradients.js";
import { membersOf } from "../plan/mesh.js";
import { slotLives } from "../plan/slots.js";
import type { Instruction, Operand, P, Space, Tape } from "../plan/types.js";
import { QUEUES, queueOf } from "../plan/waits.js";

/** compute: parameters in the dtype that blocks compute in, where they are stored in another. */
export const HELD_KINDS = ["parameters", "optimizer", "compute", "sums", "retained", "boundaries"] as const;
export type HeldKind = (typeof HELD_KINDS)[number];

/** Bytes of one kind and block with one life. */
export interface Holding {
  space: Space;
  kind: HeldKind;
  block: number;
  bytes: number;
  /**
   * Position of the instruction that first writes them; -1: held from before the tape. A slot's tensor appears when that
   * instruction ends: until then it counts as the pass's workspace.
   */
  from: number;
  /** Position of the last that uses them; the tape's length: held beyond it. */
  to: number;
  /** The last use on each queue, in no order: whichever ends last ends the life in time. */
  uses: number[];
}

/** change: reads and writes. */
type Access = "read" | "write" | "change";
type See = (p: P, access: Access, kind: HeldKind, block: number, at: number, bytes: number) => void;

const KIND_OF: Readonly<Record<Operand["kind"], HeldKind>> = {
  param: "parameters",
  state: "optimizer",
  retained: "retained",
  x: "boundaries",
  dx: "boundaries",
};

/**
 * Every life in the tape's arenas and slots. `dims`: sizes of a micro-batch, for boundaries in slots; throws SHAPE where
 * one is missing.
 */
export function holdings(
  graph: Graph,
  tape: Tape,
  dims: Readonly<Record<string, number>> = tape.dims ?? {},
): Holding[] {
  const uses = new Uses(graph, tape);
  const found = new Map<string, Holding>();
  const add = (holding: Holding): void => {
    if (holding.bytes === 0) return;
    const { space, kind, block, from, to, uses: last } = holding;
    const key = [space, kind, block, from, to, ...last].join();
    const known = found.get(key);
    if (known === undefined) found.set(key, holding);
    else known.bytes += holding.bytes;
  };
  for (const space of ["device", "host", "disk"] as const) arenaHoldings(tape, uses, space, add);
  for (const { block, bytes, from, to } of slotLives(graph, tape, dims))
    add({ space: "slot", kind: "boundaries", block, bytes, from, to, uses: to < tape.instructions.length ? [to] : [] });
  // Of host memory that ranks share, the rank's own part.
  for (const [block, { param }] of tape.placement.homes.entries())
    if (param?.space === "shared")
      add({
        space: "host",
        kind: "parameters",
        block,
        bytes: param.bytes,
        from: -1,
        to: tape.instructions.length,
        uses: [],
      });
  return [...found.values()];
}

/** What a message between ranks is held as, other than a boundary. */
export const SENT_AS = {
  param: "parameters",
  compute: "compute",
  partial: "sums",
  reduced: "sums",
  sums: "sums",
} as const;

/** Which operand each place holds for an instruction: reads first, then writes. */
class Uses {
  private readonly owners: readonly (readonly number[])[];
  private readonly users: number[][];
  private readonly stored: HeldKind[];

  constructor(
    private readonly graph: Graph,
    private readonly tape: Tape,
  ) {
    // Of all ranks: sums of another stage's block come here, too.
    const flow = new Flow(graph);
    this.owners = graph.blocks.map((_, b) => ownersOf(graph, b));
    this.users = graph.blocks.map((_, b) => usersOf(graph, b, (user) => flow.hasBackward(user)));
    this.stored = blockLayouts(graph, tape.state, tape.stages).map((l) =>
      l.computeBytes > 0 ? "compute" : "parameters",
    );
  }

  each(i: Instruction, see: See): void {
    const whole = (p: P | undefined, access: Access, kind: HeldKind, block: number) => {
      if (p !== undefined && p >= 0) see(p, access, kind, block, 0, this.tape.places[p]!.bytes);
    };
    const source = (block: number, input: number): number => {
      const from = this.graph.blocks[block]!.inputs[input]!;
      return "block" in from ? from.block : block;
    };
    switch (i.op) {
      case "forward":
      case "turn":
      case "backward":
        for (const [k, p] of i.params.entries()) {
          const owner = this.owners[i.block]![k]!;
          whole(p, "read", this.stored[owner]!, owner);
        }
        for (const [k, p] of i.in.entries()) whole(p, "read", "boundaries", source(i.block, k));
        if (i.op === "backward") for (const p of i.dOut) whole(p, "read", "boundaries", i.block);
        if (i.op === "forward") for (const p of i.out) whole(p, "write", "boundaries", i.block);
        else {
          for (const [k, p] of i.dIn.entries())
            whole(p, i.add[k] ? "change" : "write", "boundaries", source(i.block, k));
          whole(i.sums, i.first ? "write" : "change", "sums", i.block);
        }
        break;
      case "cast":
        whole(i.from, "read", "parameters", i.block);
        whole(i.to, "write", "compute", i.block);
        break;
      case "partial":
        for (const [k, p] of i.sums.entries()) whole(p, "read", "sums", this.users[i.block]![k]!);
        whole(i.to, i.sums.includes(i.to) ? "change" : "write", "sums", i.block);
        break;
      case "reduce":
        for (const p of i.parts) whole(p, "read", "sums", i.block);
        whole(i.to, "write", "sums", i.block);
        break;
      case "norm":
      case "pack":
        for (const [k, p] of i.sums.entries())
          whole(p, i.op === "norm" && i.sums.length > 1 ? "change" : "read", "sums", this.summed(i.block, k));
        if (i.op === "pack") whole(i.to, "write", "retained", i.block);
        break;
      case "update":
        for (const [k, p] of i.grad.entries()) {
          if (i.from === "retained") whole(p, "read", "retained", i.block);
          else whole(p, "read", "sums", this.summed(i.block, k));
        }
        whole(i.param, "change", "parameters", i.block);
        whole(i.state, "change", "optimizer", i.block);
        break;
      case "copy": {
        const { kind, block } = i.operand;
        // Another rank's part may come straight to where the block computes.
        const others = !("output" in i.operand) && i.operand.shard !== undefined;
        const held = others && this.tape.state.storage === this.graph.dtype ? "compute" : KIND_OF[kind];
        see(i.from, "read", KIND_OF[kind], block, i.at, i.bytes);
        see(i.to, "write", held, block, i.at, i.bytes);
        break;
      }
      case "send":
      case "receive": {
        const { kind, block } = i.operand;
        if (kind === "updated") break;
        const held = kind === "x" || kind === "dx" ? "boundaries" : SENT_AS[kind];
        see(i.place, i.op === "send" ? "read" : "write", held, block, 0, i.bytes);
        break;
      }
      case "report":
      case "agree":
      case "coefficient":
        break;
    }
  }

  /** The block whose sums the k-th gradient of a block is. */
  private summed(block: number, k: number): number {
    return membersOf(this.tape.stages) > 1 ? block : this.users[block]![k]!;
  }
}

/** A piece of an arena: what it holds now, and whether it held something before the tape. */
interface Piece {
  life: Omit<Holding, "bytes" | "to"> | null;
  before: boolean;
}

function arenaHoldings(tape: Tape, uses: Uses, space: Space, add: (h: Holding) => void): void {
  const n = tape.instructions.length;
  const cuts = new Set<number>();
  const homes: { start: number; end: number }[] = [];
  for (const [block, { param, state }] of tape.placement.homes.entries()) {
    for (const [kind, home] of [
      ["parameters", param],
      ["optimizer", state],
    ] as const) {
      if (home?.space !== space) continue;
      homes.push({ start: home.offset, end: home.offset + home.bytes });
      cuts.add(home.offset).add(home.offset + home.bytes);
      add({ space, kind, block, bytes: home.bytes, from: -1, to: n, uses: [] });
    }
  }
  const ranged = (
    visit: (i: number, start: number, end: number, access: Access, kind: HeldKind, b: number) => void,
  ) => {
    for (const [i, instruction] of tape.instructions.entries())
      uses.each(instruction, (p, access, kind, block, at, bytes) => {
        const place = tape.places[p]!;
        if (place.space === space) visit(i, place.offset + at, place.offset + at + bytes, access, kind, block);
      });
  };
  ranged((_, start, end) => cuts.add(start).add(end));
  const ends = Float64Array.from(cuts).sort();
  const index = new Map([...ends].map((at, k) => [at, k]));
  const pieces = Array.from(ends, (): Piece => ({ life: null, before: false }));
  const isHome = new Uint8Array(ends.length);
  for (const { start, end } of homes) isHome.fill(1, index.get(start)!, index.get(end)!);
  const close = (k: number, to: number) => {
    const { life } = pieces[k]!;
    if (life !== null) add({ ...life, bytes: ends[k + 1]! - ends[k]!, to });
  };
  ranged((i, start, end, access, kind, block) => {
    for (let k = index.get(start)!; ends[k]! < end; k++) {
      if (isHome[k]) continue;
      const piece = pieces[k]!;
      if (access === "write" || piece.life === null) {
        // What is overwritten ended with its last use.
        if (piece.life !== null) close(k, Math.max(...piece.life.uses));
        if (access !== "write") piece.before = true;
        piece.life = { space, kind, block, from: access === "write" ? i : -1, uses: [] };
      }
      used(piece.life.uses, tape, i);
    }
  });
  for (const [k, piece] of pieces.entries())
    if (piece.life !== null) close(k, piece.before ? n : Math.max(...piece.life.uses));
}

/** Keeps the last use of every queue. */
function used(uses: number[], tape: Tape, i: number): void {
  const queue = queueOf(tape.instructions[i]!);
  const k = uses.findIndex((u) => queueOf(tape.instructions[u]!) === queue);
  if (k < 0) uses.push(i);
  else uses[k] = i;
}

export type ByKind = Record<HeldKind, Float64Array>;

/** Bytes held during each instruction of the tape, by kind. */
export function heldByInstruction(list: readonly Holding[], space: Space, instructions: number): ByKind {
  const out = byKind(instructions);
  for (const h of list) {
    if (h.space !== space) continue;
    const column = out[h.kind];
    const last = Math.min(h.to, instructions - 1);
    for (let i = Math.max(0, space === "slot" ? h.from + 1 : h.from); i <= last; i++) column[i]! += h.bytes;
  }
  return out;
}

export const byKind = (length: number): ByKind =>
  Object.fromEntries(HELD_KINDS.map((kind) => [kind, new Float64Array(length)])) as ByKind;

/** Bytes beside arena and slots that the plan expects at the highest of each instruction: what is kept, and workspaces. */
export function predictedWorkspace(
  graph: Graph,
  tape: Tape,
  device: MemoryDevice,
  dims: Readonly<Record<string, number>> = tape.dims ?? {},
): Float64Array {
  let kept = 0;
  return Float64Array.from(tape.instructions, (at) => {
    if (at.op !== "forward" && at.op !== "turn" && at.op !== "backward") return kept;
    const pass = passWorkspace(graph, at.block, dims, { device, kept: tape.kept });
    const before = kept;
    if (at.op === "forward" && at.keep) {
      kept += pass.kept;
      return before + pass.keepingForward;
    }
    if (at.op === "forward") return before + pass.forward;
    if (at.op === "turn" || tape.recompute === "all") return before + pass.backward;
    kept -= pass.kept;
    return before - pass.kept + pass.keptBackward;
  });
}

/** What the engine takes for a device arena: whole pages, at least 64 KiB (native/engine/memory.cc). */
export const arenaAllocation = (bytes: number): number => (bytes === 0 ? 0 : Math.max(roundUp(bytes, PAGE), 64 << 10));

export interface OverTime {
  /** Ascending, milliseconds; values hold from one to the next. */
  timeMs: Float64Array;
  held: ByKind;
  /** What libtorch holds beside arena and slots. */
  workspace: Float64Array;
  /** Bytes of the device's arena that hold nothing. */
  unused: Float64Array;
}

interface Change {
  kind: HeldKind | "workspace" | "unused";
  at: number;
  bytes: number;
}

/**
 * Device memory in measured time. `peak` and `after`: bytes beside arena and slots at the highest during each instruction
 * and at its end, on the compute queue.
 */
export function overTime(
  tape: Tape,
  list: readonly Holding[],
  measured: { startMs: Float64Array; endMs: Float64Array },
  workspace: { peak: Float64Array; after: Float64Array },
): OverTime {
  const { startMs, endMs } = measured;
  const n = tape.instructions.length;
  const finish = endMs.reduce((a, b) => Math.max(a, b), 0);
  const changes: Change[] = [];
  const hold = (kind: Change["kind"], from: number, to: number, bytes: number) => {
    if (bytes === 0 || to <= from) return;
    changes.push({ kind, at: from, bytes }, { kind, at: to, bytes: -bytes });
  };
  for (const h of list) {
    if (h.space !== "device" && h.space !== "slot") continue;
    const from = h.from < 0 ? 0 : h.space === "slot" ? endMs[h.from]! : startMs[h.from]!;
    const to = h.to >= n ? finish : h.uses.reduce((t, u) => Math.max(t, endMs[u]!), 0);
    hold(h.kind, from, to, h.bytes);
    if (h.space === "device") hold("unused", from, to, -h.bytes);
  }
  hold("unused", 0, finish, arenaAllocation(tape.placement.arenas.deviceBytes));
  let [since, kept] = [0, 0];
  for (const [i, at] of tape.instructions.entries()) {
    if (queueOf(at) !== QUEUES[0]) continue;
    hold("workspace", since, startMs[i]!, kept);
    hold("workspace", startMs[i]!, endMs[i]!, workspace.peak[i]!);
    [since, kept] = [endMs[i]!, workspace.after[i]!];
  }
  hold("workspace", since, finish, kept);
  const timeMs = Float64Array.from(new Set([0, ...changes.map((c) => c.at), finish])).sort();
  const index = new Map([...timeMs].map((t, k) => [t, k]));
  const columns = {
    ...byKind(timeMs.length),
    workspace: new Float64Array(timeMs.length),
    unused: new Float64Array(timeMs.length),
  };
  for (const { kind, at, bytes } of changes) columns[kind][index.get(at)!]! += bytes;
  for (const column of Object.values(columns)) for (let k = 1; k < column.length; k++) column[k]! += column[k - 1]!;
  const { workspace: beside, unused, ...held } = columns;
  return { timeMs, held, workspace: beside, unused };
}
