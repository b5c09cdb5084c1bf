/**
 * Runs a model function on real Tensors, block after block, through the same dispatcher: for debugging, and as the
 * oracle of the compiled graph. libtorch is loaded here, lazily, and nowhere else in src/graph.
 */
import { StromaError } from "../errors.js";
import type { Context } from "./context.js";
import type { BlockScope, LossOptions, ModelDefinition, ModelScope, ParameterOptions } from "./model.js";
import { type OpArguments, type OpName, type OpSchema, schemas, splitArgument } from "./schemas.js";
import type { Dim, DType, Mode } from "./types.js";
import { type Backend, DTYPES, isFloating, type Value } from "./value.js";

/** As much of a Tensor as this runner needs. */
export interface EagerTensor {
  readonly shape: readonly number[];
  readonly dtype: unknown;
  readonly requiresGrad?: boolean;
}

/** Calls an operator by overload name: what src/tensor gives, or a test's own. */
export type CallOp = (name: string, args: unknown[], kwargs?: Record<string, unknown>) => unknown;

export interface EagerOptions<T extends EagerTensor> {
  /** By full name; shapes are checked against what the model asks for. */
  parameters: Readonly<Record<string, T>>;
  /** Batch inputs by name, and lossScale scalars under "lossScale.NAME". */
  batch: Readonly<Record<string, T>>;
  mode?: Mode;
  dtype?: DType;
  /** With the name of a group in c10d's registry: the batch is then this rank's share. */
  context?: Context | null;
  /** int64 [4] of (seed, step, micro-batch, block) for the n-th block; needed only where the model draws. */
  rngKey?: (block: number) => T;
  /** Default: the addon's dispatcher. */
  callOp?: CallOp;
}

export interface EagerResult<T> {
  /** Loss terms by name, times their lossScale, not yet times their weight. */
  losses: Record<string, T>;
  outputs: Record<string, T>;
}

/** A Value over a real tensor; models get these instead of symbolic ones. */
class EagerValue<T extends EagerTensor> implements Value {
  readonly shape: readonly number[];
  readonly dtype: DType;
  readonly grad: boolean;
  constructor(
    readonly backend: Runner<T>,
    readonly tensor: T,
    readonly label?: string,
  ) {
    this.shape = tensor.shape;
    this.dtype = dtypeName(tensor.dtype);
    this.grad = tensor.requiresGrad ?? false;
  }
}

function dtypeName(dtype: unknown): DType {
  const name = String((dtype as { name?: unknown } | null)?.name ?? dtype).replace(/^(torch|stroma)\./, "");
  if (DTYPES.includes(name as DType)) return name as DType;
  throw new StromaError("INVALID_ARGUMENT", `[eager] ${name} is not a dtype that a model may hold`);
}

/** Runs `definition` forward. Throws INVALID_ARGUMENT for a missing or misshapen tensor, NATIVE for what an op throws. */
export async function runEager<C, T extends EagerTensor>(
  definition: ModelDefinition<C>,
  config: C,
  options: EagerOptions<T>,
): Promise<EagerResult<T>> {
  const callOp = options.callOp ?? ((await import("../tensor/call.js")).callOp as unknown as CallOp);
  const runner = new Runner<T>(definition.name, options, callOp);
  definition.build(runner, config);
  return { losses: runner.losses, outputs: runner.outputs };
}

class Runner<T extends EagerTensor> implements ModelScope, Backend {
  readonly losses: Record<string, T> = {};
  readonly outputs: Record<string, T> = {};
  readonly mode: Mode;
  readonly dtype: DType;
  readonly context: Context | null;
  private blocks = 0;
  private inBlock: string | null = null;

  constructor(
    readonly name: string,
    private readonly options: EagerOptions<T>,
    private readonly callOp: CallOp,
  ) {
    this.mode = options.mode ?? "train";
    this.dtype = options.dtype ?? "float32";
    this.context = options.context ?? null;
  }

  input(name: string, dtype: DType, shape: Dim[]): Value {
    const tensor = this.options.batch[name];
    // A mode may not use an input (labels in generate): then it may be missing.
    if (tensor === undefined) return new Missing(this, name, dtype, shape);
    const value = new EagerValue(this, tensor, name);
    if (value.dtype !== dtype || value.shape.length !== shape.length) {
      throw this.error(`batch input ${name}: expected ${dtype} [${shape.join(", ")}], got ${describe(value)}`);
    }
    return value;
  }

