/**
 * Writes the tape of an optimizer step from a policy (TAPE.md, sections 1 to 3). The program is written in its
 * sequential meaning; then every buffer gets its place by its lifetime in it, and the waits are derived.
 *
 * Rules that make every tape mean the same numbers: micro-batches enter the sums in index order, the first overwrites;
 * consumers of a boundary add to its gradient in the order in which their backwards run, last block first; an update
 * stands after the norms that its coefficient needs and before any pass of the next version.
 *
 * With shards a block is gathered before its visit and its gradient reduced behind it, each beside the passes of a
 * neighbouring visit (sharding.ts).
 */
import type { Graph } from "../graph/types.js";
import { Buffers } from "./arena.js";
import { Boundaries } from "./boundaries.js";
import { Flow } from "./flow.js";
import { type BlockLayout, blockLayouts, PAGE, roundUp } from "./layout.js";
import { links } from "./links.js";
import { pushAt } from "./lists.js";
import { batchesOf, membersOf, shardsOf, sharesHost } from "./mesh.js";
import { checkPolicy, homeOf, type Policy } from "./policy.js";
import { keptOf } from "./selective.js";
import { Sharding } from "./sharding.js";
import { SharedHost } from "./shared-host.js";
import type { Boundary, CopyQueue, Instruction, Operand, P, Placement, Shard, Tape, Tied } from "./types.js";
import { flushVisits, type Pass, type Visit, visitsOf } from "./visits.js";
import { accesses, deriveWaits } from "./waits.js";

export type { Home, Policy, Space3 } from "./policy.js";

/**
 * The tape of a step, and with update "forward" the one that carries out what a step left pending. Both have one
 * placement. Throws CONFIG for a policy that contradicts itself and TAPE for a graph that does not train.
 */
export function writeTape(graph: Graph, policy: Policy): { step: Tape; flush: Tape | null } {
  checkPolicy(graph, policy);
  const flow = new Flow(graph, policy.stages);
  const layouts = blockLayouts(graph, policy.state, policy.stages);
  const step = new Writer(flow, policy, layouts).write(visitsOf(flow, policy), "step");
  if (policy.update !== "forward") return { step, flush: null };
  const flush = new Writer(flow, policy, layouts).write(flushVisits(flow), "flush");
  const arenas = step.placement.arenas;
  for (const key of ["deviceBytes", "hostBytes", "diskBytes"] as const)
    arenas[key] = Math.max(arenas[key], flush.placement.arenas[key]);
  return { step, flush: { ...flush, placement: step.placement } };
}

type Kind = "param" | "state" | "retained";
interface Copy {
  queue: CopyQueue;
  operand: Operand;
  from: P;
  to: P;
  at: number;
  bytes: number;
}
/** One operand on the device for its uses in visits `first`..`last`. */
interface Stay {
  kind: Kind;
  block: number;
  first: number;
  last: number;
  /** On the way from disk. */
  staging: P;
}

class Writer {
  readonly buffers = new Buffers();
  private readonly instructions: Instruction[] = [];
  private readonly homes: Record<Kind, P[]> = { param: [], state: [], retained: [] };
  /** Where each operand is on the device now. */
  private readonly here: Record<Kind, P[]> = { param: [], state: [], retained: [] };
  private readonly compute: P[] = [];
  private readonly sums: P[] = [];
  /** By visit: owners whose compute copy is written for it, and where that is: with shards ahead of it. */
  private readonly casts: number[][] = [];
  private readonly castsAt: number[][] = [];
  /** By visit: the copies from disk and to the device that begin there. */
  private readonly loads: Stay[][] = [];
  private readonly ins: Stay[][] = [];
  /** By home of a retained gradient: its last read and its first write. */
  private readonly lent = new Map<P, { opens: number; closes: number }>();
  private readonly wide: "float32" | "float64";
  /** Null: a rank has the whole of its blocks. */
  private readonly sharding: Sharding | null;
  /** Null: parts of parameters go from rank to rank. */
  private readonly shared: SharedHost | null;
  /** Visits between what is gathered or reduced and its use. */
  private readonly lead: number;
  /** The first micro-batch of this rank. */
  private readonly first: number;
  private agreed = false;
  /** Index of the pass after which no loss and no forward is left to fail. */
  private lastLoss = -1;

