/**
 * The form of a tape: every place lies inside its arena, aligned; every operand is there exactly where the graph has one,
 * in a space that the operation works on and of the size that layout.ts gives it. What the places hold is not asked here.
 */
import type { Graph } from "../graph/types.js";
import { dtypeBytes } from "../graph/value.js";
import { type Facts, type Op, type Pass, refuse, samePlace, showPlace, showRange } from "./check-facts.js";
import { PAGE, PLACE_ALIGN } from "./layout.js";
import {
  batchesOf,
  memberOf,
  membersOf,
  replicaOf,
  replicasOf,
  shardOf,
  shardsOf,
  sharesHost,
  stageOf,
} from "./mesh.js";
import { checkStages } from "./stages.js";
import {
  type Boundary,
  type CopyQueue,
  type Instruction,
  type Operand,
  type Place,
  type RetainedDType,
  SCHEDULES,
  type Shard,
  type Space,
  type Tape,
  type Tied,
} from "./types.js";

const WORDS = {
  kind: ["step", "flush"],
  schedule: SCHEDULES,
  recompute: ["all", "none", "selective"],
  update: ["end", "backward", "forward"],
  clip: ["none", "block", "global"],
} as const;
export const RETAINED_DTYPES: readonly RetainedDType[] = ["float32", "float64", "bfloat16", "dynamic8"];
const ROUTES: Record<CopyQueue, [from: readonly Space[], to: readonly Space[]]> = {
  in: [["host", "shared"], ["device"]],
  out: [["device"], ["host", "shared"]],
  load: [["disk"], ["host"]],
  save: [["host"], ["disk"]],
};

const isCount = (n: unknown, least = 0): n is number => Number.isSafeInteger(n) && (n as number) >= least;

/** Before anything else of the tape is read. */
export function checkHeader(graph: Graph, tape: Tape): void {
  if (tape?.format !== "stromatolite.tape" || tape.version !== 2 || !Array.isArray(tape.instructions))
    refuse({ instructions: [] as Instruction[] } as Tape, -1, "is not a stromatolite tape of version 2");
  if (graph.mode !== "train") refuse(tape, -1, `expected a graph in train mode, got ${graph.mode}`);
  for (const [field, words] of Object.entries(WORDS)) {
    const word = tape[field as keyof typeof WORDS];
    if (!(words as readonly string[]).includes(word))
      refuse(tape, -1, `expected ${field} to be one of ${words.join(", ")}, got ${word}`);
  }
  const least = tape.kind === "step" ? 1 : 0;
  if (!isCount(tape.microBatches, least) || (tape.kind === "flush" && tape.microBatches !== 0))
    refuse(tape, -1, `microBatches of a ${tape.kind} is ${tape.microBatches}`);
  const { deviceBytes, hostBytes, diskBytes, sharedBytes = 0 } = tape.placement.arenas;
  for (const [name, n] of Object.entries({ slots: tape.slots, deviceBytes, hostBytes, diskBytes, sharedBytes }))
    if (!isCount(n)) refuse(tape, -1, `${name} is ${n}`);
  if (tape.kind === "flush" && tape.update !== "forward")
    refuse(tape, -1, `a flush is for update "forward", not "${tape.update}"`);
  if (JSON.stringify(tape.placement.stages) !== JSON.stringify(tape.stages))
    refuse(tape, -1, "its placement is for other stages than the tape");
  if (tape.stages === undefined) return;
  try {
    checkStages(graph, tape.stages);
  } catch (error) {
    refuse(tape, -1, (error as Error).message);
  }
}

export function checkForm(facts: Facts, tape: Tape): void {
  new Form(facts, tape).run();
}

class Form {
  private at = -1;
  private readonly boundaryBytes: number[][];
  /** Micro-batches of this rank. */
  private readonly mine: number[];

  constructor(
    private readonly facts: Facts,
    private readonly tape: Tape,
  ) {
    this.boundaryBytes = facts.boundaryBytes(tape.dims);
    this.mine = batchesOf(tape.stages, tape.microBatches);
  }

