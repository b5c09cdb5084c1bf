/** Ctrl-C and SIGTERM: the first one asks, the second one quits at once. */
import { whenShellGone } from "./npx.js";

/**
 * npm and npx pass a Ctrl-C on to their child, which the terminal has already sent it to: one press comes twice, a few
 * milliseconds apart. Signals this close count as one.
 */
const ECHO_MS = 400;

export type StopSignal = "SIGINT" | "SIGTERM";

export class StopSignals implements Disposable {
  private readonly controller = new AbortController();
  private firstAtMs = 0;
  private first: StopSignal | null = null;
  /** npx was sent SIGTERM, unless this process was asked as well. */
  private readonly shell = whenShellGone(() => {
    if (this.first === null) this.receive("SIGTERM");
  });
  private readonly handler = (signal: StopSignal) => this.receive(signal);

  /**
   * @param onFirst tells the person what happens now
   * @param onQuit leaves the terminal as it was; the process ends right after it
   */
  constructor(
    private readonly onFirst: (signal: StopSignal) => void,
    private readonly onQuit: () => void = () => {},
    private readonly now: () => number = Date.now,
    private readonly end: (signal: StopSignal) => void = dieOf,
  ) {
    process.on("SIGINT", this.handler);
    process.on("SIGTERM", this.handler);
  }

  get signal(): AbortSignal {
    return this.controller.signal;
  }

  /** The signal that asked, or null. */
  get received(): StopSignal | null {
    return this.first;
  }

  /** Asks as the first signal does, for another reason. */
  stop(): void {
    this.controller.abort();
  }

  private receive(signal: StopSignal): void {
    const now = this.now();
    if (this.first === null) {
      this.first = signal;
      this.firstAtMs = now;
      this.onFirst(signal);
      this.controller.abort(signal);
      return;
    }
    if (now - this.firstAtMs < ECHO_MS) return;
    this.onQuit();
    this.end(signal);
  }

  [Symbol.dispose](): void {
    process.off("SIGINT", this.handler);
    process.off("SIGTERM", this.handler);
    this.shell[Symbol.dispose]();
  }
}

/** By the signal itself, as a shell expects: no destructor runs, and none is needed for checkpoints to be whole. */
function dieOf(signal: StopSignal): void {
  process.removeAllListeners(signal);
  process.kill(process.pid, signal);
}
