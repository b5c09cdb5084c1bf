/**
 * What the bytes of every arena hold while a tape is played: which operand, in which version, at which offset inside
 * it, written by which instruction (contents.ts). A copy moves such pieces; a reader demands that its place holds one
 * operand whole.
 */
import { type Facts, type Op, type Pass, showPlace } from "./check-facts.js";
import { type Content, Contents, FROZEN } from "./contents.js";
import { batchesOf, memberOf, membersOf, replicaOf, replicasOf, shardOf, shardsOf, sharesHost } from "./mesh.js";
import type { Instruction, Place, Shard, Tape, Tied } from "./types.js";

/** Memory between tapes. Play step tapes and flushes in the order in which a session would. */
export class Memory extends Contents {
  private boundaryBytes: number[][] = [];
  /** Micro-batches of this rank. */
  private mine: number[] = [];
  /** Whether the step before left updates to carry out. */
  private pending = false;
  /** Updates that every trained block had seen when the tape began, and that its passes demand. */
  private entered = 0;
  private demanded = 0;

  private forwards = new Set<number>();
  private kept = new Map<number, { at: number; params: string; in: string }>();
  private summed: number[] = [];
  private norms = new Set<number>();
  private partials = new Set<number>();
  private packed = new Set<number>();
  private updated = new Set<number>();
  private closed = false;
  private reported = false;
  private agreed = false;

  /** microBatches: the most of any tape that will be played. */
  constructor(facts: Facts, home: Tape["placement"], microBatches: number) {
    super(facts, microBatches);
    for (const [b, { param, state }] of home.homes.entries()) {
      if (param !== null) this.putParam(b, param, 0, -1);
      if (state !== null) this.put("state", b, state, 0, -1);
      this.putOthers(home, b, 0, -1);
    }
  }

  /** Throws TAPE for the first instruction that works on anything but its operands, or for what the end lacks. */
  play(tape: Tape): void {
    this.tape = tape;
    this.boundaryBytes = this.facts.boundaryBytes(tape.dims);
    this.mine = batchesOf(tape.stages, tape.microBatches);
    const forward = tape.update === "forward";
    this.demanded = this.entered + (forward && this.pending ? 1 : 0);
    this.forwards = new Set();
    this.kept = new Map();
    this.summed = this.facts.layouts.map(() => 0);
    this.norms = new Set();
    this.partials = new Set();
    this.packed = new Set();
    this.updated = new Set();
    this.closed = false;
    this.reported = false;
    this.agreed = false;
    for (const [at, instruction] of tape.instructions.entries()) {
      this.at = at;
      this.run(instruction);
      this.ran++;
    }
    this.at = tape.instructions.length;
    const { final } = this;
    this.end(final);
    // All ranks end a step, and a flush, before any of them begins the next step.
    for (const b of this.facts.layouts.keys()) this.putOthers(tape.placement, b, final, this.ran);
    this.entered = final;
    this.pending = forward && tape.kind === "step";
    this.step++;
  }

  private run(i: Instruction): void {
    if (this.tape.kind === "flush" && i.op !== "update" && i.op !== "copy" && i.op !== "cast")
      this.fail("a flush only updates");
    switch (i.op) {
      case "forward":
        this.forward(i);
        break;
      case "turn":
      case "backward":
        this.backward(i);
        break;
      case "cast":
        this.cast(i);
        break;
      case "norm":
        this.once(this.norms, i.block, `takes the norm of block ${i.block} again`);
        this.demandSums(i.block, "sums", i.sums);
        break;
      case "partial":
        this.demandUserSums(i.block, "sums", i.sums);
        this.once(this.partials, i.block, "adds up again");
        this.put("partial", i.block, this.tape.places[i.to]!, this.counted(memberOf(this.tape.stages!)));
        break;
      case "reduce":
        this.reduce(i);
        break;
      case "report":
        this.report();
        break;
      case "agree":
        if (this.agreed) this.fail("agrees again");
        if (!this.reported) this.fail("agrees before it has reported");
        this.agreed = true;
        break;
      case "coefficient":
        this.coefficient();
        break;
      case "pack":
        this.pack(i);
        break;
      case "update":
        this.update(i);
        break;
      case "copy":
        this.copy(i);
        break;
      case "send":
      case "receive":
        this.exchange(i);
        break;
    }
  }

