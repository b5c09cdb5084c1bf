import pc from "picocolors";
import { afterEach, describe, expect, it, vi } from "vitest";
import { type StopSignal, StopSignals } from "../../../src/cli/signals.js";
import { describeEvent } from "../../../src/cli/ui/lines.js";
import { fold, initialState, secondsLeft } from "../../../src/cli/ui/state.js";
import {
  colorsFor,
  isLive,
  JsonView,
  LiveView,
  type Output,
  PlainView,
  picture,
  QuietView,
} from "../../../src/cli/ui/view.js";
import type { StartEvent, StepEvent, TrainEvent } from "../../../src/train/events.js";

const plain = pc.createColors(false);
const start: StartEvent = {
  event: "start",
  model: "tiny",
  parameters: 1_624_512,
  data: "planets",
  step: 0,
  steps: 400,
  tokensPerStep: 2048,
  schedule: "breadthFirst",
  device: "cpu",
  deviceReason: null,
  dtype: "float32",
  dtypeReason: null,
  precision: "float32",
  masterWeight: "none",
  optimizer: "adamw",
  plan: "all on the device",
  resumedFrom: null,
};
const step = (n: number, more: Partial<StepEvent> = {}): StepEvent => ({
  event: "step",
  step: n,
  epoch: 0,
  loss: 5 / n,
  gradNorm: 1,
  learningRate: 1e-3,
  tokens: 2048,
  tokensPerSecond: 4096,
  seconds: 0.5,
  peakDeviceBytes: 0,
  peakHostBytes: 64 << 20,
  bytesToDevice: 0,
  bytesFromDevice: 0,
  bytesLoaded: 0,
  bytesSaved: 0,
  ...more,
});

class Recorder implements Output {
  text = "";
  constructor(
    readonly isTTY = false,
    readonly columns = 80,
    readonly rows = 24,
  ) {}
  write(text: string): boolean {
    this.text += text;
    return true;
  }
}

describe("the state of a run", () => {
  it("the time left is steps left times the wall time of a step", () => {
    const state = initialState();
    fold(state, start, 0);
    expect(secondsLeft(state)).toBeNull();
    fold(state, step(1), 1000);
    expect(secondsLeft(state)).toBe(399 * 0.5);
    // Ten steps at two seconds each, though the engine claims half a second: the wall clock is right.
    fold(state, step(11), 21_000);
    expect(secondsLeft(state)).toBeCloseTo(389 * 2);
  });

  it("a long run keeps a bounded curve that ends at the last steps and keeps the mean", () => {
    const state = initialState();
    fold(state, start, 0);
    for (let n = 1; n <= 100_000; n++) fold(state, step(n, { loss: n % 2 === 0 ? 1 : 3 }), n);
    expect(state.curve.length).toBeLessThanOrEqual(2048);
    expect(state.curve.length).toBeGreaterThan(1000);
    expect(state.curve.at(-1)![0]).toBeGreaterThan(100_000 - state.stride);
    for (const [, loss] of state.curve) expect(loss).toBe(2);
  });

  it("a loss that is not finite is no point of the curve", () => {
    const state = initialState();
    fold(state, step(1, { loss: Number.NaN }), 0);
    expect(state.curve).toEqual([]);
    expect(state.last!.step).toBe(1);
  });
});

