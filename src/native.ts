/**
 * The loader, and the only importer of .node files. Nothing is loaded before the first call; then the addon of the
 * build named by `build/current.json` (or by STROMA_BUILD=<id>) is loaded once in this thread, after its libtorch was
 * found and its version compared, so that a wrong one is a StromaError and never a crash.
 */
import { existsSync, readFileSync, realpathSync } from "node:fs";
import { createRequire } from "node:module";
import { dirname, join, resolve } from "node:path";
import { fileURLToPath } from "node:url";
import { isMainThread } from "node:worker_threads";
import { StromaError } from "./errors.js";
import type { NativeTensorApi } from "./tensor/native-api.js";
import type { NativeRanks, NativeSession, RankSpec, SessionOptions } from "./train/native-session.js";

/** What `stroma setup` writes as build/<id>/build.json when a build is complete; build/current.json is a copy. */
export interface BuildRecord {
  /** `cpu-<version>` or `cuda-<version>`. */
  id: string;
  /** Paths of the addon and of the kernel library (null while there is none), relative to the package root. */
  addon: string;
  kernels: string | null;
  /** The libtorch it was compiled against: full version, folder that holds lib/ and include/, CUDA version or null. */
  libtorch: { version: string; path: string; cuda: string | null };
}

export interface SessionFactory {
  createSession(options: SessionOptions): NativeSession;
  /** Resolves when all ranks are there. Rejects with RANKS, naming who is missing. */
  /** Rejects with RANKS when a rank is missing after `joinSeconds`, or when `signal` is aborted before all are there. */
  joinRanks(spec: RankSpec, signal?: AbortSignal): Promise<NativeRanks>;
  /** Of the NCCL that ranks on cards exchange over; null: this build has none. */
  ncclVersion(): string | null;
  /** Where a card sits in its machine, as the driver says it. Throws NOT_SET_UP without a CUDA build or driver. */
  busAddress(card: number): string;
  /** Of a card by its bus address. `sys`: a tree like /sys, for tests. */
  memoryNodes(busAddress: string, sys?: string): MemoryNodes;
  /** Ends the engine's threads of the whole process: called once, when it exits. */
  endThreads(): void;
}
/** Host memory of a machine of several sockets: a card's copies go to that of its own socket where the system allows it. */
export interface MemoryNodes {
  /** Those that have memory. */
  nodes: number[];
  /** Where the card hangs; null: not told, or there is one node only. */
  near: number | null;
  /** Where a page lies that was asked of it; null: asking is refused. */
  given: number | null;
}
export type NativeAddon = NativeTensorApi & SessionFactory;

/** What the machine is, told by native/probe without libtorch. Absent limits are null; bytes are plain numbers. */
export interface ProbeReport {
  gpus: {
    index: number;
    name: string;
    /** "GPU-…", as CUDA_VISIBLE_DEVICES may name it; absent: the driver does not tell. */
    uuid?: string;
    memoryBytes: number;
    freeBytes: number;
    computeCapability: string;
  }[];
  /** Null: no NVML library, so no NVIDIA driver. */
  driver: { version: string; cuda: string } | null;
  /** Why there are no GPUs, in NVML's or the loader's words; null when there are. */
  nvmlError: string | null;
  memory: { totalBytes: number; availableBytes: number; cgroupBytes: number | null };
  cpus: { online: number; affinity: number; cgroup: number | null };
  /** Soft and hard RLIMIT_MEMLOCK; null: unlimited. */
  memlock: { softBytes: number | null; hardBytes: number | null };
  cpuFlags: { avx2: boolean; avx512f: boolean; avx512Bf16: boolean; amxBf16: boolean };
  hugePages: { transparent: string | null; sizeBytes: number };
  glibc: string;
}

export const packageRoot = resolve(dirname(fileURLToPath(import.meta.url)), "..");
const CURE = "npx stroma setup";

const cureFor = (id: string | undefined) => (id?.startsWith("cuda") ? `${CURE} --cuda` : CURE);

/** `2.13.0+cpu` -> `2.13`: libtorch's binary interface changes with it. */
export function minorOf(version: string): string {
  return /^\d+\.\d+/.exec(version)?.[0] ?? version;
}

/** The version text of the torch folder at `path`; null when there is no libtorch. Reads, loads nothing. */
export function libtorchVersionAt(path: string): string | null {
  if (!existsSync(join(path, "lib", "libtorch_cpu.so"))) return null;
  try {
    const text = readFileSync(join(path, "version.py"), "utf8");
    return /^__version__\s*=\s*['"]([^'"]+)['"]/m.exec(text)?.[1] ?? null;
  } catch {
    // The plain libtorch archives carry no Python: their version lies in a file of its own.
    const file = join(path, "build-version");
    return existsSync(file) ? readFileSync(file, "utf8").trim() : null;
  }
}

/** Reads the record of the chosen build. Throws NOT_SET_UP when there is none or it is damaged. */
export function readBuildRecord(root = packageRoot, id = process.env.STROMA_BUILD): BuildRecord {
  const file = id ? join(root, "build", id, "build.json") : join(root, "build", "current.json");
  let record: BuildRecord;
  try {
    record = JSON.parse(readFileSync(file, "utf8")) as BuildRecord;
  } catch (cause) {
    const missing = (cause as NodeJS.ErrnoException).code === "ENOENT";
    const what = missing
      ? id
        ? `there is no build "${id}" (STROMA_BUILD)`
        : "the native addon has not been built on this machine"
      : "the record of the native build cannot be read";
    const cure = cureFor(id);
    throw new StromaError("NOT_SET_UP", `[native] ${what}: ${file}. Run \`${cure}\``, { file, cure }, { cause });
  }
  if (typeof record?.addon !== "string" || typeof record.libtorch?.version !== "string") {
    throw new StromaError(
      "NOT_SET_UP",
      `[native] the record of the native build is damaged: ${file}. Run \`${CURE}\``,
      {
        file,
        cure: CURE,
      },
    );
  }
  return record;
}

