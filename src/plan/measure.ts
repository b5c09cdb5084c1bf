/**
 * What this machine's processors and disk do, timed in seconds: products in each dtype over two heights, memory, a disk. Through
 * the eager operators, hence the kernels that training runs. Of cards: measure-card.ts.
 */
import { closeSync, constants, fsyncSync, mkdirSync, openSync, readSync, rmSync, writeSync } from "node:fs";
import { dirname, join } from "node:path";
import { StromaError } from "../errors.js";
import { callOp, getNumThreads, noGrad, scope, type Tensor } from "../tensor/index.js";
import { measureRates } from "./measure-rates.js";
import { measuredFile, storeMeasured } from "./measured.js";
import { findProfile, type GemmRate, type MachineProfile } from "./profiles.js";
import type { MeasuredRates } from "./rates.js";

/**
 * Measures in a minute, stores the profile and returns it. Needs the addon; throws NOT_SET_UP without.
 * @param rates measured already
 */
export function measureMachine(rates?: MeasuredRates): MachineProfile {
  const file = measuredFile();
  mkdirSync(join(file, ".."), { recursive: true });
  const disk = timeDisk(`${file}.measure`);
  const deviceMemory = timeMemory();
  const profile: MachineProfile = {
    ...findProfile("cpu"),
    gemm: { float32: timeGemm("float32"), bfloat16: timeGemm("bfloat16"), float64: timeGemm("float64") },
    deviceMemory,
    // A copy between two places of one memory.
    hostToDevice: deviceMemory / 2,
    deviceToHost: deviceMemory / 2,
    ...disk,
    threads: getNumThreads(),
    measured: rates ?? measureRates(),
  };
  storeMeasured(profile);
  return profile;
}

/** Best of as many as fit in `budget` seconds, at least two; the first warms up. */
function best(work: () => void, budget = 1.5): number {
  work();
  const begin = performance.now();
  let least = Number.POSITIVE_INFINITY;
  for (let n = 0; n < 2 || performance.now() - begin < budget * 1e3; n++) {
    const at = performance.now();
    work();
    least = Math.min(least, (performance.now() - at) / 1e3);
  }
  return least;
}

const ones = (rows: number, columns: number, dtype: string): Tensor =>
  callOp("aten::ones", [[rows, columns]], { dtype }) as Tensor;

/** [rows, D] x [D, D] at 512 rows and at 16: the two rates give both numbers of flops x rows / (rows + half). */
function timeGemm(dtype: string): GemmRate {
  const D = 1024;
  const rate = (rows: number): number =>
    noGrad(() =>
      scope(() => {
        const [x, w] = [ones(rows, D, dtype), ones(D, D, dtype)];
        return (2 * rows * D * D) / best(() => void scope(() => void callOp("aten::mm", [x, w])));
      }),
    );
  const [low, high] = [16, 512];
  return gemmRate(low, rate(low), high, rate(high));
}

/** 1 / rate = (1 + half / rows) / flops, twice: `slow` and `fast` are the rates at `low` and `high` rows. */
export function gemmRate(low: number, slow: number, high: number, fast: number): GemmRate {
  const flops = 1 / ((high / fast - low / slow) / (high - low));
  const believable = Number.isFinite(flops) && flops > 0 ? flops : fast;
  return { flops: believable, halfRows: Math.max(0, high * (believable / fast - 1)) };
}

/** Bytes a second of a copy: read and written. */
function timeMemory(): number {
  return scope(() => {
    const [from, to] = [ones(4096, 4096, "float32"), ones(4096, 4096, "float32")];
    return (2 * 4096 * 4096 * 4) / best(() => void callOp("aten::copy_", [to, from]));
  });
}

/** Writes 128 MB with fsync, and reads it past the page cache. Throws DISK_FULL. */
export function timeDisk(file: string): { diskRead: number; diskWrite: number } {
  const chunk = Buffer.alloc(16 << 20, 1);
  const bytes = 8 * chunk.length;
  try {
    const begin = performance.now();
    const writing = openSync(file, "w");
    for (let at = 0; at < bytes; at += chunk.length) writeSync(writing, chunk);
    fsyncSync(writing);
    closeSync(writing);
    const written = (performance.now() - begin) / 1e3;
    return { diskWrite: bytes / written, diskRead: timeRead(file, bytes) ?? bytes / written };
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== "ENOSPC") throw error;
    throw new StromaError(
      "DISK_FULL",
      `[doctor] no room for the 128 MB that time the disk, in ${dirname(file)}. Free some, or set STROMA_CACHE`,
      { file },
      { cause: error },
    );
  } finally {
    rmSync(file, { force: true });
  }
}

/** Null where the file system has no O_DIRECT. */
function timeRead(file: string, bytes: number): number | null {
  const size = 16 << 20;
  const buffer = Buffer.allocUnsafeSlow(size + 4096);
  let fd: number;
  try {
    fd = openSync(file, constants.O_RDONLY | constants.O_DIRECT);
  } catch {
    return null;
  }
  try {
    // O_DIRECT wants an aligned address, which JavaScript cannot see: the one that is not refused.
    for (let shift = 0; shift < 4096; shift += 16) {
      try {
        readSync(fd, buffer, shift, size, 0);
      } catch {
        continue;
      }
      const begin = performance.now();
      for (let at = 0; at < bytes; at += size) readSync(fd, buffer, shift, size, at);
      return bytes / ((performance.now() - begin) / 1e3);
    }
    return null;
  } finally {
    closeSync(fd);
  }
}