describe("lines", () => {
  it("each kind of event is one sentence", () => {
    const state = initialState();
    const say = (event: TrainEvent) => {
      fold(state, event, 1000);
      return describeEvent(event, state, plain, 100);
    };
    expect(say({ ...start, step: 200, resumedFrom: "runs/a/checkpoints/step-000200" })).toBe(
      "tiny, 1.6M parameters, on planets: steps 201 to 400, 2k tokens each (breadthFirst, cpu, float32)\n" +
        "plan: all on the device\n" +
        "resumed from runs/a/checkpoints/step-000200 after 200 steps",
    );
    const mixed = { dtypeReason: "no fast bfloat16", precision: "bfloat16", masterWeight: "none" };
    expect(say({ ...start, ...mixed, optimizer: "adamw8bit" })).toContain(
      "(breadthFirst, cpu, bfloat16 parameters, computing in float32 (no fast bfloat16), master weights: none, 8-bit AdamW)",
    );
    expect(
      say({ event: "profile", step: 201, files: ["a", "b"], peakDeviceBytes: 2 ** 20, predictedDeviceBytes: 2 ** 21 }),
    ).toBe("step 201  profile device peak 1 MiB, planned 2 MiB: a, b");
    expect(say(step(201, { loss: 2.5 }))).toBe(
      "step 201/400  loss 2.500  norm 1.000  lr 1e-3  4.1k tokens/s  64 MiB  left 1m 40s",
    );
    expect(say({ event: "eval", step: 201, loss: 2, bitsPerByte: 2.885, tokens: 16_384 })).toBe(
      "step 201  validation loss 2.000, 2.885 bits per byte (16.4k tokens)",
    );
    expect(say({ event: "checkpoint", step: 201, path: "runs/a/x", bytes: 19_600_000, seconds: 0.4 })).toBe(
      "step 201  checkpoint runs/a/x (18.7 MiB in 0.40 s)",
    );
    expect(say({ event: "skip", step: 202, microBatch: 3, loss: Number.NaN })).toContain(
      "loss nan in micro-batch 3; no parameter",
    );
    expect(say({ event: "warning", step: 1, code: "CHECKPOINT", message: "passed over: x" })).toBe(
      "warning passed over: x (CHECKPOINT)",
    );
    expect(
      say({ event: "done", step: 400, reason: "interrupted", loss: 1.5, seconds: 65, checkpoint: "runs/a/x" }),
    ).toBe("stopped after step 400 in 1m 05s, loss 1.500\ncheckpoint: runs/a/x");
    expect(say({ ...start, device: "cuda:0" })).not.toBeNull();
    expect(say(step(3, { peakDeviceBytes: 1 << 30 }))).toContain("1 GiB on the card, 64 MiB host");
  });

  it("a sample fits the width, shows the prompt's end, and holds no escape sequence", () => {
    const state = initialState();
    const prompt = `${"x".repeat(300)} climate T=`;
    const line = describeEvent(
      { event: "sample", step: 5, prompt, text: `287.9\u001b[31m\n${"y".repeat(300)}` },
      state,
      plain,
      80,
    )!;
    expect([...line].length).toBeLessThanOrEqual(80);
    expect(line).toContain("climate T=287.9");
    expect(line).not.toContain("\u001b");
    expect(line).not.toContain("\n");
  });
});

