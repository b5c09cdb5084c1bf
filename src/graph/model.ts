/**
 * How a model is written: a function over a ModelScope that declares inputs and blocks. The same function is traced into
 * a Graph (trace.ts) or run on Tensors (eager.ts); both implement the scopes below.
 */
import type { Context } from "./context.js";
import type { Dim, DType, Init, Mode } from "./types.js";
import type { Backend, Value } from "./value.js";

export interface ParameterOptions {
  /** Default: normal with std 0.02. A tied parameter takes the options of its first use. */
  init?: Init;
  /** Weight decay applies. Default: true for two or more dims, false for norms and biases. */
  decay?: boolean;
  /** Default true. A frozen parameter has no gradient and no optimizer state. */
  trainable?: boolean;
}

export interface LossOptions {
  /** Weight of this term in the whole loss. Default 1. */
  weight?: number;
  /** The batch input whose elements other than `ignore` are the term's count. */
  count: Value;
  ignore: number;
}

/** What a block's function sees. Names of parameters are joined to the scope's path with dots. */
export interface BlockScope {
  readonly mode: Mode;
  /** dtype that parameters and activations compute in. */
  readonly dtype: DType;
  /** Where rows are shared out to ranks: dim "T" is then this rank's share. Null: rows are whole. */
  readonly context: Context | null;
  readonly path: string;
  readonly backend: Backend;
  /** A scope one name deeper. */
  sub(name: string): BlockScope;
  /** A scope at an absolute path: how a block reaches another block's parameter to tie it. */
  at(path: string): BlockScope;
  /** Throws SHAPE if the same name was defined with another shape. */
  param(name: string, shape: number[], options?: ParameterOptions): Value;
  /** Registers a loss term: a float32 scalar, already multiplied by `lossScale(name)`. */
  loss(name: string, value: Value, options: LossOptions): void;
  /** float32 scalar: 1 / (the term's count over the whole step). */
  lossScale(name: string): Value;
  /** What `run` returns under this name; not available in train mode. In a repeat the name gets ".0", ".1", ... */
  output(name: string, value: Value): void;
  /** A batch input of this block alone; in a repeat the name gets ".0", ".1", ... (caches, states). */
  input(name: string, dtype: DType, shape: Dim[]): Value;
  /** int64 [4]: what random ops draw from together with `site()`. */
  rngKey(): Value;
  /** A number that no other random op of this block has. */
  site(): number;
}

export interface ModelScope {
  readonly mode: Mode;
  readonly dtype: DType;
  /** Where rows are shared out to ranks: dim "T" is then this rank's share. Null: rows are whole. */
  readonly context: Context | null;
  /** A tensor of the batch. Names among its dims ("B", "T") are bound when a batch comes. */
  input(name: string, dtype: DType, shape: Dim[]): Value;
  /**
   * A unit of streaming, recompute and sharding. Values of earlier blocks that `body` uses become its inputs; what it
   * returns becomes its outputs. Only blocks may hold ops.
   */
  block<R extends Value | readonly Value[] | undefined>(name: string, body: (p: BlockScope) => R): R;
  /** `count` blocks `name.0` ... that hand `carry` on; they share one traced program. */
  repeat<C extends Value | readonly Value[]>(
    name: string,
    count: number,
    carry: C,
    body: (p: BlockScope, carry: C) => C,
  ): C;
}

export type ModelFunction<C> = (m: ModelScope, config: C) => Value | readonly Value[] | undefined;

export interface ModelDefinition<C> {
  readonly name: string;
  readonly build: ModelFunction<C>;
}

/** Names a model function; the name heads its error messages and is stored in its graphs. */
export function model<C>(name: string, build: ModelFunction<C>): ModelDefinition<C> {
  return { name, build };
}
