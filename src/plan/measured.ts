/** The profiles that `stroma doctor --measure` left: of this machine's processors, and of cards by their names. */
import { mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { homedir } from "node:os";
import { dirname, join } from "node:path";
import type { MachineProfile } from "./profiles.js";

const MEASURED_VERSION = 3;

/**
 * Where `stroma doctor --measure` leaves what it measured: STROMA_CACHE, else the user's cache folder.
 * @param card by the name that its driver gives; none: the processors
 */
export function measuredFile(card?: string): string {
  const own = process.env.STROMA_CACHE;
  const base = process.env.XDG_CACHE_HOME || join(homedir(), ".cache");
  return join(own || join(base, "stromatolite"), `${card === undefined ? "machine" : `card-${slug(card)}`}.json`);
}

const slug = (name: string): string => name.toLowerCase().replace(/[^a-z0-9]+/g, "-");

/** As measured; null where it has not been. */
export function readMeasured(card?: string): MachineProfile | null {
  try {
    const { version, profile } = JSON.parse(readFileSync(measuredFile(card), "utf8")) as {
      version: number;
      profile: MachineProfile;
    };
    return version === MEASURED_VERSION ? profile : null;
  } catch {
    return null;
  }
}

export function storeMeasured(profile: MachineProfile, card?: string): void {
  const file = measuredFile(card);
  mkdirSync(dirname(file), { recursive: true });
  writeFileSync(file, `${JSON.stringify({ version: MEASURED_VERSION, profile }, null, 2)}\n`);
}