  constructor(
    private readonly flow: Flow,
    private readonly policy: Policy,
    private readonly layouts: BlockLayout[],
  ) {
    this.wide = flow.graph.dtype === "float64" ? "float64" : "float32";
    const { stages } = policy;
    this.first = batchesOf(stages, policy.microBatches)[0]!;
    this.sharding =
      stages === undefined || membersOf(stages) === 1
        ? null
        : new Sharding(flow.graph, stages, layouts, this.wide, policy.reduceDType ?? this.wide, this);
    this.shared = sharesHost(stages) ? new SharedHost(flow.graph, stages!, layouts, policy.state.storage, this) : null;
    this.lead = this.sharding === null ? 0 : Math.min(1, policy.prefetch);
    for (const [b, layout] of layouts.entries()) {
      const mine = flow.isMine(b);
      this.homes.param[b] =
        this.shared !== null && mine && homeOf(policy.param, b) === "host"
          ? this.shared.home(b)
          : this.home(policy.param, b, mine ? layout.paramBytes : 0);
      this.homes.state[b] = this.home(policy.optimizer, b, mine ? layout.stateBytes : 0);
    }
    // Behind all other homes: a retained gradient exists only with update "forward".
    for (const b of layouts.keys()) {
      const bytes = policy.update === "forward" && flow.isMine(b) ? this.bytesOf("retained", b) : 0;
      const p = this.home(policy.retained, b, bytes);
      this.homes.retained[b] = p;
      if (p >= 0) this.lent.set(p, { opens: -1, closes: -1 });
    }
    for (const kind of ["param", "state", "retained"] as const) {
      for (const [b, p] of this.homes[kind].entries()) this.here[kind][b] = this.onDevice(p) ? p : -1;
    }
  }

  write(visits: Visit[], kind: "step" | "flush"): Tape {
    const passes = visits.flatMap((v) => v.passes);
    if (kind === "step" && this.lead > 0) updateAhead(visits, this.lead);
    this.planCasts(visits);
    this.planFetches(visits);
    this.lastLoss = passes.findLastIndex((p) => p.op !== "backward");
    const boundaries = new Boundaries(
      this.flow,
      this.policy,
      this,
      passes,
      kind === "step" ? links(this.flow, this.policy, this.layouts) : null,
    );
    let closed = kind === "flush";
    for (const [v, visit] of visits.entries()) {
      if (!closed && visit.end.length > 0) {
        this.sharding?.settle();
        this.emit({ op: "coefficient", waits: [] });
        closed = true;
      }
      this.visit(v, visit, boundaries);
    }
    this.sharding?.settle();
    if (!closed) {
      this.agree();
      this.emit({ op: "coefficient", waits: [] });
    }
    return this.tape(kind);
  }

  // ---- what is where, when

  private home(home: Policy["param"], b: number, bytes: number): P {
    return bytes > 0 ? this.buffers.fixed(homeOf(home, b), bytes) : -1;
  }

  private onDevice(p: P): boolean {
    return p < 0 || this.buffers.list[p]!.space === "device";
  }

  private bytesOf(kind: Kind, b: number): number {
    const layout = this.layouts[b]!;
    return kind === "param"
      ? layout.paramBytes
      : kind === "state"
        ? layout.stateBytes
        : layout.retainedBytes(this.policy.retainedDType);
  }

