/**
 * Tracing: runs a model function on symbolic values and writes the Graph. Shapes are checked op by op as they are
 * recorded, and an error names model, block, op and dims. Nothing of libtorch is loaded.
 */
import { StromaError } from "../errors.js";
import { type Context, type ContextOptions, checkContext, SEQUENCE_DIM } from "./context.js";
import { canonical, dimNames, shapeEqual, showShape } from "./dims.js";
import { encodeCall } from "./encode.js";
import type { BlockScope, LossOptions, ModelDefinition, ModelScope, ParameterOptions } from "./model.js";
import { RuleError } from "./rule.js";
import { rules } from "./rules.js";
import { type OpArguments, type OpName, schemas } from "./schemas.js";
import type {
  BatchInput,
  Block,
  Dim,
  DType,
  Graph,
  LossTerm,
  Mode,
  Node,
  Parameter,
  Program,
  ProgramInput,
  ProgramOutput,
  ProgramParameter,
  Source,
} from "./types.js";
import { validateGraph } from "./validate.js";
import { type Backend, scaleDType, type TensorMeta, type Value } from "./value.js";

export interface TraceOptions {
  mode?: Mode;
  /**
   * dtype of parameters and activations: what the session computes in. A graph is traced for one. Default float32.
   */
  dtype?: DType;
  /** Shares the tokens of every row out to the ranks of a group. Default: rows are whole, as with one rank. */
  context?: ContextOptions | null;
}

/** Runs `definition` over `config` (plain JSON, stored in the graph). Throws SHAPE or GRAPH, and CONFIG for a context in generate. */
export function traceModel<C>(definition: ModelDefinition<C>, config: C, options: TraceOptions = {}): Graph {
  const { mode = "train", dtype = "float32" } = options;
  const context = checkContext(options.context);
  if (context !== null && mode === "generate") {
    throw new StromaError(
      "CONFIG",
      `[${definition.name}] a row that is being generated is not shared out to ranks: trace generate without context`,
    );
  }
  const tracer = new Tracer(definition.name, mode, dtype, context);
  definition.build(tracer, config);
  const graph = tracer.finish(config);
  validateGraph(graph);
  return graph;
}

/** A tensor between blocks: of the batch, or the output of a block. */
class Boundary implements Value {
  constructor(
    readonly backend: Tracer,
    readonly source: Source,
    readonly dtype: DType,
    readonly shape: readonly Dim[],
    readonly grad: boolean,
    readonly label: string,
  ) {}
}

/** A tensor inside the block that is being traced. `id` is set once the program closes. */
class Local implements Value {
  id = -1;
  constructor(
    readonly backend: Tracer,
    readonly program: ProgramTrace,
    readonly dtype: DType,
    readonly shape: readonly Dim[],
    readonly grad: boolean,
    readonly label?: string,
  ) {}
}

type Slot = { kind: ProgramInput["kind"]; source: Source; carry: number; template: string | null; local: Local };
type Structure = "none" | "one" | number;

/** A block body's result: enough to place the program again for the next layer. */
interface Traced {
  program: number;
  inputs: Slot[];
  parameters: string[];
  structure: Structure;
  losses: { name: string; output: number; options: LossOptions }[];
  named: { name: string; output: number }[];
}

class Tracer implements ModelScope, Backend {
  current: ProgramTrace | null = null;
  readonly inputs = new Map<string, { input: BatchInput; used: boolean; value: Boundary }>();
  readonly programs: Program[] = [];
  readonly blocks: Block[] = [];
  readonly parameters = new Map<string, Parameter>();
  private readonly losses: LossTerm[] = [];
  private readonly outputs: Graph["outputs"] = [];

  constructor(
    readonly name: string,
    readonly mode: Mode,
    readonly dtype: DType,
    readonly context: Context | null,
  ) {}

  input(name: string, dtype: DType, shape: Dim[]): Boundary {
    const known = this.inputs.get(name);
    if (known !== undefined) {
      if (known.input.dtype !== dtype || !shapeEqual(known.input.shape, shape)) {
        throw this.error("GRAPH", `batch input ${name} is defined twice and differently`);
      }
      return known.value;
    }
    const value = new Boundary(this, { batch: name }, dtype, shape.map(canonical), false, name);
    this.inputs.set(name, { input: { name, dtype, shape: [...value.shape] }, used: false, value });
    return value;
  }

