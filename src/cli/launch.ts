/** `stroma train --ranks N`: this process starts the ranks, hands Ctrl-C on and, where asked to, starts them again. */
import { CheckpointStore } from "../checkpoint/store.js";
import { type Arguments, type LaunchOptions, launch } from "../distributed/launch.js";
import { EXIT } from "./errors.js";
import { StopSignals } from "./signals.js";
import { colorsFor } from "./ui/view.js";

/** Another try ends the same way: the command line is wrong, or the native part is missing. */
const FINAL = [EXIT.usage, EXIT.notSetUp];

/**
 * Runs this very command once more for every rank, with the variables that say which one it is.
 * @returns the exit status
 */
export async function launchTraining(
  { ranks, restart = 0 }: { ranks: number; restart?: number },
  json: boolean,
  overrides: Partial<LaunchOptions> = {},
): Promise<number> {
  const quit = new AbortController();
  using signals = new StopSignals(
    () => {}, // rank 0 says that it finishes the step and saves
    () => quit.abort(signals.received),
  );
  const command = [...process.execArgv.filter((arg) => !arg.startsWith("--inspect")), process.argv[1]!];
  const resume = new ResumePoint(process.argv.slice(2));
  return await launch({
    command: process.execPath,
    args: async (attempt) => {
      const { args, from } = await resume.arguments(attempt);
      return { args: [...command, ...args], from };
    },
    ranks,
    restarts: restart,
    final: FINAL,
    onlyRank0Out: json,
    colors: colorsFor(process.stderr),
    stop: signals.signal,
    quit: quit.signal,
    onRun: (folder) => resume.begun(folder),
    ...overrides,
  });
}

/**
 * Where a restart goes on. Only a checkpoint that was saved since this launcher began moves it: a folder may hold those of
 * an earlier run, which the ranks refuse to mix with, or a newer one than the run was told to resume from.
 */
export class ResumePoint {
  #folder: string | null = null;
  #before: Promise<string | null> = Promise.resolve(null);

  /** @param given the command line */
  constructor(private readonly given: readonly string[]) {}

  /** Rank 0's run has begun, in this folder. */
  begun(folder: string): void {
    if (this.#folder === folder) return;
    this.#folder = folder;
    this.#before = newestOf(folder);
  }

  async arguments(attempt: number): Promise<Arguments> {
    if (attempt === 0) return { args: this.given };
    if (this.#folder === null || (await newestOf(this.#folder)) === (await this.#before))
      return { args: this.given, from: "no checkpoint was saved, so from where it began" };
    return {
      args: [...withoutResume(this.given), `--resume=${this.#folder}`],
      from: `from the last checkpoint in ${this.#folder}`,
    };
  }
}

/** What tells one checkpoint from the next, also of the same step. */
async function newestOf(folder: string): Promise<string | null> {
  const [newest] = await new CheckpointStore(folder).list();
  return newest === undefined ? null : `${newest.path} ${newest.state?.sequence}`;
}

/** `--resume`, `--resume PATH` and `--resume=PATH` taken out, as the parser reads them. */
function withoutResume(args: readonly string[]): string[] {
  const kept: string[] = [];
  for (let i = 0; i < args.length; i++) {
    const arg = args[i]!;
    if (arg.startsWith("--resume=") || arg === "--no-resume") continue;
    if (arg !== "--resume") kept.push(arg);
    else if (args[i + 1] !== undefined && !args[i + 1]!.startsWith("-")) i++;
  }
  return kept;
}
