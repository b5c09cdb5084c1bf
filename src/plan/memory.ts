/**
 * Device memory of a pass: what libtorch holds while a block's program runs, beside the arena in which parameters, sums
 * and boundaries lie. The program is walked as the engine runs it: nodes in order, each value let go after its last
 * reader (with autograd on, what a node saved stays), then autograd newest first, every gradient of a parameter added
 * into the sums and freed as it appears. With recompute "selective" the forward cuts every value off from autograd and
 * holds the kept ones, which the backward's run takes up where it would have made them.
 */
import type { Graph } from "../graph/types.js";
import { type SizedCall, type SizedProgram, type SizedValue, sizedProgram } from "./cost-calls.js";
import { additiveMask, forwardTemporary, gradients, type MemoryDevice } from "./memory-gradients.js";
import type { Kept } from "./types.js";

/** Bytes at the highest of each kind of pass of one micro-batch. */
export interface PassWorkspace {
  /** Without autograd; its outputs included until they are copied to their places. */
  forward: number;
  /** A forward run again and its backward; of a head, its turn. */
  backward: number;
  /** A forward whose graph, or dear results, are kept. */
  keepingForward: number;
  /** What stays from such a forward to its backward. */
  kept: number;
  /** The backward that follows, `kept` included. */
  keptBackward: number;
}

export interface WorkspaceOptions {
  /** Whose attention kernel runs. Default "cuda". */
  device?: MemoryDevice;
  /** Blocks of the allocator are multiples of it, but for smaller ones. Default 64 KiB, the engine's. */
  unit?: number;
  /** Tape.kept: what is kept are these results. Default: autograd graphs. */
  kept?: Kept;
}

/** Of one program. */
type KeptOfProgram = Record<"values" | "shapes", readonly number[]>;

const UNIT = 64 << 10;

const known = new WeakMap<Graph, Map<string, PassWorkspace>>();

/**
 * Workspace of a block at the given sizes, e.g. { B: 4, T: 512 }. Parameters, batch inputs, boundaries in their places
 * and gradient sums are not in it. Throws SHAPE for a dim without a size.
 */
export function passWorkspace(
  graph: Graph,
  block: number,
  dims: Readonly<Record<string, number>>,
  options: WorkspaceOptions = {},
): PassWorkspace {
  const { device = "cuda", unit = UNIT } = options;
  const { program } = graph.blocks[block]!;
  const kept = options.kept && { values: options.kept.values[program]!, shapes: options.kept.shapes[program]! };
  const cache = known.get(graph) ?? new Map<string, PassWorkspace>();
  known.set(graph, cache);
  // Blocks that run one program agree in what trains (validateGraph), so in memory too.
  const key = JSON.stringify([program, dims, device, unit, kept]);
  const found = cache.get(key) ?? walk(sizedProgram(graph, block, dims), device, unit, kept);
  cache.set(key, found);
  return found;
}

function walk(program: SizedProgram, device: MemoryDevice, unit: number, kept?: KeptOfProgram): PassWorkspace {
  const plain = new Pass(program, device, new Heap(unit), false);
  plain.forward();
  const graph = new Pass(program, device, new Heap(unit), true);
  graph.forward();
  const keepingForward = graph.heap.peak;
  const held = graph.heap.live;
  graph.heap.peak = held;
  graph.backward();
  const keptBackward = graph.heap.peak;
  const forward = plain.heap.peak;
  const backward = Math.max(keepingForward, keptBackward);
  if (kept === undefined) return { forward, backward, keepingForward, kept: held, keptBackward };
  if (kept.values.length + kept.shapes.length === 0)
    return { forward, backward, keepingForward: forward, kept: 0, keptBackward: backward };
  const cutting = new Pass(program, device, new Heap(unit), false, kept);
  cutting.forward();
  const replay = new Pass(program, device, new Heap(unit), true, kept);
  const results = replay.heap.live;
  replay.forward();
  replay.backward();
  return { forward, backward, keepingForward: cutting.heap.peak, kept: results, keptBackward: replay.heap.peak };
}

/** What the allocator gives for a tensor of so many bytes. */
export const allocated = (bytes: number, unit = UNIT): number =>
  bytes < unit ? bytes : Math.ceil(bytes / unit) * unit;

interface Storage {
  bytes: number;
  references: number;
}

class Heap {
  live = 0;
  peak = 0;
  constructor(private readonly unit: number) {}

  allocate(bytes: number): Storage {
    const size = allocated(bytes, this.unit);
    this.live += size;
    this.peak = Math.max(this.peak, this.live);
    return { bytes: size, references: 1 };
  }
  hold(storage: Storage): Storage {
    storage.references++;
    return storage;
  }
  drop(storage: Storage): void {
    if (--storage.references === 0) this.live -= storage.bytes;
  }
  /** Bytes that come and go beside what is live. */
  pass(bytes: number): void {
    this.peak = Math.max(this.peak, this.live + allocated(bytes, this.unit));
  }
}

