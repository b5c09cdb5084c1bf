import { spawn } from "node:child_process";
import { existsSync, mkdirSync, mkdtempSync, readdirSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { pathToFileURL } from "node:url";
import { afterEach, beforeEach, describe, expect, it, vi } from "vitest";
import { packageRoot } from "../../src/native.js";

// The scripts run before node_modules exist and are plain JavaScript: imported by URL, without types.
const library = (name: string) => import(pathToFileURL(join(packageRoot, "scripts/lib", `${name}.mjs`)).href);
const { fillFolder, cacheDir } = await library("python");
const { hashTree, stampIs } = await library("hash");
const { withLock } = await library("process");
const { chooseLibtorch, cudaRequirements, inspectTorch } = await library("libtorch");
const { parseArguments } = await library("setup");
const { readTorchVersion } = await library("record");
const { cudaArchitectures } = await library("native");

let folder: string;
beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), "stroma-setup-"));
});
afterEach(() => {
  vi.unstubAllEnvs();
  rmSync(folder, { recursive: true, force: true });
});

/** A torch folder as the wheel lays it, with empty libraries. */
function fakeTorch(at: string, version: string, { headers = true, cuda = null as string | null } = {}): string {
  const path = join(at, "torch");
  mkdirSync(join(path, "lib"), { recursive: true });
  writeFileSync(join(path, "lib", "libtorch_cpu.so"), "");
  if (cuda) writeFileSync(join(path, "lib", "libtorch_cuda.so"), "");
  if (headers) {
    mkdirSync(join(path, "include/ATen/core/dispatch"), { recursive: true });
    writeFileSync(join(path, "include/ATen/core/dispatch/Dispatcher.h"), "");
  }
  const quoted = cuda ? `'${cuda}'` : "None";
  writeFileSync(
    join(path, "version.py"),
    `__version__ = '${version}'\ndebug = False\ncuda: Optional[str] = ${quoted}\n`,
  );
  return path;
}

describe("a folder that is filled", () => {
  it("appears only when it is whole", async () => {
    const final = join(folder, "thing");
    const seen: boolean[] = [];
    await fillFolder(final, async (partial: string) => {
      writeFileSync(join(partial, "a"), "1");
      seen.push(existsSync(final));
    });
    expect(seen).toEqual([false]);
    expect(readdirSync(final)).toEqual(["a"]);
  });

  it("leaves nothing when the filling fails", async () => {
    const filling = fillFolder(join(folder, "thing"), async (partial: string) => {
      writeFileSync(join(partial, "half"), "");
      throw new Error("the connection broke");
    });
    await expect(filling).rejects.toThrow("the connection broke");
    expect(readdirSync(folder)).toEqual([]);
  });

  it("removes what a killed try left behind, and keeps what is whole", async () => {
    mkdirSync(join(folder, ".partial-killed"));
    mkdirSync(join(folder, "other"));
    await fillFolder(join(folder, "thing"), async () => {});
    expect(readdirSync(folder).sort()).toEqual(["other", "thing"]);
  });
});

describe("the lock", () => {
  it("lets one in after the other", async () => {
    const order: string[] = [];
    const work = (name: string) => async () => {
      order.push(`${name} in`);
      await new Promise((resolve) => setTimeout(resolve, 50));
      order.push(`${name} out`);
    };
    await Promise.all([withLock(join(folder, "lock"), work("a")), withLock(join(folder, "lock"), work("b"))]);
    const [first, second] = order[0] === "a in" ? ["a", "b"] : ["b", "a"];
    expect(order).toEqual([`${first} in`, `${first} out`, `${second} in`, `${second} out`]);
  });

  it("is free again when its holder is killed", async () => {
    const module = pathToFileURL(join(packageRoot, "scripts/lib/process.mjs")).href;
    const code = `import { withLock } from ${JSON.stringify(module)};
      await withLock(${JSON.stringify(join(folder, "lock"))}, async () => { console.log("held"); await new Promise(() => setInterval(() => {}, 1e6)); });`;
    const holder = spawn(process.execPath, ["--input-type=module", "-e", code], {
      stdio: ["ignore", "pipe", "inherit"],
    });
    await new Promise((resolve) => holder.stdout.once("data", resolve));
    holder.kill("SIGKILL");
    expect(await withLock(join(folder, "lock"), async () => "entered")).toBe("entered");
  });
});

