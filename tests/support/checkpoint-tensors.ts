import { readFile } from "node:fs/promises";
import { join } from "node:path";
import { openCheckpoint, shardsOf } from "../../src/checkpoint/read.js";
import { readSafetensorsHeader } from "../../src/checkpoint/safetensors.js";

/** Every tensor's bytes (base64) by name, of the newest checkpoint, whatever files they lie in. */
export async function tensorsOf(outputDir: string): Promise<Map<string, string>> {
  const { path, state } = await openCheckpoint(outputDir);
  const all = new Map<string, string>();
  for (const whole of ["model.safetensors", "optimizer.safetensors"])
    for (const name of shardsOf(state, whole)) {
      const file = join(path, name);
      const bytes = await readFile(file);
      for (const [tensor, { offset, bytes: n }] of (await readSafetensorsHeader(file)).entries)
        all.set(tensor, bytes.subarray(offset, offset + n).toString("base64"));
    }
  return all;
}