const outside = (): Storage => ({ bytes: 0, references: Number.POSITIVE_INFINITY });

class Pass {
  private readonly held: (Storage | undefined)[] = [];
  private readonly strides: number[][] = [];
  private readonly saved: Storage[][] = [];
  private readonly lastReader: number[];
  /** By value: what its kernels returned in an earlier forward, its result first. */
  private readonly results: Storage[][] = [];

  constructor(
    private readonly program: SizedProgram,
    private readonly device: MemoryDevice,
    readonly heap: Heap,
    private readonly autograd: boolean,
    private readonly kept: KeptOfProgram = { values: [], shapes: [] },
  ) {
    this.lastReader = program.values.map(() => -1);
    for (const [n, call] of program.calls.entries()) {
      this.lastReader[call.out.id] = n;
      for (const t of call.tensors) this.lastReader[t.id] = n;
    }
    for (const id of program.outputs) this.lastReader[id] = program.calls.length;
    for (const value of [...program.inputs, ...program.parameters]) {
      this.held[value.id] = outside();
      this.strides[value.id] = contiguous(value.shape);
    }
    if (!autograd) return;
    for (const { out, savedOwnBytes } of program.calls) {
      if (kept.values.includes(out.id))
        this.results[out.id] = [out.bytes, ...savedOwnBytes].map((bytes) => heap.allocate(bytes));
      else if (kept.shapes.includes(out.id)) this.results[out.id] = [outside()];
    }
  }

  forward(): void {
    for (const [n, call] of this.program.calls.entries()) {
      const { out } = call;
      const base = this.viewed(call);
      const [result, ...own] = this.results[out.id] ?? [];
      this.held[out.id] = base === undefined ? (result ?? this.heap.allocate(out.bytes)) : this.heap.hold(base);
      const records = this.autograd && out.grad;
      // Saved tensors of the op's own stand beside its temporaries: the head's gradients beside its logits.
      const saves = records || this.kept.values.includes(out.id);
      this.saved[n] = !saves ? [] : result ? own : call.savedOwnBytes.map((bytes) => this.heap.allocate(bytes));
      if (!this.autograd && this.kept.values.includes(out.id)) this.heap.hold(this.held[out.id]!);
      const mask = additiveMask(call);
      if (records && mask !== null) this.saved[n]!.push(this.heap.allocate(mask.bytes));
      if (saves && !records && mask !== null) this.heap.pass(mask.bytes);
      if (result === undefined) this.heap.pass(forwardTemporary(call, saves, this.device));
      for (const id of records ? call.savedValues : [])
        if (id !== mask?.of) this.saved[n]!.push(this.heap.hold(this.held[id]!));
      this.release(n);
    }
  }

  /** Values whose last reader was call n. */
  private release(n: number): void {
    const call = this.program.calls[n]!;
    for (const id of new Set([...call.tensors.map((t) => t.id), call.out.id])) {
      const storage = this.held[id];
      if (this.lastReader[id] !== n || storage === undefined) continue;
      // The leaves are kept by the caller: their storage is not here.
      this.heap.drop(storage);
    }
  }

  /** The storage that a call's result shares, if it does; sets its strides. */
  private viewed(call: SizedCall): Storage | undefined {
    const { op, out, args } = call;
    const self = call.tensors[0]!;
    const strides = this.strides[self.id]!;
    const share = (to: number[]) => {
      this.strides[out.id] = to;
      return this.held[self.id];
    };
    switch (op) {
      case "to":
        if (self.dtype === out.dtype) return share(strides);
        break;
      case "contiguous":
        if (isContiguous(self.shape, strides)) return share(strides);
        break;
      case "view":
      case "reshape": {
        const to = viewStrides(self.shape, strides, out.shape);
        if (to !== null) return share(to);
        break;
      }
      case "transpose": {
        const [i, j] = [axis(args[1], self), axis(args[2], self)];
        return share(strides.map((s, d) => (d === i ? strides[j]! : d === j ? strides[i]! : s)));
      }
      case "permute":
        return share((args[1] as number[]).map((d) => strides[axis(d, self)]!));
      case "unsqueeze": {
        const at = (args[1] as number) < 0 ? (args[1] as number) + self.shape.length + 1 : (args[1] as number);
        return share(strides.toSpliced(at, 0, 0));
      }
      case "squeeze":
      case "select":
        return share(strides.toSpliced(axis(args[1], self), 1));
      case "expand": {
        const extra = out.shape.length - self.shape.length;
        return share(out.shape.map((d, i) => (i >= extra && self.shape[i - extra] === d ? strides[i - extra]! : 0)));
      }
      case "slice": {
        const step = typeof args[4] === "number" ? args[4] : 1;
        return share(strides.map((s, d) => (d === axis(args[1], self) ? s * step : s)));
      }
    }
    this.strides[out.id] = this.freshStrides(call);
    return undefined;
  }

