// The compiler, cmake, ninja and nvcc: from the machine, or (all but the compiler) from packages in the cache.
import { existsSync, mkdtempSync, readdirSync, rmSync, writeFileSync } from "node:fs";
import { availableParallelism, freemem, tmpdir } from "node:os";
import { dirname, join } from "node:path";
import { ask, run, SetupError, step, which, withLock } from "./process.mjs";
import { cacheDir, fillFolder, pipInstall } from "./python.mjs";

const COMPILER_CURE =
  "install one (Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++), 11 or newer, or name it in CXX";

/** Path of a C++ compiler; null when there is none. */
export function findCompiler() {
  if (process.env.CXX) return which(process.env.CXX);
  return which("g++") ?? which("c++") ?? which("clang++");
}

/** The compiler, tried on a C++20 program that uses the standard library. Throws SetupError with the cure. */
export async function requireCompiler() {
  const compiler = findCompiler();
  if (!compiler) {
    throw new SetupError(
      process.env.CXX ? `CXX=${process.env.CXX} is not an executable` : "a C++ compiler is missing",
      COMPILER_CURE,
    );
  }
  const folder = mkdtempSync(join(tmpdir(), "stroma-cxx-"));
  try {
    const source = join(folder, "try.cc");
    writeFileSync(
      source,
      "#include <concepts>\n#include <span>\n#include <string>\ntemplate <std::integral T> T twice(T x) { return x + x; }\n" +
        "int f(std::span<const int> s) { return twice(static_cast<int>(s.size())); }\n",
    );
    const { code, output } = await run(compiler, ["-std=c++20", "-c", source, "-o", join(folder, "try.o")], {
      quiet: true,
      allowFailure: true,
    });
    if (code !== 0) {
      throw new SetupError(
        `${compiler} (${ask(compiler, ["-dumpfullversion"]) ?? "?"}) does not compile C++20: ${output.trim().split("\n")[0]}`,
        COMPILER_CURE,
      );
    }
  } finally {
    rmSync(folder, { recursive: true, force: true });
  }
  return compiler;
}

/** A tool that pip brings: the program itself, not its Python shim, which would need PYTHONPATH. */
async function fromPip(name, requirement, inside, { pipArgs, fetch }) {
  const folder = join(cacheDir(), "tools", requirement.replace("==", "-"));
  const program = () => inside.map((path) => join(folder, path)).find((path) => existsSync(path));
  if (program()) return program();
  if (!fetch) throw new SetupError(`this machine has no ${name}`, "`npx stroma setup` fetches it with pip");
  await withLock(join(cacheDir(), ".lock"), async () => {
    if (program()) return;
    await step(`fetching ${requirement} with pip (this machine has no ${name})`, () =>
      fillFolder(folder, (partial) => pipInstall(partial, [requirement], { noDeps: true, pipArgs })),
    );
  });
  const path = program();
  if (!path) throw new SetupError(`pip's ${requirement} holds no ${name}`, `install ${name} and put it on PATH`);
  return path;
}

/** cmake 3.18 or newer, and ninja. */
export async function findBuildTools({ pipArgs = [], fetch = true } = {}) {
  const options = { pipArgs, fetch };
  let cmake = which("cmake");
  const version = cmake && /(\d+)\.(\d+)/.exec(ask(cmake, ["--version"]) ?? "");
  if (!version || Number(version[1]) * 100 + Number(version[2]) < 318) cmake = null;
  cmake ??= await fromPip("cmake", "cmake==4.4.4", ["cmake/data/bin/cmake"], options);
  const ninja =
    which("ninja") ?? (await fromPip("ninja", "ninja==1.13.2", ["ninja/data/bin/ninja", "bin/ninja"], options));
  return { cmake, ninja };
}

/**
 * nvcc for libtorch's CUDA version: the machine's when its major version is the same (CUDA's minor versions mix), else
 * the one that NVIDIA's packages bring. Returns {nvcc, include}; include: where CUDA's headers lie.
 */
export async function findNvcc(cuda, { pipArgs = [] } = {}) {
  const major = cuda.split(".")[0];
  const candidates = [
    process.env.CUDACXX && which(process.env.CUDACXX),
    which("nvcc"),
    "/usr/local/cuda/bin/nvcc",
    `/usr/local/cuda-${cuda}/bin/nvcc`,
  ];
  for (const nvcc of candidates) {
    if (!nvcc || !existsSync(nvcc)) continue;
    const release = /release (\d+)\.(\d+)/.exec(ask(nvcc, ["--version"]) ?? "");
    if (release?.[1] === major) return nvcc;
  }
  const folder = join(cacheDir(), "tools", `cuda-toolkit-${cuda}`);
  const nvcc = join(folder, "nvidia", `cu${major}`, "bin", "nvcc");
  await withLock(join(cacheDir(), ".lock"), async () => {
    if (existsSync(nvcc)) return;
    await step(`fetching nvcc ${cuda} with pip (this machine has none for CUDA ${major})`, () =>
      fillFolder(folder, (partial) => pipInstall(partial, [`cuda-toolkit[nvcc,cccl]==${cuda}.*`], { pipArgs })),
    );
  });
  if (existsSync(nvcc)) return nvcc;
  throw new SetupError(`no nvcc for CUDA ${cuda}`, `install the CUDA toolkit ${major}.x and put nvcc on PATH`);
}

/** Compilations at once: a file that includes libtorch's headers takes up to 2 GB. */
export function compileJobs() {
  return Math.max(1, Math.min(availableParallelism(), Math.floor(freemem() / 2e9)));
}

/**
 * Folder with CUDA's headers for host code: the wheels' beside torch, else the toolkit's. libtorch's own headers include
 * cuda_runtime.h, which needs the compiler's crt folder: wheels of the runtime alone lack it.
 */
export function cudaHeaders(torchPath, cuda, nvcc) {
  const major = cuda.split(".")[0];
  const candidates = [
    join(dirname(torchPath), "nvidia", `cu${major}`, "include"),
    join(dirname(torchPath), "nvidia", "cuda_runtime", "include"),
    ...(nvcc ? [join(dirname(dirname(nvcc)), "include")] : []),
    "/usr/local/cuda/include",
  ];
  const needed = ["cuda_runtime_api.h", join("crt", "host_config.h")];
  return candidates.find((folder) => needed.every((file) => existsSync(join(folder, file)))) ?? null;
}

/**
 * Folders that c10d's ProcessGroupNCCL.hpp includes from, of the wheels beside torch: NCCL's, and those of the libraries
 * that libtorch's CUDA context names. Null where one is missing: ranks on cards then exchange over Gloo.
 */
export function ncclHeaders(torchPath) {
  const nvidia = join(dirname(torchPath), "nvidia");
  const folders = existsSync(nvidia) ? readdirSync(nvidia).map((name) => join(nvidia, name, "include")) : [];
  const needed = ["nccl.h", "cublas_v2.h", "cublasLt.h", "cusparse.h", "cusolverDn.h"];
  const found = needed.map((file) => folders.find((folder) => existsSync(join(folder, file))));
  return found.includes(undefined) ? null : [...new Set(found)];
}
