/** What a person sees of a run: the event stream folded into a small state. No clock and no terminal in here. */
import type {
  CheckpointEvent,
  DoneEvent,
  EvalEvent,
  SampleEvent,
  StartEvent,
  StepEvent,
  TrainEvent,
} from "../../train/events.js";

/** Points of the curve that are kept: beyond that neighbours are merged, so a long run takes no more memory. */
const MOST_POINTS = 2048;
/** Weight of the newest interval in the speed: about the last ten. */
const NEWEST = 0.2;

export interface RunState {
  start: StartEvent | null;
  last: StepEvent | null;
  /** [step, mean loss since the point before] */
  curve: [number, number][];
  /** How many steps one point of the curve stands for. */
  stride: number;
  pending: { sum: number; n: number };
  /** Smoothed, by the wall clock: saving and evaluating are in it. null until two step events came. */
  secondsPerStep: number | null;
  tokensPerSecond: number | null;
  lastAtMs: number | null;
  validation: EvalEvent | null;
  checkpoint: CheckpointEvent | null;
  sample: SampleEvent | null;
  skipped: number;
  stopping: boolean;
  done: DoneEvent | null;
}

export function initialState(): RunState {
  return {
    start: null,
    last: null,
    curve: [],
    stride: 1,
    pending: { sum: 0, n: 0 },
    secondsPerStep: null,
    tokensPerSecond: null,
    lastAtMs: null,
    validation: null,
    checkpoint: null,
    sample: null,
    skipped: 0,
    stopping: false,
    done: null,
  };
}

/** Takes one event that came at `nowMs` into the state. */
export function fold(state: RunState, event: TrainEvent, nowMs: number): void {
  switch (event.event) {
    case "start":
      state.start = event;
      break;
    case "step":
      step(state, event, nowMs);
      break;
    case "eval":
      state.validation = event;
      break;
    case "checkpoint":
      state.checkpoint = event;
      break;
    case "sample":
      state.sample = event;
      break;
    case "skip":
      state.skipped++;
      break;
    case "profile":
    case "warning":
      break;
    case "done":
      state.done = event;
      break;
  }
}

function step(state: RunState, event: StepEvent, nowMs: number): void {
  const { last, lastAtMs } = state;
  const ran = last === null ? 0 : event.step - last.step;
  if (lastAtMs !== null && ran > 0) {
    const seconds = Math.max(nowMs - lastAtMs, 0.001) / 1000 / ran;
    state.secondsPerStep =
      state.secondsPerStep === null ? seconds : (1 - NEWEST) * state.secondsPerStep + NEWEST * seconds;
  }
  const rate = event.tokensPerSecond;
  state.tokensPerSecond = state.tokensPerSecond === null ? rate : (1 - NEWEST) * state.tokensPerSecond + NEWEST * rate;
  state.last = event;
  state.lastAtMs = nowMs;
  if (!Number.isFinite(event.loss)) return;
  state.pending.sum += event.loss;
  state.pending.n++;
  if (state.pending.n < state.stride) return;
  state.curve.push([event.step, state.pending.sum / state.pending.n]);
  state.pending = { sum: 0, n: 0 };
  if (state.curve.length < MOST_POINTS) return;
  state.stride *= 2;
  state.curve = Array.from({ length: MOST_POINTS / 2 }, (_, i) => {
    const a = state.curve[2 * i]!;
    const b = state.curve[2 * i + 1]!;
    return [b[0], (a[1] + b[1]) / 2];
  });
}

/** Seconds until the last step at the present speed; null when there is no speed yet. */
export function secondsLeft(state: RunState): number | null {
  const { start, last, secondsPerStep } = state;
  if (start === null || last === null) return null;
  const each = secondsPerStep ?? last.seconds;
  return Math.max(0, start.steps - last.step) * each;
}
