/** The stream of micro-batches: units in their order, packed, with an exact position after every batch. */
import { invalidArgument, StromaError } from "../errors.js";
import { type Packing, RowPacker } from "./pack.js";
import { UnitPool } from "./pool.js";
import { END_OF_TEXT, PADDING } from "./tokenizer.js";
import type { BatchStream, DataBatch, DataPosition, StreamOptions } from "./types.js";
import { type Unit, type UnitSource, unitCount } from "./units.js";

/** The place of the next token: everything else follows from the options that the position repeats. */
export interface StreamPosition extends DataPosition {
  version: 1;
  epoch: number;
  unit: number;
  document: number;
  token: number;
  seed: number;
  split: string;
  sequenceLength: number;
  packing: Packing;
  fingerprint: string;
}

export interface StreamSettings {
  source: UnitSource;
  fingerprint: string;
  packing: Packing;
  workers: number;
  /** Units asked for beyond the one in use. */
  readAhead: number;
}

export function openStream(settings: StreamSettings, options: StreamOptions): BatchStream {
  return new PackedStream(settings, options);
}

function positive(value: unknown, name: string): void {
  if (!Number.isSafeInteger(value) || (value as number) < 1)
    throw invalidArgument("data", "a positive integer", value, name);
}

/** Beyond, (epoch, unit) would leave the safe integers. */
const MOST_EPOCHS = 0xffff_ffff;

class PackedStream implements BatchStream {
  private readonly pool: UnitPool;
  private readonly units: number;
  private readonly epochs: number;
  private epoch = 0;
  private unit = 0;
  private document = 0;
  private token = 0;
  /** Byte offset of `document` in `current`. */
  private start = 0;
  private current: Unit | null = null;
  /** Units on the way, by epoch * units + unit. */
  private readonly ahead = new Map<number, Promise<Unit>>();
  private queue: Promise<unknown> = Promise.resolve();
  private closed = false;
  /** Bytes seen in this epoch: an epoch without any would never fill a batch. */
  private seen = false;

  constructor(
    private readonly settings: StreamSettings,
    private readonly options: StreamOptions,
  ) {
    positive(options.sequenceLength, "sequenceLength");
    positive(options.microBatchSize, "microBatchSize");
    if (!Number.isSafeInteger(options.seed) || options.seed < 0)
      throw invalidArgument("data", "an integer in [0, 2^53)", options.seed, "seed");
    if (options.split !== "train" && options.split !== "validation")
      throw invalidArgument("data", "train or validation", options.split, "split");
    if (options.epochs !== undefined) positive(options.epochs, "epochs");
    this.epochs = options.epochs ?? (options.split === "validation" ? 1 : Number.POSITIVE_INFINITY);
    this.units = unitCount(settings.source);
    if (options.position !== undefined) this.restore(options.position);
    this.pool = new UnitPool(settings.source, settings.workers);
  }

  private restore(position: DataPosition): void {
    const p = position as StreamPosition;
    if (p.version !== 1)
      throw new StromaError("VERSION_MISMATCH", `[data] expected a position of version 1, got ${String(p.version)}`);
    const { settings, options } = this;
    const must: [keyof StreamPosition, unknown, string][] = [
      ["fingerprint", settings.fingerprint, "the data changed since"],
      ["seed", options.seed, "seed"],
      ["split", options.split, "split"],
      ["sequenceLength", options.sequenceLength, "sequenceLength"],
      ["packing", settings.packing, "packing"],
    ];
    for (const [key, expected, name] of must)
      if (p[key] !== expected)
        throw invalidArgument("data", `a position with ${String(key)} ${String(expected)}`, p[key], name);
    for (const key of ["epoch", "unit", "document", "token"] as const)
      if (
        !Number.isSafeInteger(p[key]) ||
        p[key] < 0 ||
        (key === "unit" && p[key] > this.units) ||
        (key === "epoch" && p[key] > MOST_EPOCHS)
      )
        throw invalidArgument("data", "a place in the data", p[key], `position.${key}`);
    this.epoch = p.epoch;
    this.unit = p.unit;
    this.document = p.document;
    this.token = p.token;
    // Whether an epoch that is resumed in the middle has documents was settled before.
    this.seen = p.unit > 0 || p.document > 0 || p.token > 0;
  }

