/** `stroma generate`: text from a checkpoint, as it comes. */
import type { Argv, CommandModule } from "yargs";
import { EXIT } from "./errors.js";
import { checkOptions, generateOptions, required, yargsOptions } from "./options.js";
import { StopSignals } from "./signals.js";
import { harmless } from "./ui/format.js";

async function readStdin(): Promise<string> {
  const parts: Buffer[] = [];
  for await (const part of process.stdin) parts.push(part as Buffer);
  return Buffer.concat(parts).toString("utf8");
}

export const generateCommand: CommandModule<object, Record<string, unknown>> = {
  command: "generate",
  describe: "Continue a text with a checkpoint",
  builder: (y: Argv<object>) =>
    y
      .options(yargsOptions(generateOptions))
      .example('$0 generate --checkpoint runs/tiny --prompt "synthetic star"', "from the newest checkpoint")
      .example("$0 generate --checkpoint runs/tiny --prompt - --temperature 0 < prompt.txt", "the likeliest text")
      .example('$0 generate --checkpoint runs/tiny --prompt "" --seed 3 --json', "one JSON object a line") as never,
  handler: async (argv) => {
    const flags = checkOptions(generateOptions, argv);
    const path = required(flags.checkpoint, generateOptions, "checkpoint");
    const given = required(flags.prompt, generateOptions, "prompt");
    const prompt = given === "-" ? await readStdin() : given;
    using signals = new StopSignals(() => {});
    const { loadModel } = await import("../generate/load-model.js");
    await using model = await loadModel(path, { device: flags.device, threads: flags.threads });
    const { maxTokens = 256, temperature, topK, topP, seed } = flags;
    const started = performance.now();
    const pieces = model.stream(prompt, {
      maxTokens,
      ...(temperature === undefined ? {} : { temperature }),
      ...(topK === undefined ? {} : { topK }),
      ...(topP === undefined ? {} : { topP }),
      ...(seed === undefined ? {} : { seed }),
      signal: signals.signal,
    });
    let text = "";
    const say = (event: object) => process.stdout.write(`${JSON.stringify(event)}\n`);
    // What a model says may hold escape sequences: never to a terminal.
    const show = (piece: string) => process.stdout.write(process.stdout.isTTY ? harmless(piece) : piece);
    if (flags.json !== true) show(prompt);
    for await (const piece of pieces) {
      text += piece;
      if (flags.json === true) say({ event: "text", text: piece });
      else show(piece);
    }
    const seconds = (performance.now() - started) / 1000;
    if (flags.json === true)
      say({ event: "done", prompt, text, checkpoint: model.path, step: model.step, device: model.device, seconds });
    else if (!text.endsWith("\n")) process.stdout.write("\n");
    process.exitCode = EXIT.ok;
  },
};
