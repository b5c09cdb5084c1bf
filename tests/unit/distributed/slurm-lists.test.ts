import fc from "fast-check";
import { describe, expect, it } from "vitest";
import { expandCounts, expandHosts } from "../../../src/distributed/slurm-lists.js";

describe("lists of hosts", () => {
  it.each([
    ["node1", ["node1"]],
    ["node[01-03,7],gpu5", ["node01", "node02", "node03", "node7", "gpu5"]],
    ["a,b[2,1],c", ["a", "b2", "b1", "c"]],
    ["rack[1-2]n[08-09]", ["rack1n08", "rack1n09", "rack2n08", "rack2n09"]],
    ["n[9-11]-ib", ["n9-ib", "n10-ib", "n11-ib"]],
    ["n[098-101]", ["n098", "n099", "n100", "n101"]],
    ["ip-10-0-0-[1-2].ec2", ["ip-10-0-0-1.ec2", "ip-10-0-0-2.ec2"]],
  ])("%s", (list, hosts) => {
    expect(expandHosts(list)).toEqual(hosts);
  });

  it.each([
    ["", '"" is not the name of a host'],
    ["a,,b", '"" is not the name of a host'],
    ["a b", '"a b" is not the name'],
    ["n[1-3", "a bracket without its other half"],
    ["n1-3]", "a bracket without its other half"],
    ["n[]", '"" in brackets is neither a number nor a range'],
    ["n[a-c]", '"a-c" in brackets'],
    ["n[3-1]", "the range 3-1 runs backwards"],
    ["n[0-999999999]", "more than 100000 hosts"],
    ["n[1-1000]m[1-1000]", "more than 100000 hosts"],
    ["n[[1]]", "a bracket without its other half"],
  ])("%j is refused by name", (list, message) => {
    expect(() => expandHosts(list, "SLURM_X")).toThrow(message);
    expect(() => expandHosts(list, "SLURM_X")).toThrow(/^\[distributed\] SLURM_X /);
  });

  it("what a list was made of comes back in order", () => {
    const range = fc.tuple(fc.nat(500), fc.nat(20), fc.integer({ min: 1, max: 5 }));
    const entry = fc.tuple(fc.stringMatching(/^[a-z]{1,6}$/), fc.array(range, { maxLength: 3 }));
    fc.assert(
      fc.property(fc.array(entry, { minLength: 1, maxLength: 5 }), (entries) => {
        const pad = (n: number, width: number) => String(n).padStart(width, "0");
        const list = entries.map(([name, ranges]) => {
          const inside = ranges.map(([from, more, w]) =>
            more === 0 ? pad(from, w) : `${pad(from, w)}-${from + more}`,
          );
          return ranges.length === 0 ? name : `${name}[${inside.join(",")}]`;
        });
        const hosts = entries.flatMap(([name, ranges]) =>
          ranges.length === 0
            ? [name]
            : ranges.flatMap(([from, more, w]) => {
                const width = pad(from, w).length;
                return Array.from({ length: more + 1 }, (_, i) => name + pad(from + i, width));
              }),
        );
        expect(expandHosts(list.join(","))).toEqual(hosts);
      }),
    );
  });
});

describe("counts per node", () => {
  it.each([
    ["4", [4]],
    ["2(x3),1", [2, 2, 2, 1]],
    ["1,2(x2),8", [1, 2, 2, 8]],
  ])("%s", (list, counts) => {
    expect(expandCounts(list)).toEqual(counts);
  });

  it.each(["", "0", "2(x0)", "-1", "2(3)", "2(x3", "a", "1,,2", "1(x99999999999)", "1(x999999999)"])(
    "%j is refused",
    (list) => {
      expect(() => expandCounts(list, "SLURM_X")).toThrow(/^\[distributed\] SLURM_X .* is not a count of tasks/);
    },
  );
});
