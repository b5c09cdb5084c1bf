// The native builds: the probe (one compiler call, no libtorch) and the addon (cmake and ninja) under build/<id>/.
import { existsSync, mkdirSync, readFileSync, renameSync, rmSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { dirname, join } from "node:path";
import { isCheckout } from "./checkout.mjs";
import { hashTree, stampIs } from "./hash.mjs";
import { ask, run, SetupError, step, which } from "./process.mjs";
import { readTorchVersion, root, writeAtomically, writeRecord } from "./record.mjs";
import {
  compileJobs,
  cudaHeaders,
  findBuildTools,
  findCompiler,
  findNvcc,
  ncclHeaders,
  requireCompiler,
} from "./toolchain.mjs";

const require = createRequire(join(root, "package.json"));

/** Folder of an npm package that holds headers; wherever npm put it. */
function headerPackage(name) {
  try {
    return dirname(require.resolve(`${name}/package.json`));
  } catch {
    throw new SetupError(`the npm package ${name} is missing`, "run npm install in the folder of your package.json");
  }
}

const probeFile = join(root, "build", "probe", "stroma_probe.node");
const probeStamp = join(root, "build", "probe", "stamp");

const probeHash = () => hashTree(root, ["native/probe"], [process.arch]);

/** Builds the probe when its sources changed. Needs a compiler and nothing else. */
export async function buildProbe({ force = false } = {}) {
  const hash = probeHash();
  if (!force && existsSync(probeFile) && stampIs(probeStamp, hash)) return;
  const compiler = await requireCompiler();
  await step("building the probe", async () => {
    mkdirSync(dirname(probeFile), { recursive: true });
    const partial = `${probeFile}.${process.pid}.tmp`;
    const sources = ["probe.cc", "limits.cc", "nvml.cc"].map((name) => join(root, "native", "probe", name));
    const include = join(headerPackage("node-api-headers"), "include");
    const flags = [
      "-std=c++20",
      "-O2",
      "-fPIC",
      "-shared",
      "-fvisibility=hidden",
      "-Wall",
      "-Wextra",
      "-DNAPI_VERSION=9",
    ];
    try {
      await run(compiler, [...flags, `-I${include}`, "-o", partial, ...sources, "-ldl"], { quiet: true });
      renameSync(partial, probeFile);
    } finally {
      rmSync(partial, { force: true });
    }
    writeAtomically(probeStamp, hash);
  });
}

/** The machine as the probe sees it; null while the probe is not built. */
export function probe() {
  return existsSync(probeFile) ? require(probeFile).probe() : null;
}

/** Is there an NVIDIA GPU with a driver? Asks the probe, and the driver's own tool where the probe is not built. */
export function hasGpu() {
  const report = probe();
  if (report) return report.gpus.length > 0;
  const tool = which("nvidia-smi");
  return tool !== null && /^GPU \d/m.test(ask(tool, ["-L"]) ?? "");
}

const NATIVE_INPUTS = ["CMakeLists.txt", "cmake", "native/kernels", "native/engine", "native/binding"];

function nativeHash(torch) {
  const facts = [torch.path, torch.version, process.arch, process.env.CXX ?? "", process.env.STROMA_CUDA_ARCHS ?? ""];
  return hashTree(root, NATIVE_INPUTS, facts);
}

/**
 * Compute capabilities to compile for, ascending, as nvcc spells them ("86"): those of STROMA_CUDA_ARCHS, else of the
 * cards in this machine, about a third of the work for one. Empty: all. Cards before Ampere are not served.
 */
export function cudaArchitectures(named = process.env.STROMA_CUDA_ARCHS, gpus = probe()?.gpus ?? []) {
  const words = (named ?? "").split(/[\s,;]+/).filter(Boolean);
  const wrong = words.find((word) => !/^\d+\.?\d$/.test(word));
  if (wrong !== undefined)
    throw new SetupError(`STROMA_CUDA_ARCHS: "${wrong}" is no compute capability`, 'write them as "8.6 9.0"');
  const old = words.find((word) => Number(word.replace(".", "")) < 80);
  if (old !== undefined)
    throw new SetupError(
      `STROMA_CUDA_ARCHS: the kernels are for 8.0 and later, not ${old}`,
      "leave it out, or unset it",
    );
  const of = words.length > 0 ? words : gpus.map((gpu) => gpu.computeCapability).filter(Boolean);
  const all = of.map((word) => Number(word.replace(".", ""))).filter((arch) => arch >= 80);
  return [...new Set(all)].sort((a, b) => a - b).map(String);
}

export function buildId(torch, cuda) {
  return `${cuda ? "cuda" : "cpu"}-${torch.version.split("+")[0]}`;
}

/** The record of a build that is complete, current with the sources and whose libtorch is still there; else null. */
export function currentRecord(id) {
  const folder = join(root, "build", id);
  let record;
  try {
    record = JSON.parse(readFileSync(join(folder, "build.json"), "utf8"));
  } catch {
    return null;
  }
  const torch = record.libtorch && readTorchVersion(record.libtorch.path);
  if (!torch || torch.version !== record.libtorch.version) return null;
  if (!existsSync(join(root, record.addon)) || (record.kernels && !existsSync(join(root, record.kernels)))) return null;
  return stampIs(join(folder, "stamp"), nativeHash(torch)) ? record : null;
}

function cmakeArguments(folder, torch, ninja, cuda) {
  const args = [
    "-S",
    root,
    "-B",
    folder,
    "-G",
    "Ninja",
    `-DCMAKE_MAKE_PROGRAM=${ninja}`,
    `-DCMAKE_CXX_COMPILER=${findCompiler()}`,
    `-DSTROMA_TORCH=${torch.path}`,
    `-DSTROMA_NODE_HEADERS=${join(headerPackage("node-api-headers"), "include")}`,
    `-DSTROMA_NODE_ADDON_API=${headerPackage("node-addon-api")}`,
  ];
  if (cuda) args.push("-DSTROMA_CUDA=ON", ...cuda);
  return args;
}

async function cudaArguments(torch, pipArgs) {
  const major = torch.cuda.split(".")[0];
  const needsNvcc = ask("sh", ["-c", `ls '${root}'/native/kernels/*.cu`]) !== null;
  const nvcc = needsNvcc ? await findNvcc(torch.cuda, { pipArgs }) : null;
  const include = cudaHeaders(torch.path, torch.cuda, nvcc);
  if (!include) {
    throw new SetupError(
      `no CUDA headers for libtorch ${torch.version} (cuda_runtime_api.h)`,
      `install the CUDA toolkit ${major}.x, or let setup fetch libtorch: unset STROMA_LIBTORCH and leave the virtual environment`,
    );
  }
  const name = `libcudart.so.${major}`;
  const cudart = [
    join(dirname(torch.path), "nvidia", `cu${major}`, "lib", name),
    join(dirname(torch.path), "nvidia", "cuda_runtime", "lib", name),
    join(dirname(include), "lib64", name),
    join(dirname(include), "lib", name),
    join("/usr/local/cuda/lib64", name),
  ].find((path) => existsSync(path));
  if (!cudart) throw new SetupError(`${name} is missing beside ${torch.path}`, "run `npx stroma setup --cuda --force`");
  const args = [`-DSTROMA_CUDA_INCLUDE=${include}`, `-DSTROMA_CUDART=${cudart}`];
  if (nvcc) args.push(`-DCMAKE_CUDA_COMPILER=${nvcc}`, `-DSTROMA_CUDA_ARCHS=${cudaArchitectures().join(";")}`);
  const nccl = ncclHeaders(torch.path);
  if (nccl) args.push(`-DSTROMA_NCCL_INCLUDE=${nccl.join(";")}`);
  return args;
}

/** A build folder that was configured for other paths (moved checkout, other libtorch) is started afresh. */
function isConfiguredFor(folder, args) {
  const file = join(folder, "CMakeCache.txt");
  if (!existsSync(join(folder, "build.ninja")) || !existsSync(file)) return false;
  return stampIs(join(folder, "arguments"), args.join("\n"));
}

/**
 * Builds the addon against `torch` into build/<id>/ and writes its record last. ninja decides what is stale; the hash
 * of the sources decides whether ninja is asked at all.
 */
export async function buildAddon(torch, { cuda = false, force = false, pipArgs = [] } = {}) {
  const id = buildId(torch, cuda);
  const folder = join(root, "build", id);
  if (!force) {
    const record = currentRecord(id);
    if (record && record.libtorch.path === torch.path) return record;
  }
  await requireCompiler();
  const { cmake, ninja } = await findBuildTools({ pipArgs });
  return step(`building the addon (${id})`, async () => {
    const args = cmakeArguments(folder, torch, ninja, cuda ? await cudaArguments(torch, pipArgs) : null);
    if (force || !isConfiguredFor(folder, args)) rmSync(folder, { recursive: true, force: true });
    mkdirSync(folder, { recursive: true });
    const hash = nativeHash(torch); // before the build: what is edited while it runs is stale afterwards
    if (!existsSync(join(folder, "build.ninja"))) {
      await run(cmake, args, { quiet: true });
      writeFileSync(join(folder, "arguments"), args.join("\n"));
    }
    await run(ninja, ["-C", folder, "-j", String(compileJobs())]);
    // Half a gigabyte each, of use only to who compiles again.
    if (!isCheckout())
      for (const name of ["stroma", "stroma_kernels"])
        rmSync(join(folder, "CMakeFiles", `${name}.dir`, "cmake_pch.hxx.gch"), { force: true });
    const record = writeRecord(folder, torch, { makeCurrent: false });
    writeAtomically(join(folder, "stamp"), hash);
    return record;
  });
}

/** Points build/current.json to this build, unless it does already. */
export function makeCurrent(record) {
  const text = readFileSync(join(root, "build", record.id, "build.json"), "utf8");
  const file = join(root, "build", "current.json");
  if (!stampIs(file, text)) writeAtomically(file, text);
}