  run(): void {
    for (const [p, place] of this.tape.places.entries()) this.inArena(place, `place ${p}`);
    this.homes();
    this.kept();
    for (const [at, instruction] of this.tape.instructions.entries()) {
      this.at = at;
      this.instruction(instruction);
      this.waits(instruction);
    }
  }

  private inArena(place: Place, what: string): void {
    const { deviceBytes, hostBytes, diskBytes, sharedBytes = 0 } = this.tape.placement.arenas;
    const ends: Record<Space, number> = {
      device: deviceBytes,
      host: hostBytes,
      shared: sharedBytes,
      disk: diskBytes,
      slot: this.tape.slots,
    };
    const end = ends[place.space];
    const slot = place.space === "slot";
    if (end === undefined || !isCount(place.offset) || !isCount(place.bytes, slot ? 0 : 1))
      this.fail(`${what} is ${JSON.stringify(place)}`);
    if (slot ? place.bytes !== 0 || place.offset >= end : place.offset + place.bytes > end)
      this.fail(`${what} (${showRange(place)}) ends beyond its ${slot ? "slots" : "arena"}, which has ${end}`);
    const unit = place.space === "disk" ? PAGE : PLACE_ALIGN;
    if (!slot && place.offset % unit !== 0) this.fail(`${what} (${showRange(place)}) is not on a multiple of ${unit}`);
  }

  private homes(): void {
    const { homes } = this.tape.placement;
    this.count("homes", homes, this.facts.layouts.length);
    const taken: Place[] = [];
    for (const [b, layout] of this.facts.layouts.entries()) {
      for (const kind of ["param", "state"] as const) {
        const home = homes[b]![kind];
        const bytes = this.facts.isMine(b) ? layout[`${kind}Bytes`] : 0;
        const what = `home of ${kind}(${b})`;
        if ((home === null) !== (bytes === 0) || (home !== null && home.bytes !== bytes))
          this.fail(`${what} has ${home?.bytes ?? "no"} bytes, expected ${bytes}`);
        if (home === null) continue;
        this.inArena(home, what);
        if (home.space === "slot") this.fail(`${what} is a slot`);
        if (home.space !== "shared") taken.push(home);
        else if (kind === "state" || homes[b]!.shared === undefined) this.fail(`${what} is in shared memory`);
      }
      if (homes[b]!.shared !== undefined) taken.push(this.sharedHome(b, homes[b]!.shared, homes[b]!.param));
    }
    taken.sort((a, b) => (a.space < b.space ? -1 : a.space > b.space ? 1 : a.offset - b.offset));
    for (const [i, home] of taken.entries()) {
      const next = taken[i + 1];
      if (next?.space === home.space && next.offset < home.offset + home.bytes)
        this.fail(`homes overlap: ${showRange(home)} and ${showRange(next)}`);
    }
  }

  /** Where the parts of all shards of a block lie. */
  private sharedHome(b: number, whole: Place, own: Place | null): Place {
    const { stages, placement } = this.tape;
    const what = `shared home of param(${b})`;
    if (!sharesHost(stages) || !this.facts.isMine(b)) this.fail(`${what}: there is nobody to share it with`);
    const last = this.facts.layouts[b]!.slab(shardsOf(stages) - 1);
    if (whole.space !== "shared" || whole.bytes !== last.at + last.paramBytes)
      this.fail(`${what} (${showRange(whole)}) is not of ${last.at + last.paramBytes} shared bytes`);
    this.inArena(whole, what);
    if (!samePlace(own, this.facts.slab(placement, b, shardOf(stages!))))
      this.fail(`home of param(${b}) is not the rank's own part of its shared home`);
    return whole;
  }

  /** Every kept value is the one result of an operator that the tape names kernels for. */
  private kept(): void {
    const { kept, recompute, kind } = this.tape;
    const wanted = recompute === "selective" && kind === "step";
    if ((kept !== undefined) !== wanted)
      this.fail(`${kept === undefined ? "does not say" : "says"} what is kept; recompute ${recompute} of a ${kind}`);
    if (kept === undefined) return;
    const { programs } = this.facts.graph;
    for (const list of [kept.values, kept.shapes]) this.count("kept", list, programs.length);
    for (const [p, program] of programs.entries()) {
      const ids = [...kept.values[p]!, ...kept.shapes[p]!];
      if (new Set(ids).size !== ids.length) this.fail(`keeps a value of program ${program.name} twice`);
      for (const id of ids) {
        const node = program.nodes.find(({ outputs }) => outputs.length === 1 && outputs[0] === id);
        if (node === undefined || !(kept.kernels[node.op]?.length ?? 0))
          this.fail(`keeps value ${id} of program ${program.name}, which is of no operator with kernels`);
      }
    }
  }

