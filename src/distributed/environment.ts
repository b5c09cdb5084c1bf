/**
 * Which rank this process is, as the launcher that started it says: torchrun's variables (also what `stroma train
 * --ranks` sets for its children, and what a Kubernetes job sets by hand), mpirun's or srun's. A source counts when it is
 * complete; one that is half there is refused, since the run would otherwise train alone, several times over.
 *
 * mpirun goes before srun: across the nodes of a Slurm job it starts its daemons as Slurm tasks, whose variables its own
 * ranks inherit; a rank that srun started itself has no OMPI_COMM_WORLD_RANK.
 */
import { StromaError } from "../errors.js";
import { expandCounts, expandHosts } from "./slurm-lists.js";

export type Launcher = "stroma" | "torchrun" | "slurm" | "openmpi";

export interface RankSpec {
  /** Of all ranks, from 0. */
  rank: number;
  size: number;
  /** Among the ranks of this machine, from 0: also the number of its card. */
  localRank: number;
  localSize: number;
  /** Where the store is that ranks meet at: a host's name or an IP address. */
  address: string;
  port: number;
  /** host: rank 0 serves the store. join: it is served already (torchrun's agent), every rank is a client. */
  store: "host" | "join";
  /** Before every key: keeps attempts of one run apart in a store that outlives them. */
  prefix: string;
  launcher: Launcher;
  /** The machines in the order of the nodes, where the launcher tells. */
  hosts?: readonly string[];
}

export type Environment = Readonly<Record<string, string | undefined>>;

/** Set for the children of `stroma train --ranks`: how often the run was started again. */
export const ATTEMPT = "STROMA_ATTEMPT";

/**
 * Where no port is given and the launcher tells a job's number, the port is one of these, by that number: below the range
 * from which Linux gives ports to outgoing connections (32,768 and up).
 */
export const PORTS = { first: 20_000, count: 10_000 } as const;
/** PyTorch's own, for mpirun without a job's number. */
const DEFAULT_PORT = 29_500;
const MOST_RANKS = 2 ** 20;

/**
 * The rank that `env` describes; null where no launcher started this process, or it started only this one.
 * @throws CONFIG for a source that is half set (naming what is set and what is missing), a value out of its range, or
 * values that contradict each other
 */
export function rankFromEnvironment(env: Environment = process.env): RankSpec | null {
  return torchrun(env) ?? openMpi(env) ?? slurm(env);
}

/** False only for a rank other than 0: one of several that say the same, and that leave stdout to the first. */
export function isFirstRank(env: Environment = process.env): boolean {
  try {
    return (rankFromEnvironment(env)?.rank ?? 0) === 0;
  } catch {
    return true; // whoever needs the rank will say what is wrong
  }
}

const TORCHRUN = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"] as const;

function torchrun(env: Environment): RankSpec | null {
  // The address and port alone are no rank: they may stand there for mpirun or srun, or in a profile.
  if (!TORCHRUN.slice(0, 4).some((name) => has(env, name))) return null;
  const agent = env.TORCHELASTIC_USE_AGENT_STORE === "True";
  complete(env, TORCHRUN, "One rank on each machine: LOCAL_RANK=0 LOCAL_WORLD_SIZE=1. No rank at all: unset them");
  const attempt = has(env, ATTEMPT) ? whole(env, ATTEMPT, 0) : null;
  return checked(env, {
    rank: whole(env, "RANK", 0),
    size: whole(env, "WORLD_SIZE", 1, MOST_RANKS),
    localRank: whole(env, "LOCAL_RANK", 0),
    localSize: whole(env, "LOCAL_WORLD_SIZE", 1, MOST_RANKS),
    address: addressOf(env)!,
    port: portOf(env)!,
    store: agent ? "join" : "host",
    // The agent's store serves several attempts. TORCHELASTIC_RESTART_COUNT does not tell them apart: agents of several
    // machines count their own failures, and differ after the first. Rank 0 begins a generation there instead.
    prefix: agent ? "/stroma" : `/stroma/attempt_${attempt ?? 0}`,
    launcher: attempt === null ? "torchrun" : "stroma",
  });
}

const OPEN_MPI = [
  "OMPI_COMM_WORLD_RANK",
  "OMPI_COMM_WORLD_SIZE",
  "OMPI_COMM_WORLD_LOCAL_RANK",
  "OMPI_COMM_WORLD_LOCAL_SIZE",
] as const;