  /** A compute copy serves the next visit too; kept autograd graphs hold it until their backward. */
  private planCasts(visits: Visit[]): void {
    const last: number[] = [];
    for (const [v, { passes }] of visits.entries()) {
      this.casts[v] = [];
      if (passes.length === 0) continue;
      for (const o of this.flow.owners[passes[0]!.block]!) {
        if (this.layouts[o]!.computeBytes === 0 || !this.flow.isMine(o)) continue;
        const held = last[o] !== undefined && (v - last[o] <= 1 + this.lead || this.policy.recompute === "none");
        if (!held) {
          this.casts[v]!.push(o);
          pushAt(this.castsAt, Math.max(0, v - this.lead), o);
        }
        last[o] = v;
      }
    }
  }

  /** Finds for each operand that lives elsewhere the visits that need it, and when its copies begin. */
  private planFetches(visits: Visit[]): void {
    const stays = new Map<string, Stay>();
    const need = (kind: Kind, block: number, v: number) => {
      const home = this.homes[kind][block]!;
      if (this.onDevice(home)) return;
      const { prefetch } = this.policy;
      const fromDisk = this.buffers.list[home]!.space === "disk";
      const lead = prefetch + (fromDisk ? 1 : 0);
      const stay = stays.get(`${kind} ${block}`);
      // What is cast ahead of its visit and updated behind it is fetched once for both.
      const near = Math.max(1, lead) + (kind === "param" ? this.lead : 0);
      if (stay !== undefined && v - stay.last <= near) {
        stay.last = v;
        return;
      }
      const next = { kind, block, first: v, last: v, staging: -1 };
      stays.set(`${kind} ${block}`, next);
      if (fromDisk) pushAt(this.loads, Math.max(0, v - lead), next);
      pushAt(this.ins, Math.max(0, v - prefetch), next);
    };
    for (const [v, { passes, pending, complete, end }] of visits.entries()) {
      for (const b of pending) for (const kind of ["param", "retained", "state"] as const) need(kind, b, v);
      for (const o of this.castsAt[v] ?? []) need("param", o, v);
      if (passes.length > 0) {
        for (const o of this.flow.owners[passes[0]!.block]!)
          if (this.layouts[o]!.computeBytes === 0) need("param", o, v);
      }
      // What is reduced is updated a visit later, at the end at once.
      const last = this.lead > 0 && v === visits.length - 1 ? complete : [];
      const updated = this.policy.update === "backward" ? [...(visits[v - this.lead]?.complete ?? []), ...last] : [];
      for (const b of [...updated, ...end]) {
        need("param", b, v);
        need("state", b, v);
      }
    }
  }

  // ---- the program

  get position(): number {
    return this.instructions.length;
  }

  emit(i: Instruction): void {
    accesses(i, this.buffers.list, (p, writes) => {
      this.buffers.touch(p, this.position);
      const lent = this.lent.get(p);
      if (lent === undefined) return;
      if (!writes) lent.opens = this.position;
      else if (lent.closes < 0) lent.closes = this.position;
    });
    this.instructions.push(i);
  }

  copy(queue: CopyQueue, operand: Operand, from: P, to: P, at: number, bytes: number): void {
    this.emit({ op: "copy", queue, operand, from, to, at, bytes, waits: [] });
  }

  exchange(
    op: "send" | "receive",
    operand: Boundary | Shard | Tied,
    count: number,
    peer: number,
    place: P,
    bytes: number,
  ): void {
    this.emit({ op, operand, count, peer, place, bytes, waits: [] });
  }

  /** What stages share: where it is here, once it is; and where another rank's is received. */
  tied({ kind, block }: Tied): { place: P; bytes: number } {
    const { paramBytes, computeBytes, sumsBytes } = this.layouts[block]!;
    const bytes = { param: paramBytes, compute: computeBytes, sums: sumsBytes }[kind];
    return { place: this.tiedPlaces(kind)[block]!, bytes };
  }
  arrived({ kind, block }: Tied, place: P): void {
    this.tiedPlaces(kind)[block] = place;
  }
  private tiedPlaces(kind: Tied["kind"]): P[] {
    return kind === "param" ? this.here.param : kind === "compute" ? this.compute : this.sums;
  }