  private waits({ waits }: Instruction): void {
    if (!Array.isArray(waits)) this.fail("has no waits");
    const queue = queueOf(this.tape.instructions[this.at]!);
    for (const w of waits) {
      if (!isCount(w) || w >= this.at) this.fail(`waits for ${w}, which does not come before it`);
      if (queueOf(this.tape.instructions[w]!) === queue) this.fail(`waits for ${w} of its own queue, ${queue}`);
    }
  }

  private instruction(i: Instruction): void {
    if ("block" in i && this.facts.layouts[i.block] === undefined) this.fail(`block ${i.block} does not exist`);
    if ("block" in i && !this.facts.isMine(i.block)) this.fail(`block ${i.block} is another rank's`);
    const layout = "block" in i ? this.facts.layouts[i.block]! : null;
    switch (i.op) {
      case "forward":
      case "turn":
      case "backward":
        this.pass(i);
        break;
      case "cast":
        if (layout!.computeBytes === 0) this.fail(`casts block ${i.block}, which computes in its storage dtype`);
        this.state(
          "from",
          i.from,
          i.shard === undefined ? layout!.paramBytes : this.others(i.block, i.shard).heldBytes,
        );
        this.state(
          "to",
          i.to,
          shardsOf(this.tape.stages) > 1 ? this.shardBytes("compute", i.block, i.shard) : layout!.computeBytes,
        );
        break;
      case "partial":
        this.partial(i);
        break;
      case "reduce":
        this.reduce(i);
        break;
      case "norm":
        this.gradient(i.block, "sums", i.sums);
        break;
      case "coefficient":
        break;
      case "report":
      case "agree":
        if (this.tape.stages === undefined) this.fail("there is no other rank to agree with");
        break;
      case "send":
      case "receive":
        this.exchange(i);
        break;
      case "pack":
        this.gradient(i.block, "sums", i.sums);
        this.retainedDType(i);
        this.state("to", i.to, layout!.retainedBytes(i.dtype));
        break;
      case "update":
        this.update(i);
        break;
      case "copy":
        this.copy(i);
        break;
      default:
        this.fail(`${(i as { op: unknown }).op} is no operation`);
    }
  }

  private pass(i: Pass): void {
    const { facts } = this;
    const { block, microBatch } = i;
    if (!isCount(microBatch) || microBatch >= this.tape.microBatches)
      this.fail(`micro-batch ${microBatch} is not one of the step's ${this.tape.microBatches}`);
    if (!this.mine.includes(microBatch)) this.fail(`micro-batch ${microBatch} is another rank's`);
    const hasLosses = facts.losses.has(block);
    if ((i.op === "turn") !== hasLosses) this.fail(`a block ${hasLosses ? "with" : "without"} losses runs as ${i.op}`);
    this.count("params", i.params, facts.owners[block]!.length);
    for (const [k, owner] of facts.owners[block]!.entries()) {
      const { computeBytes, paramBytes } = facts.layouts[owner]!;
      this.state(`params ${k}`, i.params[k]!, computeBytes || paramBytes);
    }
    const { inputs } = facts.graph.blocks[block]!;
    this.count("in", i.in, inputs.length);
    for (const [k, source] of inputs.entries()) this.boundary(`in ${k}`, i.in[k]!, "block" in source ? source : null);
    const { outputs } = facts.program(block);
    if (i.op === "forward") {
      this.count("out", i.out, outputs.length);
      for (const o of outputs.keys())
        this.boundary(`out ${o}`, i.out[o]!, facts.isRead[block]![o]! ? { block, output: o } : null);
      const keep = this.tape.recompute !== "all" && facts.needsBackward[block]!;
      if (i.keep !== keep) this.fail(`keep is ${i.keep}; recompute ${this.tape.recompute} wants ${keep}`);
      return;
    }
    if (!facts.needsBackward[block]) this.fail(`block ${block} has no backward`);
    if (i.op === "backward") {
      this.count("dOut", i.dOut, outputs.length);
      for (const o of outputs.keys()) {
        const flows = facts.contributors[block]![o]!.length > 0;
        this.boundary(`dOut ${o}`, i.dOut[o]!, flows ? { block, output: o } : null);
      }
    }
    this.count("dIn", i.dIn, inputs.length);
    this.count("add", i.add, inputs.length);
    for (const [k, source] of inputs.entries()) {
      const share = facts.contribution(block, k);
      this.boundary(`dIn ${k}`, i.dIn[k]!, share !== null && "block" in source ? source : null);
      const add = share !== null && share.index > 0;
      if (i.add[k] === add) continue;
      const which = share === null ? "where no gradient flows" : `as contribution ${share.index + 1} of ${share.of}`;
      this.fail(`dIn ${k} ${i.add[k] ? "adds" : "overwrites"} ${which}`);
    }
    this.state("sums", i.sums, facts.layouts[block]!.sumsBytes);
    if (i.first !== (microBatch === this.mine[0])) this.fail(`first is ${i.first} at micro-batch ${microBatch}`);
  }

