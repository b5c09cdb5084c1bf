/**
 * Starts the ranks of one machine, as torchrun does, and ends with them. Each rank leads a session of its own, so that a
 * terminal's Ctrl-C reaches the launcher alone and each rank gets it once. Rank 0 has the launcher's own stdout and
 * stderr; lines of the others come prefixed.
 */
import { type ChildProcess, spawn } from "node:child_process";
import { createServer } from "node:net";
import { availableParallelism, constants } from "node:os";
import { type Readable, Writable } from "node:stream";
import { pipeline } from "node:stream/promises";
import pc from "picocolors";
import type { Colors } from "picocolors/types.js";
import { StromaError } from "../errors.js";
import { ATTEMPT } from "./environment.js";
import { LAUNCHER, type LauncherMessage, type RankMessage } from "./lifeline.js";
import { PrefixedLines } from "./lines.js";

export type StopSignal = "SIGINT" | "SIGTERM";

export interface LaunchOptions {
  /** A program that takes part in followLauncher(): this one, in general. */
  command: string;
  /** Its arguments, the same for every rank, and after a restart what to tell the user of where it goes on. */
  args(attempt: number): Arguments | Promise<Arguments>;
  /** Processes to start. One alone is no group: it gets no rank. */
  ranks: number;
  /** Default: this process's. */
  env?: NodeJS.ProcessEnv;
  /** How often all ranks are started again after a failure. Default 0. */
  restarts?: number;
  /** Exit statuses that another try would end with too: a wrong command line. */
  final?: readonly number[];
  /** How long ranks may take to end once another has failed, before they are killed. Default 10,000. */
  graceMs?: number;
  /** Before the first restart; doubled for each one after it, up to `longestBackoffMs`. Default 1,000. */
  backoffMs?: number;
  /** Default 60,000. */
  longestBackoffMs?: number;
  /** Only rank 0 writes to stdout: stdout of the others goes to stderr. Default false. */
  onlyRank0Out?: boolean;
  out?: NodeJS.WritableStream;
  err?: NodeJS.WritableStream;
  /** Of the prefixes. Default: none. */
  colors?: Colors;
  /** Aborted with a signal's name as reason: every rank gets that signal, once; they save and end. */
  stop?: AbortSignal;
  /** Aborted: every rank is killed, at once. */
  quit?: AbortSignal;
  /** Rank 0's run has begun, and this is its folder. */
  onRun?(folder: string): void;
}

export interface Arguments {
  args: readonly string[];
  /** `from the last checkpoint in runs/a`. */
  from?: string;
}

interface Failure {
  rank: number;
  status: number;
}

/**
 * Runs to the end of all ranks.
 * @returns the exit status: of the first rank that failed (128 + n for one that signal n ended), after a stop 130 or
 * 143 where ranks say so, else 0
 * @throws INVALID_ARGUMENT for a number of ranks below 1, CONFIG when there is no free port
 */
export async function launch(options: LaunchOptions): Promise<number> {
  const { ranks, restarts = 0, final = [], backoffMs = 1000, longestBackoffMs = 60_000, stop, quit } = options;
  if (!Number.isSafeInteger(ranks) || ranks < 1)
    throw new StromaError("INVALID_ARGUMENT", `[launch] expected at least 1 rank, got ${ranks}`);
  for (let attempt = 0; ; attempt++) {
    const { args, from } = await options.args(attempt);
    if (attempt > 0) say(options, `attempt ${attempt + 1} of ${restarts + 1}${from === undefined ? "" : `: ${from}`}`);
    const group = new RankGroup(options, args, attempt);
    const { status, failure } = await group.run();
    if (failure === null || stop?.aborted || quit?.aborted) return status;
    if (attempt === restarts) return status;
    if (final.includes(status)) {
      say(options, `not started again: status ${status} says that another try would end the same way`);
      return status;
    }
    const wait = Math.min(longestBackoffMs, backoffMs * 2 ** attempt);
    say(options, `starting ${ranks === 1 ? "it" : `all ${ranks} ranks`} again in ${wait / 1000} s`);
    await pause(wait, stop, quit);
    // Asked to end while nothing ran: nothing was saved since the failure.
    if (stop?.aborted || quit?.aborted) return stop?.reason === "SIGINT" ? statusOf(null, "SIGINT") : status;
  }
}