  block<R extends Value | readonly Value[] | undefined>(name: string, body: (p: BlockScope) => R): R {
    const traced = this.trace(name, name, [], (p) => body(p));
    return this.place(name, traced, [], null) as R;
  }

  repeat<C extends Value | readonly Value[]>(
    name: string,
    count: number,
    carry: C,
    body: (p: BlockScope, carry: C) => C,
  ): C {
    if (!Number.isInteger(count) || count < 1) {
      throw this.error("INVALID_ARGUMENT", `repeat ${name}: expected a count of at least 1, got ${count}`);
    }
    let values: readonly Value[] = asList(carry);
    const cache = new Map<string, Traced>();
    for (let i = 0; i < count; i++) {
      const key = JSON.stringify(values.map((v) => [kindOf(v), v.dtype, v.shape, v.grad]));
      let traced = cache.get(key);
      if (traced === undefined) {
        const label = `${name}.${i}`;
        traced = this.trace(label, name, values, (p, carried) =>
          body(p, (Array.isArray(carry) ? carried : carried[0]) as C),
        );
        if (traced.structure !== (Array.isArray(carry) ? values.length : "one")) {
          throw this.error("GRAPH", `${label}: expected the body to return what it carries (${values.length} values)`);
        }
        cache.set(key, traced);
      }
      const next = asList(this.place(`${name}.${i}`, traced, values, i) as C);
      for (const [j, v] of next.entries()) {
        const before = values[j]!;
        if (v.dtype !== before.dtype || !shapeEqual(v.shape, before.shape)) {
          throw this.error(
            "SHAPE",
            `${name}.${i}: carries ${before.dtype} ${showShape(before.shape)} in and ${v.dtype} ${showShape(v.shape)} out`,
          );
        }
      }
      values = next;
    }
    return (Array.isArray(carry) ? values : values[0]) as C;
  }

  call<K extends OpName>(op: K, args: OpArguments<Value>[K]): Value {
    if (this.current === null)
      throw this.error("GRAPH", `${op}: ops stand inside m.block or m.repeat, this one does not`);
    return this.current.record(op, args);
  }

  private trace(
    label: string,
    name: string,
    carry: readonly Value[],
    body: (p: BlockScope, carried: readonly Value[]) => Value | readonly Value[] | undefined,
  ): Traced {
    if (this.current !== null) {
      throw this.error("GRAPH", `${label} is defined inside ${this.current.label}; blocks do not nest`);
    }
    const program = new ProgramTrace(this, label, label === name ? name : `${name}.*`, label);
    this.current = program;
    try {
      const carried = carry.map((v, i) => program.carried(v, i));
      const result = body(program.scope(), carried);
      return program.close(result);
    } finally {
      this.current = null;
    }
  }

  /** Adds a block that runs a traced program; `index` names what belongs to one of several layers. */
  private place(name: string, traced: Traced, carry: readonly Value[], index: number | null): unknown {
    if (this.blocks.some((b) => b.name === name)) throw this.error("GRAPH", `two blocks are named ${name}`);
    const block = this.blocks.length;
    const program = this.programs[traced.program]!;
    const own = (n: string) => (index === null ? n : `${n}.${index}`);
    const inputs = traced.inputs.map((slot, i): Source => {
      const input = program.inputs[i]!;
      if (slot.carry >= 0) return this.use((carry[slot.carry] as Boundary).source);
      if (slot.template !== null) return this.use(this.input(own(slot.template), input.dtype, input.shape).source);
      return this.use(slot.source);
    });
    const parameters = traced.parameters.map((p) => (p.startsWith("\0") ? name + p.slice(1) : p));
    for (const [i, full] of parameters.entries()) {
      const first = this.definitions.get(`${traced.program}:${traced.parameters[i]}`)!;
      this.define(full, program.parameters[i]!.shape, first, block, name);
    }
    this.blocks.push({ name, program: traced.program, inputs, parameters });
    for (const { name: term, output, options } of traced.losses) {
      const count = (options.count as Boundary).source as { batch: string };
      this.use(count);
      const scale = own(term);
      if (this.losses.some((l) => l.name === scale)) throw this.error("GRAPH", `two loss terms are named ${scale}`);
      this.losses.push({
        name: scale,
        block,
        output,
        weight: options.weight ?? 1,
        count: { input: count.batch, ignore: options.ignore },
      });
      if (this.mode !== "train") this.outputs.push({ name: scale, block, output });
    }
    for (const { name: n, output } of traced.named) this.outputs.push({ name: own(n), block, output });
    const values = program.outputs.map(
      (o, output) => new Boundary(this, { block, output }, o.dtype, o.shape, o.grad, `${name}:${o.name}`),
    );
    if (traced.structure === "none") return undefined;
    return traced.structure === "one" ? values[0] : values.slice(0, traced.structure);
  }

