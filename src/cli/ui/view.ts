/**
 * The three ways a run is shown: a live picture on a terminal, plain lines elsewhere, JSON for programs. Each takes the
 * same events and keeps its own state; none knows the trainer.
 */
import { createLogUpdate } from "log-update";
import pc from "picocolors";
import type { Colors } from "picocolors/types.js";
import type { TrainEvent } from "../../train/events.js";
import { formatCount, formatDuration, formatLoss, formatRate } from "./format.js";
import { describeEvent, memory } from "./lines.js";
import { plot, progressBar } from "./plot.js";
import { fold, initialState, type RunState, secondsLeft } from "./state.js";

export interface View {
  event(event: TrainEvent): void;
  /** A sentence for a person, between events. */
  note(text: string): void;
  /** The person asked to stop: say so until it is done. */
  stopping(text: string): void;
  /** Leaves the terminal as it was found. */
  close(): void;
}

/** The part of a stream that views need: real terminals and tests' recorders. */
export interface Output {
  write(text: string): boolean;
  isTTY?: boolean;
  columns?: number;
  rows?: number;
}

/** no-color.org: set to anything but nothing. A dumb terminal gets neither colour nor movement. */
export function colorsFor(out: Output, env: NodeJS.ProcessEnv = process.env): Colors {
  return pc.createColors(out.isTTY === true && !env.NO_COLOR && env.TERM !== "dumb");
}

export function isLive(out: Output, env: NodeJS.ProcessEnv = process.env): boolean {
  // Some terminals of containers and editors say that they are 0 columns wide: nothing could be drawn there.
  return out.isTTY === true && out.columns !== 0 && env.TERM !== "dumb" && !env.CI;
}

const LINE_WIDTH = 120;

/** Lines as they come: for files, pipes and dumb terminals. */
export class PlainView implements View {
  private readonly state = initialState();
  private readonly colors: Colors;

  constructor(
    private readonly out: Output,
    private readonly now: () => number = Date.now,
  ) {
    this.colors = colorsFor(out);
  }

  event(event: TrainEvent): void {
    fold(this.state, event, this.now());
    const line = describeEvent(event, this.state, this.colors, LINE_WIDTH);
    if (line !== null) this.out.write(`${line}\n`);
  }

  note(text: string): void {
    this.out.write(`${text}\n`);
  }

  stopping(text: string): void {
    this.note(text);
  }

  close(): void {}
}

/** One object a line, exactly the events; a second view may show them to a person elsewhere. */
export class JsonView implements View {
  constructor(
    private readonly out: Output,
    private readonly people: View,
  ) {}

  event(event: TrainEvent): void {
    this.out.write(`${JSON.stringify(event)}\n`);
    this.people.event(event);
  }

  note(text: string): void {
    this.people.note(text);
  }

  stopping(text: string): void {
    this.people.stopping(text);
  }

  close(): void {
    this.people.close();
  }
}

/** Errors and notes alone: beside JSON, where nobody watches. */
export class QuietView extends PlainView {
  override event(_event: TrainEvent): void {}
}

/** How often the picture is drawn at most: a terminal over a slow line must not slow the run. */
const FRAME_MS = 100;

export class LiveView implements View {
  private readonly state: RunState = initialState();
  private readonly colors: Colors;
  private readonly log: ReturnType<typeof createLogUpdate>;
  private drawnAt = Number.NEGATIVE_INFINITY;
  private timer: NodeJS.Timeout | null = null;
  private closed = false;
  private stopText = "";

  constructor(
    private readonly out: Output,
    private readonly now: () => number = Date.now,
  ) {
    this.colors = colorsFor(out);
    this.log = createLogUpdate(out as NodeJS.WritableStream);
  }

  event(event: TrainEvent): void {
    fold(this.state, event, this.now());
    if (event.event === "done") {
      this.draw();
      this.log.done();
    }
    // Steps are in the picture; all else stays above it.
    if (event.event !== "step") {
      const line = describeEvent(event, this.state, this.colors, this.width());
      if (line !== null) {
        if (event.event === "done") this.out.write(`${line}\n`);
        else this.log.persist(line);
      }
    }
    if (event.event === "done") this.closed = true;
    else this.soon();
  }

