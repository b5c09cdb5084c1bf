/** What ranks agree on before the first step, from the facts of all by rank. */
import { expect, it } from "vitest";
import { agreeOnDevice, type DeviceFacts } from "../../../src/distributed/ranks.js";
import type { NativeRanks } from "../../../src/train/native-session.js";

/** What every rank of these says, called as all of them are. */
async function agreed(all: readonly DeviceFacts[]): Promise<(string | null)[]> {
  const said: string[] = [];
  let last = (_: string[]): void => {};
  const everyone = new Promise<string[]>((resolve) => {
    last = resolve;
  });
  return Promise.all(
    all.map((mine, rank) => {
      const gather = (text: string) => {
        said[rank] = text;
        if (Object.keys(said).length === all.length) last(said);
        return everyone;
      };
      return agreeOnDevice({ rank, size: all.length, gather } as unknown as NativeRanks, mine).then(
        () => null,
        (error) => `${error.code} ${error.message}`,
      );
    }),
  );
}

it("two cards are one kind", async () => {
  const all: DeviceFacts[] = [0, 1].map((n) => ({ device: `cuda:${n}`, dtype: "bfloat16" }));
  expect(await agreed(all)).toEqual([null, null]);
});

it("machines with and without cards are told apart on every rank, with the cure", async () => {
  const card: DeviceFacts = { device: "cuda:1", dtype: "bfloat16" };
  const message =
    "RANKS [ranks] the ranks do not train on the same kind of device:\n" +
    "  ranks 0, 2: cuda, computing in bfloat16\n  rank 1: cpu, computing in float32\n" +
    "Say --device cpu to all, or give every rank a card (--distributed: none starts without)";
  expect(await agreed([card, { device: "cpu", dtype: "float32" }, card])).toEqual([message, message, message]);
});