  private update(i: Op<"update">): void {
    const layout = this.facts.layouts[i.block]!;
    if (!this.facts.trains(i.block)) this.fail(`block ${i.block} owns no trainable parameter`);
    this.state("param", i.param, layout.paramBytes);
    this.state("state", i.state, layout.stateBytes);
    const from = this.tape.update === "forward" ? "retained" : "sums";
    if (i.from !== from) this.fail(`takes its gradient from ${i.from}; update ${this.tape.update} wants ${from}`);
    if (from === "sums") {
      this.gradient(i.block, "grad", i.grad);
      return;
    }
    this.count("grad", i.grad, 1);
    this.retainedDType(i);
    this.state("grad 0", i.grad[0]!, layout.retainedBytes(i.dtype));
  }

  private copy(i: Op<"copy">): void {
    const route = ROUTES[i.queue];
    if (route === undefined) this.fail(`${i.queue} is no copy queue`);
    this.operand(i.operand);
    const ends = [i.from, i.to].map((p) => this.place("copy", p));
    for (const [k, place] of ends.entries()) {
      const what = k === 0 ? "from" : "to";
      if (!route[k]!.includes(place.space))
        this.fail(`${what} is on ${place.space}; queue ${i.queue} wants ${route[k]!.join(" or ")}`);
      this.holdsOperand(what, [i.from, i.to][k]!, i.operand);
      const unit = route.flat().includes("disk") ? PAGE : 1;
      if (place.offset % unit !== 0) this.fail(`${what} (${showRange(place)}) is not on a multiple of ${unit}`);
      if (!isCount(i.at) || !isCount(i.bytes, 1) || i.at % unit !== 0 || i.bytes % unit !== 0)
        this.fail(`bytes ${i.at}..${i.at + i.bytes} are no range${unit > 1 ? ` of whole ${unit} bytes` : ""}`);
      if (i.at + i.bytes > place.bytes)
        this.fail(`bytes ${i.at}..${i.at + i.bytes} end beyond ${what}, ${showRange(place)}`);
    }
  }

  private exchange(i: Op<"send" | "receive">): void {
    const { stages } = this.tape;
    if (stages === undefined || !isCount(i.peer) || i.peer >= stages.ranks || i.peer === stages.rank)
      this.fail(`there is no other rank ${i.peer}`);
    if (i.operand !== undefined && "shard" in i.operand) {
      this.exchangeShard(i, i.operand);
      return;
    }
    if (i.operand !== undefined && !("output" in i.operand)) {
      this.exchangeTied(i, i.operand);
      return;
    }
    if (i.operand?.kind !== "x" && i.operand?.kind !== "dx")
      this.fail("only boundaries, shards and what stages share go from rank to rank");
    this.operand(i.operand);
    const { block, output } = i.operand;
    const most = i.operand.kind === "x" ? 0 : this.facts.contributors[block]![output]!.length;
    if (!isCount(i.count, Math.min(most, 1)) || i.count > most)
      this.fail(`count is ${i.count}, expected up to ${most}`);
    this.boundary("place", i.place, i.operand);
    if (!isCount(i.bytes, this.boundaryBytes[block]![output]!) || i.bytes > this.tape.places[i.place]!.bytes)
      this.fail(`${i.bytes} bytes are not those of the boundary`);
  }

