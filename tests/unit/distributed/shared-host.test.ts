import { describe, expect, it } from "vitest";
import { chooseSharedHost, type MachineFacts, machineFacts } from "../../../src/distributed/shared-host.js";
import type { StromaError } from "../../../src/errors.js";

const here: MachineFacts = { ...machineFacts("auto", "cuda:0"), asked: "auto" };
const elsewhere: MachineFacts = { ...here, host: "node2", boot: "another" };
const refusal = (all: MachineFacts[], shards: number): string => {
  try {
    chooseSharedHost(all, shards);
  } catch (error) {
    return (error as StromaError).message;
  }
  return "";
};

describe("shared host memory is chosen", () => {
  it("by itself where the ranks of every replica are on one machine and have memory of their own", () => {
    expect(chooseSharedHost([here, here], 2)).toBe(true);
    expect(chooseSharedHost([here, here, elsewhere, elsewhere], 2)).toBe(true);
    expect(chooseSharedHost([here, here, elsewhere, elsewhere], 4)).toBe(false);
    expect(chooseSharedHost([here, elsewhere], 1)).toBe(false);
    const cpu = { ...here, device: "cpu" } as const;
    expect(chooseSharedHost([cpu, cpu], 2)).toBe(false);
    expect(
      chooseSharedHost(
        [
          { ...here, device: "sim" },
          { ...here, device: "sim" },
        ],
        2,
      ),
    ).toBe(true);
  });

  it("as asked, or refused with who and why", () => {
    const on = { ...here, asked: "on" } as const;
    expect(
      chooseSharedHost(
        [
          { ...on, device: "cpu" },
          { ...on, device: "cpu" },
        ],
        2,
      ),
    ).toBe(true);
    expect(
      chooseSharedHost(
        [
          { ...here, asked: "off" },
          { ...here, asked: "off" },
        ],
        2,
      ),
    ).toBe(false);
    expect(refusal([on, { ...on, ...elsewhere, asked: "on" }], 2)).toContain(
      `ranks 0 and 1 share the state of a block and are on two machines, ${here.host} and node2`,
    );
    expect(refusal([on, { ...on, processes: "pid:[1]" }], 2)).toContain("are in two containers");
    expect(refusal([on, { ...on, user: 4 }], 2)).toContain("run under two users");
    expect(refusal([on, on], 1)).toContain("no two ranks share the state of a block (--shards)");
    expect(refusal([on, here], 2)).toContain("sharedHost: on on rank 0, auto on rank 1");
  });

  it("by what names this machine and nothing else", () => {
    const facts = machineFacts("auto", "sim");
    expect(facts.boot).toMatch(/^[0-9a-f-]{36}$/);
    expect(facts.processes).toMatch(/^pid:\[\d+\]$/);
    expect(facts).toEqual(machineFacts("auto", "sim"));
  });
});
