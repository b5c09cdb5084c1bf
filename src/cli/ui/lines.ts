/** The sentences of a run, one an event: what a log holds, and what stays above the live view. */
import type { Colors } from "picocolors/types.js";
import type { StartEvent, TrainEvent } from "../../train/events.js";
import { formatBytes, formatCount, formatDuration, formatLoss, formatRate, printable, truncate } from "./format.js";
import { sparkline } from "./plot.js";
import { type RunState, secondsLeft } from "./state.js";

/** The device, and why it is this one where nobody said. */
const deviceOf = ({ device, deviceReason }: StartEvent): string =>
  deviceReason === null ? device : `${device}: ${deviceReason}`;

/** What is not the plain case of float32 and AdamW. */
function formatsOf({ dtype, dtypeReason, precision, masterWeight, optimizer }: StartEvent): string[] {
  const why = dtypeReason === null ? "" : ` (${dtypeReason})`;
  const stored = precision === dtype ? dtype : `${precision} parameters, computing in ${dtype}`;
  return [
    `${stored}${why}`,
    ...(precision === "bfloat16" ? [`master weights: ${masterWeight}`] : []),
    ...(optimizer === "adamw" ? [] : ["8-bit AdamW"]),
  ];
}

/** One line for an event that has been folded into `state`; null for those that say nothing by themselves. */
export function describeEvent(event: TrainEvent, state: RunState, c: Colors, width: number): string | null {
  const at = (step: number) => c.dim(`step ${String(step).padStart(digits(state))}`);
  switch (event.event) {
    case "start": {
      const from = event.resumedFrom === null ? "" : `\nresumed from ${event.resumedFrom} after ${event.step} steps`;
      return (
        `${c.bold(event.model)}, ${formatCount(event.parameters)} parameters, on ${c.bold(event.data)}: ` +
        `steps ${event.step + 1} to ${event.steps}, ${formatCount(event.tokensPerStep)} tokens each ` +
        c.dim(`(${[event.schedule, deviceOf(event), ...formatsOf(event)].join(", ")})`) +
        c.dim(`\nplan: ${event.plan}`) +
        from
      );
    }
    case "step": {
      const left = secondsLeft(state);
      const parts = [
        `loss ${formatLoss(event.loss)}`,
        `norm ${formatLoss(event.gradNorm)}`,
        `lr ${formatRate(event.learningRate)}`,
        `${formatCount(state.tokensPerSecond ?? event.tokensPerSecond)} tokens/s`,
        memory(state),
        ...(left === null || left === 0 ? [] : [`left ${formatDuration(left)}`]),
      ];
      return `step ${String(event.step).padStart(digits(state))}/${state.start?.steps ?? "?"}  ${parts.join("  ")}`;
    }
    case "eval": {
      const bits = event.bitsPerByte === null ? "" : `, ${event.bitsPerByte.toFixed(3)} bits per byte`;
      return `${at(event.step)}  ${c.cyan("validation")} loss ${formatLoss(event.loss)}${bits} (${formatCount(event.tokens)} tokens)`;
    }
    case "checkpoint":
      return `${at(event.step)}  ${c.green("checkpoint")} ${event.path} (${formatBytes(event.bytes)} in ${formatDuration(event.seconds)})`;
    case "sample": {
      const head = `step ${String(event.step).padStart(digits(state))}  sample `;
      const room = width - head.length;
      // The end of the prompt and the begin of the answer are what a reader wants to see.
      const prompt = printable(event.prompt);
      const shown = prompt.length > room * 0.4 ? `…${prompt.slice(-Math.floor(room * 0.4) + 1)}` : prompt;
      const text = truncate(printable(event.text), Math.max(8, room - shown.length));
      return `${at(event.step)}  ${c.magenta("sample")} ${c.dim(shown)}${text}`;
    }
    case "skip":
      return `${at(event.step)}  ${c.yellow("skipped")}: loss ${formatLoss(event.loss)} in micro-batch ${event.microBatch}; no parameter was changed`;
    case "profile":
      return (
        `${at(event.step)}  ${c.cyan("profile")} device peak ${formatBytes(event.peakDeviceBytes)}, ` +
        `planned ${formatBytes(event.predictedDeviceBytes)}: ${event.files.slice(0, 3).join(", ")}` +
        (event.files.length > 3 ? ` and ${event.files.length - 3} more` : "")
      );
    case "warning":
      return `${c.yellow("warning")} ${event.message} (${event.code})`;
    case "done": {
      const what = event.reason === "steps" ? c.green("done") : c.yellow("stopped");
      const loss = event.loss === null ? "" : `, loss ${formatLoss(event.loss)}`;
      const saved = event.checkpoint === null ? "" : `\ncheckpoint: ${event.checkpoint}`;
      const curve =
        state.curve.length < 8
          ? ""
          : `  ${c.cyan(
              sparkline(
                state.curve.map(([, y]) => y),
                32,
              ),
            )}`;
      return `${what} after step ${event.step} in ${formatDuration(event.seconds)}${loss}${curve}${saved}`;
    }
  }
}

/** What the run holds at its highest: of the device where there is one, else of the host, as the engine counts it. */
export function memory(state: RunState): string {
  const { last, start } = state;
  if (last === null) return "";
  return start?.device.startsWith("cuda")
    ? `${formatBytes(last.peakDeviceBytes)} on the card, ${formatBytes(last.peakHostBytes)} host`
    : formatBytes(last.peakHostBytes);
}

function digits(state: RunState): number {
  return String(state.start?.steps ?? state.last?.step ?? 0).length;
}
