/** Child of the kill test: trains with a save at every step until it is killed. */
import { Trainer } from "../../src/train/trainer.js";
import { fakeParts, SMALL } from "./fake-trainer.js";
import { REAL } from "./real-trainer.js";

const [outputDir, engine] = process.argv.slice(2) as [string, "fake" | "real"];

// Tensors are written a little apart, so that kills fall inside files too.
const parts = fakeParts({ onWrite: () => new Promise((resolve) => setTimeout(resolve, 1)) });
const constant = { learningRateSchedule: { kind: "constant" } } as const;
const saving = { saveEveryNSteps: 1, keepLast: 2, resume: "auto" } as const;
const options = { ...(engine === "fake" ? SMALL : REAL), ...constant, ...saving, steps: 1e6, outputDir };
await using trainer = new Trainer(options, engine === "fake" ? parts : {});
for await (const { event } of trainer.run())
  if (event === "start" || event === "step" || event === "checkpoint") process.send?.(event);
