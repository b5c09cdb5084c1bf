/**
 * Documents into rows of a batch. Each document is followed by the end-of-text token; rows are filled one after another.
 *
 *   input_ids     the tokens; padding where a row has no more
 *   labels        the next token of the same document; -100 at its end and on padding
 *   position_ids  0, 1, 2, ... from the start of each document (or of the part of it that stands in this row)
 *   segment_ids   0, 1, 2, ... by document within a row; padding is one more segment
 *
 * "whole": a document that fits a row is never cut: when it does not fit what is left, the row is padded. Longer ones are
 * cut to fill rows. "split": every row is filled, documents are cut wherever a row ends.
 */
import { totalmem } from "node:os";
import { StromaError } from "../errors.js";
import type { DataBatch } from "./types.js";

export type Packing = "whole" | "split";

/** Tensors of one batch being filled. int64 are written as pairs of 32-bit words: BigInt is slow. */
export class RowPacker {
  private row = 0;
  private column = 0;
  private segment = 0;
  private labelled = 0;
  private readonly ids: Int32Array;
  private readonly labels: Int32Array;
  private readonly positions: Int32Array;
  private readonly segments: Int32Array;

  /** @throws OUT_OF_MEMORY */
  constructor(
    private readonly rows: number,
    private readonly length: number,
    private readonly padding: number,
  ) {
    const words = 2 * rows * length;
    try {
      // The system would give out more than there is, and end the process once it is written to.
      if (16 * words > totalmem()) throw new RangeError("more than this machine's memory");
      this.ids = new Int32Array(words);
      this.labels = new Int32Array(words);
      this.positions = new Int32Array(words);
      this.segments = new Int32Array(words);
    } catch (cause) {
      const bytes = (16 * words).toPrecision(3);
      throw new StromaError(
        "OUT_OF_MEMORY",
        `[data] a micro-batch of ${rows} x ${length} tokens takes ${bytes} bytes, which cannot be had. Make microBatchSize or sequenceLength smaller`,
        { rows, length },
        { cause },
      );
    }
  }

  get full(): boolean {
    return this.row === this.rows;
  }

  get empty(): boolean {
    return this.row === 0 && this.column === 0;
  }

  /** Room in the row. */
  get room(): number {
    return this.length - this.column;
  }

  /**
   * Writes up to `room` tokens of a document from `offset` on, `size` bytes and the end-of-text token in all. Returns how
   * many; the label of the last one written is the next token even when that stands in the next row.
   */
  write(bytes: Uint8Array, start: number, size: number, offset: number, endOfText: number): number {
    const count = Math.min(this.room, size + 1 - offset);
    let at = 2 * (this.row * this.length + this.column);
    for (let i = 0; i < count; i++, at += 2) {
      const token = offset + i;
      this.ids[at] = token < size ? bytes[start + token]! : endOfText;
      if (token < size) {
        this.labels[at] = token + 1 < size ? bytes[start + token + 1]! : endOfText;
        this.labelled++;
      } else {
        this.labels[at] = -100;
        this.labels[at + 1] = -1;
      }
      this.positions[at] = i;
      this.segments[at] = this.segment;
    }
    this.column += count;
    this.segment++;
    if (this.column === this.length) this.nextRow();
    return count;
  }

  /** Pads what is left of the row. */
  padRow(): void {
    let at = 2 * (this.row * this.length + this.column);
    for (let i = 0; this.column < this.length; this.column++, i++, at += 2) {
      this.ids[at] = this.padding;
      this.labels[at] = -100;
      this.labels[at + 1] = -1;
      this.positions[at] = i;
      this.segments[at] = this.segment;
    }
    this.nextRow();
  }

  private nextRow(): void {
    this.row++;
    this.column = 0;
    this.segment = 0;
  }

  /** Pads the remaining rows and hands the tensors over. */
  finish(): Pick<DataBatch, "tensors" | "tokens"> {
    while (!this.full) this.padRow();
    const tensor = (words: Int32Array) => ({
      dtype: "int64" as const,
      shape: [this.rows, this.length],
      data: new BigInt64Array(words.buffer),
    });
    return {
      tensors: {
        input_ids: tensor(this.ids),
        labels: tensor(this.labels),
        position_ids: tensor(this.positions),
        segment_ids: tensor(this.segments),
      },
      tokens: this.labelled,
    };
  }
}
