/** Held-out loss and bits per byte. */
import type { DataBatch, Dataset, Tokenizer } from "../data/types.js";
import { StromaError } from "../errors.js";
import type { Graph } from "../graph/types.js";
import type { Runner } from "./gate.js";
import type { HostTensor } from "./native-session.js";
import { pickInputs } from "./parts.js";

export interface EvaluateOptions {
  sequenceLength: number;
  microBatchSize: number;
  /** Order of the rows; what is left out when `microBatches` ends the pass. Default 0. */
  seed?: number;
  /** End after so many micro-batches; default: the whole validation split. */
  microBatches?: number;
  signal?: AbortSignal;
}

export interface EvaluateResult {
  /** Mean negative log-likelihood in nats over labelled positions. */
  loss: number;
  /** Bits for the text's own bytes, special tokens' cost included; null when the tokenizer cannot tell bytes. */
  bitsPerByte: number | null;
  /** Labelled positions. */
  tokens: number;
}

/** Name of the attached graph in eval mode. */
export const EVAL = "eval";

/** Ranks that each hold all of the model among themselves, and deal micro-batches out between them. */
export interface EvaluatingMembers {
  /** Whose this rank is, of how many. */
  member: number;
  members: number;
  /** Every rank's text. Collective. */
  gather(mine: string): Promise<string[]>;
}

/**
 * One pass over the validation split. The same options give the same rows, and the same bits on however many members.
 * @param graph in eval mode, attached to the session as EVAL
 * @param among every rank of them calls this; each gets the result
 * @throws DATA when the split has no labelled position; ABORTED by the signal
 */
export async function evaluateSession(
  session: Runner,
  graph: Graph,
  dataset: Dataset,
  options: EvaluateOptions,
  among: EvaluatingMembers | null = null,
): Promise<EvaluateResult> {
  const { sequenceLength, microBatchSize, seed = 0, microBatches = Number.POSITIVE_INFINITY, signal } = options;
  const output = lossOutput(graph);
  const { member, members } = among ?? { member: 0, members: 1 };
  await using stream = await dataset.open({ split: "validation", sequenceLength, microBatchSize, seed });
  const counts: number[] = [];
  /** Of this member's micro-batches, one of every round of `members`. */
  const losses: number[] = [];
  const run = async (batch: DataBatch): Promise<number> =>
    scalar((await session.run(EVAL, pickInputs(graph.inputs, batch.tensors, "evaluate")))[output]!);
  let bytes: number | null = 0;
  let last: DataBatch | null = null;
  let next = stream.next();
  for (let i = 0; i < microBatches; i++) {
    const batch = await next;
    if (batch === null) break;
    if (signal?.aborted) throw new StromaError("ABORTED", "[evaluate] cancelled", {}, { cause: signal.reason });
    if (i + 1 < microBatches) {
      next = stream.next();
      next.catch(() => {}); // it is reported when it is waited for
    }
    if (batch.tokens === 0) continue;
    last = batch;
    if (bytes !== null) bytes = addBytes(bytes, batch, dataset.tokenizer);
    if (counts.push(batch.tokens) % members === (member + 1) % members) losses.push(await run(batch));
  }
  // Members that share blocks gather them together: one whose round lacks a micro-batch runs another's along.
  if (last !== null && losses.length < Math.ceil(counts.length / members)) losses.push(await run(last));
  const all = among === null ? [losses] : await lossesByMember(among, losses);
  let nats = 0;
  for (const [i, count] of counts.entries()) nats += all[i % members]![Math.floor(i / members)]! * count;
  const tokens = counts.reduce((sum, count) => sum + count, 0);
  if (tokens === 0)
    throw new StromaError("DATA", `[evaluate] the validation split of ${dataset.name} has no labelled token`);
  const bitsPerByte = bytes === null || bytes === 0 ? null : nats / Math.LN2 / bytes;
  return { loss: nats / tokens, bitsPerByte, tokens };
}

/** As text: JSON has no NaN. */
async function lossesByMember({ member, gather }: EvaluatingMembers, losses: number[]): Promise<number[][]> {
  const by: number[][] = [];
  for (const text of await gather([member, ...losses].join(" "))) {
    const [of, ...mine] = text.split(" ").map(Number) as [number, ...number[]];
    by[of] ??= mine;
  }
  return by;
}

/** The graph's output that is the mean loss of a micro-batch. */
function lossOutput(graph: Graph): string {
  const term = graph.losses[0];
  const named = graph.outputs.find((o) => o.name === (term?.name ?? "loss"));
  if (named === undefined)
    throw new StromaError("GRAPH", `[evaluate] ${graph.model} in eval mode has no output "${term?.name ?? "loss"}"`);
  return named.name;
}

function scalar(tensor: HostTensor): number {
  const { data } = tensor;
  const view = new DataView(data.buffer, data.byteOffset, data.byteLength);
  return tensor.dtype === "float64" ? view.getFloat64(0, true) : view.getFloat32(0, true);
}

/** Bytes of text that the labels stand for: known where every token below 256 is a byte. */
function addBytes(bytes: number, batch: DataBatch, tokenizer: Tokenizer): number | null {
  if ((tokenizer as { name?: string }).name !== "bytes") return null;
  const { data } = batch.tensors.labels ?? {};
  if (data === undefined) return null;
  const labels = new BigInt64Array(data.buffer, data.byteOffset, data.byteLength / 8);
  let total = bytes;
  for (const label of labels) if (label >= 0n && label < 256n) total++;
  return total;
}
