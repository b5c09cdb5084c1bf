/**
 * Where x and dx are at every pass. A value stays on the device while its next use lies in the next visit or a few
 * passes ahead; before a longer wait it moves to its home (host or disk) and comes back just before its next use.
 */
import { evaluate } from "../graph/dims.js";
import type { ProgramOutput } from "../graph/types.js";
import { dtypeBytes } from "../graph/value.js";
import type { Buffers } from "./arena.js";
import type { Flow } from "./flow.js";
import { PAGE, roundUp } from "./layout.js";
import { isTied, type Link, type Links } from "./links.js";
import { pushAt } from "./lists.js";
import type { Policy } from "./policy.js";
import type { Boundary, CopyQueue, Operand, P, Tied } from "./types.js";
import type { Pass } from "./visits.js";

/** Passes between the start of a boundary's copy and its use. */
const AHEAD = 3;
/** Passes for which a place rests after its copy out began, so that the next write need not wait for it. */
const REST = 2;

export interface Emitter {
  readonly buffers: Buffers;
  readonly position: number;
  copy(queue: CopyQueue, operand: Operand, from: P, to: P, at: number, bytes: number): void;
  exchange(
    op: "send" | "receive",
    operand: Boundary | Tied,
    count: number,
    peer: number,
    place: P,
    bytes: number,
  ): void;
  tied(operand: Tied): { place: P; bytes: number };
  arrived(operand: Tied, place: P): void;
}

interface Value {
  operand: Boundary;
  bytes: number;
  touches: Pass[];
  /** On the device now; -1: not yet, or away. */
  here: P;
  home: P;
  staging: P;
  /** By the pass that needs what comes from another rank: where it was received; -1: not yet. */
  arrives: Map<number, P>;
}

export class Boundaries {
  private readonly values = new Map<number, Value>();
  private readonly loads: Value[][] = [];
  private readonly ins: Value[][] = [];
  private readonly outs: Value[][] = [];
  private readonly sends: Link<Boundary>[][] = [];
  /** By pass: parameters that are lent before it; sums that are sent once nothing writes them any more. */
  private readonly lends: Link<Tied>[][] = [];
  private readonly owes: Link<Tied>[][] = [];
  /** By pass: what must have been received before it, and a few passes ahead; by peer, how many have been. */
  private readonly receives: Link[][] = [];
  private readonly received: number[] = [];
  private readonly arrivals: Value[][] = [];
  private resting: { p: P; until: number }[] = [];
  /** Most outputs of any block. */
  private readonly most: number;
  /** Bytes of outputs, by block and output. */
  private readonly bytes: number[][];

  constructor(
    private readonly flow: Flow,
    private readonly policy: Pick<Policy, "boundary" | "dims">,
    private readonly emitter: Emitter,
    passes: readonly Pass[],
    private readonly links: Links | null,
  ) {
    const dims = policy.boundary === "slot" ? null : policy.dims;
    const ofProgram = flow.graph.programs.map((p) => p.outputs.map((o) => (dims === null ? 0 : outputBytes(o, dims))));
    this.bytes = flow.graph.blocks.map((b) => ofProgram[b.program]!);
    this.most = Math.max(...ofProgram.map((list) => list.length));
    for (const pass of passes) this.touch(pass);
    if (links !== null) this.planLinks(links);
    if (policy.boundary !== "host" && policy.boundary !== "disk") return;
    for (const value of this.values.values()) this.planMoves(value);
  }

  /** The boundaries of a pass; -1 where there is none. */
  inputs(pass: Pass): P[] {
    return this.flow
      .sources(pass.block)
      .map((s) => ("block" in s ? this.at("x", s.block, s.output, pass.microBatch) : -1));
  }
  outputs({ block, microBatch }: Pass): P[] {
    return this.flow.programs[block]!.outputs.map((_, o) => this.at("x", block, o, microBatch));
  }
  outputGradients({ block, microBatch }: Pass): P[] {
    return this.flow.programs[block]!.outputs.map((_, o) => this.at("dx", block, o, microBatch));
  }
  /** Gradients of the inputs, and whether each is added to what another consumer left. */
  inputGradients({ block, microBatch, index }: Pass): { dIn: P[]; add: boolean[] } {
    const dIn: P[] = [];
    const add: boolean[] = [];
    for (const i of this.flow.sources(block).keys()) {
      const source = this.flow.gradientSource(block, i);
      const p = source === null ? -1 : this.at("dx", source.block, source.output, microBatch);
      const first = source === null || this.isFirst(this.find("dx", source.block, source.output, microBatch)!, index);
      add.push(!first || (p >= 0 && dIn.includes(p)));
      dIn.push(p);
    }
    return { dIn, add };
  }