  /** Update on backward: before the first update, every rank knows that all losses are finite. */
  private agree(): void {
    if (!this.mustAgree || this.agreed) return;
    this.agreed = true;
    this.emit({ op: "agree", waits: [] });
  }
  private get mustAgree(): boolean {
    return this.policy.update === "backward" && this.policy.stages !== undefined;
  }

  private visit(v: number, visit: Visit, boundaries: Boundaries): void {
    const { passes, pending, complete, end } = visit;
    const ahead: Copy[] = [];
    const begin = (stay: Stay, copies: Copy[]) => {
      if (stay.first === v) this.emitCopies(copies);
      else ahead.push(...copies);
    };
    for (const stay of this.loads[v] ?? []) begin(stay, this.load(stay));
    for (const stay of this.ins[v] ?? []) begin(stay, this.fetch(stay));
    if (passes.length === 0) this.emitCopies(ahead);
    const behind: Copy[] = [];
    for (const b of pending) behind.push(...this.pending(b, passes.length > 0));
    for (const b of this.castsAt[v] ?? []) {
      const copies = this.cast(b);
      if (this.casts[v]!.includes(b)) this.emitCopies(copies);
      else ahead.push(...copies);
    }
    for (const b of this.casts[v] ?? []) this.shared?.cast(b);
    for (const [i, pass] of passes.entries()) {
      this.emitCopies(share(ahead, i, passes.length));
      this.emitCopies(share(behind, i, passes.length));
      boundaries.before(pass.index);
      this.pass(pass, boundaries);
      boundaries.after(pass.index);
      if (pass.index === this.lastLoss && this.mustAgree) this.emit({ op: "report", waits: [] });
    }
    if (passes.length === 0) this.emitCopies(behind);
    const { sharding } = this;
    sharding?.advance();
    for (const b of complete) {
      if (sharding === null) this.summed(b);
      else
        sharding.reduce(
          b,
          this.flow.users[b]!.map((u) => this.sums[u]!),
          () => this.summed(b),
        );
    }
    if (passes.length > 0) boundaries.settle(passes.at(-1)!.index);
    if (this.lead === 0) sharding?.settle();
    for (const b of end) this.emitCopies(this.update(b, "sums"));
  }

  /** The gradient of a block's parameters is whole. */
  private summed(b: number): void {
    if (!this.updates(b)) return;
    if (this.policy.update === "backward") this.agree();
    this.emit({ op: "norm", block: b, sums: this.sumsOf(b), waits: [] });
    if (this.policy.update === "backward") this.emitCopies(this.update(b, "sums"));
    if (this.policy.update === "forward") this.pack(b);
  }

  /** False: the rank's shard of the block has nothing that trains. */
  private updates(b: number): boolean {
    return this.layouts[b]!.trainable.length > 0;
  }

  private pass(pass: Pass, boundaries: Boundaries): void {
    const { op, block, microBatch } = pass;
    const params = this.flow.owners[block]!.map((o) =>
      this.layouts[o]!.computeBytes > 0 ? this.compute[o]! : this.here.param[o]!,
    );
    const common = { block, microBatch, params, in: boundaries.inputs(pass), waits: [] };
    if (op === "forward") {
      const keep = this.policy.recompute !== "all" && this.flow.hasBackward(block);
      this.emit({ op, ...common, out: boundaries.outputs(pass), keep });
      return;
    }
    const first = microBatch === this.first;
    if (first) {
      const bytes = this.layouts[block]!.sumsBytes;
      this.sums[block] = bytes > 0 ? this.buffers.transient("device", bytes, "large") : -1;
    }
    const sums = { sums: this.sums[block]!, first };
    if (op === "turn") this.emit({ op, ...common, ...boundaries.inputGradients(pass), ...sums });
    else
      this.emit({
        op,
        ...common,
        dOut: boundaries.outputGradients(pass),
        ...boundaries.inputGradients(pass),
        ...sums,
      });
  }

