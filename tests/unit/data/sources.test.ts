import { existsSync, mkdirSync, mkdtempSync, readFileSync, rmSync, utimesSync, writeFileSync } from "node:fs";
import os from "node:os";
import path from "node:path";
import { fileURLToPath } from "node:url";
import { gzipSync } from "node:zlib";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { type FileDataset, type FilesOptions, openDataset } from "../../../src/data/index.js";
import { byteStream, findFiles, globToRegExp } from "../../../src/data/sources/files.js";
import { guessDelimiter, type RowEvent, readRows } from "../../../src/data/sources/rows.js";
import { parseTemplate, renderTemplate } from "../../../src/data/sources/template.js";

let folder: string;
beforeAll(() => {
  folder = mkdtempSync(path.join(os.tmpdir(), "stroma-sources-"));
});
afterAll(() => rmSync(folder, { recursive: true, force: true }));

let made = 0;
function file(name: string, content: string | Uint8Array): string {
  const at = path.join(folder, `${made++}`);
  mkdirSync(at);
  writeFileSync(path.join(at, name), content);
  return path.join(at, name);
}

const open = async (source: string, options: Partial<FilesOptions> = {}): Promise<FileDataset> =>
  (await openDataset({ source, cacheFolder: path.join(folder, "cache"), workers: 0, ...options })) as FileDataset;

async function documents(source: string, options: Partial<FilesOptions> = {}): Promise<string[]> {
  const dataset = await open(source, { validationShare: 0, ...options });
  const out: string[] = [];
  for await (const text of dataset.texts("train", 1e9)) out.push(text);
  return out;
}

/** Rows of one file, events as they come. */
async function events(source: string, documents: "paragraphs" | "files" = "paragraphs"): Promise<RowEvent[]> {
  const [found] = await findFiles(source);
  const out: RowEvent[] = [];
  for await (const e of readRows({ file: found!, gzip: false, count: () => {}, documents })) out.push(e);
  return out;
}

describe("CSV", () => {
  it("reads quotes, CRLF, BOM, line breaks within quotes, and takes empty, nan, None for missing", async () => {
    const source = file(
      "a.csv",
      '\ufeffname,mass,note\r\n"b, the first",1.5,"says ""hi"""\r\nc,nan,None\r\nd,,"two\r\nlines"\r\ne,NaN,null\r\n',
    );
    expect(await events(source)).toEqual([
      { row: { name: "b, the first", mass: "1.5", note: 'says "hi"' }, line: 2 },
      { row: { name: "c", mass: null, note: null }, line: 3 },
      { row: { name: "d", mass: null, note: "two\r\nlines" }, line: 4 },
      { row: { name: "e", mass: null, note: null }, line: 6 },
    ]);
    expect(await documents(source)).toEqual([
      'name=b, the first\nmass=1.5\nnote=says "hi"\n',
      "name=c\n",
      "name=d\nnote=two lines\n",
      "name=e\n",
    ]);
  });

  it("finds the separator by the header, and leaves comment lines before it out", async () => {
    expect(guessDelimiter('"a,b";c;d')).toBe(";");
    expect(guessDelimiter("a\tb")).toBe("\t");
    expect(guessDelimiter("a")).toBe(",");
    const source = file("a.csv", "# made by hand\n# two\na;b\n1;2\n");
    expect(await events(source)).toEqual([{ row: { a: "1", b: "2" }, line: 4 }]);
  });

  it("guesses types and counts what is missing", async () => {
    const source = file(
      "a.csv",
      "i,n,b,t,e,m,f\n1,1.5,true,x,,1,inf\n-2,1e-3,FALSE,2,,,2\n3,4,true,y,nan,x,-Infinity\n",
    );
    const columns = (await open(source)).describe().columns;
    expect(columns.map((c) => [c.name, c.type, Number(c.missing.toFixed(3)), c.minimum, c.maximum])).toEqual([
      ["i", "integer", 0, -2, 3],
      ["n", "number", 0, 0.001, 4],
      ["b", "boolean", 0, null, null],
      ["t", "text", 0, null, null],
      ["e", "empty", 1, null, null],
      ["m", "text", 0.333, null, null],
      ["f", "number", 0, 2, 2],
    ]);
  });

  it("names a ragged row, invalid UTF-8, a NUL byte and a broken quote by file and line, and goes on", async () => {
    const good = Array.from({ length: 10 }, (_, i) => `g${i},1\n`).join("");
    const source = file(
      "bad.csv",
      Buffer.concat([
        Buffer.from("a,b\n1,2\nragged,1,2\nshort\n"),
        Buffer.from([0x63, 0xff, 0xfe, 0x2c, 0x31, 0x0a]),
        Buffer.from("n\0l,1\n"),
        Buffer.from('x"y,1\nlast,9\n'),
        Buffer.from(good),
      ]),
    );
    const dataset = await open(source);
    const [report] = dataset.report();
    expect(report!.refusals.map((r) => [path.basename(r.file), r.line, r.reason])).toEqual([
      ["bad.csv", 3, "3 cells where the header has 2"],
      ["bad.csv", 4, "1 cells where the header has 2"],
      ["bad.csv", 5, "invalid UTF-8 (or the replacement character U+FFFD)"],
      ["bad.csv", 6, "a NUL byte"],
      ["bad.csv", 7, "a quote in the middle of a cell"],
    ]);
    expect(report!.rowsRefused).toBe(5);
    expect(report!.rowsRead).toBe(17);
    expect((await documents(source)).length).toBe(12);
  });

  it("stops at a source with more than the stated share of bad rows after 1,000, and not before", async () => {
    const rows = (bad: number, n: number) =>
      `a,b\n${Array.from({ length: n }, (_, i) => (i % 1000 < bad ? `${i}\n` : `${i},1\n`)).join("")}`;
    await expect(open(file("a.csv", rows(51, 1000)))).rejects.toMatchObject({
      code: "FILE_FORMAT",
      message: expect.stringMatching(/51 of 1000 rows refused \(5\.1 %, more than 5 %\).*line 2/),
    });
    expect((await open(file("a.csv", rows(50, 1000)))).report()[0]!.rowsRefused).toBe(50);
    expect((await open(file("a.csv", rows(400, 900)))).report()[0]!.rowsRefused).toBe(400);
    await expect(open(file("a.csv", rows(500, 900)))).rejects.toThrow(/500 of 900 rows refused/);
    expect((await open(file("a.csv", rows(200, 2000)), { maxRefusedShare: 0.35 })).report()[0]!.rowsRefused).toBe(400);
  });
});

