/** `stroma`: parses the command line and runs one command. */
import { readFileSync } from "node:fs";
import yargs, { type Argv } from "yargs";
import { isFirstRank } from "../distributed/environment.js";
import { followLauncher } from "../distributed/lifeline.js";
import { StromaError } from "../errors.js";
import { COMMANDS, type CommandEntry, commandName } from "./commands.js";
import { EXIT, reportError } from "./errors.js";
import { camel, kebab } from "./options.js";
import { didYouMean } from "./suggest.js";

const EPILOGUE = `Exit status: ${EXIT.ok} done, ${EXIT.failed} failed, ${EXIT.usage} wrong command line or config, ${EXIT.notSetUp} native part missing or unfit, ${EXIT.interrupted} Ctrl-C, ${EXIT.terminated} SIGTERM.
Environment: STROMA_DEBUG=1 shows stacks; STROMA_CACHE, STROMA_LIBTORCH (see stroma setup --help); NO_COLOR.`;

export function packageVersion(): string {
  const file = new URL("../../package.json", import.meta.url);
  return (JSON.parse(readFileSync(file, "utf8")) as { version: string }).version;
}

/** Runs the command line; resolves to the exit status. Throws nothing. */
export async function run(argv: readonly string[]): Promise<number> {
  const json = argv.includes("--json");
  try {
    await parser(argv).parseAsync();
    return typeof process.exitCode === "number" ? process.exitCode : EXIT.ok;
  } catch (thrown) {
    // The parser itself throws this one, past fail().
    const [, lacking] = /^Not enough arguments following: (.+)$/.exec((thrown as Error).message) ?? [];
    const error = lacking === undefined ? thrown : new StromaError("CONFIG", `[cli] --${lacking} takes a value`);
    const out = isFirstRank() ? process.stdout : process.stderr;
    return reportError(error, { json, out, err: process.stderr });
  }
}

/** The whole command: also ends the process, since a native thread or a worker may hold it open. */
export async function main(argv: readonly string[]): Promise<void> {
  followLauncher();
  // A reader that has gone (`stroma train --json | head`) is no reason for a stack.
  process.stdout.on("error", (error: NodeJS.ErrnoException) => {
    if (error.code !== "EPIPE") throw error;
  });
  process.exitCode = await run(argv);
}

/** What yargs has and its types, a version behind, lack. */
type Configurable = Argv & { usageConfiguration(options: { "hide-types": boolean }): Argv };

function parser(argv: readonly string[]): Argv {
  const names = COMMANDS.map(commandName);
  let cli = (yargs([...argv]) as Configurable)
    .usageConfiguration({ "hide-types": true })
    .scriptName("stroma")
    .usage("Trains large transformers from Node.js.\n\n$0 <command> [options]")
    .parserConfiguration({
      "duplicate-arguments-array": true,
      "boolean-negation": true,
      "parse-positional-numbers": false,
    })
    .exitProcess(false)
    .strict()
    .demandCommand(1, "Which command?")
    .example("$0 demo", "five minutes: train, evaluate, look")
    .example("$0 train --data planets --steps 400", "train the tiny preset")
    .example("$0 train --resume --output-dir runs/tiny", "go on where a run stopped")
    .example('$0 generate --checkpoint runs/tiny --prompt "synthetic star"', "text from the newest checkpoint")
    .example("$0 doctor", "what is there and what is missing")
    .epilogue(EPILOGUE)
    .version(packageVersion())
    .alias({ help: "h", version: "v" })
    .wrap(Math.min(110, process.stdout.columns || 100))
    .fail((message, error) => {
      // Its own complaints come with or without an error of its own.
      if (error && error.name !== "YError") throw error;
      throw usageError(message ?? error.message, argv, names, optionNames(cli));
    });
  for (const entry of COMMANDS) cli = cli.command(lazy(entry));
  return cli;
}

/** A yargs command whose module is imported when its builder runs. */
function lazy(entry: CommandEntry) {
  let loaded: Awaited<ReturnType<CommandEntry["load"]>> | undefined;
  return {
    command: entry.command,
    describe: entry.describe,
    builder: (async (y: unknown) => {
      loaded = await entry.load();
      const { builder } = loaded;
      if (typeof builder === "function") return builder(y as never);
      return builder === undefined ? y : (y as { options(o: unknown): unknown }).options(builder);
    }) as never,
    handler: async (args: unknown) => {
      loaded ??= await entry.load();
      await loaded.handler(args as never);
    },
  };
}

function optionNames(y: unknown): string[] {
  const { key } = (y as { getOptions(): { key: Record<string, unknown> } }).getOptions();
  return Object.keys(key).filter((name) => name.length > 1 && name === kebab(name));
}

/** yargs's complaint in our words, with the nearest name. */
function usageError(message: string, argv: readonly string[], commands: string[], options: string[]): StromaError {
  const [, list] = /^Unknown (?:arguments?|commands?): (.+)$/s.exec(message) ?? [];
  const command = argv.find((word) => !word.startsWith("-"));
  const help = `stroma ${command !== undefined && commands.includes(command) ? `${command} ` : ""}--help`;
  if (list !== undefined) {
    // As it was typed, where it was; yargs also lists its camelCase twin.
    const typed = (name: string) => (argv.includes(name) ? name : kebab(camel(name)));
    const unknown = [...new Set(list.split(", ").map(typed))];
    const first = unknown[0]!;
    const flag = argv.some((word) => word === `-${first}` || word.startsWith(`--${first}`));
    if (flag)
      return new StromaError(
        "CONFIG",
        `[cli] there is no option --${first}${didYouMean(first, options, "--") || "."} See ${help}`,
      );
    if (command === first)
      return new StromaError(
        "CONFIG",
        `[cli] there is no command "${first}"${didYouMean(first, commands, "stroma ") || "."} See ${help}`,
      );
    return new StromaError(
      "CONFIG",
      `[cli] "${first}" is one word too many: options are written --name value. See ${help}`,
    );
  }
  if (message.startsWith("Which command?"))
    return new StromaError("CONFIG", `[cli] which command? There are: ${commands.join(", ")}. See stroma --help`);
  return new StromaError("CONFIG", `[cli] ${message.trim().replace(/\s*\n\s*/g, ". ")}. See ${help}`);
}