  /** Between the stage that owns a parameter and one that uses it, and between the same members of both. */
  private exchangeTied(i: Op<"send" | "receive">, { kind, block }: Tied): void {
    const { facts } = this;
    const stages = this.tape.stages!;
    const layout = facts.layouts[block];
    if (layout === undefined) this.fail(`block ${block} does not exist`);
    const [own, peer] = [stageOf(stages), stageOf(stages, i.peer)];
    const [from, to] = i.op === "send" ? [own, peer] : [peer, own];
    const uses = (user: number) =>
      facts.owners[user]!.some((o) => stages.of[o] === to && facts.users[o]!.includes(user));
    const ends =
      kind === "sums" ? uses(block) : facts.owners.some((owners, b) => stages.of[b] === to && owners.includes(block));
    if (stages.of[block] !== from || from === to || !ends || memberOf(stages) !== memberOf(stages, i.peer))
      this.fail(`${kind}(${block}) is not for rank ${i.op === "send" ? i.peer : stages.rank}`);
    const read = layout.computeBytes > 0 ? "compute" : "param";
    if (kind !== "sums" && kind !== read) this.fail(`passes read ${read}(${block}), not its ${kind}`);
    const bytes = kind === "sums" ? layout.sumsBytes : layout.computeBytes || layout.paramBytes;
    this.state("place", i.place, bytes);
    if (i.bytes !== bytes || i.count !== 0) this.fail(`${i.bytes} bytes, count ${i.count}, are not those of ${kind}`);
  }

  private exchangeShard(i: Op<"send" | "receive">, { kind, block, shard, of }: Shard): void {
    const stages = this.tape.stages!;
    if (this.facts.layouts[block] === undefined || !this.facts.isMine(block)) this.fail(`block ${block} is not here`);
    if (stageOf(stages, i.peer) !== stageOf(stages)) this.fail(`rank ${i.peer} is of another stage`);
    const most = { compute: 1, partial: membersOf(stages), reduced: replicasOf(stages), updated: 1 }[kind];
    if (most === undefined) this.fail(`there are no shards of ${kind}`);
    if (!isCount(shard) || shard >= shardsOf(stages) || !isCount(of) || of >= most || i.count !== 0)
      this.fail(`there is no shard ${shard} of ${of}, count ${i.count}`);
    const place = this.place("place", i.place);
    if (kind === "updated") {
      const writer = i.op === "send" ? stages.rank : i.peer;
      const sharing = i.op === "send" ? i.peer : stages.rank;
      if (
        shard !== shardOf(stages, writer) ||
        replicaOf(stages, writer) !== replicaOf(stages, sharing) ||
        i.bytes !== 1
      )
        this.fail(`rank ${writer} has no word of shard ${shard} for rank ${sharing}`);
      if (!samePlace(place, this.facts.slab(this.tape.placement, block, shard)))
        this.fail(`${showRange(place)} is not where shard ${shard} lies`);
      return;
    }
    const bytes = this.shardBytes(
      kind,
      block,
      shard,
      kind === "partial" ? this.gradientItemsize(i.bytes, block, shard) : 0,
    );
    if (place.space !== "device" || place.bytes !== bytes || i.bytes !== bytes)
      this.fail(`${i.bytes} bytes of ${showRange(place)} are not those of the shard, ${bytes}`);
  }

  /** Gradients travel in one of two widths; which, their reduction says. */
  private gradientItemsize(bytes: number, block: number, shard: number): number {
    const narrow = this.shardBytes("partial", block, shard, 2);
    return bytes === narrow ? 2 : this.facts.wideItemsize;
  }