/** STROMA_LIBTORCH may name the torch folder or the folder it lies in. */
function namedLibtorch(): string | null {
  const named = process.env.STROMA_LIBTORCH;
  if (!named) return null;
  const inner = join(named, "torch");
  return existsSync(join(inner, "lib")) ? inner : named;
}

/** Throws NOT_SET_UP or VERSION_MISMATCH unless the libtorch that `record` would load is the one it was built for. */
export function checkBuild(record: BuildRecord, root = packageRoot): void {
  const cure = cureFor(record.id);
  const built = record.libtorch;
  const named = namedLibtorch();
  const path = named ?? built.path;
  const found = libtorchVersionAt(path);
  const facts = { build: record.id, expected: built.version, actual: found, path, cure };
  if (found === null) {
    throw new StromaError(
      "NOT_SET_UP",
      `[native] expected libtorch ${built.version} at ${path}${named ? " (STROMA_LIBTORCH)" : ""}, found none. Run \`${cure}\``,
      facts,
    );
  }
  if (minorOf(found) !== minorOf(built.version)) {
    throw new StromaError(
      "VERSION_MISMATCH",
      `[native] the addon was built for libtorch ${minorOf(built.version)} (${built.version}), found ${found} at ${path}: ` +
        `binaries do not carry across minors. Run \`${cure}\``,
      facts,
    );
  }
  if (named && realpath(named) !== realpath(built.path)) {
    throw new StromaError(
      "VERSION_MISMATCH",
      `[native] STROMA_LIBTORCH names ${named}, but the addon is linked to ${built.path}. Run \`${cure}\`, or unset STROMA_LIBTORCH`,
      facts,
    );
  }
  for (const file of [record.addon, ...(record.kernels ? [record.kernels] : [])]) {
    if (!existsSync(join(root, file))) {
      throw new StromaError("NOT_SET_UP", `[native] build ${record.id} lacks ${file}. Run \`${cure}\``, {
        ...facts,
        file,
      });
    }
  }
}

function realpath(path: string): string {
  try {
    return realpathSync(path);
  } catch {
    return resolve(path);
  }
}

const require = createRequire(import.meta.url);
let loaded: { addon: NativeAddon; record: BuildRecord } | undefined;

/**
 * The addon, loaded on first use in each thread. Throws StromaError NOT_SET_UP (no build, no libtorch) or
 * VERSION_MISMATCH (libtorch of another minor), each with the cure.
 */
export function loadAddon(): NativeAddon {
  if (loaded) return loaded.addon;
  const record = readBuildRecord();
  checkBuild(record);
  letThreadsSleep();
  // Cards are counted as the driver and nvidia-smi count them, so that names and free memory are those of the card meant.
  process.env.CUDA_DEVICE_ORDER ??= "PCI_BUS_ID";
  // c10d logs what it also throws, with stacks: whoever catches it says it in words.
  if (process.env.STROMA_DEBUG !== "1") process.env.TORCH_CPP_LOG_LEVEL ??= "FATAL";
  const addon = requireNative<NativeAddon>(join(packageRoot, record.addon), record);
  addon.setErrorClass(StromaError);
  // A worker's own end runs the environment's cleanup hooks; it must not end the sessions of other threads.
  if (isMainThread) process.on("exit", () => addon.endThreads());
  loaded = { addon, record };
  return addon;
}

/**
 * libgomp reads its settings once, while libtorch is being loaded. Left alone, its threads spin for milliseconds between
 * two parallel regions and take the cores from whatever serial work stands between them: on two cores a step of the
 * smallest preset took 1.0 to 5 s with spinning threads and 0.64 s with sleeping ones. Settings of the user's own stay.
 * (In a worker thread process.env is a copy, so there the first load must have been the main thread's to profit.)
 */
function letThreadsSleep(): void {
  if (process.env.OMP_WAIT_POLICY === undefined) process.env.GOMP_SPINCOUNT ??= "0";
}

/** The build in use; the same errors as loadAddon(). */
export function currentBuild(): BuildRecord {
  if (loaded) return loaded.record;
  const record = readBuildRecord();
  checkBuild(record);
  return record;
}

function requireNative<T>(file: string, record: BuildRecord): T {
  try {
    return require(file) as T;
  } catch (cause) {
    const text = (cause as Error).message;
    const cure = cureFor(record.id);
    const foreign = /undefined symbol|GLIBC|version `/.test(text);
    throw new StromaError(
      foreign ? "VERSION_MISMATCH" : "NOT_SET_UP",
      `[native] the addon of build ${record.id} does not load: ${text.split("\n")[0]}. Run \`${cure}\``,
      { build: record.id, file, cure },
      { cause },
    );
  }
}

/** What this machine is (GPUs, limits, CPU flags); null where the probe has not been built. Needs no libtorch. */
export function probeMachine(): ProbeReport | null {
  const file = join(packageRoot, "build", "probe", "stroma_probe.node");
  if (!existsSync(file)) return null;
  return (require(file) as { probe(): ProbeReport }).probe();
}