  next(): Promise<DataBatch | null> {
    const result = this.queue.then(() => this.fill());
    this.queue = result.catch(() => undefined);
    return result;
  }

  private async fill(): Promise<DataBatch | null> {
    if (this.closed) throw new StromaError("DISPOSED", "[data] the stream is closed");
    const { microBatchSize, sequenceLength } = this.options;
    const packer = new RowPacker(microBatchSize, sequenceLength, PADDING);
    let epoch = -1;
    while (!packer.full) {
      const unit = await this.here();
      if (unit === null) break;
      if (epoch < 0) epoch = this.epoch;
      const size = unit.lengths[this.document]!;
      const left = size + 1 - this.token;
      // A document that fits a row is never cut; one that is already cut goes on filling rows.
      if (this.settings.packing === "whole" && this.token === 0 && left <= sequenceLength && left > packer.room) {
        packer.padRow();
        continue;
      }
      this.token += packer.write(unit.bytes, this.start, size, this.token, END_OF_TEXT);
      if (this.token > size) {
        this.start += size;
        this.document++;
        this.token = 0;
      }
    }
    if (packer.empty) return null;
    return { ...packer.finish(), epoch, position: this.position() };
  }

  /** The unit that holds the next document, or null at the end. */
  private async here(): Promise<Unit | null> {
    for (;;) {
      if (this.current !== null) {
        if (this.document < this.current.lengths.length) {
          this.seen = true;
          return this.current;
        }
        this.current = null;
        this.unit++;
        this.document = 0;
        this.start = 0;
      }
      if (this.unit >= this.units) {
        if (!this.seen)
          throw new StromaError(
            "DATA",
            `[data] the ${this.options.split} split has no documents. Give more data or another share for validation`,
          );
        this.unit = 0;
        this.epoch++;
        this.seen = false;
      }
      if (this.epoch >= this.epochs) return null;
      const unit = await this.fetch();
      if (this.document > unit.lengths.length)
        throw invalidArgument("data", `a document within ${unit.lengths.length}`, this.document, "position.document");
      const size = unit.lengths[this.document] ?? 0;
      if (this.token > size)
        throw invalidArgument("data", `a token within the ${size} of its document`, this.token, "position.token");
      this.start = 0;
      for (let i = 0; i < this.document; i++) this.start += unit.lengths[i]!;
      this.current = unit;
    }
  }

  /** Asks for this unit and those after it; waits for this one. */
  private fetch(): Promise<Unit> {
    const at = this.epoch * this.units + this.unit;
    for (let i = at; i <= at + this.settings.readAhead; i++) {
      const epoch = Math.floor(i / this.units);
      if (epoch >= this.epochs) break;
      if (this.ahead.has(i)) continue;
      const { split, seed } = this.options;
      const made = this.pool.make({ split, seed, epoch, unit: i % this.units });
      made.catch(() => undefined); // it is reported when it is waited for
      this.ahead.set(i, made);
    }
    const wanted = this.ahead.get(at)!;
    this.ahead.delete(at);
    return wanted;
  }

  private position(): StreamPosition {
    return {
      version: 1,
      epoch: this.epoch,
      unit: this.unit,
      document: this.document,
      token: this.token,
      seed: this.options.seed,
      split: this.options.split,
      sequenceLength: this.options.sequenceLength,
      packing: this.settings.packing,
      fingerprint: this.settings.fingerprint,
    };
  }

  async close(): Promise<void> {
    this.closed = true;
    await this.pool.close();
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.close();
  }
}
