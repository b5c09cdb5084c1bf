/** `stroma eval`: the held-out loss of a checkpoint, on what it was trained on or on other data. */

import { readFile } from "node:fs/promises";
import { join } from "node:path";
import type { Argv, CommandModule } from "yargs";
import { FILES } from "../checkpoint/format.js";
import { openCheckpoint } from "../checkpoint/read.js";
import type { DatasetOptions, TextDataset } from "../data/index.js";
import { StromaError } from "../errors.js";
import { EXIT } from "./errors.js";
import { checkOptions, evalOptions, required, yargsOptions } from "./options.js";
import { StopSignals } from "./signals.js";
import { formatCount, formatDuration, formatLoss } from "./ui/format.js";

/** What the run of a checkpoint trained on. @throws CONFIG when that was a Dataset of a program's own */
async function trainedOn(path: string): Promise<{ spec: string | DatasetOptions; fingerprint: string }> {
  const checkpoint = await openCheckpoint(path);
  const saved = JSON.parse(await readFile(join(checkpoint.path, FILES.trainer), "utf8")) as {
    options?: { data?: string | DatasetOptions };
  };
  const spec = saved.options?.data;
  if (spec === undefined)
    throw new StromaError(
      "CONFIG",
      `[eval] ${path} was trained on data of a program's own (${checkpoint.state.data.name}): say --data`,
    );
  return { spec, fingerprint: checkpoint.state.data.fingerprint };
}

export const evalCommand: CommandModule<object, Record<string, unknown>> = {
  command: "eval",
  describe: "Held-out loss and bits per byte of a checkpoint",
  builder: (y: Argv<object>) =>
    y
      .options(yargsOptions(evalOptions))
      .example("$0 eval --checkpoint runs/tiny", "on what it was trained on")
      .example("$0 eval --checkpoint runs/tiny --data other.csv --json", "on something else") as never,
  handler: async (argv) => {
    const flags = checkOptions(evalOptions, argv);
    const path = required(flags.checkpoint, evalOptions, "checkpoint");
    using signals = new StopSignals(() => process.stderr.write("stroma: stopping\n"));
    const { openDataset } = await import("../data/index.js");
    const { loadModel } = await import("../generate/load-model.js");
    const started = performance.now();
    let dataset: TextDataset;
    if (flags.data !== undefined) dataset = await openDataset(flags.data);
    else {
      const { spec, fingerprint } = await trainedOn(path);
      dataset = await openDataset(spec);
      if (dataset.fingerprint !== fingerprint)
        process.stderr.write(
          `stroma: ${dataset.name} has changed since the run: what is held out now may have been trained on\n`,
        );
    }
    await using model = await loadModel(path, { device: flags.device, threads: flags.threads });
    const { sequenceLength, microBatchSize, microBatches } = flags;
    const result = await model.evaluate(dataset, {
      ...(sequenceLength === undefined ? {} : { sequenceLength }),
      ...(microBatchSize === undefined ? {} : { microBatchSize }),
      ...(microBatches === undefined ? {} : { microBatches }),
      signal: signals.signal,
    });
    const seconds = (performance.now() - started) / 1000;
    if (flags.json === true) {
      const event = {
        event: "eval",
        step: model.step,
        ...result,
        data: dataset.name,
        checkpoint: model.path,
        device: model.device,
        seconds,
      };
      process.stdout.write(`${JSON.stringify(event)}\n`);
    } else {
      const bits = result.bitsPerByte === null ? "" : `, ${result.bitsPerByte.toFixed(4)} bits per byte`;
      process.stdout.write(
        `${model.name} at ${model.path}, on ${model.device}${model.deviceReason === null ? "" : ` (${model.deviceReason})`}\n` +
          `held-out ${dataset.name}: loss ${formatLoss(result.loss)}${bits} (${formatCount(result.tokens)} tokens, ${formatDuration(seconds)})\n`,
      );
    }
    process.exitCode = EXIT.ok;
  },
};
