/**
 * A test instrument, not an engine: bigram logistic regression with a real AdamW behind the NativeSession interface, so
 * that the trainer's and the checkpoints' laws (exact resume, nothing lost) can be tested where nothing native is built.
 * Float32 state; a keyed draw perturbs every micro-batch, so a wrong seed or step after a resume shows.
 */
import { createHash } from "node:crypto";
import { open, rm, stat } from "node:fs/promises";
import { readTensor } from "../../src/checkpoint/safetensors.js";
import { Draws } from "../../src/data/planets/philox.js";
import { StromaError } from "../../src/errors.js";
import type { Graph, Mode } from "../../src/graph/types.js";
import type {
  Batch,
  FileEntry,
  HostTensor,
  NativeSession,
  NativeSnapshot,
  SessionOptions,
  StateEntry,
  StateKind,
  StepRequest,
  StepResult,
} from "../../src/train/native-session.js";

/** Blocks hold no programs here: only names, shapes, losses and outputs are read. */
export function bigramGraph(vocabulary: number, mode: Mode = "train"): Graph {
  const parameters = [
    { name: "bigram.weight", shape: [vocabulary, vocabulary], decay: true },
    { name: "bigram.bias", shape: [vocabulary], decay: false },
  ].map((p) => ({ ...p, init: { kind: "normal" as const, std: 0.02 }, trainable: true, owner: 0 }));
  const outputs = { train: [], eval: ["loss"], generate: ["logits"] }[mode];
  return {
    format: "stromatolite.graph",
    version: 1,
    model: "bigram",
    mode,
    config: { vocabulary },
    inputs: [
      { name: "input_ids", dtype: "int64", shape: ["B", "T"] },
      ...(mode === "generate" ? [] : [{ name: "labels", dtype: "int64" as const, shape: ["B", "T"] }]),
    ],
    programs: [],
    blocks: [],
    parameters,
    losses:
      mode === "generate"
        ? []
        : [{ name: "loss", block: 0, output: 0, weight: 1, count: { input: "labels", ignore: -100 } }],
    outputs: outputs.map((name) => ({ name, block: 0, output: 0 })),
  };
}

export interface FakeFaults {
  /** Called before each tensor of a snapshot is written; what it throws is the write's failure. */
  onWrite?: (path: string, tensor: string) => void | Promise<void>;
  /** Loss of a micro-batch to report instead, e.g. NaN. */
  loss?: (step: number, microBatch: number) => number | undefined;
  /** Snapshots are the live state, as where memory does not hold it twice. */
  uncopied?: boolean;
  /** Awaited inside each step. */
  onStep?: (step: number) => void | Promise<void>;
}

type Kind = Exclude<StateKind, "master" | "step">;
const KINDS: readonly Kind[] = ["param", "exp_avg", "exp_avg_sq"];

export class FakeSession implements NativeSession {
  #graph: Graph | undefined;
  readonly #attached = new Map<string, Graph>();
  #state = new Map<string, Float32Array>();
  #optimizerStep = 0;
  #gradients = new Map<string, Float32Array>();
  disposed = false;
  openSnapshots = 0;
  steps: StepRequest[] = [];

  constructor(
    readonly options: SessionOptions,
    readonly faults: FakeFaults = {},
  ) {}

  async load(graph: Graph): Promise<void> {
    this.#graph = graph;
    for (const p of graph.parameters)
      for (const kind of KINDS)
        this.#state.set(`${kind}.${p.name}`, new Float32Array(p.shape.reduce((a, b) => a * b, 1)));
  }

  /** Never anything pending: each step updates at its end. */
  async flush(): Promise<void> {
    this.#alive();
  }

  async attach(name: string, graph: Graph): Promise<void> {
    this.#attached.set(name, graph);
  }