  private shardBytes(
    kind: Shard["kind"],
    block: number,
    shard = shardOf(this.tape.stages!),
    itemsize = kind === "compute" ? this.facts.computeItemsize : this.facts.wideItemsize,
  ): number {
    const { begin, end } = this.facts.layouts[block]!.shard(shard)[kind === "compute" ? "compute" : "partial"];
    return (end - begin) * (itemsize || (kind === "compute" ? this.facts.computeItemsize : this.facts.wideItemsize));
  }

  private partial(i: Op<"partial">): void {
    const { facts } = this;
    if (membersOf(this.tape.stages) === 1) this.fail("there is no other rank to share a gradient with");
    if (!facts.isTrained(i.block)) this.fail(`block ${i.block} owns no trainable parameter`);
    this.userSums(i.block, "sums", i.sums);
    this.gradientDType(i.dtype);
    this.state("to", i.to, facts.layouts[i.block]!.partialBytes(i.dtype));
  }

  private reduce(i: Op<"reduce">): void {
    const { stages } = this.tape;
    if (membersOf(stages) === 1) this.fail("there is no other rank to share a gradient with");
    if (!this.facts.trains(i.block)) this.fail(`this rank holds nothing of block ${i.block} that trains`);
    this.gradientDType(i.dtype);
    if (i.of !== "partial" && i.of !== "reduced") this.fail(`${i.of} is nothing to reduce`);
    this.count("parts", i.parts, i.of === "partial" ? shardsOf(stages) : replicasOf(stages));
    const itemsize = i.of === "partial" ? dtypeBytes(i.dtype) : this.facts.wideItemsize;
    for (const [k, p] of i.parts.entries())
      this.state(`part ${k}`, p, this.shardBytes("partial", i.block, undefined, itemsize));
    this.state("to", i.to, this.shardBytes("reduced", i.block));
  }

  private gradientDType(dtype: string): void {
    const wide = this.facts.wideItemsize === 8 ? "float64" : "float32";
    if (dtype !== wide && dtype !== "bfloat16") this.fail(`a gradient does not travel as ${dtype}`);
  }

  private operand(o: Operand): void {
    const layout = this.facts.layouts[o?.block];
    if (layout === undefined) this.fail(`block ${o?.block} does not exist`);
    if ("output" in o) {
      const exists = this.facts.isRead[o.block]![o.output];
      if (!exists || !isCount(o.microBatch) || o.microBatch >= this.tape.microBatches)
        this.fail("copies a boundary that does not exist");
    } else if (!["param", "state", "retained"].includes(o.kind) || (o.shard !== undefined && o.kind !== "param"))
      this.fail(`${(o as Operand).kind} is no operand to copy`);
  }

  /** The place is of the size that the copied operand has. */
  private holdsOperand(what: string, p: number, o: Operand): void {
    if ("output" in o) {
      this.boundary(what, p, o);
      return;
    }
    const layout = this.facts.layouts[o.block]!;
    const place = this.tape.places[p]!;
    const { bytes } = place;
    if (place.space === "shared") this.sharedEnd(what, place, o);
    if (o.shard !== undefined) {
      const { heldBytes } = this.others(o.block, o.shard);
      if (bytes !== heldBytes) this.fail(`${what}: ${showPlace(this.tape, p)} is not of size ${heldBytes}`);
      return;
    }
    // On its way to disk, only the trained part of the parameters is there.
    const sizes = {
      retained: RETAINED_DTYPES.map((d) => layout.retainedBytes(d)),
      param: [layout.paramBytes, layout.trainableBytes],
      state: [layout.stateBytes],
    }[o.kind];
    if (!sizes.includes(bytes)) this.fail(`${what}: ${showPlace(this.tape, p)} is not of size ${sizes.join(" or ")}`);
  }

  /** A shard that another rank has, of which this one reads. */
  private others(block: number, shard: number): ReturnType<Facts["layouts"][number]["slab"]> {
    const { stages, placement } = this.tape;
    const exists = Number.isSafeInteger(shard) && shard >= 0 && shard < shardsOf(stages);
    if (placement.homes[block]!.shared === undefined || !exists || shard === shardOf(stages!))
      this.fail(`there is no other rank's shard ${shard} of block ${block} in shared memory`);
    return this.facts.layouts[block]!.slab(shard);
  }