  block<R extends Value | readonly Value[] | undefined>(name: string, body: (p: BlockScope) => R): R {
    return this.inside(name, null, body);
  }

  repeat<C extends Value | readonly Value[]>(
    name: string,
    count: number,
    carry: C,
    body: (p: BlockScope, carry: C) => C,
  ): C {
    let x = carry;
    for (let i = 0; i < count; i++) x = this.inside(`${name}.${i}`, i, (p) => body(p, x));
    return x;
  }

  private inside<R>(name: string, index: number | null, body: (p: BlockScope) => R): R {
    if (this.inBlock !== null) throw this.error(`${name} is defined inside ${this.inBlock}; blocks do not nest`);
    this.inBlock = name;
    try {
      const block = this.blocks++;
      let sites = 0;
      return body(this.scope(name, index, block, () => sites++));
    } finally {
      this.inBlock = null;
    }
  }

  private scope(path: string, index: number | null, block: number, site: () => number): BlockScope {
    const own = (n: string) => (index === null ? n : `${n}.${index}`);
    return {
      mode: this.mode,
      dtype: this.dtype,
      context: this.context,
      path,
      backend: this,
      sub: (name) => this.scope(`${path}.${name}`, index, block, site),
      at: (absolute) => this.scope(absolute, index, block, site),
      param: (name, shape, _options?: ParameterOptions) => this.param(`${path}.${name}`, shape),
      loss: (name, value, _options: LossOptions) => {
        this.losses[own(name)] = this.tensor(value);
      },
      lossScale: (name) => this.required(`lossScale.${own(name)}`),
      output: (name, value) => {
        this.outputs[own(name)] = this.tensor(value);
      },
      input: (name, dtype, shape) => this.input(own(name), dtype, shape),
      rngKey: () => {
        const key = this.options.rngKey?.(block);
        if (key === undefined) throw this.error(`${path} draws random numbers: pass rngKey`);
        return new EagerValue(this, key, "rngKey");
      },
      site,
    };
  }

  private param(name: string, shape: number[]): Value {
    const tensor = this.options.parameters[name];
    if (tensor === undefined) throw this.error(`parameter ${name} is missing`);
    const value = new EagerValue(this, tensor, name);
    if (value.shape.length !== shape.length || value.shape.some((d, i) => d !== shape[i]) || !isFloating(value.dtype)) {
      throw this.error(`parameter ${name}: expected [${shape.join(", ")}], got ${describe(value)}`);
    }
    return value;
  }

  private required(name: string): Value {
    const tensor = this.options.batch[name];
    if (tensor === undefined) throw this.error(`batch input ${name} is missing`);
    return new EagerValue(this, tensor, name);
  }

  private tensor(value: unknown): T {
    if (value instanceof EagerValue && value.backend === this) return value.tensor as T;
    if (value instanceof Missing) throw this.error(`batch input ${value.label} is missing`);
    throw this.error("expected a value of this run");
  }

  call<K extends OpName>(op: K, args: OpArguments<Value>[K]): Value {
    if (this.inBlock === null) throw this.error(`${op}: ops stand inside m.block or m.repeat, this one does not`);
    const schema: OpSchema = schemas[op];
    const plain = (args as readonly unknown[]).map((a, i) => {
      const { kind } = splitArgument((schema.args[i] ?? schema.kwargs?.[i - schema.args.length])!);
      if (a === null) return null;
      if (kind === "tensor" || kind === "tensor?") return this.tensor(a);
      return kind === "tensors" ? (a as unknown[]).map((v) => this.tensor(v)) : a;
    });
    const kwargs: Record<string, unknown> = {};
    for (const [i, argument] of (schema.kwargs ?? []).entries()) {
      const value = plain[schema.args.length + i];
      if (value !== null) kwargs[splitArgument(argument).name] = value;
    }
    const result = this.callOp(schema.overload, plain.slice(0, schema.args.length), kwargs);
    return new EagerValue(this, result as T);
  }

  private error(message: string): StromaError {
    return new StromaError("INVALID_ARGUMENT", `[${this.name}, eager] ${message}`, { model: this.name });
  }
}

/** An input that the batch lacks; an error only once something uses it. */
class Missing implements Value {
  readonly grad = false;
  constructor(
    readonly backend: Backend,
    readonly label: string,
    readonly dtype: DType,
    readonly shape: readonly Dim[],
  ) {}
}

const describe = (v: Value): string => `${v.dtype} [${v.shape.join(", ")}]`;