  /** Copies that begin before a pass. */
  before(pass: number): void {
    const { buffers } = this.emitter;
    for (const link of this.lends[pass] ?? []) this.sendTied(link);
    for (const link of this.receives[pass] ?? []) this.receive(link);
    // A partial sum may come while the one before it is still here: each is taken up by the pass that needs it.
    for (const value of this.arrivals[pass] ?? []) value.here = value.arrives.get(pass)!;
    for (const value of this.loads[pass] ?? []) {
      value.staging = buffers.transient("host", value.bytes, "small");
      this.copy("load", value, value.home, value.staging);
    }
    for (const value of this.ins[pass] ?? []) {
      value.here = buffers.transient("device", value.bytes, "small");
      this.copy("in", value, this.policy.boundary === "disk" ? value.staging : value.home, value.here);
    }
  }

  /** Copies that begin after a pass. */
  after(pass: number): void {
    const { buffers } = this.emitter;
    for (const { operand, count, peer, taken } of this.sends[pass] ?? []) {
      const value = this.find(operand.kind, operand.block, operand.output, operand.microBatch)!;
      this.emitter.exchange("send", operand, count, peer, value.here, value.bytes);
      this.rest(value.here, pass, taken);
      // A partial sum that comes back is another one.
      if (operand.kind === "dx") value.here = -1;
    }
    for (const value of this.outs[pass] ?? []) {
      const { bytes } = value;
      const { boundary } = this.policy;
      value.home = buffers.transient(boundary as "host" | "disk", bytes, "small");
      if (boundary === "disk") {
        value.staging = buffers.transient("host", bytes, "small");
        this.copy("out", value, value.here, value.staging);
        this.copy("save", value, value.staging, value.home);
      } else this.copy("out", value, value.here, value.home);
      this.resting.push({ p: value.here, until: pass + REST });
    }
    this.resting = this.resting.filter(({ until }) => until >= pass);
    for (const { p } of this.resting) buffers.touch(p, Math.max(0, this.emitter.position - 1));
  }

  /** Sums that the visit which ends with this pass has settled. */
  settle(pass: number): void {
    for (const link of this.owes[pass] ?? []) this.sendTied(link);
  }

  private sendTied({ operand, peer, pass, taken }: Link<Tied>): void {
    const { place, bytes } = this.emitter.tied(operand);
    this.emitter.exchange("send", operand, 0, peer, place, bytes);
    this.rest(place, pass, taken);
  }

  /**
   * What is sent is gone when the peer asks for it, near the pass that needs it there. Who writes its place before waits
   * for the peer, and the peer perhaps for what it would do next.
   */
  private rest(p: P, pass: number, taken: number): void {
    this.resting.push({ p, until: Math.max(pass + REST, taken) });
  }

  /** Everything that the peer sends before it comes before it. */
  private receive({ operand, peer }: Link): void {
    const list = this.links!.receives[peer]!;
    const wanted = list.findIndex((l) => l.operand === operand);
    for (let k = this.received[peer] ?? 0; k <= wanted; k++) {
      const { operand: o, count, pass } = list[k]!;
      this.received[peer] = k + 1;
      if (isTied(o)) {
        const { bytes } = this.emitter.tied(o);
        const place = this.emitter.buffers.transient("device", bytes, "large");
        this.emitter.arrived(o, place);
        this.emitter.exchange("receive", o, count, peer, place, bytes);
        continue;
      }
      const value = this.find(o.kind, o.block, o.output, o.microBatch)!;
      const place = this.emitter.buffers.transient("device", value.bytes, "small");
      value.arrives.set(pass, place);
      this.emitter.exchange("receive", o, count, peer, place, value.bytes);
    }
  }

