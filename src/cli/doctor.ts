/**
 * `stroma doctor`: the chain from Node to a training step, link by link. What could crash runs in a child process
 * (doctor-child.ts), so that a segmentation fault is one failed check with its name.
 */
import { spawn } from "node:child_process";
import { existsSync } from "node:fs";
import { cpus } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import type { CommandModule } from "yargs";
import { type Device, machineFacts, visibleCards } from "../device.js";
import { StromaError } from "../errors.js";
import {
  type BuildRecord,
  checkBuild,
  type ProbeReport,
  packageRoot,
  probeMachine,
  readBuildRecord,
} from "../native.js";
import type { MachineProfile } from "../plan/profiles.js";

/** One link. `ok` is false exactly where it keeps this machine from training; a cure may be worth reading all the same. */
export interface Check {
  name: string;
  ok: boolean;
  detail: string;
  cure: string | null;
}

export interface DoctorDevice {
  device: Device;
  name: string;
  memoryBytes: number;
  /** Can the build in use train on it? */
  usable: boolean;
}

export interface DoctorReport {
  ok: boolean;
  checks: Check[];
  libtorch: BuildRecord["libtorch"] | null;
  devices: DoctorDevice[];
}

/** The links that the child tries, in order. */
const CHILD_LINKS = ["addon", "operator", "openmp", "gpu", "nccl", "training step"] as const;
export type ChildLink = (typeof CHILD_LINKS)[number];

/** Without a CUDA build there is no word of NCCL. */
export const childLinks = (cuda: string | null): readonly ChildLink[] =>
  CHILD_LINKS.filter((name) => name !== "nccl" || cuda !== null);

/** A line of the child: a link begins, or ends with its result. */
export type ChildLine = { begin: ChildLink } | ({ end: ChildLink; cudaDevices?: number } & Omit<Check, "name">);

const SETUP = "npx stroma setup";

export const doctorCommand: CommandModule<object, { json?: boolean; measure?: boolean }> = {
  command: "doctor",
  describe: "Try the whole chain link by link, and name the cure of each that fails",
  builder: (yargs) =>
    yargs.options({
      json: { type: "boolean", describe: "One JSON object instead of a table" },
      measure: {
        type: "boolean",
        describe:
          "Also time processors, memory and disk (a minute), and each kind of card (half a minute), and keep the results for plans",
      },
    }),
  handler: async (args) => {
    const report = await runDoctor();
    const measured = args.measure && report.ok ? await measure(report) : null;
    const text = table(report) + (measured ?? []).map(measuredText).join("");
    const [processors, ...cards] = measured ?? [];
    const said = { ...report, ...(processors && { measured: processors, measuredCards: cards }) };
    process.stdout.write(args.json ? `${JSON.stringify(said)}\n` : text);
    process.exitCode = report.ok ? 0 : 3;
  },
};

/** Of the processors, then of one card of each name that can be used. */
async function measure({ devices }: DoctorReport): Promise<MachineProfile[]> {
  const { measureMachine } = await import("../plan/measure.js");
  const { measureCard } = await import("../plan/measure-card.js");
  const cards = devices.filter(({ device, usable }) => device !== "cpu" && usable);
  const kinds = [...new Map(cards.toReversed().map((card) => [card.name, card])).values()];
  return [measureMachine(), ...kinds.map(({ device, name }) => measureCard(device, name))];
}

export async function runDoctor(options: { child?: string } = {}): Promise<DoctorReport> {
  const checks: Check[] = [];
  const machine = probeOrNull(checks);
  checks.push(nodeCheck(), glibcCheck(), packageCheck());
  const build = buildChecks(checks);
  const { links, cudaDevices } = await childChecks(build, options.child);
  checks.push(...links, memoryCheck(machine));
  return {
    ok: checks.every((check) => check.ok),
    checks,
    libtorch: build.record?.libtorch ?? null,
    devices: devices(
      machine,
      build.record,
      links.find((link) => link.name === "training step")?.ok ?? false,
      cudaDevices,
    ),
  };
}

function nodeCheck(): Check {
  const [major = 0, minor = 0] = process.versions.node.split(".").map(Number);
  const ok = process.platform === "linux" && (major > 20 || (major === 20 && minor >= 19));
  return {
    name: "node",
    ok,
    detail: `Node ${process.versions.node}, ${process.platform} ${process.arch}, N-API ${process.versions.napi}`,
    cure: ok ? null : "use Node 20.19 or newer on Linux",
  };
}