  private forward(i: Op<"forward">): void {
    const { block, microBatch } = i;
    const pass = this.passId(i);
    this.once(this.forwards, pass, "runs again");
    this.demandInputs(i);
    for (const [o, p] of i.out.entries())
      if (p !== -1) this.put("x", this.boundary(block, o, microBatch), this.tape.places[p]!, this.step);
    if (i.keep) this.kept.set(pass, { at: this.ran, params: i.params.join(), in: i.in.join() });
  }

  private backward(i: Op<"turn" | "backward">): void {
    const { block, microBatch } = i;
    const pass = this.passId(i);
    this.demandInputs(i);
    if (i.op === "backward") {
      if (!this.forwards.has(pass)) this.fail("runs before its forward");
      if (this.tape.recompute === "none") this.demandKept(i);
      for (const [o, p] of i.dOut.entries()) {
        if (p === -1) continue;
        const whole = this.counted(this.facts.contributors[block]![o]!.length);
        this.demand(`dOut ${o}`, p, "dx", this.boundary(block, o, microBatch), whole, this.boundaryBytes[block]![o]!);
      }
    }
    for (const [k, p] of i.dIn.entries()) {
      const source = this.facts.graph.blocks[block]!.inputs[k]!;
      if (p === -1 || !("block" in source)) continue;
      const index = this.facts.contribution(block, k)!.index;
      const operand = this.boundary(source.block, source.output, microBatch);
      if (i.add[k])
        this.demand(
          `dIn ${k}`,
          p,
          "dx",
          operand,
          this.counted(index),
          this.boundaryBytes[source.block]![source.output]!,
        );
      this.put("dx", operand, this.tape.places[p]!, this.counted(index + 1));
    }
    const summed = this.summed[block]!++;
    if (this.mine[summed] !== microBatch)
      this.fail(`adds micro-batch ${microBatch} to sums of block ${block}, which have seen ${summed}`);
    if (i.sums === -1) return;
    if (!i.first) this.demand("sums", i.sums, "sums", block, this.counted(summed));
    this.put("sums", block, this.tape.places[i.sums]!, this.counted(summed + 1));
  }

  /** Parameters of the step's version, and the boundaries that the pass reads. */
  private demandInputs(i: Pass): void {
    for (const [k, owner] of this.facts.owners[i.block]!.entries()) {
      const version = this.facts.isTrained(owner) ? this.demanded : FROZEN;
      if (this.facts.layouts[owner]!.computeBytes > 0)
        this.demand(`params ${k}`, i.params[k]!, "compute", owner, version);
      else this.demandParam(`params ${k}`, i.params[k]!, owner, this.demanded);
    }
    for (const [k, source] of this.facts.graph.blocks[i.block]!.inputs.entries()) {
      if (!("block" in source)) continue;
      const { block, output } = source;
      const operand = this.boundary(block, output, i.microBatch);
      this.demand(`in ${k}`, i.in[k]!, "x", operand, this.step, this.boundaryBytes[block]![output]!);
    }
  }

  /** An autograd graph holds views of the places that its forward read: nothing may have written them since. */
  private demandKept(i: Op<"backward">): void {
    const kept = this.kept.get(this.passId(i))!;
    if (kept.params !== i.params.join() || kept.in !== i.in.join())
      this.fail("names other places than the forward whose graph it goes back through");
    for (const p of [...i.params, ...i.in]) {
      if (p === -1) continue;
      const { space, offset, bytes } = this.tape.places[p]!;
      this.arenas[space].each(offset, offset + (space === "slot" ? 1 : bytes), (content) => {
        if (content !== undefined && content.written >= kept.at)
          this.fail(`${showPlace(this.tape, p)} was written after the forward whose graph still reads it`);
      });
    }
  }