describe("the hash of sources", () => {
  it("changes with a byte, a name and a fact, and not with time", () => {
    mkdirSync(join(folder, "src"));
    writeFileSync(join(folder, "src", "a.cc"), "int a;");
    const first = hashTree(folder, ["src"], ["2.13.0"]);
    writeFileSync(join(folder, "src", "a.cc"), "int b;");
    expect(hashTree(folder, ["src"], ["2.13.0"])).not.toBe(first);
    writeFileSync(join(folder, "src", "a.cc"), "int a;");
    expect(hashTree(folder, ["src"], ["2.13.0"])).toBe(first);
    expect(hashTree(folder, ["src"], ["2.14.0"])).not.toBe(first);
    rmSync(join(folder, "src", "a.cc"));
    writeFileSync(join(folder, "src", "b.cc"), "int a;");
    expect(hashTree(folder, ["src"], ["2.13.0"])).not.toBe(first);
  });

  it("takes a stamp that is missing or of another text for stale", () => {
    expect(stampIs(join(folder, "stamp"), "x")).toBe(false);
    writeFileSync(join(folder, "stamp"), "x");
    expect(stampIs(join(folder, "stamp"), "x")).toBe(true);
    expect(stampIs(join(folder, "stamp"), "xy")).toBe(false);
  });
});

