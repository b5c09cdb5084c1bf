/** Sizes as people write them, and how much of a machine's memory a plan may use. */
import { StromaError } from "../errors.js";

const UNITS: Readonly<Record<string, number>> = {
  "": 1,
  B: 1,
  KB: 1e3,
  MB: 1e6,
  GB: 1e9,
  TB: 1e12,
  KIB: 2 ** 10,
  MIB: 2 ** 20,
  GIB: 2 ** 30,
  TIB: 2 ** 40,
};

/** "24GB" (1e9 each), "8GiB" (2^30 each), "500 MB", or bytes -> bytes. Throws CONFIG for anything else. */
export function parseSize(text: string | number, option: string): number {
  const [, number, unit] = /^\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?b?)\s*$/i.exec(String(text)) ?? [];
  const scale = UNITS[(unit ?? "?").toUpperCase()];
  if (number === undefined || scale === undefined)
    throw new StromaError(
      "CONFIG",
      `[plan] expected ${option} to be a size like 24GB (1e9 bytes each) or 8GiB (2^30), got ${JSON.stringify(text)}`,
    );
  return Math.round(Number(number) * scale);
}

export interface Budget {
  /** Of the card or the process: all there is. */
  deviceBytes: number;
  hostBytes: number;
  diskBytes: number;
}

/**
 * What a plan may fill. Of a card all but a twentieth, at most 1 GB: the driver's context, libraries' workspaces and what
 * this model of memory misses. Of host memory all but a twentieth, at most 2 GB: Node, data, the page cache. Of disk all.
 */
export const usable = ({ deviceBytes, hostBytes, diskBytes }: Budget): Budget => ({
  deviceBytes: deviceBytes - Math.min(1e9, deviceBytes / 20),
  hostBytes: hostBytes - Math.min(2e9, hostBytes / 20),
  diskBytes,
});

/** Of a memory that was detected, what a plan may take and what it leaves. */
export function usableOf(bytes: number, kind: "deviceBytes" | "hostBytes"): { bytes: number; left: number } {
  const within = usable({ deviceBytes: 0, hostBytes: 0, diskBytes: 0, [kind]: bytes })[kind];
  return { bytes: within, left: bytes - within };
}

/** 24e9 -> "24 GB", 1.234e9 -> "1.23 GB", 0 -> "0": decimal, three digits. */
export function showSize(bytes: number): string {
  const [unit, scale] = bytes >= 1e9 ? ["GB", 1e9] : bytes >= 1e6 ? ["MB", 1e6] : ["kB", 1e3];
  return bytes === 0 ? "0" : `${Number((bytes / scale).toPrecision(3))} ${unit}`;
}