function openMpi(env: Environment): RankSpec | null {
  if (!OPEN_MPI.some((name) => has(env, name))) return null;
  complete(env, OPEN_MPI, "mpirun sets all of them");
  const [rank, size, localRank, localSize] = [
    whole(env, OPEN_MPI[0], 0),
    whole(env, OPEN_MPI[1], 1, MOST_RANKS),
    whole(env, OPEN_MPI[2], 0),
    whole(env, OPEN_MPI[3], 1, MOST_RANKS),
  ];
  if (size === 1) return null;
  const address = addressOf(env) ?? mpirunHost(env) ?? (localSize === size ? "127.0.0.1" : null);
  if (address === null)
    throw config(
      `mpirun started ${size} ranks on several machines (${localSize} on this one) and does not say where rank 0 is. ` +
        "Add -x MASTER_ADDR=<the host of rank 0>",
    );
  const job = env.PMIX_NAMESPACE || env.OMPI_MCA_ess_base_jobid;
  return checked(env, {
    ...{ rank, size, localRank, localSize, address },
    port: portOf(env) ?? (job ? PORTS.first + (hash(job) % PORTS.count) : DEFAULT_PORT),
    store: "host",
    prefix: "/openmpi",
    launcher: "openmpi",
  });
}

/** The machine on which mpirun runs and, unless a host file leaves it out, rank 0: as Open MPI 4 and PRRTE state it. */
function mpirunHost(env: Environment): string | null {
  const uri = env.OMPI_MCA_orte_hnp_uri || env.PRTE_MCA_prte_hnp_uri || "";
  const [, v4, v6] = /tcp4?:\/\/([\w.-]+)[,:]|tcp6:\/\/\[([0-9a-fA-F:]+)[,\]]/.exec(uri) ?? [];
  return v4 ?? v6 ?? null;
}

const SLURM = ["SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", "SLURM_STEP_ID", "SLURM_JOB_ID"] as const;
/** Older and newer spellings of one thing, the better one last; a step's own go before those of its job. */
const SLURM_NAMES: Readonly<Record<(typeof SLURM)[number], readonly string[]>> = {
  SLURM_PROCID: ["SLURM_PROCID"],
  SLURM_LOCALID: ["SLURM_LOCALID"],
  SLURM_NTASKS: ["SLURM_NPROCS", "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS"],
  SLURM_STEP_ID: ["SLURM_STEPID", "SLURM_STEP_ID"],
  SLURM_JOB_ID: ["SLURM_JOBID", "SLURM_JOB_ID"],
};

function slurm(env: Environment): RankSpec | null {
  const named = Object.fromEntries(SLURM.map((name) => [name, SLURM_NAMES[name].findLast((n) => has(env, n))]));
  // Inside a batch script SLURM_PROCID and SLURM_LOCALID are 0 without a step: nobody started ranks yet.
  const task = named.SLURM_PROCID === undefined ? null : whole(env, named.SLURM_PROCID, 0);
  if (named.SLURM_STEP_ID === undefined && (task ?? 0) === 0) return null;
  const missing = SLURM.filter((name) => named[name] === undefined);
  const set = SLURM.flatMap((name) => named[name] ?? []);
  if (missing.length > 0) {
    if (named.SLURM_PROCID === undefined && named.SLURM_LOCALID === undefined) return null; // a step's id in a profile
    throw halfSet(env, set, missing, "srun sets all of them");
  }
  const size = whole(env, named.SLURM_NTASKS!, 1, MOST_RANKS);
  if (size === 1) return null;
  const [job, step] = [whole(env, named.SLURM_JOB_ID!, 0), whole(env, named.SLURM_STEP_ID!, 0)];
  const nodes = ["SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST"].find((name) => has(env, name));
  const hosts = nodes === undefined ? undefined : expandHosts(env[nodes]!, nodes);
  const address = addressOf(env) ?? hosts?.[0];
  if (address === undefined)
    throw halfSet(env, set, ["SLURM_STEP_NODELIST"], "Or give MASTER_ADDR, the host of rank 0");
  const restarts = has(env, "SLURM_RESTART_COUNT") ? whole(env, "SLURM_RESTART_COUNT", 0) : 0;
  return checked(env, {
    rank: task!,
    size,
    localRank: whole(env, named.SLURM_LOCALID!, 0),
    localSize: tasksOfThisNode(env, size),
    address,
    port: portOf(env) ?? PORTS.first + ((job * 17 + step) % PORTS.count),
    store: "host",
    prefix: `/slurm/${job}.${step}/attempt_${restarts}`,
    launcher: "slurm",
    ...(hosts === undefined ? {} : { hosts }),
  });
}