  async initialize(seed: number): Promise<void> {
    this.#parameters().forEach((p, i) => {
      const draws = new Draws(seed, 1, i);
      const values = this.#get("param", p.name);
      for (let j = 0; j < values.length; j++) values[j] = 0.04 * (draws.uniform() - 0.5);
    });
  }

  async step(request: StepRequest): Promise<StepResult> {
    this.#alive();
    if (request.tape.microBatches !== request.microBatches.length)
      throw new StromaError("TAPE", `tape for ${request.tape.microBatches}, got ${request.microBatches.length}`);
    this.steps.push(request);
    await this.faults.onStep?.(request.step);
    const started = performance.now();
    const weight = this.#get("param", "bigram.weight");
    const bias = this.#get("param", "bigram.bias");
    const V = bias.length;
    const count = request.microBatches.reduce((n, b) => n + labelled(b), 0);
    const sums = { weight: new Float32Array(V * V), bias: new Float32Array(V) };
    const losses: number[] = [];
    request.microBatches.forEach((batch, m) => {
      const noise = new Draws(request.seed, 2, request.step * 4096 + m);
      const total = crossEntropy(weight, bias, batch, sums, 1 / count);
      for (let i = 0; i < V; i++) sums.bias[i]! += 1e-4 * (noise.uniform() - 0.5);
      losses.push(this.faults.loss?.(request.step, m) ?? total / Math.max(1, labelled(batch)));
    });
    const bad = losses.findIndex((l) => !Number.isFinite(l));
    let square = 0;
    for (const g of [sums.weight, sums.bias]) for (const v of g) square += v * v;
    const gradNorm = Math.sqrt(square);
    if (bad < 0) {
      const { maxGradNorm } = request;
      const clip = maxGradNorm === null ? 1 : Math.min(1, maxGradNorm / (gradNorm + 1e-6));
      this.#adamw(request.learningRate, clip, { "bigram.weight": sums.weight, "bigram.bias": sums.bias });
    }
    this.#gradients = new Map([
      ["bigram.weight", sums.weight],
      ["bigram.bias", sums.bias],
    ]);
    const loss = request.microBatches.reduce((s, b, m) => s + (losses[m]! * labelled(b)) / count, 0);
    await new Promise((resolve) => setImmediate(resolve));
    return {
      losses: { loss },
      loss,
      microBatchLosses: losses,
      counts: { loss: count },
      gradNorm,
      nonFinite: bad < 0 ? null : { microBatch: bad, loss: losses[bad]! },
      seconds: (performance.now() - started) / 1000,
      bytesToDevice: 0,
      bytesFromDevice: 0,
      bytesLoaded: 0,
      bytesSaved: 0,
      bytesSent: 0,
      bytesReceived: 0,
      skippedBlocks: [],
      newDeviceSegments: 0,
      peakDeviceBytes: 0,
      peakHostBytes: 4 * V * V,
    };
  }

  #adamw(learningRate: number, clip: number, gradients: Record<string, Float32Array>): void {
    const { beta1, beta2, epsilon, weightDecay } = this.options.optimizer;
    const t = ++this.#optimizerStep;
    const correction1 = 1 - beta1 ** t;
    const correction2 = Math.sqrt(1 - beta2 ** t);
    for (const p of this.#parameters()) {
      const [w, m, v] = KINDS.map((k) => this.#get(k, p.name)) as [Float32Array, Float32Array, Float32Array];
      gradients[p.name]!.forEach((raw, i) => {
        const g = raw * clip;
        if (p.decay) w[i]! *= 1 - learningRate * weightDecay;
        m[i] = beta1 * m[i]! + (1 - beta1) * g;
        v[i] = beta2 * v[i]! + (1 - beta2) * g * g;
        w[i]! -= ((learningRate / correction1) * m[i]!) / (Math.sqrt(v[i]!) / correction2 + epsilon);
      });
    }
  }

  async run(name: string, batch: Batch): Promise<Record<string, HostTensor>> {
    this.#alive();
    const graph = this.#attached.get(name);
    if (graph === undefined) throw new StromaError("INVALID_ARGUMENT", `nothing attached as ${name}`);
    for (const input of graph.inputs)
      if (batch[input.name] === undefined) throw new StromaError("SHAPE", `no ${input.name}`);
    const weight = this.#get("param", "bigram.weight");
    const bias = this.#get("param", "bigram.bias");
    const V = bias.length;
    if (graph.mode === "eval") {
      const n = labelled(batch);
      const loss = n === 0 ? 0 : crossEntropy(weight, bias, batch, null, 1) / n;
      return { loss: { dtype: "float32", shape: [], data: Float32Array.of(loss) } };
    }
    const [B, T] = batch.input_ids!.shape as [number, number];
    const ids = batch.input_ids!.data as BigInt64Array;
    const logits = new Float32Array(B * V);
    for (let b = 0; b < B; b++) {
      const last = Number(ids[b * T + T - 1]);
      for (let v = 0; v < V; v++) logits[b * V + v] = weight[last * V + v]! + bias[v]!;
    }
    return { logits: { dtype: "float32", shape: [B, V], data: logits } };
  }

  async gradient(name: string): Promise<HostTensor> {
    return this.#tensor(name, this.#gradients.get(name)!);
  }

  async read(kind: StateKind, name: string): Promise<HostTensor> {
    return this.#tensor(name, this.#get(kind as Kind, name).slice());
  }

  async write(kind: StateKind, name: string, tensor: HostTensor): Promise<void> {
    this.#get(kind as Kind, name).set(tensor.data as Float32Array);
  }

  async state(): Promise<StateEntry[]> {
    const entries: StateEntry[] = this.#parameters().flatMap((p) =>
      KINDS.map((kind) => ({
        kind,
        name: p.name,
        dtype: "float32" as const,
        shape: p.shape,
        begin: 0,
        bytes: 4 * p.shape.reduce((a, b) => a * b, 1),
      })),
    );
    for (const p of this.#parameters())
      entries.push({ kind: "step", name: p.name, dtype: "int64", shape: [], begin: 0, bytes: 8 });
    return entries;
  }

  optimizerStep = async (): Promise<number> => this.#optimizerStep;
  async setOptimizerStep(step: number): Promise<void> {
    this.#optimizerStep = step;
  }

  async snapshot(kinds: StateKind[]): Promise<NativeSnapshot> {
    this.#alive();
    const copy = new Map<string, Float32Array | BigInt64Array>(
      [...this.#state].filter(([k]) => kinds.some((kind) => k.startsWith(`${kind}.`))).map(([k, v]) => [k, v.slice()]),
    );
    for (const p of this.#parameters()) copy.set(`step.${p.name}`, BigInt64Array.of(BigInt(this.#optimizerStep)));
    this.openSnapshots++;
    let open_ = true;
    return {
      copied: this.faults.uncopied !== true,
      write: (path, header, entries) => this.#writeFile(copy, path, header, entries),
      writeParts: async () => {
        throw new Error("one rank writes whole tensors");
      },
      dispose: () => {
        if (open_) this.openSnapshots--;
        open_ = false;
      },
    };
  }

  async #writeFile(
    copy: Map<string, Float32Array | BigInt64Array>,
    path: string,
    header: Uint8Array,
    entries: FileEntry[],
  ) {
    const handle = await open(path, "wx");
    const hash = createHash("sha256");
    let bytes = 0;
    try {
      const put = async (part: Uint8Array) => {
        hash.update(part);
        bytes += (await handle.write(part, 0, part.length, bytes)).bytesWritten;
      };
      await put(header);
      for (const e of entries) {
        await this.faults.onWrite?.(path, `${e.kind}.${e.name}`);
        if (e.offset !== bytes)
          throw new StromaError("INVALID_ARGUMENT", `offset ${e.offset}, the file is at ${bytes}`);
        const values = copy.get(`${e.kind}.${e.name}`)!;
        await put(new Uint8Array(values.buffer, values.byteOffset, values.byteLength));
      }
      await handle.sync();
    } catch (error) {
      await rm(path, { force: true });
      throw error;
    } finally {
      await handle.close();
    }
    return { bytes, sha256: hash.digest("hex") };
  }

  async readFile(path: string, entries: FileEntry[]): Promise<void> {
    const { size } = await stat(path);
    for (const e of entries) {
      if (e.offset + e.bytes > size) throw new StromaError("CHECKPOINT", `${path}: ${e.name} ends after the file`);
      const t = await readTensor(path, { ...e, shape: [] });
      if (e.kind === "step") {
        this.#optimizerStep = Number(new DataView((t.data as Uint8Array).buffer).getBigInt64(0, true));
        continue;
      }
      const bytes = new Uint8Array((t.data as Uint8Array).slice().buffer);
      this.#get(e.kind as Kind, e.name).set(toFloat32(bytes, e.dtype));
    }
  }

  cancel(): void {}
  async dispose(): Promise<void> {
    this.disposed = true;
  }
  stats = () => ({ queued: 0, stateBytes: 0, liveBytes: 0, cachedBytes: 0 });

  #parameters = () => this.#graph?.parameters ?? [];
  #alive(): void {
    if (this.disposed) throw new StromaError("DISPOSED", "the session is disposed");
  }
  #get(kind: Kind, name: string): Float32Array {
    const found = this.#state.get(`${kind}.${name}`);
    if (found === undefined) throw new StromaError("INVALID_ARGUMENT", `no ${kind} of ${name}`);
    return found;
  }
  #tensor(name: string, data: Float32Array): HostTensor {
    return { dtype: "float32", shape: this.#parameters().find((p) => p.name === name)!.shape, data };
  }
}