describe("the choice of libtorch", () => {
  it("reads version and CUDA version without loading anything", () => {
    expect(readTorchVersion(fakeTorch(folder, "2.15.0+cu132", { cuda: "13.2" }))).toMatchObject({
      version: "2.15.0+cu132",
      cuda: "13.2",
    });
    expect(readTorchVersion(join(folder, "nothing"))).toBeNull();
  });

  it("passes over one that is too old, that has no headers, or that is a CPU build where CUDA is wanted", () => {
    expect(inspectTorch(fakeTorch(join(folder, "a"), "2.9.1")).reason).toContain("older than 2.11");
    expect(inspectTorch(fakeTorch(join(folder, "b"), "2.13.0", { headers: false })).reason).toContain("headers");
    expect(inspectTorch(fakeTorch(join(folder, "c"), "2.13.0"), { cuda: true }).reason).toContain("CPU build");
    expect(inspectTorch(fakeTorch(join(folder, "d"), "2.11.0")).reason).toBeUndefined();
  });

  it("takes STROMA_LIBTORCH first, as the torch folder or the one around it", async () => {
    vi.stubEnv("STROMA_CACHE", join(folder, "cache"));
    const path = fakeTorch(folder, "2.14.1");
    for (const named of [path, folder]) {
      vi.stubEnv("STROMA_LIBTORCH", named);
      expect(await chooseLibtorch({ cuda: false, fetch: false })).toMatchObject({ version: "2.14.1", path });
    }
  });

  it("refuses an unusable STROMA_LIBTORCH instead of passing over it", async () => {
    vi.stubEnv("STROMA_LIBTORCH", fakeTorch(folder, "2.1.0"));
    await expect(chooseLibtorch({ cuda: false, fetch: false })).rejects.toThrow(/STROMA_LIBTORCH.*2\.1\.0.*older/);
  });

  it("takes from the cache the CPU build that tests compare with, and a CUDA build only with its libraries", async () => {
    vi.stubEnv("STROMA_CACHE", folder);
    vi.stubEnv("STROMA_LIBTORCH", "");
    vi.stubEnv("PATH", join(folder, "empty")); // no Python: its torch is not asked
    vi.stubEnv("VIRTUAL_ENV", "");
    vi.stubEnv("CONDA_PREFIX", "");
    const cached = join(folder, "libtorch");
    fakeTorch(join(cached, "2.12.1+cpu"), "2.12.1+cpu");
    expect(await chooseLibtorch({ cuda: false, fetch: false })).toBeNull();
    fakeTorch(join(cached, "2.13.0+cpu"), "2.13.0+cpu");
    expect(await chooseLibtorch({ cuda: false, fetch: false })).toMatchObject({ version: "2.13.0+cpu" });
    fakeTorch(join(cached, "2.15.0+cu132"), "2.15.0+cu132", { cuda: "13.2" });
    expect(await chooseLibtorch({ cuda: true, fetch: false })).toBeNull();
    mkdirSync(join(cached, "2.15.0+cu132", "nvidia"));
    expect(await chooseLibtorch({ cuda: true, fetch: false })).toMatchObject({ version: "2.15.0+cu132" });
  });

  it("passes over a cached one with a library shorter than its wheel recorded", async () => {
    vi.stubEnv("STROMA_CACHE", folder);
    vi.stubEnv("STROMA_LIBTORCH", "");
    vi.stubEnv("PATH", join(folder, "empty"));
    vi.stubEnv("VIRTUAL_ENV", "");
    vi.stubEnv("CONDA_PREFIX", "");
    const site = join(folder, "libtorch", "2.13.0+cpu");
    fakeTorch(site, "2.13.0+cpu");
    mkdirSync(join(site, "torch-2.13.0+cpu.dist-info"));
    writeFileSync(join(site, "torch-2.13.0+cpu.dist-info", "RECORD"), "torch/lib/libtorch_cpu.so,sha256=x,400000000\n");
    expect(await chooseLibtorch({ cuda: false, fetch: false })).toBeNull();
  });

  it("fetches of a CUDA wheel's needs NVIDIA's libraries alone", () => {
    const metadata = [
      "Name: torch",
      "Requires-Dist: sympy>=1.13.3",
      'Requires-Dist: cuda-toolkit[cublas,cudart]==13.2.2; platform_system == "Linux"',
      'Requires-Dist: nvidia-nccl-cu13==2.30.7; platform_system == "Linux"',
      'Requires-Dist: triton~=3.9.0; platform_system == "Linux"',
      'Requires-Dist: nvidia-extra==1; extra == "all"',
    ].join("\n");
    expect(cudaRequirements(metadata)).toEqual([
      'cuda-toolkit[cublas,cudart]==13.2.2; platform_system == "Linux"',
      'nvidia-nccl-cu13==2.30.7; platform_system == "Linux"',
    ]);
  });
});

describe("settings", () => {
  it("put the cache under XDG_CACHE_HOME unless STROMA_CACHE names one", () => {
    vi.stubEnv("STROMA_CACHE", "");
    vi.stubEnv("XDG_CACHE_HOME", folder);
    expect(cacheDir()).toBe(join(folder, "stromatolite"));
    vi.stubEnv("STROMA_CACHE", join(folder, "own"));
    expect(cacheDir()).toBe(join(folder, "own"));
  });

  it("split pip's words and keep what is not theirs", () => {
    expect(parseArguments(["--cuda", "--pip-args", "--index-url x", "-t"])).toEqual({
      cuda: true,
      pipArgs: ["--index-url", "x"],
      rest: ["-t"],
    });
    expect(parseArguments(["--pip-args=--pre", "--cpu", "--force"])).toEqual({
      cuda: false,
      force: true,
      pipArgs: ["--pre"],
      rest: [],
    });
  });
});

