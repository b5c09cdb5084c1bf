/** Output of several processes in one terminal: each line whole, and with the name of the one who wrote it. */
import { Transform, type TransformCallback } from "node:stream";
import { StringDecoder } from "node:string_decoder";

/** A line without an end is cut here, so that a process that never ends one cannot fill the memory. */
export const LONGEST_LINE = 16_384;

/**
 * Bytes in, whole lines out, each after `prefix`. A chunk that goes out holds whole lines alone, so that whoever writes
 * chunks of several sources in turn never mixes two lines. Of a line that was written over itself (`10%\r20%`) what
 * stands there at its end is kept. The last line gets its end when the source closes.
 */
export class PrefixedLines extends Transform {
  readonly #decoder = new StringDecoder("utf8");
  #rest = "";

  constructor(private readonly prefix: string) {
    super({ decodeStrings: true });
  }

  override _transform(chunk: Buffer, _encoding: BufferEncoding, done: TransformCallback): void {
    this.#take(this.#decoder.write(chunk));
    done();
  }

  override _flush(done: TransformCallback): void {
    this.#take(this.#decoder.end());
    if (this.#rest !== "") this.#emit([this.#rest]);
    this.#rest = "";
    done();
  }

  #take(text: string): void {
    const lines = (this.#rest + text).split("\n");
    this.#rest = lines.pop()!;
    const cut: string[] = [];
    while (this.#rest.length > LONGEST_LINE) {
      const at = isHighSurrogate(this.#rest, LONGEST_LINE - 1) ? LONGEST_LINE - 1 : LONGEST_LINE;
      cut.push(this.#rest.slice(0, at));
      this.#rest = this.#rest.slice(at);
    }
    this.#emit([...lines, ...cut]);
  }

  #emit(lines: readonly string[]): void {
    if (lines.length > 0) this.push(lines.map((line) => `${this.prefix}${lastWritten(line)}\n`).join(""));
  }
}

function lastWritten(line: string): string {
  const text = line.endsWith("\r") ? line.slice(0, -1) : line;
  return text.slice(text.lastIndexOf("\r") + 1);
}

function isHighSurrogate(text: string, at: number): boolean {
  const unit = text.charCodeAt(at);
  return unit >= 0xd800 && unit <= 0xdbff;
}
