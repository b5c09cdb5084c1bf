/**
 * The commands there are. A command's module is loaded when it is used: `stroma --help` costs nothing, and `stroma
 * doctor` runs also where something else is broken. A test compares each entry with what its module exports.
 */
import type { CommandModule } from "yargs";

export interface CommandEntry {
  /** As yargs spells it, with positionals. */
  command: string;
  describe: string;
  load(): Promise<CommandModule>;
}

// biome-ignore lint/suspicious/noExplicitAny: each command knows its own arguments
const any = (module: CommandModule<any, any>): CommandModule => module;

export const COMMANDS: readonly CommandEntry[] = [
  {
    command: "train",
    describe: "Train a model, or resume a run",
    load: async () => any((await import("./train.js")).trainCommand),
  },
  {
    command: "eval",
    describe: "Held-out loss and bits per byte of a checkpoint",
    load: async () => any((await import("./eval.js")).evalCommand),
  },
  {
    command: "generate",
    describe: "Continue a text with a checkpoint",
    load: async () => any((await import("./generate.js")).generateCommand),
  },
  {
    command: "demo",
    describe: "Train a small model on simulated planets and print its score",
    load: async () => any((await import("./demo.js")).demoCommand),
  },
  {
    command: "inspect",
    describe: "Show a model's blocks, parameters, shapes and floating-point operations",
    load: async () => any((await import("./inspect.js")).inspectCommand),
  },
  {
    command: "plan",
    describe: "Say whether a model trains in given memory, where every byte lives, and how fast",
    load: async () => any((await import("./plan.js")).planCommand),
  },
  {
    command: "data",
    describe: "Look into data, or simulate planets",
    load: async () => any((await import("./data.js")).dataCommand),
  },
  {
    command: "setup",
    describe: "Fetch libtorch where none fits, and build the native part",
    load: async () => any((await import("./setup.js")).setupCommand),
  },
  {
    command: "doctor",
    describe: "Try the whole chain link by link, and name the cure of each that fails",
    load: async () => any((await import("./doctor.js")).doctorCommand),
  },
  {
    command: "selftest <what>",
    describe: "Train small models with every means that saves memory, and check what each claims",
    load: async () => any((await import("./selftest.js")).selftestCommand),
  },
];

export const commandName = (entry: CommandEntry): string => entry.command.split(" ")[0]!;