  private cast(i: Op<"cast">): void {
    if (i.shard !== undefined) {
      this.demandShard("from", i.from, i.block, i.shard);
      this.putComputed(i.block, i.shard, i.to);
      return;
    }
    const { offset } = this.tape.places[i.from]!;
    let version = FROZEN;
    this.arenas.device.each(offset, offset + 1, (content) => {
      version = content?.version ?? FROZEN;
    });
    this.demandParam("from", i.from, i.block, version);
    if (shardsOf(this.tape.stages) === 1) {
      this.put("compute", i.block, this.tape.places[i.to]!, version);
      return;
    }
    // A shard that is all frozen goes with any version of the others.
    if (version === FROZEN && this.facts.isTrained(i.block)) version = this.demanded;
    const { start } = this.shard({ kind: "compute", block: i.block, shard: shardOf(this.tape.stages!), of: 0 }, 0);
    this.put("compute", i.block, this.tape.places[i.to]!, version, this.ran, start);
  }

  /** Another rank's part, as this one computes with it: bytes [at, at + bytes) of the place. */
  private putComputed(block: number, shard: number, p: number, at = 0, bytes = this.tape.places[p]!.bytes): void {
    const { version, start } = this.shard({ kind: "compute", block, shard, of: 0 }, 0);
    const { space, offset } = this.tape.places[p]!;
    this.put("compute", block, { space, offset: offset + at, bytes }, version, this.ran, start + at);
  }

  /** Another rank's part in storage, of the step's version. */
  private demandShard(what: string, p: number, block: number, shard: number, at?: number, bytes?: number): void {
    const { facts } = this;
    const { trainableBytes, heldBytes } = facts.layouts[block]!.slab(shard);
    const start = this.othersStart(block, shard);
    const place = this.tape.places[p]!;
    const [from, to] = [at ?? 0, (at ?? 0) + (bytes ?? heldBytes)];
    const trained = Math.min(trainableBytes, heldBytes);
    const demand = (version: number, a: number, b: number) => {
      if (a < b) this.demandAt(what, place, "others", block, version, a, b, start);
    };
    demand(this.demanded, from, Math.min(to, trained));
    demand(FROZEN, Math.max(from, trained), to);
  }

  /** Where a shard's param begins, of all that `others` has of its block. */
  private othersStart(block: number, shard: number): number {
    const { begin } = this.facts.layouts[block]!.shard(shard).compute;
    return begin * this.facts.storedItemsize;
  }

  /** The version of a shard, and the byte of its operand at which it begins. */
  private shard({ kind, block, shard, of }: Shard, bytes: number): { version: number; start: number } {
    const { facts } = this;
    const { begin, end } = facts.layouts[block]!.shard(shard)[kind === "compute" ? "compute" : "partial"];
    if (kind === "compute")
      return {
        version: facts.isTrained(block) ? this.demanded : FROZEN,
        start: begin * facts.computeItemsize,
      };
    const itemsize = kind === "partial" ? bytes / (end - begin) : facts.wideItemsize;
    return { version: this.counted(kind === "partial" ? of : of + 1), start: begin * itemsize };
  }

  private reduce(i: Op<"reduce">): void {
    const stages = this.tape.stages!;
    const { block } = i;
    const own = shardOf(stages);
    const first = replicaOf(stages) * shardsOf(stages);
    for (const [k, p] of i.parts.entries()) {
      const of = i.of === "partial" ? first + k : k;
      const { bytes } = this.tape.places[p]!;
      const { version, start } = this.shard({ kind: i.of, block, shard: own, of }, bytes);
      this.demand(`part ${k}`, p, i.of, block, version, bytes, 0, start);
    }
    const { start } = this.shard({ kind: "reduced", block, shard: own, of: 0 }, 0);
    const whole = i.of === "reduced" || replicasOf(stages) === 1;
    const version = this.counted(whole ? 0 : replicaOf(stages) + 1);
    this.put("reduced", block, this.tape.places[i.to]!, version, this.ran, start);
  }