/** The ranks of one attempt. */
class RankGroup {
  readonly #children: ChildProcess[] = [];
  readonly #running = new Set<ChildProcess>();
  #failure: Failure | null = null;
  #stopped: number | null = null;
  #grace: NodeJS.Timeout | undefined;
  /** Rank 0, while it shows a live view. */
  #live: ChildProcess | null = null;
  /** Settles when all lines so far are written: one after the other. */
  #written: Promise<void> = Promise.resolve();

  constructor(
    private readonly options: LaunchOptions,
    private readonly args: readonly string[],
    private readonly attempt: number,
  ) {}

  async run(): Promise<{ status: number; failure: Failure | null }> {
    const { ranks, stop, quit } = this.options;
    const port = ranks === 1 ? null : await freePort();
    if (stop?.aborted || quit?.aborted) return { status: statusOf(null, asSignal(stop?.reason)), failure: null };
    const forward = (): void => {
      // After a failure they were asked already, and a second signal would end them without saving.
      if (this.#failure === null) this.#each((child) => child.kill(asSignal(stop!.reason)));
    };
    const kill = (): void => {
      this.#each(killGroup);
      this.#leaveTerminal();
    };
    const terminal = followTerminal(this.#running, () => this.#children[0]);
    // Whatever ends this process in an orderly way, an exception too.
    process.on("exit", kill);
    stop?.addEventListener("abort", forward, { once: true });
    quit?.addEventListener("abort", kill, { once: true });
    try {
      const ended = Array.from({ length: ranks }, (_, rank) => this.#start(rank, port));
      await Promise.all(ended);
      await this.#written;
    } finally {
      clearTimeout(this.#grace);
      terminal[Symbol.dispose]();
      process.off("exit", kill);
      stop?.removeEventListener("abort", forward);
      quit?.removeEventListener("abort", kill);
    }
    if (quit?.aborted) return { status: statusOf(null, asSignal(quit.reason)), failure: null };
    return { status: this.#failure?.status ?? this.#stopped ?? 0, failure: this.#failure };
  }

  /** Resolves when the rank has ended and all that it wrote is written. */
  #start(rank: number, port: number | null): Promise<void> {
    const { command, env = process.env, ranks } = this.options;
    const own = rank === 0 ? "inherit" : "pipe";
    const child = spawn(command, this.args, {
      stdio: ["ignore", own, own, "ipc"],
      detached: true,
      env: {
        ...rankEnvironment(env, rank, ranks, port),
        [ATTEMPT]: String(this.attempt),
        [LAUNCHER]: String(process.pid),
      },
    });
    this.#children[rank] = child;
    this.#running.add(child);
    if (rank === 0) child.on("message", (message) => this.#hear(child, message as RankMessage));
    const shown = rank === 0 ? [] : this.#show(child, rank);
    return new Promise((resolve) => {
      let verdict: string | null = null;
      let leftOpen: NodeJS.Timeout | undefined;
      const closed = async (): Promise<void> => {
        clearTimeout(leftOpen);
        await Promise.all(shown); // what it wrote itself comes before what is said of its end
        if (verdict !== null) this.#say(verdict);
        resolve();
      };
      child.once("error", (error) => {
        // Also told of a signal that came too late; only one that never ran has no process id.
        if (child.pid !== undefined) return;
        verdict = this.#ended(child, rank, 1, `could not be started: ${error.message}`);
        void closed();
      });
      child.once("exit", (code, signal) => {
        killGroup(child);
        const how = signal === null ? `ended with status ${code}` : `was ended by ${signal}${OFTEN[signal] ?? ""}`;
        verdict = this.#ended(child, rank, statusOf(code, signal), `(process ${child.pid}) ${how}`);
        // A process that left its group may still hold the pipes.
        leftOpen = setTimeout(() => {
          child.stdout?.destroy();
          child.stderr?.destroy();
        }, 2000);
      });
      child.once("close", () => void closed());
    });
  }

  /** Acts on the end of a rank at once; what is to be said of it, if anything. */
  #ended(child: ChildProcess, rank: number, status: number, what: string): string | null {
    this.#running.delete(child);
    if (this.#live === child) this.#leaveTerminal();
    const { stop, quit, ranks, graceMs = 10_000 } = this.options;
    if (status === 0 || quit?.aborted) return null;
    if (stop?.aborted && (status === statusOf(null, "SIGINT") || status === statusOf(null, "SIGTERM"))) {
      this.#stopped ??= status;
      return null;
    }
    if (this.#failure !== null) return null;
    this.#failure = { rank, status };
    const others = this.#running.size;
    if (others > 0) {
      // Those that were asked to stop are saving; asked twice they would end without.
      if (!stop?.aborted) this.#each((other) => other.kill("SIGTERM"));
      this.#grace = setTimeout(() => {
        this.#say(`killing what has not ended ${graceMs / 1000} s after it`);
        this.#each(killGroup);
      }, graceMs);
    }
    const then = others === 0 ? "" : `; ending the other ${others === 1 ? "rank" : `${others} ranks`}`;
    return `${ranks === 1 ? "the run" : `rank ${rank}`} ${what}${then}`;
  }

  /** A live view hides the cursor; one that was killed cannot show it again. */
  #leaveTerminal(): void {
    if (this.#live === null) return;
    this.#live = null;
    const { out = process.stdout, err = process.stderr } = this.options;
    const terminal = [out, err].find((stream) => (stream as Partial<NodeJS.WriteStream>).isTTY === true);
    terminal?.write("\u001b[?25h\n");
  }

  #hear(child: ChildProcess, message: RankMessage): void {
    if (message?.stroma === "view") this.#live = message.live ? child : null;
    else if (message?.stroma === "run") this.options.onRun?.(message.folder);
  }

  /** Lines of a rank but the first, whole and prefixed. */
  #show(child: ChildProcess, rank: number): Promise<void>[] {
    const {
      out = process.stdout,
      err = process.stderr,
      onlyRank0Out = false,
      colors = pc.createColors(false),
    } = this.options;
    const tints = [colors.cyan, colors.magenta, colors.yellow, colors.green, colors.blue];
    const prefix = `${tints[(rank - 1) % tints.length]!(`[rank ${rank}]`)} `;
    const show = (from: Readable | null, to: NodeJS.WritableStream): Promise<void>[] =>
      // Without pipes it could not be started, which is told; one cut short has been told of too.
      from ? [pipeline(from, new PrefixedLines(prefix), this.#sink(to)).catch(() => {})] : [];
    return [...show(child.stdout, onlyRank0Out ? err : out), ...show(child.stderr, err)];
  }

  /** As slow as whoever reads, so that a rank that writes much waits, as it would on a terminal of its own. */
  #sink(to: NodeJS.WritableStream): Writable {
    return new Writable({
      write: (chunk: Buffer, _encoding, done) => void this.#write(chunk.toString(), to).then(() => done()),
    });
  }

  #write(text: string, to: NodeJS.WritableStream): Promise<void> {
    this.#written = this.#written.then(async () => {
      if (await this.#writeThroughRank0(text)) return;
      await new Promise<void>((resolve) => to.write(text, () => resolve())); // also when the reader has gone
    });
    return this.#written;
  }

  /** While its view is live: a line between two of its drawings would stay in the picture. */
  async #writeThroughRank0(text: string): Promise<boolean> {
    const live = this.#live;
    if (live === null || !live.connected) return false;
    const note: LauncherMessage = { stroma: "note", text: text.replace(/\n$/, "") };
    return new Promise((resolve) => live.send(note, (error) => resolve(error === null)));
  }