  /** Of shared memory a rank writes its own parts only, and copies from where the operand lies. */
  private sharedEnd(what: string, place: Place, { kind, block, shard }: Exclude<Operand, Boundary>): void {
    const { stages, placement } = this.tape;
    const slab = kind === "param" ? this.facts.slab(placement, block, shard ?? shardOf(stages!)) : null;
    const bytes = shard === undefined ? slab?.bytes : this.facts.layouts[block]!.slab(shard).heldBytes;
    if (slab === null || place.offset !== slab.offset || place.bytes !== bytes)
      this.fail(`${what}: ${showRange(place)} is not where the part lies`);
    if (what === "to" && shard !== undefined) this.fail(`shard ${shard} of block ${block} is another rank's to write`);
  }

  private gradient(block: number, what: string, list: number[]): void {
    if (!this.facts.trains(block)) this.fail(`block ${block} owns no trainable parameter`);
    if (membersOf(this.tape.stages) === 1) {
      this.userSums(block, what, list);
      return;
    }
    this.count(what, list, 1);
    this.state(`${what} 0`, list[0]!, this.shardBytes("reduced", block));
  }

  private userSums(block: number, what: string, list: number[]): void {
    const users = this.facts.users[block]!;
    this.count(what, list, users.length);
    for (const [k, user] of users.entries()) this.state(`${what} ${k}`, list[k]!, this.facts.layouts[user]!.sumsBytes);
  }

  /** A flat buffer on the device; -1 where the operand has no byte. */
  private state(what: string, p: number, bytes: number): void {
    if (bytes === 0) {
      if (p !== -1) this.fail(`${what} has place ${p}, and there is nothing to hold`);
      return;
    }
    const place = this.place(what, p);
    if (place.space !== "device") this.fail(`${what}: ${showPlace(this.tape, p)} is not on the device`);
    if (place.bytes !== bytes)
      this.fail(`${what}: ${showPlace(this.tape, p)} has ${place.bytes} bytes, expected ${bytes}`);
  }

  /** A boundary or its gradient; null: there is none. */
  private boundary(what: string, p: number, of: { block: number; output: number } | null): void {
    if (of === null) {
      if (p !== -1) this.fail(`${what} has place ${p}, and there is nothing to hold`);
      return;
    }
    const place = this.place(what, p);
    const copied = ["copy", "send", "receive"].includes(this.tape.instructions[this.at]!.op);
    if (place.space === "slot" ? copied : this.tape.dims === null)
      this.fail(
        `${what}: ${showPlace(this.tape, p)}, ${copied ? "a slot is not copied" : "expected a slot without dims"}`,
      );
    if (place.space === "slot") return;
    if (!copied && place.space !== "device") this.fail(`${what}: ${showPlace(this.tape, p)} is not on the device`);
    const bytes = this.boundaryBytes[of.block]![of.output]!;
    if (place.bytes < bytes)
      this.fail(`${what}: ${showPlace(this.tape, p)} has ${place.bytes} bytes, expected ${bytes}`);
  }

  private place(what: string, p: number): Place {
    const place = this.tape.places[p];
    if (place === undefined) this.fail(`${what}: place ${p} is not one of ${this.tape.places.length}`);
    return place;
  }

  private retainedDType({ dtype }: { dtype: RetainedDType }): void {
    if (!RETAINED_DTYPES.includes(dtype)) this.fail(`${dtype} is no dtype of a retained gradient`);
  }

  private count(what: string, list: readonly unknown[], expected: number): void {
    if (!Array.isArray(list) || list.length !== expected)
      this.fail(`${what} has ${list?.length} entries, expected ${expected}`);
  }

  private fail(why: string): never {
    refuse(this.tape, this.at, why);
  }
}

/** The queue that it waits its turn on; each peer has one of its own in either direction. */
export const queueOf = (i: Instruction): string =>
  i.op === "copy" ? i.queue : i.op === "send" || i.op === "receive" ? `${i.op} ${i.peer}` : "compute";
