/** Who reads what in a graph that trains: facts that every schedule shares. */
import { StromaError } from "../errors.js";
import type { Graph, Program, Source } from "../graph/types.js";
import { ownersOf, usersOf } from "./layout.js";
import { stageOf } from "./mesh.js";
import type { Stages } from "./types.js";

/** Throws TAPE for a graph that does not train, or a block that returns a loss beside something else. */
export class Flow {
  /** Blocks of this rank that run as `forward`, ascending. */
  readonly forwards: number[];
  /** Of this rank, that run as `turn` or `backward`, descending. */
  readonly backwards: number[];
  /** Of this rank, that own a trainable parameter, ascending. */
  readonly trained: number[];
  /** By block: ownersOf, usersOf and its program. */
  readonly owners: readonly (readonly number[])[];
  readonly users: number[][];
  readonly programs: Program[];
  private readonly losses: Set<number>;
  private readonly backward = new Set<number>();
  private readonly consumed = new Set<string>();
  private readonly summed = new Set<string>();

  /** `stages`: whose blocks of them `forwards`, `backwards` and `trained` are; all other facts are of the whole graph. */
  constructor(
    readonly graph: Graph,
    readonly stages?: Stages,
  ) {
    if (graph.mode !== "train")
      throw new StromaError("TAPE", `[plan] expected a graph in train mode, got ${graph.mode}`);
    this.losses = new Set(graph.losses.map((l) => l.block));
    if (this.losses.size === 0) throw new StromaError("TAPE", `[plan] ${graph.model} has no loss`);
    if (!graph.parameters.some((p) => p.trainable)) {
      throw new StromaError("TAPE", `[plan] ${graph.model} has no trainable parameter`);
    }
    const order = graph.blocks.map((_, b) => b);
    this.programs = graph.blocks.map((b) => graph.programs[b.program]!);
    for (const b of order) {
      for (const source of this.sources(b)) {
        if ("block" in source) this.consumed.add(`${source.block}:${source.output}`);
      }
      if (this.isTurn(b)) this.checkTurn(b);
    }
    for (const b of order.toReversed()) {
      if (!this.isTurn(b) && !this.backward.has(b)) continue;
      this.backward.add(b);
      for (const i of this.sources(b).keys()) {
        const source = this.gradientSource(b, i);
        if (source === null) continue;
        this.backward.add(source.block);
        this.summed.add(`${source.block}:${source.output}`);
      }
    }
    this.forwards = order.filter((b) => this.isMine(b) && !this.isTurn(b));
    this.backwards = order.filter((b) => this.isMine(b) && this.hasBackward(b)).reverse();
    const trained = new Set(graph.parameters.filter((p) => p.trainable).map((p) => p.owner));
    this.trained = order.filter((b) => this.isMine(b) && trained.has(b));
    this.owners = order.map((b) => ownersOf(graph, b));
    this.users = order.map((b) => (trained.has(b) ? usersOf(graph, b, (u) => this.hasBackward(u)) : []));
  }

  isMine(b: number): boolean {
    return this.stages === undefined || this.stages.of[b] === stageOf(this.stages);
  }
  sources(b: number): Source[] {
    return this.graph.blocks[b]!.inputs;
  }
  /** Its outputs are losses: forward and backward in one. */
  isTurn(b: number): boolean {
    return this.losses.has(b);
  }
  hasBackward(b: number): boolean {
    return this.backward.has(b);
  }
  /** Whether a gradient of the boundary is ever made. */
  isSummed(block: number, output: number): boolean {
    return this.summed.has(`${block}:${output}`);
  }
  isConsumed(block: number, output: number): boolean {
    return this.consumed.has(`${block}:${output}`);
  }
  /** The boundary that input i of block b sends a gradient to; null where none flows. */
  gradientSource(b: number, i: number): { block: number; output: number } | null {
    const source = this.sources(b)[i]!;
    return "block" in source && this.programs[b]!.inputs[i]!.grad ? source : null;
  }

  private checkTurn(b: number): void {
    const losses = new Set(this.graph.losses.filter((l) => l.block === b).map((l) => l.output));
    const other = this.programs[b]!.outputs.find((_, o) => !losses.has(o));
    if (other !== undefined) {
      throw new StromaError(
        "TAPE",
        `[plan] block ${this.graph.blocks[b]!.name} returns a loss and also ${other.name}: ` +
          "give the loss a block of its own",
      );
    }
  }
}
