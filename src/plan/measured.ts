/** The profile that `stroma doctor --measure` left of this machine. */
import { mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { homedir } from "node:os";
import { dirname, join } from "node:path";
import type { MachineProfile } from "./profiles.js";

const MEASURED_VERSION = 1;

/** Where `stroma doctor --measure` leaves what it measured: STROMA_CACHE, else the user's cache folder. */
export function measuredFile(): string {
  const own = process.env.STROMA_CACHE;
  const base = process.env.XDG_CACHE_HOME || join(homedir(), ".cache");
  return join(own || join(base, "stromatolite"), "machine.json");
}

/** The profile of this machine's processors as measured; null where it has not been. */
export function readMeasured(): MachineProfile | null {
  try {
    const { version, profile } = JSON.parse(readFileSync(measuredFile(), "utf8")) as {
      version: number;
      profile: MachineProfile;
    };
    return version === MEASURED_VERSION ? profile : null;
  } catch {
    return null;
  }
}

export function storeMeasured(profile: MachineProfile): void {
  const file = measuredFile();
  mkdirSync(dirname(file), { recursive: true });
  writeFileSync(file, `${JSON.stringify({ version: MEASURED_VERSION, profile }, null, 2)}\n`);
}