/** From the list that adds up to the step's tasks, since one of the whole job may stand there too; else the request. */
function tasksOfThisNode(env: Environment, size: number): number {
  const seen: string[] = [];
  for (const name of ["SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE"]) {
    if (!has(env, name)) continue;
    seen.push(`${name}=${env[name]}`);
    const counts = expandCounts(env[name]!, name);
    if (counts.reduce((a, b) => a + b, 0) !== size) continue;
    if (counts.every((count) => count === counts[0])) return counts[0]!;
    if (!has(env, "SLURM_NODEID"))
      throw config(`${name} is ${env[name]}: nodes differ, and SLURM_NODEID, which says which one this is, is missing`);
    const node = whole(env, "SLURM_NODEID", 0);
    if (node >= counts.length)
      throw config(`SLURM_NODEID is ${node}, and ${name} ${env[name]} counts ${counts.length} nodes, from 0`);
    return counts[node]!;
  }
  if (has(env, "SLURM_NTASKS_PER_NODE")) return Math.min(size, whole(env, "SLURM_NTASKS_PER_NODE", 1, MOST_RANKS));
  const found = seen.length === 0 ? "" : ` (${seen.join(" and ")} do not add up to them)`;
  throw config(
    `Slurm does not say how many of the ${size} tasks run on this node${found}. Give srun --ntasks-per-node, or start through torchrun`,
  );
}

function checked(env: Environment, spec: RankSpec): RankSpec {
  const { rank, size, localRank, localSize } = spec;
  const problem =
    rank >= size
      ? `rank ${rank} of ${size}: ranks count from 0 to ${size - 1}`
      : localRank >= localSize
        ? `local rank ${localRank} of ${localSize}: they count from 0 to ${localSize - 1}`
        : localSize > size
          ? `${localSize} ranks on this machine, of ${size} in all`
          : null;
  if (problem === null) return spec;
  const names = Object.keys(env).filter((name) => has(env, name) && PART_OF[spec.launcher].test(name));
  throw config(`${problem}. Set are ${stated(env, names)}`);
}

const PART_OF: Readonly<Record<Launcher, RegExp>> = {
  stroma: /^(?:LOCAL_)?(?:RANK|WORLD_SIZE)$/,
  torchrun: /^(?:LOCAL_)?(?:RANK|WORLD_SIZE)$/,
  slurm: /^SLURM_(?:PROCID|LOCALID|NODEID|NTASKS|NPROCS|STEP_NUM_TASKS|NTASKS_PER_NODE|(?:STEP_)?TASKS_PER_NODE)$/,
  openmpi: /^OMPI_COMM_WORLD_(?:LOCAL_)?(?:RANK|SIZE)$/,
};

/** An empty variable is one that is not set: shells and job scripts leave such behind. */
const has = (env: Environment, name: string): boolean => env[name] !== undefined && env[name] !== "";

function complete(env: Environment, names: readonly string[], cure: string): void {
  const missing = names.filter((name) => !has(env, name));
  if (missing.length === 0) return;
  throw halfSet(
    env,
    names.filter((name) => has(env, name)),
    missing,
    cure,
  );
}

function halfSet(env: Environment, set: readonly string[], missing: readonly string[], cure: string): StromaError {
  return new StromaError(
    "CONFIG",
    `[distributed] the environment names a rank only in part: set ${set.length === 1 ? "is" : "are"} ${stated(env, set)}; missing ${missing.length === 1 ? "is" : "are"} ${missing.join(", ")}. ${cure}`,
    { set, missing },
  );
}

const stated = (env: Environment, names: readonly string[]): string =>
  names.map((name) => `${name}=${short(env[name]!)}`).join(", ");

const short = (text: string): string =>
  JSON.stringify(text.length > 40 ? `${text.slice(0, 37)}...` : text).slice(1, -1);

function whole(env: Environment, name: string, least: number, most = Number.MAX_SAFE_INTEGER): number {
  const text = env[name]!;
  const value = /^\d{1,16}$/.test(text) ? Number(text) : Number.NaN;
  if (value >= least && value <= most) return value;
  const range = most === Number.MAX_SAFE_INTEGER ? `of at least ${least}` : `from ${least} to ${most}`;
  throw new StromaError("CONFIG", `[distributed] expected a whole number ${range}, got "${short(text)}", at ${name}`, {
    name,
    value: text,
  });
}

function addressOf(env: Environment): string | null {
  if (!has(env, "MASTER_ADDR")) return null;
  const text = env.MASTER_ADDR!;
  if (/^[\w.:%-]{1,253}$/.test(text)) return text;
  throw new StromaError(
    "CONFIG",
    `[distributed] expected a host's name or an IP address, got "${short(text)}", at MASTER_ADDR`,
    { name: "MASTER_ADDR", value: text },
  );
}

const portOf = (env: Environment): number | null =>
  has(env, "MASTER_PORT") ? whole(env, "MASTER_PORT", 1, 65_535) : null;

/** FNV-1a: the same for every rank of a job. */
function hash(text: string): number {
  let h = 0x811c9dc5;
  for (const byte of Buffer.from(text)) h = Math.imul(h ^ byte, 0x01000193) >>> 0;
  return h;
}

const config = (message: string): StromaError => new StromaError("CONFIG", `[distributed] ${message}`);
