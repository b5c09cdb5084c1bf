/** What the ranks of a run say to each other at step boundaries. Every function here is collective. */
import { StromaError } from "../errors.js";
import type { NativeRanks, SessionOptions } from "../train/native-session.js";

/** Rank 0's text, on every rank. */
export async function fromFirst(ranks: NativeRanks, text: string): Promise<string> {
  return (await ranks.gather(ranks.rank === 0 ? text : ""))[0]!;
}

/** Whether any rank says so. */
export async function anyRank(ranks: NativeRanks, mine: boolean): Promise<boolean> {
  return (await ranks.gather(mine ? "1" : "0")).includes("1");
}

/**
 * Ranks that differ in what they run would train different models without a word.
 * @throws RANKS on every rank, naming each fact that differs, whose it is and what it is
 */
export async function agreeOn(ranks: NativeRanks, facts: Readonly<Record<string, unknown>>): Promise<void> {
  const all = (await ranks.gather(JSON.stringify(facts))).map((text) => JSON.parse(text) as Record<string, unknown>);
  const problems: string[] = [];
  for (const name of new Set(all.flatMap((f) => Object.keys(f)))) {
    const values = all.map((f) => JSON.stringify(f[name]) ?? "nothing");
    const other = values.findIndex((v) => v !== values[0]);
    if (other > 0) problems.push(`${name}: ${brief(values[0]!)} on rank 0, ${brief(values[other]!)} on rank ${other}`);
  }
  if (problems.length === 0) return;
  throw new StromaError(
    "RANKS",
    `[ranks] the ranks do not run the same:\n  ${problems.join("\n  ")}\nStart all of them with the same command, data and version`,
    { problems },
  );
}

/** What a rank trains on, and the dtype that its blocks compute in. */
export type DeviceFacts = Pick<SessionOptions, "device" | "dtype">;

/**
 * Ranks started alike on machines with and without cards each choose what they find, and would add up sums that were
 * rounded in different ways. Which card is each rank's own. Collective.
 * @throws RANKS on every rank, saying which ranks have what, and the cure
 */
export async function agreeOnDevice(ranks: NativeRanks, mine: DeviceFacts): Promise<void> {
  const kind = mine.device.startsWith("cuda") ? "cuda" : mine.device;
  const said = await ranks.gather(`${kind}, computing in ${mine.dtype}`);
  const have = new Map<string, number[]>();
  for (const [rank, what] of said.entries()) have.set(what, [...(have.get(what) ?? []), rank]);
  if (have.size === 1) return;
  const kinds = new Set(said.map((what) => what.split(",")[0]));
  const alike = kinds.size > 1 ? "train on the same kind of device" : "compute in the same dtype";
  const problems = [...have].map(([what, of]) => `${of.length === 1 ? "rank" : "ranks"} ${of.join(", ")}: ${what}`);
  const cure =
    kinds.size === 1
      ? "Say --dtype float32 to all"
      : `Say --device cpu to all${kinds.has("cuda") ? ", or give every rank a card (--distributed: none starts without)" : ""}`;
  throw new StromaError("RANKS", `[ranks] the ranks do not ${alike}:\n  ${problems.join("\n  ")}\n${cure}`, {
    problems,
  });
}

const brief = (text: string): string => (text.length > 120 ? `${text.slice(0, 117)}...` : text);