/** The wheels of libtorch are built against glibc 2.28. */
function glibcCheck(): Check {
  const header = (process.report?.getReport() as { header?: { glibcVersionRuntime?: string } } | undefined)?.header;
  const version = header?.glibcVersionRuntime;
  const [major = 0, minor = 0] = (version ?? "").split(".").map(Number);
  const ok = major > 2 || (major === 2 && minor >= 28);
  return {
    name: "glibc",
    ok,
    detail: version ? `glibc ${version}` : "no glibc (a musl system?)",
    cure: ok ? null : "use a system with glibc 2.28 or newer (Debian 10, Ubuntu 20.04, RHEL 8, and later)",
  };
}

function packageCheck(): Check {
  const dist = existsSync(join(packageRoot, "dist", "cli", "main.js"));
  return {
    name: "dist",
    ok: true,
    detail: dist ? `compiled in ${join(packageRoot, "dist")}` : "running from src; dist has not been compiled",
    cure: dist ? null : "node scripts/setup.mjs",
  };
}

function probeOrNull(checks: Check[]): ProbeReport | null {
  let report: ProbeReport | null = null;
  let detail: string;
  try {
    report = probeMachine();
    const flags = Object.entries(report?.cpuFlags ?? {}).filter(([, there]) => there);
    detail = report
      ? `${report.cpus.affinity} processors (${flags.map(([name]) => name).join(", ") || "no wide vectors"}); ` +
        (report.gpus.length > 0 ? `${report.gpus.length} GPU` : `no GPU: ${report.nvmlError}`)
      : "not built";
  } catch (error) {
    detail = `does not load: ${(error as Error).message.split("\n")[0]}`;
  }
  // Training works without it; what the machine is then remains unsaid.
  checks.push({ name: "probe", ok: true, detail, cure: report ? null : SETUP });
  return report;
}

interface Build {
  record: BuildRecord | null;
  usable: boolean;
}

function buildChecks(checks: Check[]): Build {
  let record: BuildRecord;
  try {
    record = readBuildRecord();
    checks.push({ name: "build", ok: true, detail: `${record.id} (${record.addon})`, cure: null });
  } catch (error) {
    checks.push(failed("build", error));
    checks.push({ name: "libtorch", ok: false, detail: "not tried: there is no build", cure: SETUP });
    return { record: null, usable: false };
  }
  const { version, path, cuda } = record.libtorch;
  try {
    checkBuild(record);
    checks.push({
      name: "libtorch",
      ok: true,
      detail: `${version}, ${cuda ? `CUDA ${cuda}` : "CPU"}, in ${path}, the minor that the addon was built for`,
      cure: null,
    });
    return { record, usable: true };
  } catch (error) {
    checks.push(failed("libtorch", error));
    return { record, usable: false };
  }
}

function failed(name: string, error: unknown): Check {
  const cure = error instanceof StromaError ? String(error.details.cure ?? SETUP) : SETUP;
  return { name, ok: false, detail: (error as Error).message, cure };
}

async function childChecks(build: Build, child?: string): Promise<{ links: Check[]; cudaDevices: number }> {
  const notTried = (name: string, reason: string): Check => ({
    name,
    ok: false,
    detail: `not tried: ${reason}`,
    cure: SETUP,
  });
  const expected = childLinks(build.record?.libtorch.cuda ?? null);
  if (!build.usable) {
    return { links: expected.map((name) => notTried(name, "the build is missing or does not fit")), cudaDevices: 0 };
  }
  const { lines, ending, stderr } = await runChild(child);
  const links: Check[] = [];
  let begun: ChildLink | undefined;
  let cudaDevices = 0;
  for (const line of lines) {
    if ("begin" in line) {
      begun = line.begin;
      continue;
    }
    links.push({ name: line.end, ok: line.ok, detail: line.detail, cure: line.cure });
    cudaDevices = line.cudaDevices ?? cudaDevices;
    begun = undefined;
  }
  if (begun) {
    const said = stderr.trim().split("\n").at(-1);
    links.push({
      name: begun,
      ok: false,
      detail: `the process ended with ${ending} in this link${said ? `: ${said}` : ""}`,
      cure: `${SETUP} --force; if it stays, this report and the output of STROMA_DEBUG=1 make a good bug report`,
    });
  }
  const last = links.at(-1)?.name ?? "start of the child process";
  for (const name of expected.slice(links.length)) links.push(notTried(name, `"${last}" failed`));
  return { links, cudaDevices };
}