describe("sources that are refused whole", () => {
  const cases: [string, string, string | Uint8Array, RegExp][] = [
    [
      "an archive's error page",
      "a.csv",
      'ERROR<br>\nError Type: UserError - "table" parameter<br>\n',
      /a\.csv:1: refused: .*error page/,
    ],
    ["HTML", "a.csv", "\n<!DOCTYPE html>\n<html><body>404</body></html>\n", /a\.csv:2: refused: HTML/],
    ["XML", "a.jsonl", '<?xml version="1.0"?>\n<VOTABLE/>\n', /a\.jsonl:1: refused: HTML or XML/],
    [
      "an Oracle message",
      "a.csv",
      "ORA-00942: table or view does not exist\n",
      /a\.csv:1: refused: a database's error/,
    ],
    ["JSON as CSV", "a.csv", '{"a": 1}\n', /JSON saved as CSV/],
    ["an empty file", "a.csv", "", /a\.csv: refused: the file is empty/],
    ["white space", "a.jsonl", " \n\n", /only white space/],
    ["a header alone", "a.csv", "a,b\n", /no row after the header/],
    ["a column named twice", "a.csv", "a,a\n1,2\n", /a\.csv:1: refused: the column "a" twice/],
    ["binary", "a.csv", new Uint8Array(300), /a\.csv:1: refused: binary/],
    ["UTF-16", "a.txt", Buffer.from("\ufeffhello", "utf16le"), /UTF-16/],
    ["a truncated gzip", "a.csv.gz", gzipSync(`a,b\n${"1,2\n".repeat(1e5)}`).subarray(0, 200), /a\.csv\.gz.*refused/],
    [
      "Parquet without its end",
      "a.parquet",
      Buffer.from("PAR1 and then the line was cut"),
      /truncated Parquet file: no footer at its end, byte 30/,
    ],
    ["text as Parquet", "a.parquet", "a,b\n1,2\n", /not Parquet: it begins with "a,b/],
    ["Parquet as CSV", "a.csv", Buffer.from("PAR1aaaaPAR1"), /a Parquet file named .csv/],
  ];
  for (const [what, name, content, message] of cases)
    it(`names ${what}`, async () => {
      const source = file(name, content);
      await expect(open(source)).rejects.toMatchObject({
        name: "StromaError",
        code: "FILE_FORMAT",
        message: expect.stringMatching(message),
      });
    });

  it("are left out and reported with onBadSource skip, the others read", async () => {
    const at = path.join(folder, "mixed");
    mkdirSync(at);
    writeFileSync(path.join(at, "a.csv"), "ERROR<br>\n");
    writeFileSync(path.join(at, "b.csv"), "a,b\n1,2\n");
    await expect(open(at)).rejects.toThrow(/a\.csv:1/);
    const dataset = await open(at, { onBadSource: "skip" });
    expect(dataset.report().map((r) => [path.basename(r.source), r.rowsRead, r.refusals.length])).toEqual([
      ["a.csv", 0, 1],
      ["b.csv", 1, 0],
    ]);
  });

  it("are all refused: then there is no data, which is an error too", async () => {
    await expect(open(file("a.csv", "ERROR<br>\n"), { onBadSource: "skip" })).rejects.toMatchObject({ code: "DATA" });
  });
});

describe("JSON lines and text", () => {
  it("flattens objects, takes strings, and names lines that are not JSON", async () => {
    const source = file(
      "a.jsonl",
      '{"a": {"b": 1}, "l": [1, 2], "n": null}\r\n\nnonsense\n"plain"\n[1]\n{"z": NaN}\n{"a": {"b": 2}}',
    );
    const got = await events(source);
    expect(got.map((e) => ("row" in e ? e.row : [e.line, e.refused.slice(0, 8)]))).toEqual([
      { "a.b": 1, l: "[1,2]", n: null },
      [3, "not JSON"],
      { text: "plain" },
      [5, "expected"],
      [6, "not JSON"],
      { "a.b": 2 },
    ]);
  });

  it("refuses a line that is nested too deep, and goes on", async () => {
    const deep = (open: string, close: string) => `{"a":${open.repeat(100_000)}1${close.repeat(100_000)}}`;
    const source = file("deep.jsonl", `${deep('{"a":', "}")}\n${deep("[", "]")}\n{"b": 1}\n`);
    expect(await events(source)).toEqual([
      { refused: "values nested too deep", line: 1 },
      { refused: "values nested too deep", line: 2 },
      { row: { b: 1 }, line: 3 },
    ]);
  });

  it("takes columns of any name, also those that every JavaScript object has", async () => {
    const csv = file("names.csv", "__proto__,constructor,toString\n1,2,3\n");
    expect(await documents(csv)).toEqual(["__proto__=1\nconstructor=2\ntoString=3\n"]);
    const lines = file("names.jsonl", '{"__proto__": 1, "constructor": {"prototype": 2}}\n');
    expect(await documents(lines)).toEqual(["__proto__=1\nconstructor.prototype=2\n"]);
  });

  it("takes a text field as the document", async () => {
    const source = file("a.jsonl", '{"id": 1, "text": "one\\ntwo"}\n{"id": 2, "text": "three"}\n');
    expect(await documents(source)).toEqual(["one\ntwo", "three"]);
  });

  it("cuts plain text at blank lines, or takes whole files", async () => {
    const source = file("a.txt", "one\ntwo\n\n\n  \nthree\r\nfour");
    expect(await documents(source)).toEqual(["one\ntwo", "three\nfour"]);
    expect(await documents(source, { documents: "files" })).toEqual(["one\ntwo\n\n\n  \nthree\nfour"]);
  });

  it("names invalid UTF-8 and NUL in text by line", async () => {
    const source = file(
      "a.txt",
      Buffer.concat([Buffer.from("ok\n"), Buffer.from([0xc3, 0x28, 0x0a]), Buffer.from("a\0b\nfine\n")]),
    );
    const got = await events(source);
    expect(got.filter((e) => "refused" in e)).toEqual([
      { refused: "invalid UTF-8", line: 2 },
      { refused: "a NUL byte", line: 3 },
    ]);
  });

  it("reads gzip, found by its bytes and not by its name", async () => {
    expect(await documents(file("a.txt.gz", gzipSync("one\n\ntwo\n")))).toEqual(["one", "two"]);
    expect(await documents(file("a.csv", gzipSync("a\n1\n")))).toEqual(["a=1\n"]);
  });
});

describe("templates", () => {
  it("put cells in place, shorten numbers where asked, and show what is missing", () => {
    const parts = parseTemplate("planet {pl_name}: {r:.3} {{raw}}\\n{gone}");
    expect(renderTemplate(parts, { pl_name: "b", r: "1.23456" })).toBe("planet b: 1.23 {raw}\n?");
  });

  it("refuse what is malformed, and a column that is not there, with those that are", async () => {
    for (const bad of ["{", "{}", "no column", "a } b", "{a:3}"]) expect(() => parseTemplate(bad)).toThrow(/template/);
    const source = file("a.csv", "pl_name,pl_rade\nb,1\n");
    await expect(open(source, { template: "{radius}" })).rejects.toMatchObject({
      code: "INVALID_ARGUMENT",
      message: expect.stringMatching(/the template names the column "radius".*It has pl_name, pl_rade/),
    });
    await expect(open(source, { splitKey: "host" })).rejects.toThrow(/the split key names the column "host"/);
    expect(await documents(source, { template: "{pl_name} {pl_rade}" })).toEqual(["b 1"]);
  });
});

describe("files", () => {
  it("are found by folder and by glob, in order of name", async () => {
    const at = path.join(folder, "tree");
    mkdirSync(path.join(at, "sub"), { recursive: true });
    for (const name of ["b.csv", "a.csv", "sub/c.csv", "d.txt", "ignored.bin"])
      writeFileSync(path.join(at, name), "a\n1\n");
    const names = async (spec: string) => (await findFiles(spec)).map((f) => path.relative(at, f.path));
    expect(await names(at)).toEqual(["a.csv", "b.csv", "d.txt", "sub/c.csv"]);
    expect(await names(`${at}/*.csv`)).toEqual(["a.csv", "b.csv"]);
    expect(await names(`${at}/**/*.csv`)).toEqual(["a.csv", "b.csv", "sub/c.csv"]);
    expect(await names(`${at}/{a,d}.*`)).toEqual(["a.csv", "d.txt"]);
    await expect(findFiles(`${at}/none*`)).rejects.toThrow(/found no file/);
    await expect(findFiles(path.join(at, "ignored.bin"))).rejects.toThrow(/expected a file of .csv/);
    expect(globToRegExp("a+(b).?sv").test("a+(b).csv")).toBe(true);
    expect(globToRegExp(`d/${"*".repeat(60)}x`).test(`d/${"y".repeat(200)}`)).toBe(false);
    expect(globToRegExp("d/***/x").test("d/e/f/x")).toBe(true);
  });

  it("that have not changed are not read twice, and those that have are", async () => {
    const source = file("a.csv", "a\n1\n");
    const first = await open(source);
    const again = await open(source);
    expect(again.fingerprint).toBe(first.fingerprint);
    expect(again.describe().folder).toBe(first.describe().folder);
    writeFileSync(source, "a\n2\n");
    utimesSync(source, new Date(1e12), new Date(1e12));
    const changed = await open(source);
    expect(changed.fingerprint).not.toBe(first.fingerprint);
    expect(await documents(source)).toEqual(["a=2\n"]);
  });

  it("of the same content have the same fingerprint wherever they lie", async () => {
    const a = await open(file("a.csv", "a\n1\n2\n"));
    const b = await open(file("b.csv", "a\n1\n2\n"));
    const c = await open(file("c.csv", "a\n1\n3\n"));
    expect(b.fingerprint).toBe(a.fingerprint);
    expect(c.fingerprint).not.toBe(a.fingerprint);
  });
});

describe("memory", () => {
  const ROWS = 60_000;
  const line = (i: number) => `star ${i % 977},${i},${"v".repeat(i % 97)}`;

  it("is bounded whatever the size of the file: bytes read ahead of the rows given out, and text held", async () => {
    const csv = file("big.csv", `host,i,v\n${Array.from({ length: ROWS }, (_, i) => `${line(i)}\n`).join("")}`);
    const jsonl = file(
      "big.jsonl",
      Array.from({ length: ROWS }, (_, i) => `${JSON.stringify({ text: line(i) })}\n`).join(""),
    );
    const text = file("big.txt", Array.from({ length: ROWS }, (_, i) => `${line(i)}\n\n`).join(""));
    for (const source of [csv, jsonl, text]) {
      const [found] = await findFiles(source);
      expect(found!.size).toBeGreaterThan(3.5e6);
      let read = 0;
      let given = 0;
      let most = 0;
      let rows = 0;
      const count = (bytes: number) => {
        read += bytes;
      };
      for await (const e of readRows({ file: found!, gzip: false, count, documents: "paragraphs" })) {
        rows++;
        if ("row" in e) given += Buffer.byteLength(Object.values(e.row).join(","));
        // What is read and not yet given out, less what separators and quotes take: at most 20 bytes a row.
        most = Math.max(most, read - given - 20 * rows);
        // A slow reader: the source must wait for it, not run ahead.
        if (rows % 10_000 === 0) await new Promise((r) => setTimeout(r, 20));
      }
      expect(rows).toBe(ROWS);
      expect(most).toBeLessThan(600_000);
    }
    const dataset = await open(csv, { shardBytes: 100_000 });
    const { peakBufferedBytes, bytes, splitKey } = dataset.describe();
    expect(bytes.train + bytes.validation).toBeGreaterThan(3.5e6);
    expect(peakBufferedBytes).toBeLessThan(100_000 + 200);
    expect(splitKey).toBe("host");
  });

  it("and a reader that stops early closes its file", async () => {
    const [found] = await findFiles(file("a.csv", `a\n${"1\n".repeat(100_000)}`));
    const stream = byteStream(found!, false);
    for await (const chunk of stream) {
      expect((chunk as Buffer).length).toBeGreaterThan(0);
      break;
    }
    expect(stream.destroyed).toBe(true);
  });
});

const SHARED = fileURLToPath(new URL("../../../../shared/data", import.meta.url));
const shared = (name: string) => path.join(SHARED, name);
const absent = !existsSync(SHARED);
if (absent) console.log("left out: tests of real catalogues (no ../shared/data here)");

describe.skipIf(absent)("real catalogues", () => {
  it("exoplanet.eu: every row is read, split by host star", async () => {
    const dataset = await open(shared("exoplanet-eu-2024-05.csv"));
    const { documents, splitKey, columns, leftOut, samples } = dataset.describe();
    expect(dataset.report()[0]).toMatchObject({ rowsRead: 4161, rowsRefused: 0 });
    expect(documents.train + documents.validation).toBe(4161);
    expect(splitKey).toBe("star_name");
    expect(columns).toHaveLength(98);
    expect(columns.find((c) => c.name === "mass")!.type).toBe("number");
    expect(columns.find((c) => c.name === "star_magnetic_field")!.missing).toBeGreaterThan(0.9);
    expect(leftOut.mass_error_min).toBeDefined();
    expect(samples[0]).toContain("name=11 Com b\n");
    expect(samples[0]).not.toContain("None");
    // A star's planets stand on one side.
    const sides = new Map<string, Set<string>>();
    for (const split of ["train", "validation"] as const)
      for await (const text of dataset.texts(split, 1e9)) {
        const star = /^star_name=(.*)$/m.exec(text)?.[1];
        if (star !== undefined) sides.set(star, (sides.get(star) ?? new Set()).add(split));
      }
    expect(sides.size).toBeGreaterThan(2500);
    expect([...sides.values()].every((s) => s.size === 1)).toBe(true);
  });

  it("the NASA archive's Parquet table: 100 rows, zstd", async () => {
    const dataset = await open(shared("nea-ps-100rows.parquet"));
    const { splitKey, columns, samples, leftOut } = dataset.describe();
    expect(dataset.report()[0]).toMatchObject({ rowsRead: 100, rowsRefused: 0 });
    expect(splitKey).toBe("hostname");
    expect(columns.find((c) => c.name === "pl_rade")!.type).toBe("number");
    expect(samples[0]).toContain("pl_name=HD 3167 c\n");
    expect(Object.keys(leftOut).length).toBeGreaterThan(100);
    expect(samples[0]).not.toContain("<a");
  });

  it("a Parquet file cut anywhere is named, never read as whole", async () => {
    const whole = readFileSync(shared("nea-ps-100rows.parquet"));
    for (const at of [5, 100, 10_000, whole.length - 8, whole.length - 1])
      await expect(open(file("cut.parquet", whole.subarray(0, at)))).rejects.toMatchObject({
        code: "FILE_FORMAT",
        message: expect.stringMatching(/cut\.parquet: refused: a truncated Parquet file/),
      });
    // Damage in the middle, footer whole.
    const damaged = Buffer.from(whole);
    damaged.fill(0, 1000, 60_000);
    await expect(open(file("damaged.parquet", damaged))).rejects.toMatchObject({
      code: "FILE_FORMAT",
      message: expect.stringMatching(/damaged\.parquet:1: refused: rows 1 to 100 cannot be read/),
    });
  });

  it("an error page saved as CSV stops at open, by file and line", async () => {
    await expect(open(shared("archive-error-page.csv"))).rejects.toThrow(/archive-error-page\.csv:1: refused/);
  });
});
