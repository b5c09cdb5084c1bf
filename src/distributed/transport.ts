/** Which way what ranks exchange in a step goes: from card to card over NCCL, or through the host over Gloo. */
import { hostname } from "node:os";
import { StromaError } from "../errors.js";
import type { NativeRanks, SessionOptions, Transport } from "../train/native-session.js";

export const TRANSPORTS = ["nccl", "gloo"] as const satisfies readonly Transport[];

/** What one rank knows of its own end. */
export interface TransportFacts {
  asked: Transport | null;
  device: SessionOptions["device"];
  /** The NCCL of its build; null: none. */
  nccl: string | null;
  /** Host and bus address of its card; null: it has none. */
  card: string | null;
}

/** What asking for a device's facts takes: the addon's own functions, or a test's. */
export interface CardFacts {
  ncclVersion(): string | null;
  busAddress(card: number): string;
}

/** This rank's facts. A build without NCCL, or a device that is no card, has nothing to ask. */
export function transportFacts(
  asked: Transport | null,
  device: SessionOptions["device"],
  facts: CardFacts,
): TransportFacts {
  const card = /^cuda:(\d+)$/.exec(device)?.[1];
  if (card === undefined) return { asked, device, nccl: null, card: null };
  const nccl = facts.ncclVersion();
  // NCCL knows machines by NCCL_HOSTID where it is set: so told apart, ranks may even share a card (over its network transport).
  const host = process.env.NCCL_HOSTID || hostname();
  return { asked, device, nccl, card: nccl === null ? null : `${host} ${facts.busAddress(Number(card))}` };
}

/**
 * The same on all ranks, from the facts of all by rank: what they ask for, else NCCL where every rank has a card of its own
 * and the same NCCL, else Gloo.
 * @throws RANKS where they ask for different ones; CONFIG where they ask for NCCL and it cannot be, saying why
 */
export function chooseTransport(all: readonly TransportFacts[]): Transport {
  const asked = all[0]!.asked;
  const other = all.findIndex((facts) => facts.asked !== asked);
  if (other > 0)
    throw new StromaError(
      "RANKS",
      `[ranks] the ranks do not run the same:\n  transport: ${asked ?? "not given"} on rank 0, ${all[other]!.asked ?? "not given"} on rank ${other}\nStart all of them with the same command`,
    );
  if (asked === "gloo") return "gloo";
  const why = whyNotNccl(all);
  if (why === null) return "nccl";
  if (asked === null) return "gloo";
  throw new StromaError("CONFIG", `[ranks] transport "nccl": ${why}. Leave the transport out, or use "gloo"`);
}

/** Null: NCCL can be. */
function whyNotNccl(all: readonly TransportFacts[]): string | null {
  const by = new Map<string, number>();
  for (const [rank, { device, nccl, card }] of all.entries()) {
    if (!device.startsWith("cuda:")) return `it is between cards, and rank ${rank} trains on ${device}`;
    if (nccl === null || card === null) return `the build of rank ${rank} has no NCCL (npx stroma doctor)`;
    if (nccl !== all[0]!.nccl) return `rank 0 has NCCL ${all[0]!.nccl}, rank ${rank} has ${nccl}`;
    const first = by.get(card);
    if (first !== undefined) return `ranks ${first} and ${rank} are on one card, and NCCL refuses that`;
    by.set(card, rank);
  }
  return null;
}

/** Collective. @throws as chooseTransport() */
export async function agreeOnTransport(ranks: NativeRanks, mine: TransportFacts): Promise<Transport> {
  const all = await ranks.gather(JSON.stringify(mine));
  return chooseTransport(all.map((text) => JSON.parse(text) as TransportFacts));
}
