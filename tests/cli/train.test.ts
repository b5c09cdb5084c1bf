/** The real command over the real engine: training, Ctrl-C, resume, eval, generate. */
import { existsSync, readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { beforeAll, describe, expect, it } from "vitest";
import { z } from "zod";
import { hasNative } from "../support/native.js";
import { type Ended, jsonLines, nanoConfig, scratch, start, stroma } from "./spawn.js";

const count = z.number().int().min(0);
/** The stream that programs read: exactly these fields. */
const EVENTS = {
  start: z.strictObject({
    event: z.literal("start"),
    model: z.string(),
    parameters: count.min(1),
    data: z.string(),
    step: count,
    steps: count.min(1),
    tokensPerStep: count.min(1),
    schedule: z.enum(["breadthFirst", "depthFirst"]),
    device: z.string(),
    deviceReason: z.string().nullable(),
    dtype: z.string(),
    dtypeReason: z.string().nullable(),
    precision: z.string(),
    masterWeight: z.string(),
    optimizer: z.enum(["adamw", "adamw8bit"]),
    plan: z.string(),
    resumedFrom: z.string().nullable(),
  }),
  step: z.strictObject({
    event: z.literal("step"),
    step: count.min(1),
    epoch: count,
    loss: z.number().positive(),
    gradNorm: z.number().positive(),
    learningRate: z.number().positive(),
    tokens: count.min(1),
    tokensPerSecond: z.number().positive(),
    seconds: z.number().positive(),
    peakDeviceBytes: count,
    peakHostBytes: count.min(1),
    bytesToDevice: count,
    bytesFromDevice: count,
    bytesLoaded: count,
    bytesSaved: count,
  }),
  eval: z.strictObject({
    event: z.literal("eval"),
    step: count.min(1),
    loss: z.number().positive(),
    bitsPerByte: z.number().positive(),
    tokens: count.min(1),
  }),
  sample: z.strictObject({ event: z.literal("sample"), step: count.min(1), prompt: z.string(), text: z.string() }),
  checkpoint: z.strictObject({
    event: z.literal("checkpoint"),
    step: count.min(1),
    path: z.string(),
    bytes: count.min(1),
    seconds: z.number().positive(),
  }),
  done: z.strictObject({
    event: z.literal("done"),
    step: count.min(1),
    reason: z.enum(["steps", "interrupted"]),
    loss: z.number().positive(),
    seconds: z.number().positive(),
    checkpoint: z.string(),
  }),
} as const;

const checked = (stdout: string) =>
  jsonLines(stdout).map((line) => {
    const schema = EVENTS[line.event as keyof typeof EVENTS];
    expect(schema, `an unknown event: ${JSON.stringify(line)}`).toBeDefined();
    return schema.parse(line);
  });

describe.skipIf(!hasNative())("stroma with its engine", () => {
  const folder = scratch();
  const config = nanoConfig(folder);
  const run = join(folder, "run");
  let trained: Ended;

  beforeAll(async () => {
    trained = await stroma([
      ...["train", "--config", config, "--steps", "12", "--output-dir", run, "--json"],
      ...["--save-every-n-steps", "5", "--keep-last", "2", "--eval-every-n-steps", "6", "--eval-micro-batches", "2"],
      ...["--sample-every-n-steps", "6", "--sample-prompt", "synthetic", "--sample-tokens", "4"],
    ]);
  });

  it("--json is exactly the events, in order, and nothing on stderr", () => {
    expect([trained.code, trained.stderr]).toEqual([0, ""]);
    const events = checked(trained.stdout);
    expect(events.filter((e) => e.event === "step").map((e) => e.step)).toEqual(
      Array.from({ length: 12 }, (_, i) => i + 1),
    );
    expect(events[0]).toMatchObject({ event: "start", step: 0, steps: 12, tokensPerStep: 4 * 32, data: "planets" });
    const of = (kind: string) => events.filter((e) => e.event === kind).map((e) => e.step);
    expect([of("eval"), of("sample"), of("checkpoint")]).toEqual([
      [6, 12],
      [6, 12],
      [5, 10, 12],
    ]);
    const losses = events.flatMap((e) => (e.event === "step" ? [e.loss] : []));
    expect(losses.at(-1)!).toBeLessThan(losses[0]! - 0.5);
    expect(events.at(-1)).toMatchObject({ event: "done", step: 12, reason: "steps" });
  });

  it("the output folder has the metrics, the picture and the checkpoints that were to be kept", () => {
    expect(jsonLines(readFileSync(join(run, "metrics.jsonl"), "utf8"))).toEqual(jsonLines(trained.stdout));
    expect(readFileSync(join(run, "loss.svg"), "utf8")).toContain("<svg");
    expect(readdirSync(join(run, "checkpoints")).filter((n) => n.startsWith("step-"))).toHaveLength(2);
  });

  it("a second run into the same folder is refused, not mixed", async () => {
    const { code, stderr } = await stroma(["train", "--config", config, "--output-dir", run]);
    expect(code).toBe(2);
    expect(stderr).toContain("Resume it");
  });

  it("off a terminal it prints one plain line a step", async () => {
    const { code, stdout, stderr } = await stroma([
      "train",
      "--config",
      config,
      "--steps",
      "3",
      "--output-dir",
      join(folder, "plain"),
    ]);
    expect([code, stderr]).toEqual([0, ""]);
    expect(stdout).not.toContain("\u001b");
    expect(stdout.match(/^step [123]\/3 {2}loss \d\.\d+ {2}norm /gm)).toHaveLength(3);
    expect(stdout).toMatch(/^done after step 3 in .*\ncheckpoint: .*step-000003$/m);
  });

  it("the command line goes before the config file", async () => {
    const { stdout } = await stroma([
      "train",
      "--config",
      config,
      "--steps",
      "1",
      "--batch-size",
      "2",
      "--output-dir",
      join(folder, "over"),
      "--json",
    ]);
    expect(checked(stdout)[0]).toMatchObject({ tokensPerStep: 2 * 32 });
  });

  it("Ctrl-C finishes the step, saves, ends with 130; --resume goes on where it stopped", async () => {
    const stopped = join(folder, "stopped");
    const args = ["train", "--config", config, "--steps", "4000", "--learning-rate-schedule", "constant"];
    const running = start([...args, "--output-dir", stopped, "--json"]);
    await running.until(/"event":"step","step":4,/);
    running.child.kill("SIGINT");
    const { code, stdout, stderr } = await running.ended;
    expect(code).toBe(130);
    expect(stderr).toContain("finishing the step and saving");
    const events = checked(stdout);
    const done = events.at(-1)!;
    expect(done).toMatchObject({ event: "done", reason: "interrupted" });
    expect(done.step).toBeGreaterThanOrEqual(4);
    expect(done.step).toBeLessThan(4000);

    const upTo = done.step + 3;
    const resumed = await stroma(["train", "--resume", stopped, "--steps", String(upTo), "--json"]);
    expect([resumed.code, resumed.stderr]).toEqual([0, ""]);
    expect(checked(resumed.stdout)[0]).toMatchObject({ event: "start", step: done.step, steps: upTo });
    const metrics = jsonLines(readFileSync(join(stopped, "metrics.jsonl"), "utf8")).filter((e) => e.event === "step");
    expect(metrics.map((e) => e.step)).toEqual(Array.from({ length: upTo }, (_, i) => i + 1));
  });

  it("an interrupted run that goes on has the losses of one that was never interrupted", async () => {
    const args = ["train", "--config", config, "--learning-rate-schedule", "constant", "--warmup-steps", "0", "--json"];
    const losses = (path: string) =>
      jsonLines(readFileSync(join(path, "metrics.jsonl"), "utf8")).flatMap((e) => (e.event === "step" ? [e.loss] : []));
    const [whole, halved] = [join(folder, "whole"), join(folder, "halved")];
    expect((await stroma([...args, "--steps", "8", "--output-dir", whole])).code).toBe(0);
    expect((await stroma([...args, "--steps", "5", "--output-dir", halved])).code).toBe(0);
    expect((await stroma(["train", "--resume", "--output-dir", halved, "--steps", "8", "--json"])).code).toBe(0);
    expect(losses(halved)).toEqual(losses(whole));
  });

  it("a second Ctrl-C quits at once, by the signal: the step in flight is not waited for", async () => {
    // A step of a quarter of a million tokens: many seconds on any machine.
    const batch = [
      "--batch-size",
      "512",
      "--micro-batch-size",
      "8",
      "--sequence-length",
      "512",
      "--order",
      "depthFirst",
    ];
    const running = start(["train", ...batch, "--output-dir", join(folder, "quit"), "--json"]);
    await running.until(/"event":"start"/);
    const pause = (ms: number) => new Promise((resolve) => setTimeout(resolve, ms));
    await pause(300);
    running.child.kill("SIGINT");
    await pause(600);
    expect(running.child.exitCode).toBeNull();
    running.child.kill("SIGINT");
    const { code, signal, stdout, stderr } = await running.ended;
    expect([code, signal]).toEqual([null, "SIGINT"]);
    expect(stderr).toContain("once more quits at once");
    expect(stdout).not.toContain('"event":"step"');
  });

  it("SIGTERM saves too, and ends with 143: a scheduler is to start it again", async () => {
    const running = start([
      "train",
      "--config",
      config,
      "--steps",
      "4000",
      "--output-dir",
      join(folder, "term"),
      "--json",
    ]);
    await running.until(/"event":"step","step":2,/);
    running.child.kill("SIGTERM");
    const { code, stdout } = await running.ended;
    expect(code).toBe(143);
    const done = checked(stdout).at(-1)!;
    expect(done).toMatchObject({ event: "done", reason: "interrupted" });
    expect(existsSync((done as { checkpoint: string }).checkpoint)).toBe(true);
  });

  it("the shell of npx is sent SIGTERM, and dies of it: the run saves and ends", async () => {
    const path = join(folder, "npx");
    const args = ["train", "--config", config, "--steps", "4000", "--output-dir", path, "--json"];
    // Two commands: one alone some shells replace themselves by.
    const under = ["sh", "-c", '"$@"; exit', "sh"];
    const running = start(args, { env: { npm_command: "exec" }, under });
    await running.until(/"event":"step","step":2,/);
    running.child.kill("SIGTERM");
    const { signal, stdout, stderr } = await running.ended;
    expect(signal).toBe("SIGTERM"); // the shell's; pipes close with the run
    expect(stderr).toContain("SIGTERM: finishing the step and saving");
    const done = checked(stdout).at(-1)!;
    expect(done).toMatchObject({ event: "done", reason: "interrupted" });
    expect(existsSync((done as { checkpoint: string }).checkpoint)).toBe(true);
  });

  it("a reader that goes away ends the run with a checkpoint", async () => {
    const path = join(folder, "pipe");
    const running = start(["train", "--config", config, "--steps", "100000", "--output-dir", path, "--json"]);
    await running.until(/"event":"step","step":2,/);
    running.child.stdout?.destroy();
    const { code, stderr } = await running.ended;
    expect([code, stderr]).toEqual([0, ""]);
    expect(jsonLines(readFileSync(join(path, "metrics.jsonl"), "utf8")).at(-1)).toMatchObject({
      event: "done",
      reason: "interrupted",
    });
  });

  describe("eval", () => {
    it("takes the run's own data, and says the same twice", async () => {
      const args = ["eval", "--checkpoint", run, "--micro-batches", "3", "--json"];
      const [first, second] = [await stroma(args), await stroma(args)];
      expect([first.code, first.stderr]).toEqual([0, ""]);
      const [a, b] = [first, second].map(({ stdout }) => jsonLines(stdout)[0]!);
      expect(a).toEqual({
        event: "eval",
        step: 12,
        loss: expect.any(Number),
        bitsPerByte: expect.any(Number),
        tokens: expect.any(Number),
        data: "planets",
        checkpoint: join(run, "checkpoints", "step-000012"),
        device: expect.any(String),
        seconds: expect.any(Number),
      });
      expect(b!.loss).toBe(a!.loss);
    });

    it("for a person it is two lines", async () => {
      const { stdout } = await stroma(["eval", "--checkpoint", run, "--micro-batches", "1"]);
      expect(stdout).toMatch(
        /^decoder at .*step-000012, on \S+ \(.+\)\nheld-out planets: loss \d\.\d+, \d\.\d+ bits per byte \(/,
      );
    });
  });

  describe("generate", () => {
    const args = ["generate", "--checkpoint", run, "--prompt", "synthetic", "--max-tokens", "6"];

    it("the pieces are the text, the same seed the same text, another seed another", async () => {
      const text = async (...more: string[]) => {
        const { code, stdout, stderr } = await stroma([...args, "--json", ...more]);
        expect([code, stderr]).toEqual([0, ""]);
        const lines = jsonLines(stdout);
        const done = lines.at(-1)!;
        expect(done).toMatchObject({ event: "done", prompt: "synthetic", step: 12 });
        expect(lines.slice(0, -1).map((l) => [l.event, typeof l.text])).toEqual(
          lines.slice(0, -1).map(() => ["text", "string"]),
        );
        expect(
          lines
            .slice(0, -1)
            .map((l) => l.text)
            .join(""),
        ).toBe(done.text);
        return done.text as string;
      };
      const first = await text("--seed", "3");
      expect(await text("--seed", "3")).toBe(first);
      expect(await text("--seed", "4")).not.toBe(first);
      expect(await text("--temperature", "0", "--seed", "3")).toBe(await text("--top-k", "1", "--seed", "4"));
    });

    it("--prompt - reads stdin; the prompt stands before what follows it", async () => {
      const { stdout } = await stroma(
        ["generate", "--checkpoint", run, "--prompt", "-", "--max-tokens", "3", "--temperature", "0"],
        { input: "synthetic" },
      );
      const { stdout: same } = await stroma([...args.slice(0, 5), "--max-tokens", "3", "--temperature", "0"]);
      expect(stdout.startsWith("synthetic")).toBe(true);
      expect(stdout).toBe(same);
    });
  });
});