  note(text: string): void {
    if (this.closed) this.out.write(`${text}\n`);
    else this.log.persist(text);
  }

  stopping(text: string): void {
    this.stopText = text;
    this.state.stopping = true;
    this.draw();
  }

  close(): void {
    if (this.timer !== null) clearTimeout(this.timer);
    this.timer = null;
    if (this.closed) return;
    this.closed = true;
    this.draw();
    this.log.done();
  }

  private width(): number {
    return Math.min(Math.max(20, this.out.columns ?? 80), 160);
  }

  /** Draws now, or when the frame's time is over: the last event of a burst is always shown. */
  private soon(): void {
    const wait = this.drawnAt + FRAME_MS - this.now();
    if (wait <= 0) this.draw();
    else if (this.timer === null)
      this.timer = setTimeout(() => {
        this.timer = null;
        if (!this.closed) this.draw();
      }, wait).unref();
  }

  private draw(): void {
    this.drawnAt = this.now();
    const lines = picture(this.state, { width: this.width(), height: this.out.rows ?? 24, colors: this.colors });
    if (this.stopText && !this.state.done) lines.push(this.colors.yellow(this.stopText));
    if (lines.length > 0) this.log(lines.join("\n"));
  }
}

/** The live picture: the curve, the bar, the numbers. Fits `width` columns and `height` lines. */
export function picture(
  state: RunState,
  { width, height, colors: c }: { width: number; height: number; colors: Colors },
): string[] {
  const { start, last } = state;
  if (start === null) return [];
  if (last === null) return [c.dim("the first step runs …")];
  const lines: string[] = [];
  const rows = Math.min(8, height - 10);
  if (rows >= 3 && state.curve.length >= 2) {
    const curve = plot(state.curve, { width: Math.min(width, 100), height: rows });
    lines.push("", ...curve.map((line, i) => (i === curve.length - 1 ? c.dim(line) : tint(line, c))));
  }
  const left = secondsLeft(state);
  const share = last.step / start.steps;
  const parts = [
    `${last.step}/${start.steps}`,
    `${Math.floor(share * 100)}%`,
    ...(state.done || left === null || left === 0 ? [] : [`left ${formatDuration(left)}`]),
  ];
  const least = 6;
  while (parts.length > 1 && least + 2 + parts.join("  ").length > width) parts.pop();
  const text = `  ${parts.join("  ")}`;
  const bar = Math.max(least, Math.min(40, width - text.length));
  lines.push("", c.cyan(progressBar(share, bar)) + text);
  const numbers = [
    `loss ${c.bold(formatLoss(last.loss))}`,
    `${formatCount(state.tokensPerSecond ?? last.tokensPerSecond)} tokens/s`,
    memory(state),
    `lr ${formatRate(last.learningRate)}`,
    `norm ${formatLoss(last.gradNorm)}`,
    ...(state.skipped > 0 ? [c.yellow(`${state.skipped} skipped`)] : []),
  ];
  lines.push(fitting(numbers, width, c));
  return lines;
}

/** The axis dim, the curve in colour. */
function tint(line: string, c: Colors): string {
  const at = line.search(/[┤│]/);
  return c.dim(line.slice(0, at + 1)) + c.cyan(line.slice(at + 1));
}

/** As many parts as fit the width, from the first. */
function fitting(parts: readonly string[], width: number, c: Colors): string {
  let line = "";
  let length = 0;
  for (const part of parts) {
    // biome-ignore lint/suspicious/noControlCharactersInRegex: colour codes take no room
    const bare = part.replace(/\u001b\[\d+m/g, "").length;
    if (length > 0 && length + 3 + bare > width) break;
    line += length === 0 ? part : c.dim(" · ") + part;
    length += (length === 0 ? 0 : 3) + bare;
  }
  return line;
}