  private use(source: Source): Source {
    if ("batch" in source) this.inputs.get(source.batch)!.used = true;
    return source;
  }

  /** Options of the first definition in each program, by its placeholder name. */
  readonly definitions = new Map<string, ParameterOptions>();

  private define(name: string, shape: number[], options: ParameterOptions, owner: number, block: string): void {
    const known = this.parameters.get(name);
    if (known === undefined) {
      const init = options.init ?? { kind: "normal", std: 0.02 };
      const decay = options.decay ?? shape.length >= 2;
      this.parameters.set(name, { name, shape, init, decay, trainable: options.trainable ?? true, owner });
      return;
    }
    if (!shapeEqual(known.shape, shape)) {
      throw this.error(
        "SHAPE",
        `${block}: parameter ${name} is ${showShape(shape)} here and ${showShape(known.shape)} in ${this.blocks[known.owner]?.name}`,
      );
    }
  }

  finish(config: unknown): Graph {
    return {
      format: "stromatolite.graph",
      version: 1,
      model: this.name,
      mode: this.mode,
      dtype: this.dtype,
      config: JSON.parse(JSON.stringify(config ?? null)),
      inputs: [...this.inputs.values()].filter((i) => i.used).map((i) => i.input),
      programs: this.programs,
      blocks: this.blocks,
      parameters: [...this.parameters.values()],
      losses: this.losses,
      outputs: this.outputs,
    };
  }

  error(code: "GRAPH" | "SHAPE" | "INVALID_ARGUMENT", message: string): StromaError {
    return new StromaError(code, `[${this.name}] ${message}`, { model: this.name });
  }
}

class ProgramTrace {
  private readonly slots: Slot[] = [];
  private readonly bySource = new Map<string, Slot>();
  private readonly params = new Map<string, { local: Local; options: ParameterOptions }>();
  private readonly recorded: { op: OpName; args: readonly unknown[]; out: Local }[] = [];
  private readonly losses: { name: string; value: Local; options: LossOptions }[] = [];
  private readonly named: { name: string; value: Local }[] = [];
  private sites = 0;

  constructor(
    readonly tracer: Tracer,
    readonly label: string,
    readonly name: string,
    /** Path of the block that is traced; parameters below it are stored relative to it. */
    readonly prefix: string,
  ) {}

  scope(path = this.prefix): BlockScope {
    return {
      mode: this.tracer.mode,
      dtype: this.tracer.dtype,
      context: this.tracer.context,
      path,
      backend: this.tracer,
      sub: (name) => this.scope(`${path}.${name}`),
      at: (absolute) => this.scope(absolute),
      param: (name, shape, options) => this.param(`${path}.${name}`, shape, options ?? {}),
      loss: (name, value, options) => this.loss(name, value, options),
      lossScale: (name) =>
        this.given("lossScale", { lossScale: name }, scaleDType(this.tracer.dtype), [], `lossScale ${name}`),
      output: (name, value) => this.output(name, value),
      input: (name, dtype, shape) => this.ownInput(name, dtype, shape),
      rngKey: () => this.given("rngKey", { rngKey: true }, "int64", [4], "rngKey"),
      site: () => this.sites++,
    };
  }

  carried(value: Value, index: number): Value {
    const boundary = this.boundary(value);
    return this.addSlot(boundary, index, null);
  }

  private addSlot(from: Boundary, carry: number, template: string | null): Local {
    const local = new Local(this.tracer, this, from.dtype, from.shape, from.grad, from.label);
    const slot: Slot = { kind: kindOf(from), source: from.source, carry, template, local };
    this.slots.push(slot);
    return local;
  }

  private given(kind: "lossScale" | "rngKey", source: Source, dtype: DType, shape: Dim[], label: string): Local {
    const key = JSON.stringify(source);
    const known = this.bySource.get(key);
    if (known !== undefined) return known.local;
    const local = new Local(this.tracer, this, dtype, shape, false, label);
    const slot: Slot = { kind, source, carry: -1, template: null, local };
    this.slots.push(slot);
    this.bySource.set(key, slot);
    return local;
  }