async function runChild(child?: string): Promise<{ lines: ChildLine[]; ending: string; stderr: string }> {
  const fromSource = import.meta.url.endsWith(".ts");
  const file = child ?? fileURLToPath(new URL(fromSource ? "doctor-child.ts" : "doctor-child.js", import.meta.url));
  const args = file.endsWith(".ts") ? ["--import", "tsx", file] : [file];
  const running = spawn(process.execPath, args, { stdio: ["ignore", "pipe", "pipe"], cwd: packageRoot });
  let stdout = "";
  let stderr = "";
  running.stdout.setEncoding("utf8").on("data", (text: string) => {
    stdout += text;
  });
  running.stderr.setEncoding("utf8").on("data", (text: string) => {
    stderr += text;
  });
  const timer = setTimeout(() => running.kill("SIGKILL"), 120_000);
  const ending = await new Promise<string>((resolve, reject) => {
    running.on("error", reject);
    running.on("close", (code, signal) => resolve(signal ?? `status ${code}`));
  });
  clearTimeout(timer);
  const lines = stdout.split("\n").flatMap((text) => {
    try {
      return text.startsWith("{") ? [JSON.parse(text) as ChildLine] : [];
    } catch {
      return []; // a line that a crash cut short
    }
  });
  return { lines, ending, stderr };
}

const GIB = 1024 ** 3;

function memoryCheck(machine: ProbeReport | null): Check {
  if (!machine) return { name: "memory", ok: true, detail: "unknown: the probe is not built", cure: SETUP };
  const { memory, memlock, cpus: limits } = machine;
  const limit =
    memory.cgroupBytes === null ? "" : `, this container may use ${(memory.cgroupBytes / GIB).toFixed(1)} GiB`;
  const quota = limits.cgroup === null ? "" : `, ${limits.cgroup} processors' time`;
  const locked = memlock.softBytes === null ? "unlimited" : `${(memlock.softBytes / GIB).toFixed(3)} GiB`;
  // CUDA pins memory through its driver, which this limit does not bind on most systems: said, not failed.
  return {
    name: "memory",
    ok: true,
    detail: `${(memory.totalBytes / GIB).toFixed(1)} GiB, ${(memory.availableBytes / GIB).toFixed(1)} available${limit}${quota}; lockable: ${locked}`,
    cure: null,
  };
}

function devices(machine: ProbeReport | null, record: BuildRecord | null, trains: boolean, cudaDevices: number) {
  const memoryBytes = Math.min(machine?.memory.totalBytes ?? 0, machine?.memory.cgroupBytes ?? Number.MAX_SAFE_INTEGER);
  const found: DoctorDevice[] = [
    { device: "cpu", name: cpus()[0]?.model.trim() ?? process.arch, memoryBytes, usable: trains },
  ];
  const { visible } = machineFacts();
  for (const [n, card] of visibleCards({ probe: machine, build: record?.libtorch ?? null, visible }).entries()) {
    found.push({
      device: card.device,
      name: card.name ?? "a card",
      memoryBytes: card.memoryBytes ?? 0,
      usable: trains && record?.libtorch.cuda != null && card.unusable === null && n < cudaDevices,
    });
  }
  return found;
}

function measuredText(profile: MachineProfile): string {
  const { gemm, deviceMemory, hostToDevice, deviceToHost, diskRead, diskWrite, threads } = profile;
  const card = profile.device === "cuda";
  const rate = (n: number) => (n / 1e9).toPrecision(3);
  const products = Object.entries(gemm).map(([dtype, { flops }]) => `${dtype} ${rate(flops)}`);
  return (
    `\nMeasured ${card ? profile.name : `with ${threads} threads`}: products ${products.join(", ")} GFLOP/s; memory ${rate(deviceMemory)} GB/s; ` +
    (card
      ? `to the card ${rate(hostToDevice)} GB/s, from it ${rate(deviceToHost)}; a kernel begins in ${(profile.operatorSeconds * 1e6).toPrecision(2)} us; `
      : "") +
    `disk ${rate(diskRead)} GB/s read, ${rate(diskWrite)} written. Plans use it.\n`
  );
}

function table(report: DoctorReport): string {
  const lines = report.checks.flatMap(({ name, ok, detail, cure }) => [
    `${ok ? "ok  " : "FAIL"}  ${name.padEnd(14)} ${detail}`,
    ...(cure === null ? [] : [`      ${"".padEnd(14)} -> ${cure}`]),
  ]);
  const names = report.devices.filter(({ usable }) => usable).map(({ device, name }) => `${device} (${name})`);
  lines.push("", report.ok ? `Training works here, on ${names.join(", ")}.` : "Training does not work here yet.");
  return `${lines.join("\n")}\n`;
}