  /** Attention writes [B, T, N, H] underneath; elementwise results lie as their first full operand does. */
  private freshStrides({ op, out, tensors }: SizedCall): number[] {
    if (op === "scaledDotProductAttention" || op === "ringAttention" || op === "allToAllAttention") {
      const [, n, t, h] = out.shape as [number, number, number, number];
      return [t * n * h, h, n * h, 1];
    }
    const like = JOINING.has(op) ? undefined : tensors.find((t) => sameShape(t.shape, out.shape));
    if (like === undefined || !isDense(like.shape, this.strides[like.id]!)) return contiguous(out.shape);
    return this.strides[like.id]!;
  }

  backward(): void {
    const { program, heap } = this;
    const incoming: (Storage | undefined)[] = [];
    // Gradients of outputs lie in their places; a loss is seeded with a scalar.
    for (const id of program.outputs) if (program.values[id]!.grad) incoming[id] = outside();
    const parameters = new Set(program.parameters.map((p) => p.id));
    for (let n = program.calls.length - 1; n >= 0; n--) {
      const call = program.calls[n]!;
      const g = incoming[call.out.id];
      if (g !== undefined) {
        const made = gradients[call.op](call, this.device).map(({ to, raw, temporary }) => {
          const storage = raw === null ? heap.hold(g) : heap.allocate(raw);
          heap.pass(temporary);
          return { to, storage, raw };
        });
        // Reduced to the argument's shape, where that is smaller, after all of them are there.
        for (const m of made) {
          if ((m.raw ?? call.out.bytes) <= m.to.bytes || isJoin(call)) continue;
          const reduced = heap.allocate(m.to.bytes);
          heap.drop(m.storage);
          m.storage = reduced;
        }
        heap.drop(g);
        incoming[call.out.id] = undefined;
        for (const saved of this.saved[n]!.splice(0)) heap.drop(saved);
        for (const { to, storage } of made) {
          if (parameters.has(to.id)) {
            // ATen on CPU widens a narrow operand in a copy; a CUDA kernel does it in registers.
            if (this.device === "cpu" && to.bytes < to.elements * 4) heap.pass(to.elements * 4);
            heap.drop(storage);
          } else incoming[to.id] = this.accumulate(incoming[to.id], storage, to);
        }
      }
      for (const saved of this.saved[n]!) heap.drop(saved);
    }
  }

  /** Autograd adds in place where nobody else holds the sum so far. */
  private accumulate(sum: Storage | undefined, term: Storage, to: SizedValue): Storage {
    if (sum === undefined) return term;
    if (sum.references === 1) {
      this.heap.drop(term);
      return sum;
    }
    const added = this.heap.allocate(to.bytes);
    this.heap.drop(sum);
    this.heap.drop(term);
    return added;
  }
}

const JOINING: ReadonlySet<string> = new Set(["cat", "stack", "repeatInterleave", "embedding", "indexSelect"]);
/** A part of the incoming gradient is a view of it: nothing is reduced. */
const isJoin = (call: SizedCall): boolean => call.op === "cat" || call.op === "stack";

const axis = (dim: unknown, of: SizedValue): number =>
  (dim as number) < 0 ? (dim as number) + of.shape.length : (dim as number);
const sameShape = (a: readonly number[], b: readonly number[]): boolean =>
  a.length === b.length && a.every((d, i) => d === b[i]);

function contiguous(shape: readonly number[]): number[] {
  const strides = new Array<number>(shape.length);
  let step = 1;
  for (let i = shape.length - 1; i >= 0; i--) {
    strides[i] = step;
    step *= shape[i]!;
  }
  return strides;
}

const isContiguous = (shape: readonly number[], strides: readonly number[]): boolean =>
  contiguous(shape).every((s, i) => shape[i] === 1 || s === strides[i]);

/** Some order of the dims makes it contiguous. */
function isDense(shape: readonly number[], strides: readonly number[]): boolean {
  const order = shape.map((_, i) => i).sort((a, b) => strides[b]! - strides[a]! || a - b);
  return isContiguous(
    order.map((i) => shape[i]!),
    order.map((i) => strides[i]!),
  );
}

/** at::detail::computeStride: strides of a view in another shape, null where it needs a copy. */
function viewStrides(shape: readonly number[], strides: readonly number[], to: readonly number[]): number[] | null {
  const out = new Array<number>(to.length);
  let d = to.length - 1;
  let base = strides.at(-1) ?? 1;
  let elements = 1;
  let placed = 1;
  for (let i = shape.length - 1; i >= 0; i--) {
    elements *= shape[i]!;
    const ends = i === 0 || (shape[i - 1] !== 1 && strides[i - 1] !== elements * base);
    if (!ends) continue;
    while (d >= 0 && (placed < elements || to[d] === 1)) {
      out[d] = placed * base;
      placed *= to[d]!;
      d--;
    }
    if (placed !== elements) return null;
    if (i > 0) {
      base = strides[i - 1]!;
      elements = 1;
      placed = 1;
    }
  }
  for (; d >= 0; d--) out[d] = placed * base;
  return out;
}
