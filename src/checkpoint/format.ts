/** What state.json holds, and the hashes that tie a checkpoint together. */
import { createHash } from "node:crypto";
import type { DataPosition } from "../data/types.js";
import { StromaError } from "../errors.js";
import { canonicalJson } from "../graph/hash.js";
import { SCHEDULES, type StateFormat } from "../plan/types.js";
import type { SessionOptions } from "../train/native-session.js";
import type { PlanFacts } from "../train/plan.js";

export const CHECKPOINT_FORMAT = "stromatolite.checkpoint";
export const CHECKPOINT_VERSION = 2;

const sha256Text = (text: string): string => createHash("sha256").update(text, "utf8").digest("hex");

export const FILES = {
  state: "state.json",
  model: "model.safetensors",
  optimizer: "optimizer.safetensors",
  graph: "graph.json",
  evalGraph: "graph.eval.json",
  generateGraph: "graph.generate.json",
  trainer: "trainer.json",
  config: "config.json",
} as const;

export interface CheckpointState {
  format: typeof CHECKPOINT_FORMAT;
  version: typeof CHECKPOINT_VERSION;
  /** Counts the saves of one output folder: the highest is the latest, whatever its step. */
  sequence: number;
  /** Steps completed; a skipped one counts. */
  step: number;
  /** Updates that AdamW has made, for its bias correction. */
  optimizerStep: number;
  /** Labelled positions trained on so far. */
  tokens: number;
  model: string;
  graphHash: string;
  /** What blocks computed in. */
  dtype: SessionOptions["dtype"];
  /** What model.safetensors holds, and what beside it optimizer.safetensors does. */
  storage: StateFormat["storage"];
  masterWeight: StateFormat["masterWeight"];
  optimizer: SessionOptions["optimizer"];
  /** How a step was carried out; null in checkpoints of version 1. */
  plan: PlanFacts | null;
  data: {
    name: string;
    fingerprint: string;
    sequenceLength: number;
    microBatchSize: number;
    /** null: nothing read yet. */
    position: DataPosition | null;
  };
  /** Every draw is keyed by (seed, step, micro-batch, block, op): these two are the generator's whole state. */
  rng: { generator: "philox4x32-10"; seed: number; step: number };
  versions: { stromatolite: string; libtorch: string; node: string };
  files: Record<string, { bytes: number; sha256: string }>;
}

/** state.json: the state beside its own hash, so that a flipped digit in a position does not go unseen. */
export function encodeState(state: CheckpointState): string {
  return `${JSON.stringify({ ...state, sha256: sha256Text(canonicalJson(state)) }, null, 2)}\n`;
}

/**
 * Readers by version, each giving today's form. A version leaves this table never.
 */
const READERS: Readonly<Record<number, (raw: Record<string, unknown>, where: string) => CheckpointState>> = {
  1: readVersion1,
  2: readVersion2,
};

/** @throws CHECKPOINT for what is not a checkpoint or was altered; VERSION_MISMATCH for one from a newer release */
export function decodeState(raw: Record<string, unknown>, where: string): CheckpointState {
  if (raw.format !== CHECKPOINT_FORMAT) throw damaged(where, `expected format "${CHECKPOINT_FORMAT}"`);
  const reader = typeof raw.version === "number" ? READERS[raw.version] : undefined;
  if (reader === undefined)
    throw new StromaError(
      "VERSION_MISMATCH",
      `[checkpoint] ${where} has version ${String(raw.version)}; this release reads ${Object.keys(READERS).join(", ")}. Update stromatolite`,
      { path: where, version: raw.version },
    );
  const { sha256, ...state } = raw;
  if (sha256 !== sha256Text(canonicalJson(state))) throw damaged(where, "its content does not match its own hash");
  return reader(state, where);
}

type Check = (value: unknown) => boolean;
const count: Check = (v) => Number.isSafeInteger(v) && (v as number) >= 0;
const text: Check = (v) => typeof v === "string";
const record: Check = (v) => v !== null && typeof v === "object" && !Array.isArray(v);
const all = (fields: Record<string, Check>): Check => {
  return (v) => record(v) && Object.entries(fields).every(([key, check]) => check((v as Record<string, unknown>)[key]));
};
const number: Check = (v) => typeof v === "number" && Number.isFinite(v);

const oneOf = (...values: readonly string[]): Check => {
  return (v) => values.includes(v as string);
};
const FLOATING = oneOf("float32", "float64", "bfloat16");
const AdamW = (...kinds: string[]) =>
  all({ kind: oneOf(...kinds), beta1: number, beta2: number, epsilon: number, weightDecay: number });

const VERSION_1: Record<string, Check> = {
  sequence: count,
  step: count,
  optimizerStep: count,
  tokens: count,
  model: text,
  graphHash: text,
  dtype: FLOATING,
  optimizer: AdamW("adamw"),
  data: all({
    name: text,
    fingerprint: text,
    sequenceLength: count,
    microBatchSize: count,
    position: (v) => v === null || record(v),
  }),
  rng: all({ generator: text, seed: count, step: count }),
  versions: all({ stromatolite: text, libtorch: text, node: text }),
  files: (v) => record(v) && Object.values(v as object).every(all({ bytes: count, sha256: text })),
};

const PLAN = all({
  tapeHash: text,
  order: oneOf(...SCHEDULES),
  recompute: oneOf("all", "none", "selective"),
  update: oneOf("end", "backward", "forward"),
  clip: oneOf("none", "block", "global"),
  fused: count,
  blocksMerged: count,
  retainedDType: (v) => v === null || text(v),
});
const VERSION_2: Record<string, Check> = {
  ...VERSION_1,
  optimizer: AdamW("adamw", "adamw8bit"),
  storage: FLOATING,
  masterWeight: oneOf("none", "split16", "float32"),
  plan: (v) => v === null || PLAN(v),
};

/** Parameters were stored as blocks computed, bfloat16 beside float32 masters. */
function readVersion1(raw: Record<string, unknown>, where: string): CheckpointState {
  checkFields(raw, VERSION_1, where);
  const masterWeight = raw.dtype === "bfloat16" ? "float32" : "none";
  return { ...raw, version: CHECKPOINT_VERSION, storage: raw.dtype, masterWeight, plan: null } as CheckpointState;
}

function readVersion2(raw: Record<string, unknown>, where: string): CheckpointState {
  checkFields(raw, VERSION_2, where);
  return raw as unknown as CheckpointState;
}

function checkFields(raw: Record<string, unknown>, fields: Record<string, Check>, where: string): void {
  for (const [field, check] of Object.entries(fields))
    if (!check(raw[field])) throw damaged(where, `field "${field}" is missing or malformed`);
}

function damaged(where: string, why: string): StromaError {
  return new StromaError("CHECKPOINT", `[checkpoint] ${where}: ${why}`, { path: where });
}
