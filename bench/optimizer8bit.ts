/**
 * A step of AdamW with 8-bit moments on the CPU (or a card), side by side in one run with a copy of the bytes that it reads and writes,
 * with bitsandbytes' AdamW8bit (where Python has it) and with torch.optim.AdamW(fused=True) in float32. ratio = seconds of the copy / ours:
 * the share of the memory's bandwidth that the step reaches.
 *
 *   npm run bench -- optimizer8bit [--elements 16000000] [--steps 15] [--param float32|bfloat16] [--grad float32|bfloat16]
 *                                  [--threads N] [--device cuda:0] [--json]
 */
import { availableParallelism } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";
import { packageRoot, readBuildRecord } from "../src/native.js";
import { runPython } from "../tests/support/python.js";

const { values } = parseArgs({
  options: {
    elements: { type: "string", default: "16000000" },
    steps: { type: "string", default: "15" },
    param: { type: "string", default: "float32" },
    grad: { type: "string", default: "float32" },
    device: { type: "string", default: "cpu" },
    threads: { type: "string", default: String(availableParallelism()) },
    json: { type: "boolean", default: false },
  },
});
const [elements, steps, threads] = [values.elements, values.steps, values.threads].map(Number);
const script = fileURLToPath(new URL("optimizer8bit.py", import.meta.url));
const { bytes, seconds } = await runPython<{
  bytes: number;
  seconds: Record<"ours" | "copy" | "fused", number> & { bitsandbytes?: number };
}>(script, [], {
  kernels: join(packageRoot, readBuildRecord().kernels!),
  elements,
  steps,
  threads,
  param: values.param,
  grad: values.grad,
  device: values.device,
});
const result = {
  name: "optimizer8bit",
  ratio: seconds.copy / seconds.ours,
  unit: "seconds of a copy of the same bytes / ours",
  ...(seconds.bitsandbytes === undefined ? {} : { bitsandbytesRatio: seconds.bitsandbytes / seconds.ours }),
  fusedRatio: seconds.fused / seconds.ours,
  device: values.device,
  param: values.param,
  grad: values.grad,
  threads,
  elements,
  seconds: seconds.ours,
  bitsandbytesSeconds: seconds.bitsandbytes,
  fusedSeconds: seconds.fused,
  gigabytesPerSecond: bytes / seconds.ours / 1e9,
  copyGigabytesPerSecond: bytes / seconds.copy / 1e9,
};
if (values.json) console.log(JSON.stringify(result));
else console.table(result);
