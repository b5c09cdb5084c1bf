/**
 * What every byte of an arena holds: disjoint intervals [start, end) in order, each with a value; gaps have none. A
 * change cuts the intervals at its ends, so a value may cover any part of what it was set for.
 */
export interface Interval<T> {
  start: number;
  end: number;
  value: T;
}

export class Intervals<T> {
  private readonly list: Interval<T>[] = [];

  /** Calls `visit` for every piece of [start, end) in order, gaps included. */
  each(start: number, end: number, visit: (value: T | undefined, start: number, end: number) => void): void {
    let at = start;
    for (let i = this.firstAfter(start); at < end; i++) {
      const piece = this.list[i];
      if (piece === undefined || piece.start >= end) {
        visit(undefined, at, end);
        return;
      }
      if (piece.start > at) visit(undefined, at, piece.start);
      const stop = Math.min(piece.end, end);
      visit(piece.value, Math.max(piece.start, start), stop);
      at = stop;
    }
  }

  /** Gives [start, end) one value; undefined: none. */
  set(start: number, end: number, value: T | undefined): void {
    this.replace(start, end, value === undefined ? [] : [{ start, end, value }]);
  }

  /** Gives every piece of [start, end) the value that `change` makes of what it held. */
  change(start: number, end: number, change: (value: T | undefined, start: number, end: number) => T): void {
    const pieces: Interval<T>[] = [];
    this.each(start, end, (value, from, to) => {
      pieces.push({ start: from, end: to, value: change(value, from, to) });
    });
    this.replace(start, end, pieces);
  }

  private replace(start: number, end: number, pieces: Interval<T>[]): void {
    const from = this.firstAfter(start);
    const first = this.list[from];
    if (pieces.length === 1 && first !== undefined && first.start === start && first.end === end) {
      this.list[from] = pieces[0]!;
      return;
    }
    let to = from;
    while (to < this.list.length && this.list[to]!.start < end) to++;
    const last = this.list[to - 1];
    const before = to > from && first!.start < start ? [{ ...first!, end: start }] : [];
    const after = to > from && last!.end > end ? [{ ...last!, start: end }] : [];
    this.list.splice(from, to - from, ...before, ...pieces, ...after);
  }

  /** Index of the first interval that ends after `at`. */
  private firstAfter(at: number): number {
    let low = 0;
    let high = this.list.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.list[middle]!.end > at) high = middle;
      else low = middle + 1;
    }
    return low;
  }
}