  #say(text: string): void {
    void this.#write(`stroma: ${text}\n`, this.options.err ?? process.stderr);
  }

  #each(what: (child: ChildProcess) => void): void {
    for (const child of this.#running) what(child);
  }
}

/** What a rank finds in its environment: torchrun's variables, and its share of the cores unless the user gave one. */
export function rankEnvironment(
  env: NodeJS.ProcessEnv,
  rank: number,
  ranks: number,
  port: number | null,
): NodeJS.ProcessEnv {
  if (ranks === 1) return { ...env };
  const { TORCHELASTIC_USE_AGENT_STORE: _agent, ...kept } = env;
  return {
    ...kept,
    OMP_NUM_THREADS: env.OMP_NUM_THREADS || String(Math.max(1, Math.floor(availableParallelism() / ranks))),
    RANK: String(rank),
    WORLD_SIZE: String(ranks),
    LOCAL_RANK: String(rank),
    LOCAL_WORLD_SIZE: String(ranks),
    MASTER_ADDR: "127.0.0.1",
    MASTER_PORT: String(port),
  };
}

/**
 * A port of the loopback interface that nobody listens on: below those that Linux gives to outgoing connections, so that
 * none takes it before rank 0 does.
 */
async function freePort(): Promise<number> {
  for (let trial = 0; trial < 100; trial++) {
    const port = 20_000 + Math.floor(Math.random() * 12_000);
    const free = await new Promise<boolean>((resolve) => {
      const server = createServer()
        .once("error", () => resolve(false))
        .listen({ port, host: "127.0.0.1", exclusive: true }, () => server.close(() => resolve(true)));
    });
    if (free) return port;
  }
  throw new StromaError("CONFIG", "[launch] no free port on 127.0.0.1 among 100 tried between 20000 and 31999");
}