  /** What arrives is what its sender says that it is: checkRanks compares both ends. */
  private exchange(i: Op<"send" | "receive">): void {
    if ("shard" in i.operand) {
      const { kind, block } = i.operand;
      if (kind === "updated") {
        this.word(i, i.operand);
        return;
      }
      const { version, start } = this.shard(i.operand, i.bytes);
      if (i.op === "send") this.demand("place", i.place, kind, block, version, i.bytes, 0, start);
      else this.put(kind, block, this.tape.places[i.place]!, version, this.ran, start);
      return;
    }
    if (!("output" in i.operand)) {
      this.exchangeTied(i, i.operand);
      return;
    }
    const { kind, block, output, microBatch } = i.operand;
    const operand = this.boundary(block, output, microBatch);
    const version = kind === "x" ? this.step : this.counted(i.count);
    if (i.op === "send") this.demand("place", i.place, kind, operand, version, this.boundaryBytes[block]![output]!);
    else this.put(kind, operand, this.tape.places[i.place]!, version);
  }

  /** A parameter is lent as passes demand it; sums are of all micro-batches, which both members run. */
  private exchangeTied(i: Op<"send" | "receive">, { kind, block }: Tied): void {
    const place = this.tape.places[i.place]!;
    const sends = i.op === "send";
    if (kind === "param") {
      if (sends) this.demandParam("place", i.place, block, this.demanded);
      else this.putParam(block, place, this.demanded, this.ran);
      return;
    }
    const version =
      kind === "sums" ? this.counted(this.mine.length) : this.facts.isTrained(block) ? this.demanded : FROZEN;
    if (sends) this.demand("place", i.place, kind, block, version);
    else this.put(kind, block, place, version);
  }

  /** A shard in shared memory has been updated; what lies there is then what its rank says. */
  private word(i: Op<"send" | "receive">, { block, shard }: Shard): void {
    if (i.op === "receive") {
      this.putShard(this.tape.placement, block, shard, this.final, this.ran);
      return;
    }
    const { trainableBytes } = this.facts.layouts[block]!.slab(shard);
    this.demand("place", i.place, "param", block, this.final, trainableBytes);
  }

  /** Updates that every block has seen when the tape ends. */
  private get final(): number {
    return this.tape.update === "forward" ? this.demanded : this.entered + 1;
  }

  private report(): void {
    if (this.reported) this.fail("reports again");
    this.reported = true;
    for (const b of this.facts.layouts.keys()) {
      if (!this.facts.isMine(b)) continue;
      const first = b * this.microBatches;
      const ran = this.facts.losses.has(b)
        ? this.summed[b]!
        : this.mine.filter((m) => this.forwards.has(first + m)).length;
      if (ran !== this.mine.length) this.fail(`reports before all forwards of block ${b}`);
    }
  }

  private coefficient(): void {
    if (this.closed) this.fail("closes the step again");
    if (this.tape.stages !== undefined && this.tape.update === "backward" && !this.agreed)
      this.fail("closes a step that updates on backward, and the ranks have not agreed");
    for (const b of this.facts.layouts.keys()) {
      if (!this.facts.isMine(b)) continue;
      if (this.facts.trains(b) && !this.norms.has(b)) this.fail(`closes the step without the norm of block ${b}`);
      if (this.facts.losses.has(b) && this.summed[b] !== this.mine.length)
        this.fail(`closes the step without all losses of block ${b}`);
    }
    this.closed = true;
  }

