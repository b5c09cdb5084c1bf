/** Memory nodes of machines with several sockets, told by trees like /sys; asking for pages of one, by this machine's kernel. */
import { mkdirSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { describe, expect, it } from "vitest";
import { besideCards } from "../../src/cli/doctor-nodes.js";
import { scratch } from "../cli/spawn.js";
import { nativeOrSkip } from "../support/native.js";

const native = nativeOrSkip();
const root = scratch();
let trees = 0;

/** A machine whose nodes have memory, and whose cards hang where it says. */
function machine(memory: string | null, cards: Record<string, string> = {}): string {
  const sys = join(root, `sys-${trees++}`);
  mkdirSync(join(sys, "devices/system/node"), { recursive: true });
  if (memory !== null) writeFileSync(join(sys, "devices/system/node/has_memory"), `${memory}\n`);
  for (const [address, node] of Object.entries(cards)) {
    const device = join(sys, "bus/pci/devices", address);
    mkdirSync(device, { recursive: true });
    writeFileSync(join(device, "numa_node"), `${node}\n`);
  }
  return sys;
}
const of = (sys: string, address = "0000:3b:00.0") => {
  const { nodes, near } = native!.memoryNodes(address, sys);
  return [nodes, near];
};

describe.skipIf(!native)("memory nodes", () => {
  it("are those that have memory, and the card's own where there are several", () => {
    const two = machine("0-1", { "0000:3b:00.0": "1", "0000:af:00.0": "0" });
    expect(of(two)).toEqual([[0, 1], 1]);
    expect(of(two, "0000:AF:00.0")).toEqual([[0, 1], 0]);
    expect(of(machine("0,2-3,8", { "0000:3b:00.0": "8" }))).toEqual([[0, 2, 3, 8], 8]);
  });

  it("none is near on a machine with one, where the card does not tell, or tells one without memory", () => {
    expect(of(machine("0", { "0000:3b:00.0": "0" }))).toEqual([[0], null]);
    expect(of(machine("0-1", { "0000:3b:00.0": "-1" }))).toEqual([[0, 1], null]);
    expect(of(machine("0-1", { "0000:3b:00.0": "4" }))).toEqual([[0, 1], null]);
    expect(of(machine("0-1"))).toEqual([[0, 1], null]);
    for (const memory of [null, "", "-", "nodes"])
      expect(of(machine(memory, { "0000:3b:00.0": "1" }))).toEqual([[], null]);
  });

  it("pages come from the node that is asked, and asking for one that is not there is refused", () => {
    const here = native!.memoryNodes("0000:00:00.0");
    // A container may refuse; what it must not do is lie.
    expect([null, here.nodes[0] ?? null]).toContain(here.given);
    const absent = machine("0,900", { "0000:3b:00.0": "900" });
    expect(native!.memoryNodes("0000:3b:00.0", absent)).toEqual({ nodes: [0, 900], near: 900, given: null });
  });
});

describe("the doctor", () => {
  const card = { device: "cuda:0" as const, nodes: [0, 1], near: 1, given: 1 };
  it("names each card's node, and the cure where it cannot be had; is silent on one node", () => {
    const second = { ...card, device: "cuda:1" as const, near: 0, given: 0 };
    expect(besideCards([card, second])).toEqual({
      detail: ["host memory beside cuda:0 is of node 1, cuda:1 is of node 0"],
      cure: null,
    });
    const refused = besideCards([{ ...card, given: null }, second]);
    expect(refused.detail[0]).toContain("beside cuda:0 (node 1)");
    expect(refused.cure).toContain("--cap-add SYS_NICE");
    expect(besideCards([{ ...card, nodes: [0], near: null, given: 0 }])).toEqual({ detail: [], cure: null });
  });
});
