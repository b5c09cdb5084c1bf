// Set-up as a whole, for the repository's scripts and for `stroma setup`. Every step looks first whether it is needed.
import { existsSync } from "node:fs";
import { join } from "node:path";
import { ensureDist, ensureNodeModules, ensureOpTypes, isCheckout } from "./checkout.mjs";
import { CPU_VERSION, CUDA_VERSIONS, chooseLibtorch, describe, inspectTorch } from "./libtorch.mjs";
import { buildAddon, buildProbe, currentRecord, hasGpu, makeCurrent, probe } from "./native.mjs";
import { SetupError, say, withLock } from "./process.mjs";
import { cacheDir } from "./python.mjs";
import { root } from "./record.mjs";

export { SetupError };

function checkPlatform() {
  const [major, minor] = process.versions.node.split(".").map(Number);
  if (process.platform !== "linux") {
    throw new SetupError(`${process.platform} is not supported`, "use Linux (on Windows: WSL 2)");
  }
  if (major < 20 || (major === 20 && minor < 19)) {
    throw new SetupError(`Node ${process.versions.node} is too old`, "install Node 20.19 or newer");
  }
}

/** --cuda, --cpu, --force, --pip-args "..." of the scripts; what else there is comes back as `rest`. */
export function parseArguments(argv) {
  const options = { rest: [] };
  for (let i = 0; i < argv.length; i++) {
    const arg = argv[i];
    if (arg === "--cuda") options.cuda = true;
    else if (arg === "--cpu") options.cuda = false;
    else if (arg === "--force") options.force = true;
    else if (arg === "--pip-args") options.pipArgs = splitWords(argv[++i] ?? "");
    else if (arg.startsWith("--pip-args=")) options.pipArgs = splitWords(arg.slice("--pip-args=".length));
    else options.rest.push(arg);
  }
  return options;
}

export function splitWords(text) {
  return text.split(/\s+/).filter(Boolean);
}

/** A finished build of the wanted kind that is current, without asking pip, Python or cmake; null when there is none. */
function findCurrent(cuda, pinned) {
  const named = process.env.STROMA_LIBTORCH;
  if (named) {
    // Another folder than the build's must lead to a build for it, or to an error that names it.
    const candidates = [inspectTorch(join(named, "torch"), { cuda }), inspectTorch(named, { cuda })];
    const torch = candidates.find((candidate) => !candidate.reason);
    const record = torch && currentRecord(`${cuda ? "cuda" : "cpu"}-${torch.version.split("+")[0]}`);
    return record && record.libtorch.path === torch.path ? record : null;
  }
  const versions = cuda ? CUDA_VERSIONS : pinned ? [CPU_VERSION] : [CPU_VERSION, ...CUDA_VERSIONS];
  for (const version of versions) {
    const record = currentRecord(`${cuda ? "cuda" : "cpu"}-${version}`);
    if (record) return record;
  }
  return null;
}

/** What to tell before a build of minutes that the driver here could not run; null: nothing. */
export function driverTooOld(torch, machine) {
  const runs = machine?.driver?.cuda;
  if (!torch.cuda || !runs || Number.parseInt(runs, 10) >= Number.parseInt(torch.cuda, 10)) return null;
  return (
    `the driver here (${machine.driver.version}) runs CUDA ${runs}, and this libtorch is for CUDA ${torch.cuda}: update the driver, or ` +
    `take a libtorch for CUDA ${Number.parseInt(runs, 10)} (STROMA_LIBTORCH=FOLDER, or --pip-args '--index-url URL')`
  );
}

/**
 * Probe, libtorch, addon; makes the build current. cuda undefined: the CUDA build where there is an NVIDIA GPU.
 * forTests: the CPU build of the version that tests compare with; what is current stays so.
 * @param {{cuda?: boolean, force?: boolean, forTests?: boolean, pipArgs?: string[]}} options
 */
export async function setupNative({ cuda, force = false, forTests = false, pipArgs = [] } = {}) {
  const choose = (record) => {
    if (!forTests || !existsSync(join(root, "build", "current.json"))) makeCurrent(record);
    return record;
  };
  checkPlatform();
  return withLock(join(root, "build", ".lock"), async () => {
    await buildProbe({ force });
    const wantsCuda = forTests ? false : (cuda ?? hasGpu());
    const there = force ? null : findCurrent(wantsCuda, forTests);
    if (there) return choose(there);
    const torch = await withLock(join(cacheDir(), ".lock"), () =>
      chooseLibtorch({ cuda: wantsCuda, pinned: forTests, pipArgs }),
    );
    say(`stroma: using ${describe(torch)} in ${torch.path}`);
    const old = driverTooOld(torch, probe());
    if (old) say(`stroma: ${old}`);
    const record = await buildAddon(torch, { cuda: wantsCuda, force, pipArgs });
    return choose(record);
  });
}

/** Everything that a checkout needs to run: node modules, addon, operator types, dist. */
export async function setupCheckout(options = {}) {
  checkPlatform();
  if (!isCheckout()) throw new SetupError(`${root} is no checkout of the repository`, "run `npx stroma setup`");
  await withLock(join(root, "build", ".lock"), () => ensureNodeModules());
  const record = await setupNative(options);
  await withLock(join(root, "build", ".lock"), async () => {
    await ensureOpTypes(record);
    await ensureDist();
  });
  return record;
}