  private ownInput(name: string, dtype: DType, shape: Dim[]): Local {
    const key = `own ${name}`;
    const known = this.bySource.get(key);
    if (known !== undefined) return known.local;
    const from = new Boundary(this.tracer, { batch: name }, dtype, shape.map(canonical), false, name);
    const local = this.addSlot(from, -1, name);
    this.bySource.set(key, this.slots.at(-1)!);
    return local;
  }

  private boundary(value: Value): Boundary {
    if (value instanceof Boundary && value.backend === this.tracer) return value;
    throw this.error("GRAPH", "expected a value of this model's inputs or earlier blocks");
  }

  /** A Value as this program knows it: its own, or a value from outside that becomes an input. */
  private local(value: Value): Local {
    if (value instanceof Local) {
      if (value.program === this) return value;
      throw this.error("GRAPH", `uses a value from inside ${value.program.label}; return it from that block instead`);
    }
    const from = this.boundary(value);
    const key = JSON.stringify(from.source);
    const known = this.bySource.get(key);
    if (known !== undefined) return known.local;
    const local = this.addSlot(from, -1, null);
    this.bySource.set(key, this.slots.at(-1)!);
    return local;
  }

  private param(full: string, shape: number[], options: ParameterOptions): Local {
    const known = this.params.get(full);
    if (known !== undefined) {
      if (shapeEqual(known.local.shape, shape)) return known.local;
      throw this.error(
        "SHAPE",
        `parameter ${full} is ${showShape(shape)} here and ${showShape(known.local.shape)} before`,
      );
    }
    for (const d of shape) {
      if (!Number.isSafeInteger(d) || d < 1)
        throw this.error("SHAPE", `parameter ${full} has shape ${showShape(shape)}`);
    }
    const trainable = this.tracer.parameters.get(full)?.trainable ?? options.trainable ?? true;
    const local = new Local(this.tracer, this, this.tracer.dtype, shape, trainable, full);
    this.params.set(full, { local, options });
    return local;
  }

  record<K extends OpName>(op: K, args: OpArguments<Value>[K]): Local {
    const own = (args as readonly unknown[]).map((arg) =>
      isValue(arg) ? this.local(arg) : Array.isArray(arg) && arg.some(isValue) ? arg.map((a) => this.local(a)) : arg,
    );
    if (this.tracer.context !== null && op === "scaledDotProductAttention") this.refuseOwnTokens(own[1] as Local);
    let meta: TensorMeta;
    try {
      // The rule's argument types are those of `op`; TypeScript cannot follow K through the table.
      const rule = rules[op] as { infer(args: unknown): TensorMeta };
      meta = rule.infer(own);
    } catch (error) {
      if (!(error instanceof RuleError || error instanceof StromaError)) throw error;
      throw this.error("SHAPE", `${schemas[op].overload}: ${error.message}`, op, error);
    }
    const shape = meta.shape.map(canonical);
    const out = new Local(this.tracer, this, meta.dtype, shape, meta.grad);
    this.recorded.push({ op, args: own, out });
    return out;
  }

  /** Keys of a part of the row alone would train another model without a word. */
  private refuseOwnTokens(keys: Local): void {
    if (!keys.shape.some((d) => dimNames(d).includes(SEQUENCE_DIM))) return;
    throw this.error(
      "GRAPH",
      `attention over keys ${showShape(keys.shape)} would see this rank's tokens alone, and rows are shared out to ${this.tracer.context!.ranks} ranks: use nn.selfAttention or ops.sequenceAttention`,
      "scaledDotProductAttention",
    );
  }

  private loss(name: string, value: Value, options: LossOptions): void {
    const local = this.local(value);
    const wide = this.tracer.dtype === "float64" && local.dtype === "float64";
    if ((local.dtype !== "float32" && !wide) || local.shape.length !== 0) {
      throw this.error(
        "SHAPE",
        `loss ${name}: expected a float32 scalar, got ${local.dtype} ${showShape(local.shape)}`,
      );
    }
    const count = this.boundary(options.count);
    if (!("batch" in count.source)) throw this.error("GRAPH", `loss ${name}: expected a batch input as its count`);
    if (!Number.isFinite(options.weight ?? 1)) throw this.error("GRAPH", `loss ${name}: weight is not finite`);
    if (this.losses.some((l) => l.name === name)) throw this.error("GRAPH", `two loss terms are named ${name}`);
    this.losses.push({ name, value: local, options });
  }