  private planLinks({ sends, receives }: Links): void {
    for (const link of sends)
      if (!("output" in link.operand))
        pushAt(link.operand.kind === "sums" ? this.owes : this.lends, link.pass, link as Link<Tied>);
      else pushAt(this.sends, link.pass, link as Link<Boundary>);
    for (const list of receives)
      for (const link of list) {
        pushAt(this.receives, Math.max(0, link.pass - AHEAD), link);
        if (isTied(link.operand)) continue;
        const { kind, block, output, microBatch } = link.operand;
        const value = this.find(kind, block, output, microBatch)!;
        value.arrives.set(link.pass, -1);
        pushAt(this.arrivals, link.pass, value);
      }
  }

  /** Whether a pass writes the gradient first, among all ranks. */
  private isFirst(value: Value, pass: number): boolean {
    return value.touches[0]!.index === pass && !value.arrives.has(pass);
  }

  private at(kind: "x" | "dx", block: number, output: number, microBatch: number): P {
    const value = this.find(kind, block, output, microBatch);
    if (value === undefined) return -1;
    if (value.here < 0) {
      const { buffers } = this.emitter;
      const o = this.flow.programs[block]!.outputs[output]!;
      value.here =
        this.policy.boundary === "slot"
          ? buffers.transient("slot", 0, "small", `${o.dtype} ${o.shape.join(",")}`)
          : buffers.transient("device", value.bytes, "small");
    }
    return value.here;
  }

  private find(kind: "x" | "dx", block: number, output: number, microBatch: number): Value | undefined {
    return this.values.get(this.id(kind, block, output, microBatch));
  }

  private touch(pass: Pass): void {
    const { block, microBatch, op } = pass;
    const { flow } = this;
    const see = (kind: "x" | "dx", b: number, output: number, create: boolean) => {
      const key = this.id(kind, b, output, microBatch);
      let value = this.values.get(key);
      if (value === undefined) {
        if (!create) return;
        const operand = { kind, block: b, output, microBatch };
        const arrives = new Map<number, P>();
        value = { operand, bytes: this.bytes[b]![output]!, touches: [], here: -1, home: -1, staging: -1, arrives };
        this.values.set(key, value);
      }
      value.touches.push(pass);
    };
    for (const s of flow.sources(block)) if ("block" in s) see("x", s.block, s.output, !flow.isMine(s.block));
    for (const o of flow.programs[block]!.outputs.keys()) {
      if (op === "forward" && flow.isConsumed(block, o)) see("x", block, o, true);
      if (op === "backward") see("dx", block, o, this.flow.stages !== undefined && this.flow.isSummed(block, o));
    }
    if (op === "forward") return;
    for (const i of flow.sources(block).keys()) {
      const source = flow.gradientSource(block, i);
      if (source !== null) see("dx", source.block, source.output, true);
    }
  }

  private planMoves(value: Value): void {
    const { touches, operand } = value;
    const put = (lists: Value[][], pass: number) => pushAt(lists, pass, value);
    let away = false;
    for (const [k, next] of touches.entries()) {
      const last = touches[k - 1];
      if (
        last === undefined ||
        value.arrives.has(next.index) ||
        next.visit - last.visit <= 1 ||
        next.index - last.index <= AHEAD
      )
        continue;
      // A boundary is written once, at its first use; its gradient changes with every consumer.
      if (operand.kind === "dx") put(this.outs, last.index);
      else if (!away) put(this.outs, touches[0]!.index);
      away = true;
      put(this.ins, next.index - AHEAD);
      if (this.policy.boundary === "disk") put(this.loads, Math.max(last.index + 1, next.index - 2 * AHEAD));
    }
  }

  private copy(queue: CopyQueue, value: Value, from: P, to: P): void {
    this.emitter.copy(queue, value.operand, from, to, 0, value.bytes);
  }

  private id(kind: "x" | "dx", block: number, output: number, microBatch: number): number {
    const { blocks } = this.flow.graph;
    return ((microBatch * this.most + output) * blocks.length + block) * 2 + (kind === "x" ? 0 : 1);
  }
}

const outputBytes = ({ dtype, shape }: ProgramOutput, dims: Record<string, number>): number =>
  Math.max(
    PAGE,
    roundUp(
      shape.reduce<number>((n, d) => n * evaluate(d, dims), dtypeBytes(dtype)),
      PAGE,
    ),
  );