describe("the live picture", () => {
  const run = (steps: number) => {
    const state = initialState();
    fold(state, start, 0);
    for (let n = 1; n <= steps; n++) fold(state, step(n), n * 500);
    return state;
  };
  // biome-ignore lint/suspicious/noControlCharactersInRegex: colour codes take no room
  const bare = (text: string) => text.replace(/\u001b\[[0-9;]*m/g, "");

  it.each([
    [80, 24],
    [40, 24],
    [120, 60],
    [20, 5],
    [200, 12],
  ])("fits a terminal of %i x %i, in colour too", (width, height) => {
    for (const steps of [1, 2, 57, 400])
      for (const colors of [plain, pc.createColors(true)]) {
        const lines = picture(run(steps), { width, height, colors });
        expect(lines.length).toBeLessThan(Math.max(height, 4));
        for (const line of lines) expect([...bare(line)].length).toBeLessThanOrEqual(width);
      }
  });

  it("shows the step, the share, the time left, the loss and the speed", () => {
    const text = picture(run(100), { width: 100, height: 24, colors: plain }).join("\n");
    for (const part of ["100/400", "25%", "left 2m 30s", "loss 0.0500", "4.1k tokens/s", "64 MiB", "⠤"])
      expect(text).toContain(part);
  });

  it("is drawn again in place, and checkpoints stay above it", () => {
    const out = new Recorder(true);
    let now = 0;
    const view = new LiveView(out, () => now);
    view.event(start);
    for (let n = 1; n <= 3; n++) {
      now += 500;
      view.event(step(n));
    }
    view.event({ event: "checkpoint", step: 3, path: "runs/a/step-3", bytes: 1024, seconds: 0.1 });
    view.event({ event: "done", step: 3, reason: "steps", loss: 1.667, seconds: 2, checkpoint: "runs/a/step-3" });
    view.close();
    expect(out.text).toContain("\u001b[1A"); // it moves up over what it drew
    expect(bare(out.text).match(/checkpoint runs\/a\/step-3 \(1 KiB/g)).toHaveLength(1);
    expect(bare(out.text).trimEnd().endsWith("checkpoint: runs/a/step-3")).toBe(true);
  });

  it("a burst of steps is drawn at most ten times a second", () => {
    const out = new Recorder(true);
    let now = 1000;
    const view = new LiveView(out, () => now);
    view.event(start);
    const before = out.text.length;
    view.event(step(1));
    for (let n = 2; n < 200; n++) view.event(step(n));
    expect(out.text.length - before).toBeLessThan(4000);
    now += 200;
    view.event(step(200));
    expect(bare(out.text)).toContain("200/400");
    view.close();
  });
});

describe("which view", () => {
  it("no colour off a terminal, under NO_COLOR and on a dumb one; no movement in CI", () => {
    const colored = (out: Output, env: NodeJS.ProcessEnv) => colorsFor(out, env).red("x") !== "x";
    expect(colored(new Recorder(true), {})).toBe(true);
    expect(colored(new Recorder(false), {})).toBe(false);
    expect(colored(new Recorder(true), { NO_COLOR: "1" })).toBe(false);
    expect(colored(new Recorder(true), { NO_COLOR: "" })).toBe(true);
    expect(colored(new Recorder(true), { TERM: "dumb" })).toBe(false);
    expect([
      isLive(new Recorder(true), {}),
      isLive(new Recorder(true), { CI: "true" }),
      isLive(new Recorder(false), {}),
      isLive(Object.assign(new Recorder(true), { columns: 0 }), {}),
    ]).toEqual([true, false, false, false]);
  });

  it("plain lines hold neither colour nor movement", () => {
    const out = new Recorder(false);
    const view = new PlainView(out);
    view.event(start);
    view.event(step(1));
    view.stopping("stopping");
    view.close();
    expect(out.text).not.toContain("\u001b");
    expect(out.text.trimEnd().split("\n")).toHaveLength(4);
  });

  it("JSON is exactly the events, and people's sentences go elsewhere", () => {
    const out = new Recorder();
    const err = new Recorder();
    const view = new JsonView(out, new QuietView(err));
    const events: TrainEvent[] = [
      start,
      step(1),
      { event: "done", step: 1, reason: "steps", loss: 5, seconds: 1, checkpoint: null },
    ];
    for (const event of events) view.event(event);
    view.note("hello");
    view.close();
    expect(
      out.text
        .trimEnd()
        .split("\n")
        .map((line) => JSON.parse(line)),
    ).toEqual(events);
    expect(err.text).toBe("hello\n");
  });
});

describe("Ctrl-C", () => {
  afterEach(() => vi.restoreAllMocks());

  const setup = () => {
    const log: string[] = [];
    const clock = { now: 0 };
    const signals = new StopSignals(
      (s: StopSignal) => log.push(`first ${s}`),
      () => log.push("quit"),
      () => clock.now,
      (s) => log.push(`end ${s}`),
    );
    return { log, clock, signals };
  };

  it("the first asks, an echo of it within a moment is not a second, the second quits", () => {
    const { log, clock, signals } = setup();
    using _ = signals;
    expect(signals.signal.aborted).toBe(false);
    process.emit("SIGINT", "SIGINT");
    expect(signals.signal.aborted).toBe(true);
    clock.now = 30;
    process.emit("SIGINT", "SIGINT");
    expect(log).toEqual(["first SIGINT"]);
    clock.now = 1000;
    process.emit("SIGINT", "SIGINT");
    expect(log).toEqual(["first SIGINT", "quit", "end SIGINT"]);
    expect(signals.received).toBe("SIGINT");
  });

  it("leaves no handler behind", () => {
    const before = process.listenerCount("SIGTERM");
    setup().signals[Symbol.dispose]();
    expect(process.listenerCount("SIGTERM")).toBe(before);
  });
});
