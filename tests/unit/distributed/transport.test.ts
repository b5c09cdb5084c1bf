import { describe, expect, it } from "vitest";
import { chooseTransport, type TransportFacts, transportFacts } from "../../../src/distributed/transport.js";

const card = (host: string, bus: string, more: Partial<TransportFacts> = {}): TransportFacts => ({
  asked: null,
  device: "cuda:0",
  nccl: "2.30.7",
  card: `${host} ${bus}`,
  ...more,
});
const processor: TransportFacts = { asked: null, device: "cpu", nccl: null, card: null };
const choice = (all: TransportFacts[]) => {
  try {
    return chooseTransport(all);
  } catch (error) {
    return (error as Error).message;
  }
};

describe("which way ranks exchange", () => {
  it("is NCCL where every rank has a card of its own, also one with the same address on another host", () => {
    expect(choice([card("a", "0000:01:00.0"), card("a", "0000:02:00.0"), card("b", "0000:01:00.0")])).toBe("nccl");
    const asked = { asked: "nccl" } as const;
    expect(choice([card("a", "0000:01:00.0", asked), card("b", "0000:01:00.0", asked)])).toBe("nccl");
  });

  it.each([
    ["processors", [processor, processor], "it is between cards, and rank 0 trains on cpu"],
    ["a processor among cards", [card("a", "1"), processor], "it is between cards, and rank 1 trains on cpu"],
    ["one card", [card("a", "1"), card("a", "2"), card("a", "1")], "ranks 0 and 2 are on one card"],
    ["a build without NCCL", [card("a", "1"), card("a", "2", { nccl: null })], "the build of rank 1 has no NCCL"],
    ["two NCCLs", [card("a", "1"), card("b", "1", { nccl: "2.27.3" })], "rank 0 has NCCL 2.30.7, rank 1 has 2.27.3"],
  ] as [string, TransportFacts[], string][])("is Gloo on %s, and asking for NCCL says why not", (_, all, why) => {
    expect(choice(all)).toBe("gloo");
    expect(choice(all.map((facts) => ({ ...facts, asked: "nccl" as const })))).toContain(`transport "nccl": ${why}`);
  });

  it("is what is asked for, if all ask alike", () => {
    const gloo = { asked: "gloo" } as const;
    expect(choice([card("a", "1", gloo), card("a", "2", gloo)])).toBe("gloo");
    expect(choice([card("a", "1", gloo), card("a", "2")])).toContain("transport: gloo on rank 0, not given on rank 1");
  });

  it("asks nothing of a device that is no card, and no address of a build without NCCL", () => {
    const refuse = (): never => {
      throw new Error("was asked");
    };
    expect(transportFacts(null, "cpu", { ncclVersion: refuse, busAddress: refuse })).toEqual(processor);
    expect(transportFacts(null, "cuda:1", { ncclVersion: () => null, busAddress: refuse }).card).toBeNull();
    const known = transportFacts("nccl", "cuda:1", { ncclVersion: () => "2.30.7", busAddress: (n) => `bus ${n}` });
    expect(known).toMatchObject({ asked: "nccl", nccl: "2.30.7", card: expect.stringMatching(/ bus 1$/) });
  });
});