  private output(name: string, value: Value): void {
    if (this.tracer.mode === "train") {
      throw this.error(
        "GRAPH",
        `output ${name}: a training graph returns losses only; name outputs in eval or generate`,
      );
    }
    if (this.named.some((o) => o.name === name)) throw this.error("GRAPH", `two outputs are named ${name}`);
    this.named.push({ name, value: this.local(value) });
  }

  close(result: Value | readonly Value[] | undefined): Traced {
    const returned = result === undefined ? [] : asList(result);
    const structure: Structure = result === undefined ? "none" : Array.isArray(result) ? returned.length : "one";
    const outputs: { name: string; value: Local }[] = returned.map((v, i) => ({
      name: structure === "one" ? "output" : `output.${i}`,
      value: this.local(v),
    }));
    const place = (name: string, value: Local): number => {
      const i = outputs.findIndex((o) => o.value === value);
      if (i < 0) return outputs.push({ name, value }) - 1;
      outputs[i]!.name = name;
      return i;
    };
    const losses = this.losses.map((l) => ({ name: l.name, output: place(l.name, l.value), options: l.options }));
    const named = this.named.map((o) => ({ name: o.name, output: place(o.name, o.value) }));
    for (const o of outputs) {
      if (this.slots.some((s) => s.local === o.value) || [...this.params.values()].some((p) => p.local === o.value)) {
        throw this.error(
          "GRAPH",
          `output ${o.name} is an input or a parameter as it came in; pass it around the block`,
        );
      }
    }
    if (outputs.length === 0) throw this.error("GRAPH", "returns nothing and registers no loss or output");

    let id = 0;
    const relative: string[] = [];
    const parameters: ProgramParameter[] = [];
    const inputs = this.slots.map((s): ProgramInput => {
      s.local.id = id++;
      const { dtype, shape, grad } = s.local;
      return { name: this.inputName(s), kind: s.kind, dtype, shape: [...shape], grad };
    });
    const program = this.tracer.programs.length;
    for (const [full, { local, options }] of this.params) {
      local.id = id++;
      const below = full.startsWith(`${this.prefix}.`);
      const placeholder = below ? `\0${full.slice(this.prefix.length)}` : full;
      relative.push(placeholder);
      this.tracer.definitions.set(`${program}:${placeholder}`, options);
      parameters.push({ name: below ? full.slice(this.prefix.length + 1) : full, shape: local.shape as number[] });
    }
    // Only what an output needs; a mode may leave parts of a body unused.
    const live = new Set<unknown>(outputs.map((o) => o.value));
    for (const { args, out } of this.recorded.toReversed()) {
      if (live.has(out)) for (const arg of args.flat()) live.add(arg);
    }
    const nodes: Node[] = [];
    for (const { op, args, out } of this.recorded) {
      if (!live.has(out)) continue;
      nodes.push({ ...encodeCall(op, args, (v) => (v as Local).id), outputs: [id] });
      out.id = id++;
    }
    this.tracer.programs.push({
      name: this.name,
      inputs,
      parameters,
      nodes,
      outputs: outputs.map(
        ({ name, value }): ProgramOutput => ({
          name,
          value: value.id,
          dtype: value.dtype,
          shape: [...value.shape],
          grad: value.grad,
        }),
      ),
      values: id,
    });
    return { program, inputs: this.slots, parameters: relative, structure, losses, named };
  }

  private inputName(slot: Slot): string {
    const s = slot.source;
    if (slot.carry >= 0) return slot.carry === 0 ? "x" : `x.${slot.carry}`;
    if (slot.template !== null) return slot.template;
    if ("batch" in s) return s.batch;
    if ("lossScale" in s) return `lossScale.${s.lossScale}`;
    if ("rngKey" in s) return "rngKey";
    return slot.local.label ?? "x";
  }

  private error(code: "GRAPH" | "SHAPE", message: string, op?: OpName, cause?: unknown): StromaError {
    return new StromaError(
      code,
      `[${this.tracer.name}] ${this.label}: ${message}`,
      { model: this.tracer.name, block: this.label, op },
      { cause },
    );
  }
}

const isValue = (a: unknown): a is Value => a instanceof Boundary || a instanceof Local;
const asList = <C extends Value | readonly Value[]>(c: C): readonly Value[] => (Array.isArray(c) ? c : [c as Value]);

function kindOf(v: Value): ProgramInput["kind"] {
  return v instanceof Boundary && "batch" in v.source ? "batch" : "boundary";
}