  private pack(i: Op<"pack">): void {
    if (this.tape.update !== "forward") this.fail(`retains a gradient; update is "${this.tape.update}"`);
    if (!this.norms.has(i.block)) this.fail("packs a gradient before its norm");
    this.once(this.packed, i.block, "packs again");
    this.demandSums(i.block, "sums", i.sums);
    this.put("retained", i.block, this.tape.places[i.to]!, this.retained(this.step, i.dtype));
  }

  private update(i: Op<"update">): void {
    const { block } = i;
    this.once(this.updated, block, "updates again");
    if (i.from === "sums") {
      if (!this.norms.has(block)) this.fail("updates before the norm");
      if (this.tape.clip === "global" && !this.closed)
        this.fail("updates before the coefficient that it is clipped by");
      if (this.tape.stages !== undefined && !this.agreed && !this.closed)
        this.fail("updates before the ranks have agreed that all losses are finite");
      if (this.tape.update === "end") this.demandAllBackwards();
      this.demandSums(block, "grad", i.grad);
    } else {
      if (this.closed) this.fail("updates after the record of its step was closed over by the next");
      if (!this.pending) return;
      this.demand("grad 0", i.grad[0]!, "retained", block, this.retained(this.step - 1, i.dtype));
    }
    const trainable = this.facts.layouts[block]!.trainableBytes;
    const param = this.tape.places[i.param]!;
    this.demand("param", i.param, "param", block, this.entered, trainable);
    this.demand("state", i.state, "state", block, this.entered);
    this.put("param", block, { ...param, bytes: trainable }, this.entered + 1);
    this.put("state", block, this.tape.places[i.state]!, this.entered + 1);
  }

  private copy(i: Op<"copy">): void {
    const from = this.tape.places[i.from]!;
    const to = this.tape.places[i.to]!;
    const { kind, block } = i.operand;
    const operand = "output" in i.operand ? this.boundary(block, i.operand.output, i.operand.microBatch) : block;
    // Where nothing is pending, nothing was retained; its copies move whatever lies there.
    const shard = "output" in i.operand ? undefined : i.operand.shard;
    if (shard !== undefined) {
      this.demandShard("from", i.from, block, shard, i.at, i.bytes);
      if (this.facts.storedItemsize === this.facts.computeItemsize) {
        this.putComputed(block, shard, i.to, i.at, i.bytes);
        return;
      }
    } else if (kind !== "retained" || this.pending || this.packed.has(block))
      this.demand("from", i.from, kind, operand, null, i.bytes, i.at);
    const start = from.offset + i.at;
    const pieces: [number, number, Content | undefined][] = [];
    this.arenas[from.space].each(start, start + i.bytes, (content, a, b) => {
      pieces.push([a, b, content]);
    });
    const shift = to.offset - from.offset;
    for (const [a, b, content] of pieces) {
      const moved = content && { ...content, base: content.base + shift, written: this.ran };
      this.arenas[to.space].set(a + shift, b + shift, moved);
    }
  }

  private end(final: number): void {
    const { facts, tape } = this;
    if (tape.kind === "step") {
      for (const b of facts.layouts.keys()) {
        if (!facts.isMine(b)) continue;
        for (const m of this.mine) {
          const pass = b * this.microBatches + m;
          if (!facts.losses.has(b) && !this.forwards.has(pass))
            this.fail(`lacks the forward of block ${b}, micro-batch ${m}`);
        }
        const summed = this.summed[b]!;
        if (facts.needsBackward[b] && summed < this.mine.length)
          this.fail(`lacks the backward of block ${b}, micro-batch ${this.mine[summed]}`);
        if (tape.update === "forward" && facts.trains(b) && !this.packed.has(b))
          this.fail(`lacks the pack of block ${b}`);
      }
      if (!this.closed) this.fail("lacks the coefficient");
    }
    for (const [b, { param, state }] of tape.placement.homes.entries()) {
      if (!facts.isMine(b)) continue;
      if (facts.trains(b) && !this.updated.has(b)) this.fail(`lacks the update of block ${b}`);
      const { trainableBytes, paramBytes } = facts.layouts[b]!;
      const home = `home of block ${b}`;
      if (param !== null) {
        this.demandAt(home, param, "param", b, final, 0, trainableBytes);
        this.demandAt(home, param, "param", b, FROZEN, trainableBytes, paramBytes);
      }
      if (state !== null) this.demandAt(home, state, "state", b, final, 0, state.bytes);
      if (tape.kind === "step" && tape.update === "forward") this.demandOthers(b);
    }
  }