  private sumsOf(b: number): P[] {
    return this.sharding === null ? this.flow.users[b]!.map((u) => this.sums[u]!) : [this.sharding.reduced[b]!];
  }

  /** Where host memory is shared, the copies that bring the others' parts. */
  private cast(b: number): Copy[] {
    const whole = this.buffers.transient("device", this.layouts[b]!.computeBytes, "large");
    this.compute[b] = whole;
    const from = this.here.param[b]!;
    if (this.shared?.whole(b) !== undefined)
      return this.shared
        .gather(b, from, whole)
        .flatMap(({ shard, from, to, bytes }) => this.cut("in", { kind: "param", block: b, shard }, from, to, bytes));
    if (shardsOf(this.policy.stages) > 1) this.sharding!.gather(b, from, whole);
    else this.emit({ op: "cast", block: b, from, to: whole, waits: [] });
    return [];
  }

  /** What the last step retained of a block's gradient is carried out. In a step the others may want its part at once. */
  private pending(b: number, inStep: boolean): Copy[] {
    const copies = this.update(b, "retained");
    if (!inStep || this.shared?.whole(b) === undefined) return copies;
    this.emitCopies(copies.filter(({ operand }) => operand.kind === "param"));
    this.shared.publish(b);
    return copies.filter(({ operand }) => operand.kind !== "param");
  }

  /** Emits the update; the copies that bring param and state home. */
  private update(b: number, from: "sums" | "retained"): Copy[] {
    if (!this.updates(b)) return [];
    const [param, state] = [this.here.param[b]!, this.here.state[b]!];
    const grad = from === "sums" ? this.sumsOf(b) : [this.here.retained[b]!];
    const dtype = from === "sums" ? this.wide : this.policy.retainedDType;
    this.emit({ op: "update", block: b, param, state, grad, from, dtype, waits: [] });
    return [
      ...this.store("param", b, this.layouts[b]!.trainableBytes),
      ...this.store("state", b, this.layouts[b]!.stateBytes),
    ];
  }

  private pack(b: number): void {
    const home = this.homes.retained[b]!;
    const bytes = this.bytesOf("retained", b);
    const to = this.onDevice(home) ? home : this.buffers.transient("device", bytes, "large");
    this.here.retained[b] = to;
    this.emit({ op: "pack", block: b, sums: this.sumsOf(b), to, dtype: this.policy.retainedDType, waits: [] });
    this.emitCopies(this.store("retained", b, bytes));
  }

  // ---- copies

  private load(stay: Stay): Copy[] {
    const { kind, block } = stay;
    const bytes = this.bytesOf(kind, block);
    stay.staging = this.buffers.transient("host", bytes, "large");
    return this.cut("load", { kind, block }, this.homes[kind][block]!, stay.staging, bytes);
  }

  private fetch({ kind, block, staging }: Stay): Copy[] {
    const bytes = this.bytesOf(kind, block);
    const to = this.buffers.transient("device", bytes, "large");
    this.here[kind][block] = to;
    return this.cut("in", { kind, block }, staging < 0 ? this.homes[kind][block]! : staging, to, bytes);
  }

  private store(kind: Kind, block: number, bytes: number): Copy[] {
    const home = this.homes[kind][block]!;
    if (this.onDevice(home)) return [];
    const operand = { kind, block };
    const from = this.here[kind][block]!;
    if (this.buffers.list[home]!.space !== "disk") return this.cut("out", operand, from, home, bytes);
    const staging = this.buffers.transient("host", bytes, "large");
    return [...this.cut("out", operand, from, staging, bytes), ...this.cut("save", operand, staging, home, bytes)];
  }

  /** One copy in at most `parts` page-aligned ranges. */
  private cut(queue: CopyQueue, operand: Operand, from: P, to: P, bytes: number): Copy[] {
    const whole = "shard" in operand ? bytes * shardsOf(this.policy.stages) : bytes;
    const size = roundUp(whole / this.policy.parts, PAGE);
    const copies: Copy[] = [];
    for (let at = 0; at < bytes; at += size)
      copies.push({ queue, operand, from, to, at, bytes: Math.min(size, bytes - at) });
    return copies;
  }