describe("a set-up that ends early", () => {
  const module = JSON.stringify(pathToFileURL(join(packageRoot, "scripts/lib/process.mjs")).href);
  const start = (lock: string, seconds: string) => {
    const code = `import { run, withLock } from ${module};
      await withLock(${JSON.stringify(lock)}, () => run("sh", ["-c", "trap 'kill $!; sleep 0.3; echo cleaned; exit 1' TERM; sleep ${seconds} >&- 2>&- & echo started >&2; wait"]));`;
    const child = spawn(process.execPath, ["--input-type=module", "-e", code], { stdio: ["ignore", "ignore", "pipe"] });
    let said = "";
    const started = new Promise<void>((resolve) => {
      child.stderr.setEncoding("utf8").on("data", (text: string) => {
        said += text;
        if (said.includes("started")) resolve();
      });
    });
    const ended = new Promise<number | null>((resolve) => child.on("close", resolve));
    return { child, started, ended, said: () => said };
  };

  it("waits, when interrupted, for the program that it runs, and only then lets its lock go", async () => {
    const { child, started, ended, said } = start(join(folder, "lock"), "60");
    await started;
    child.kill("SIGINT");
    expect(await ended).toBe(130);
    expect(said()).toContain("cleaned");
  });

  it("ends at once when it is interrupted again, a moment later", async () => {
    const code = `import { run } from ${module}; await run("sh", ["-c", "trap '' TERM; echo started >&2; sleep 60 >&- 2>&-; sleep 60"]);`;
    const child = spawn(process.execPath, ["--input-type=module", "-e", code], { stdio: ["ignore", "ignore", "pipe"] });
    await new Promise<void>((resolve) =>
      child.stderr.on("data", (text) => String(text).includes("started") && resolve()),
    );
    const ended = new Promise<number | null>((resolve) => child.on("exit", resolve));
    const begun = Date.now();
    child.kill("SIGINT");
    child.kill("SIGINT"); // npm's echo of the same press
    await new Promise((resolve) => setTimeout(resolve, 600));
    expect(child.exitCode).toBe(null);
    child.kill("SIGINT");
    expect(await ended).toBe(130);
    expect(Date.now() - begun).toBeLessThan(8_000);
  });

  it("leaves its lock, when killed outright, to the program that still runs", async () => {
    const { child, started } = start(join(folder, "lock"), "1");
    await started;
    child.kill("SIGKILL");
    const still = spawn("flock", ["-n", join(folder, "lock"), "true"]);
    expect(await new Promise((resolve) => still.on("close", resolve))).toBe(1);
    expect(await withLock(join(folder, "lock"), async () => "entered")).toBe("entered");
  });
});

describe("a driver that is older than the libtorch", () => {
  it.each<[string | null, string | null, boolean]>([
    ["13.0", "12.4", true],
    ["13.0", "13.0", false],
    ["12.8", "13.0", false],
    [null, "12.4", false],
    ["13.0", null, false],
  ])("libtorch for CUDA %s, driver for %s: told %s", async (cuda, runs, told) => {
    const { driverTooOld } = await library("setup");
    const machine = runs === null ? { driver: null } : { driver: { version: "550.1", cuda: runs } };
    const text = driverTooOld({ version: "2.14.1", cuda, path: "/x" }, machine);
    expect(text !== null).toBe(told);
    if (told) expect(text).toMatch(/550\.1.*CUDA 12\.4.*CUDA 13\.0.*STROMA_LIBTORCH/);
    expect(driverTooOld({ version: "2.14.1", cuda, path: "/x" }, null)).toBeNull();
  });
});

describe("the architectures that CUDA kernels are compiled for", () => {
  const cards = [{ computeCapability: "9.0" }, { computeCapability: "8.6" }, { computeCapability: "8.6" }];

  it("are those of the cards, once each", () => {
    expect(cudaArchitectures("", cards)).toEqual(["86", "90"]);
  });

  it("are all where there is no card, or none that says what it is", () => {
    expect(cudaArchitectures("", [])).toEqual([]);
    expect(cudaArchitectures("", [{ computeCapability: "" }, { computeCapability: "7.5" }])).toEqual([]);
  });

  it("are what STROMA_CUDA_ARCHS names, whatever the cards", () => {
    expect(cudaArchitectures("8.0, 12.0;89", cards)).toEqual(["80", "89", "120"]);
  });

  it("are refused where a word is none", () => {
    expect(() => cudaArchitectures("8.0 ampere", cards)).toThrow('"ampere" is no compute capability');
    expect(() => cudaArchitectures("8.6 7.5", cards)).toThrow("for 8.0 and later, not 7.5");
  });
});