function toFloat32(bytes: Uint8Array, dtype: string): Float32Array {
  if (dtype === "float32") return new Float32Array(bytes.buffer);
  if (dtype !== "bfloat16") throw new StromaError("INVALID_ARGUMENT", `${dtype} is not read here`);
  const wide = new Uint32Array(bytes.length / 2);
  new Uint16Array(bytes.buffer).forEach((v, i) => {
    wide[i] = v << 16;
  });
  return new Float32Array(wide.buffer);
}

const labelled = (batch: Batch): number =>
  (batch.labels!.data as BigInt64Array).reduce((n, l) => n + (l === -100n ? 0 : 1), 0);

/** Sum over labelled positions; gradients times `scale` are added to `sums`. */
function crossEntropy(
  weight: Float32Array,
  bias: Float32Array,
  batch: Batch,
  sums: { weight: Float32Array; bias: Float32Array } | null,
  scale: number,
): number {
  const V = bias.length;
  const ids = batch.input_ids!.data as BigInt64Array;
  const labels = batch.labels!.data as BigInt64Array;
  const p = new Float64Array(V);
  let total = 0;
  for (let i = 0; i < ids.length; i++) {
    if (labels[i] === -100n) continue;
    const row = Number(ids[i]) * V;
    let sum = 0;
    for (let v = 0; v < V; v++) {
      p[v] = Math.exp(weight[row + v]! + bias[v]!);
      sum += p[v]!;
    }
    const label = Number(labels[i]);
    total -= Math.log(p[label]! / sum);
    if (sums === null) continue;
    for (let v = 0; v < V; v++) {
      const g = scale * (p[v]! / sum - (v === label ? 1 : 0));
      sums.weight[row + v]! += g;
      sums.bias[v]! += g;
    }
  }
  return total;
}
