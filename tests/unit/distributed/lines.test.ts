import { Readable } from "node:stream";
import { text } from "node:stream/consumers";
import fc from "fast-check";
import { describe, expect, it } from "vitest";
import { LONGEST_LINE, PrefixedLines } from "../../../src/distributed/lines.js";

async function chunks(pieces: readonly (string | Buffer)[], prefix = "> "): Promise<string[]> {
  const out: string[] = [];
  const source = Readable.from(
    pieces.map((piece) => Buffer.from(piece as string)),
    { objectMode: false },
  );
  for await (const chunk of source.pipe(new PrefixedLines(prefix))) out.push(String(chunk));
  return out;
}

describe("prefixed lines", () => {
  it.each([
    [["a\nb\n"], "> a\n> b\n"],
    [["a", "b", "\nc"], "> ab\n> c\n"],
    [["\n\n"], "> \n> \n"],
    [[""], ""],
    [["a\r\nb\r\n"], "> a\n> b\n"],
    [["10%\r20%\r30%\n", "x\ry"], "> 30%\n> y\n"],
    [["\u001b[31mred\u001b[0m\n"], "> \u001b[31mred\u001b[0m\n"],
  ])("%j", async (pieces, expected) => {
    expect((await chunks(pieces)).join("")).toBe(expected);
  });

  it("however the bytes are cut, each chunk out is whole lines, and they are the same", async () => {
    const line = fc.string({ unit: "binary", maxLength: 12 }).map((s) => s.replace(/[\r\n]/g, "é"));
    await fc.assert(
      fc.asyncProperty(
        fc.array(line, { maxLength: 8 }),
        fc.array(fc.nat(64), { maxLength: 12 }),
        async (lines, cuts) => {
          const bytes = Buffer.from(lines.map((l) => `${l}\n`).join(""));
          const at = [...new Set(cuts.filter((c) => c < bytes.length))].sort((a, b) => a - b);
          const pieces = [0, ...at]
            .map((from, i) => bytes.subarray(from, at[i] ?? bytes.length))
            .filter((p) => p.length > 0);
          const out = await chunks(pieces);
          expect(out.join("")).toBe(lines.map((l) => `> ${Buffer.from(l)}\n`).join(""));
          for (const chunk of out) expect(chunk.startsWith("> ") && chunk.endsWith("\n")).toBe(true);
        },
      ),
    );
  });

  it("a line without an end goes out in pieces, no character cut in two", async () => {
    const long = `a${"😀".repeat(LONGEST_LINE)}`;
    const out = (await chunks([long])).join("").split("\n").slice(0, -1);
    expect(out.length).toBeGreaterThan(2);
    for (const piece of out) {
      expect(piece.startsWith("> ")).toBe(true);
      expect(piece.length).toBeLessThanOrEqual(LONGEST_LINE + 2);
    }
    expect(out.map((piece) => piece.slice(2)).join("")).toBe(long);
    expect(await text(Readable.from(out))).not.toContain("�");
  });
});
