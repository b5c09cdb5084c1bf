/** What a plan is made for, where the options do not say: memory and speed of the machine that this process is on. */
import { totalmem } from "node:os";
import { type Card, type MachineFacts, machineFacts, visibleCards } from "../device.js";
import type { ProbeReport } from "../native.js";
import { readMeasured } from "../plan/measured.js";
import { cardProfile, findProfile, type MachineProfile } from "../plan/profiles.js";
import type { NativeRanks } from "./native-session.js";
import type { SettledOptions } from "./options.js";

export interface Resources {
  /** Of the card that trains, free; null: no card trains, or it does not tell. */
  cardBytes: number | null;
  /** Of the machine, or of the container that this process is in: shared by all its ranks there. */
  memoryBytes: number;
  /** Whose speed is expected. */
  profile: MachineProfile;
  /** Why the profile is no more than a guess; null: it is of this machine, or of a card of this name. */
  guess: string | null;
}

export function detectResources(
  { device }: Pick<SettledOptions, "device">,
  facts: () => MachineFacts = machineFacts,
  measured: (card?: string) => MachineProfile | null = readMeasured,
): Resources {
  const machine = facts();
  const memoryBytes = processMemory(machine.probe);
  const card = visibleCards(machine).find((c) => c.device === device);
  if (device.startsWith("cuda")) return { cardBytes: card?.freeBytes ?? null, memoryBytes, ...speedOf(card, measured) };
  const cpu = measured() ?? findProfile("cpu");
  // A simulated device has a link, and the processor's kernels.
  return { cardBytes: null, memoryBytes, profile: device === "sim" ? { ...cpu, device: "cuda" } : cpu, guess: null };
}

function speedOf(card: Card | undefined, measured: (card: string) => MachineProfile | null) {
  const name = card?.name ?? null;
  const known = name === null ? null : measured(name);
  return known === null ? cardProfile(name) : { profile: known, guess: null };
}

/** What this process may use: the machine's memory, or what its cgroup grants of it. */
export function processMemory(probe: ProbeReport | null): number {
  const memory = probe?.memory;
  return Math.min(memory?.totalBytes ?? totalmem(), memory?.cgroupBytes ?? Number.POSITIVE_INFINITY);
}

/** What all ranks plan for, since all must come to one plan: the least that any has, at the speed that rank 0 expects. Collective. */
export async function agreeOnResources(ranks: NativeRanks, mine: Resources): Promise<Resources> {
  const { cardBytes, memoryBytes, profile, guess } = mine;
  const said = JSON.stringify({ cardBytes, memoryBytes, ...(ranks.rank === 0 ? { profile, guess } : {}) });
  const all = (await ranks.gather(said)).map((text) => JSON.parse(text) as Resources);
  const cards = all.map((r) => r.cardBytes);
  return {
    ...all[0]!,
    cardBytes: cards.includes(null) ? null : Math.min(...(cards as number[])),
    memoryBytes: Math.min(...all.map((r) => r.memoryBytes)),
  };
}