  /** The others have said that their parts of a block are of this step. */
  private demandOthers(block: number): void {
    if (!sharesHost(this.tape.stages)) return;
    for (let k = 0; k < shardsOf(this.tape.stages); k++) {
      const slab = this.facts.slab(this.tape.placement, block, k);
      const { trainableBytes } = this.facts.layouts[block]!.slab(k);
      if (slab === null || k === shardOf(this.tape.stages!)) continue;
      const start = this.othersStart(block, k);
      this.demandAt(`shard ${k} of block ${block}`, slab, "others", block, this.demanded, 0, trainableBytes, start);
    }
  }

  private demandAllBackwards(): void {
    for (const [b, needed] of this.facts.needsBackward.entries())
      if (needed && this.facts.isMine(b) && this.summed[b] !== this.mine.length)
        this.fail(`updates before all backwards of block ${b}`);
  }

  /** The gradient of what the rank holds of a block, by the whole batch. */
  private demandSums(block: number, what: string, list: readonly number[]): void {
    if (membersOf(this.tape.stages) === 1) {
      this.demandUserSums(block, what, list);
      return;
    }
    const own = shardOf(this.tape.stages!);
    const { start } = this.shard({ kind: "reduced", block, shard: own, of: 0 }, 0);
    const { bytes } = this.tape.places[list[0]!]!;
    this.demand(`${what} 0`, list[0]!, "reduced", block, this.counted(0), bytes, 0, start);
  }

  private demandUserSums(block: number, what: string, list: readonly number[]): void {
    for (const [k, user] of this.facts.users[block]!.entries())
      this.demand(`${what} ${k}`, list[k]!, "sums", user, this.counted(this.mine.length));
  }

  private demandParam(what: string, p: number, block: number, version: number): void {
    const { trainableBytes, paramBytes } = this.facts.layouts[block]!;
    const place = this.tape.places[p]!;
    this.demandAt(what, place, "param", block, version, 0, trainableBytes);
    this.demandAt(what, place, "param", block, FROZEN, trainableBytes, paramBytes);
  }

  private putParam(block: number, place: Place, version: number, written: number): void {
    this.put("param", block, place, FROZEN, written);
    this.put("param", block, { ...place, bytes: this.facts.layouts[block]!.trainableBytes }, version, written);
  }

  private putOthers(placement: Tape["placement"], block: number, version: number, written: number): void {
    if (!sharesHost(this.facts.stages)) return;
    for (let k = 0; k < shardsOf(this.facts.stages); k++)
      if (k !== shardOf(this.facts.stages!)) this.putShard(placement, block, k, version, written);
  }

  private putShard(placement: Tape["placement"], block: number, shard: number, version: number, written: number): void {
    const slab = this.facts.slab(placement, block, shard);
    if (slab === null) return;
    const start = this.othersStart(block, shard);
    const { trainableBytes } = this.facts.layouts[block]!.slab(shard);
    this.put("others", block, slab, FROZEN, written, start);
    this.put("others", block, { ...slab, bytes: trainableBytes }, version, written, start);
  }

  private once(done: Set<number>, id: number, again: string): void {
    if (done.has(id)) this.fail(again);
    done.add(id);
  }

  private passId(i: Pass): number {
    return i.block * this.microBatches + i.microBatch;
  }
}