  private emitCopies(copies: readonly Copy[]): void {
    for (const { queue, operand, from, to, at, bytes } of copies) this.copy(queue, operand, from, to, at, bytes);
  }

  // ---- the result

  private tape(kind: "step" | "flush"): Tape {
    const { schedule, recompute, update, clip, state, microBatches, dims, boundary, stages } = this.policy;
    for (const [p, { opens, closes }] of this.lent)
      if (opens >= 0 && closes > opens) this.buffers.lend(p, opens, closes);
    const used = this.buffers.place(this.position);
    const { places, index } = this.buffers.toPlaces();
    for (const i of this.instructions) relocate(i, index);
    deriveWaits(this.instructions, places);
    const at = (p: P) => (p < 0 ? null : places[index[p]!]!);
    const placement: Placement = {
      arenas: {
        ...{ deviceBytes: used.device, hostBytes: used.host, diskBytes: used.disk },
        ...(used.shared > 0 ? { sharedBytes: used.shared } : {}),
      },
      homes: this.layouts.map((_, b) => {
        const whole = this.shared?.whole(b);
        return {
          ...{ param: at(this.homes.param[b]!), state: at(this.homes.state[b]!) },
          ...(whole === undefined ? {} : { shared: at(whole)! }),
        };
      }),
      ...(stages === undefined ? {} : { stages }),
    };
    return {
      format: "stromatolite.tape",
      version: 2,
      kind,
      schedule,
      recompute,
      update,
      clip,
      state,
      microBatches: kind === "flush" ? 0 : microBatches,
      ...(stages === undefined ? {} : { stages }),
      dims: boundary === "slot" ? null : dims,
      placement,
      slots: used.slot,
      ...(recompute === "selective" && kind === "step" ? { kept: keptOf(this.flow.graph, dims) } : {}),
      places,
      instructions: this.instructions,
    };
  }
}

/** What is gathered ahead of its visit is updated before that. */
function updateAhead(visits: Visit[], lead: number): void {
  for (const [v, visit] of visits.entries()) visits[Math.max(0, v - lead)]!.pending.push(...visit.pending.splice(0));
}

/** The i-th of n shares of a list: the first entry goes to the first share, none to the end of the last. */
const share = <T>(list: readonly T[], i: number, n: number): T[] =>
  list.slice(Math.ceil((i * list.length) / n), Math.ceil(((i + 1) * list.length) / n));

/** Buffers -> places, in every operand of an instruction. */
function relocate(i: Instruction, index: readonly P[]): void {
  const to = (p: P): P => (p < 0 ? -1 : index[p]!);
  switch (i.op) {
    case "forward":
      Object.assign(i, { params: i.params.map(to), in: i.in.map(to), out: i.out.map(to) });
      break;
    case "turn":
    case "backward":
      Object.assign(i, { params: i.params.map(to), in: i.in.map(to), dIn: i.dIn.map(to), sums: to(i.sums) });
      if (i.op === "backward") i.dOut = i.dOut.map(to);
      break;
    case "cast":
    case "copy":
      Object.assign(i, { from: to(i.from), to: to(i.to) });
      break;
    case "norm":
      i.sums = i.sums.map(to);
      break;
    case "reduce":
      Object.assign(i, { parts: i.parts.map(to), to: to(i.to) });
      break;
    case "partial":
    case "pack":
      Object.assign(i, { sums: i.sums.map(to), to: to(i.to) });
      break;
    case "update":
      Object.assign(i, { param: to(i.param), state: to(i.state), grad: i.grad.map(to) });
      break;
    case "send":
    case "receive":
      i.place = to(i.place);
      break;
    case "report":
    case "agree":
    case "coefficient":
      break;
  }
}
