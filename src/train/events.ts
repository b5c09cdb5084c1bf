/** The metrics stream: what `trainer.run()` yields, `--json` prints and metrics.jsonl holds, one object each. */

export type TrainEvent =
  | StartEvent
  | StepEvent
  | EvalEvent
  | CheckpointEvent
  | SampleEvent
  | SkipEvent
  | ProfileEvent
  | WarningEvent
  | DoneEvent;

export interface StartEvent {
  event: "start";
  model: string;
  parameters: number;
  data: string;
  /** First step that this run will take, 0-based: > 0 after a resume. */
  step: number;
  steps: number;
  tokensPerStep: number;
  schedule: string;
  device: string;
  /** Why this one, where the user did not say. */
  deviceReason: string | null;
  /** What blocks compute in, and why where the user did not say. */
  dtype: string;
  dtypeReason: string | null;
  /** What parameters are stored as, and what beside them. */
  precision: string;
  masterWeight: string;
  optimizer: string;
  /** Where state lives, the order of work, and predicted bytes, for a person. */
  plan: string;
  resumedFrom: string | null;
}

export interface StepEvent {
  event: "step";
  /** 1-based: steps completed. */
  step: number;
  epoch: number;
  loss: number;
  gradNorm: number;
  learningRate: number;
  tokens: number;
  tokensPerSecond: number;
  seconds: number;
  peakDeviceBytes: number;
  peakHostBytes: number;
  /** Copied in this step to and from the device, and to and from a disk. */
  bytesToDevice: number;
  bytesFromDevice: number;
  bytesLoaded: number;
  bytesSaved: number;
}

export interface EvalEvent {
  event: "eval";
  step: number;
  loss: number;
  bitsPerByte: number | null;
  tokens: number;
}

export interface CheckpointEvent {
  event: "checkpoint";
  step: number;
  path: string;
  bytes: number;
  seconds: number;
}

export interface SampleEvent {
  event: "sample";
  step: number;
  prompt: string;
  text: string;
}

/** A step left out because its loss was not finite (nonFinite: "skip"). */
export interface SkipEvent {
  event: "skip";
  step: number;
  microBatch: number;
  loss: number;
}

/** A step's profile was written. */
export interface ProfileEvent {
  event: "profile";
  step: number;
  /** Of several ranks rank 0 writes all: none on another. */
  files: string[];
  /** Of the step, on this rank: measured, and as the plan had it. */
  peakDeviceBytes: number;
  predictedDeviceBytes: number;
}

/**
 * Something was worked around or is not as it was: a damaged checkpoint passed over for an older whole one, a plan that
 * rounds otherwise than the one before a resume, blocks left as they were.
 */
export interface WarningEvent {
  event: "warning";
  step: number;
  code: string;
  message: string;
}

export interface DoneEvent {
  event: "done";
  step: number;
  /** steps: all were taken. interrupted: asked to stop, saved. */
  reason: "steps" | "interrupted";
  loss: number | null;
  seconds: number;
  checkpoint: string | null;
}