/** As a shell counts. */
export function statusOf(code: number | null, signal: NodeJS.Signals | null): number {
  return signal === null ? (code ?? 1) : 128 + constants.signals[signal];
}

const asSignal = (reason: unknown): StopSignal => (reason === "SIGINT" ? "SIGINT" : "SIGTERM");

const OFTEN: Partial<Record<NodeJS.Signals, string>> = {
  SIGKILL: ": often the system, out of memory (dmesg tells)",
};

/** The rank and all that it started; it leads their group. */
function killGroup(child: ChildProcess): void {
  if (child.pid === undefined) return;
  try {
    process.kill(-child.pid, "SIGKILL");
  } catch {} // gone already
}

/** What a terminal tells its foreground processes, for ranks that stand in sessions of their own: its size, Ctrl-Z. */
function followTerminal(running: ReadonlySet<ChildProcess>, first: () => ChildProcess | undefined): Disposable {
  const all = (signal: NodeJS.Signals): void => {
    for (const child of running) child.kill(signal);
  };
  const resized = (): void => void first()?.kill("SIGWINCH");
  const paused = (): void => {
    all("SIGSTOP");
    process.kill(process.pid, "SIGSTOP");
  };
  const resumed = (): void => all("SIGCONT");
  process.on("SIGWINCH", resized).on("SIGTSTP", paused).on("SIGCONT", resumed);
  return {
    [Symbol.dispose]: () => void process.off("SIGWINCH", resized).off("SIGTSTP", paused).off("SIGCONT", resumed),
  };
}

function say({ err = process.stderr }: LaunchOptions, text: string): void {
  err.write(`stroma: ${text}\n`);
}

function pause(ms: number, ...signals: (AbortSignal | undefined)[]): Promise<void> {
  return new Promise((resolve) => {
    const end = (): void => {
      clearTimeout(timer);
      for (const signal of signals) signal?.removeEventListener("abort", end);
      resolve();
    };
    const timer = setTimeout(end, ms);
    for (const signal of signals) signal?.addEventListener("abort", end, { once: true });
    if (signals.some((signal) => signal?.aborted)) end();
  });
}
