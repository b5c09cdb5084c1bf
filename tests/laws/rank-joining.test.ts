/** How ranks meet at a store, and part: who comes twice, who comes again, who is asked to end, who says why. */
import { afterEach, expect, test } from "vitest";
import type { NativeRanks, RankSpec } from "../../src/train/native-session.js";
import { nativeOrSkip } from "../support/native.js";
import { freePort, joinAll } from "./rank-case.js";

const native = nativeOrSkip();
const law = test.skipIf(!native);
const open: NativeRanks[] = [];
afterEach(async () => {
  for (const ranks of open) ranks.fail("the test is over");
  await Promise.all(open.splice(0).map((ranks) => ranks.leave()));
});

const join = async (spec: RankSpec, signal?: AbortSignal): Promise<NativeRanks> => {
  const ranks = await native!.joinRanks(spec, signal);
  open.push(ranks);
  return ranks;
};

/** A store that serves several starts of a run, as torchrun's agent does. */
async function agent(): Promise<RankSpec> {
  const port = await freePort();
  const spec = { rank: 0, size: 1, address: "127.0.0.1", port, joinSeconds: 30, silenceSeconds: 5 };
  await join({ ...spec, serve: true, prefix: "/agent" });
  return { ...spec, size: 2, serve: false, prefix: "/stroma" };
}

law("in a store that outlives them, ranks of each start meet their own, whoever comes first", async () => {
  const spec = await agent();
  const first = await Promise.all([0, 1].map((rank) => join({ ...spec, rank })));
  // Killed: nobody said a word. Rank 1 is started again, and finds all of the first start there.
  let early = false;
  const one = join({ ...spec, rank: 1 }).then((ranks) => {
    early = true;
    return ranks;
  });
  await new Promise((done) => setTimeout(done, 300));
  expect(early).toBe(false);
  const [zero, other] = await Promise.all([join({ ...spec, rank: 0 }), one]);
  expect(await Promise.all([zero.gather("a"), other.gather("b")])).toEqual([
    ["a", "b"],
    ["a", "b"],
  ]);
  expect(first.map((ranks) => ranks.lost())).toEqual([null, null]);
});

law("two processes of one rank: the second says so", async () => {
  const spec = await agent();
  await Promise.all([0, 1].map((rank) => join({ ...spec, rank })));
  await expect(native!.joinRanks({ ...spec, rank: 1, joinSeconds: 1 })).rejects.toThrow(
    /there is a rank 1 at 127\.0\.0\.1:\d+ already/,
  );
});

law("asked to end while it waits, a rank does: for the store, or for others", async () => {
  const spec = await agent();
  for (const more of [{}, { port: await freePort() }]) {
    const stop = new AbortController();
    const joining = native!.joinRanks({ ...spec, ...more, rank: 1 }, stop.signal);
    setTimeout(() => stop.abort(), 200);
    await expect(joining).rejects.toThrow(/rank 1 was asked to end while it/);
  }
  await expect(native!.joinRanks({ ...spec, rank: 1 }, AbortSignal.abort())).rejects.toMatchObject({ code: "RANKS" });
});

law("whoever serves the store stays until the others have read why it fails", async () => {
  const [zero, one] = (await joinAll(native!, 2)) as [NativeRanks, NativeRanks];
  open.push(one);
  zero.fail("the disk of rank 0 burned");
  await Promise.all([
    zero.leave(),
    expect(one.gather("there?").finally(() => one.fail("rank 0 failed"))).rejects.toThrow(
      /rank 0 \(.+\) failed: the disk of rank 0 burned/,
    ),
  ]);
});
