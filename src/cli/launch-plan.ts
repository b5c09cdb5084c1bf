/** Whether this process trains alone, starts ranks, or is one: from the flags, the environment and the machine. */
import {
  ATTEMPT,
  type Environment,
  type Launcher,
  type RankSpec,
  rankFromEnvironment,
} from "../distributed/environment.js";
import { StromaError } from "../errors.js";
import { type ProbeReport, probeMachine } from "../native.js";
import { DEFAULT_RANK_TIMEOUT, type TrainFlags } from "./options.js";

type Card = `cuda:${number}`;

export type DistributedPlan =
  | { mode: "single"; device?: Card }
  | { mode: "launch"; ranks: number }
  /** `timeoutSeconds`: of silence, after which a rank counts as lost. */
  | { mode: "rank"; spec: RankSpec; device?: Card; timeoutSeconds: number };

export type RankFlags = Pick<
  TrainFlags,
  "ranks" | "gpus" | "distributed" | "restart" | "rankTimeout" | "transport" | "device"
>;

/**
 * @param cards how many this process may use
 * @throws CONFIG where flags contradict each other, the environment or the machine, the arithmetic shown; what
 * rankFromEnvironment() throws; NOT_SET_UP where cards are asked for and nothing can count them
 */
export function distributedPlan(
  flags: RankFlags,
  env: Environment = process.env,
  cards: () => number = () => countCards(env),
): DistributedPlan {
  const { ranks, gpus, device, restart = 0, rankTimeout, transport } = flags;
  const onCards = gpus !== undefined || flags.distributed === true;
  const asked = gpus !== undefined ? `--gpus ${gpus}` : "--distributed";
  if (onCards && device !== undefined)
    throw config(`${asked} trains on cards, and --device ${device} is given: leave one out`);

  const spec = rankFromEnvironment(env);
  if (spec !== null) {
    const { rank, size, localSize, launcher } = spec;
    const by = BY[launcher];
    if (ranks !== undefined && ranks !== size)
      throw config(
        `--ranks ${ranks} asks for ${ranks} ranks, and ${by} started ${size} (this is rank ${rank}): ${ranks} is not ${size}. Leave --ranks out`,
      );
    if (gpus !== undefined && gpus !== localSize)
      throw config(
        `--gpus ${gpus} asks for ${gpus} ranks on this machine, and ${by} started ${localSize} here (${size} in all): ${gpus} is not ${localSize}. Leave --gpus out, or say --distributed`,
      );
    if (restart > 0 && launcher !== "stroma")
      throw config(`--restart ${restart} is for ranks that stroma starts; ${by} started these. ${RESTARTS[launcher]}`);
    return {
      mode: "rank",
      spec,
      ...(onCards ? { device: cardOf(spec, asked, cards()) } : {}),
      timeoutSeconds: rankTimeout ?? DEFAULT_RANK_TIMEOUT,
    };
  }

  const available = onCards ? cards() : 0;
  const wanted = onCards ? (gpus ?? available) : (ranks ?? 1);
  if (onCards && available === 0)
    throw config(`${asked}: no card of this machine can be used (npx stroma doctor tells). On processors: --ranks N`);
  if (onCards && wanted > available)
    throw config(
      `${asked}: this machine has ${available} ${plural(available, "card")} to use, and ${wanted} > ${available}`,
    );
  if (onCards && ranks !== undefined && ranks !== wanted)
    throw config(
      `--ranks ${ranks} and ${asked}: one rank a card makes ${wanted}, and ${ranks} is not ${wanted}. Leave --ranks out`,
    );
  // A launcher started this one process, to start it again after a failure.
  const launched = env[ATTEMPT] !== undefined && env[ATTEMPT] !== "";
  if (wanted === 1 && rankTimeout !== undefined)
    throw config(`--rank-timeout ${rankTimeout} is for a run over several ranks, and this is one alone: leave it out`);
  if (wanted === 1 && transport !== undefined)
    throw config(`--transport ${transport} is how several ranks exchange, and this is one alone: leave it out`);
  if (wanted === 1 && (restart === 0 || launched)) return { mode: "single", ...(onCards ? { device: "cuda:0" } : {}) };
  return { mode: "launch", ranks: wanted };
}

/** The rank's own card; the only one, where the launcher shows each rank one alone. */
function cardOf({ localRank, localSize }: RankSpec, asked: string, available: number): Card {
  if (available >= localSize) return `cuda:${localRank}`;
  if (available === 1) return "cuda:0";
  throw config(
    `${asked}: ${localSize} ranks were started on this machine, which has ${available} ${plural(available, "card")} to use: ${localSize} > ${available}`,
  );
}

/**
 * Cards that this process may use: those of the machine, as far as CUDA_VISIBLE_DEVICES shows them.
 * @throws NOT_SET_UP where the probe that asks the driver is not built
 */
export function countCards(env: Environment = process.env, machine: ProbeReport | null = probeMachine()): number {
  if (machine === null)
    throw new StromaError(
      "NOT_SET_UP",
      "[cli] nothing can count the cards of this machine yet. Run `npx stroma setup`",
    );
  const visible = env.CUDA_VISIBLE_DEVICES;
  if (visible === undefined) return machine.gpus.length;
  // CUDA takes the list up to the first entry that names no card; names (GPU-…, MIG-…) are taken on trust.
  const listed = visible.split(",").map((entry) => entry.trim());
  const end = listed.findIndex(
    (entry) => !(/^(?:GPU|MIG)-/.test(entry) || (/^\d+$/.test(entry) && Number(entry) < machine.gpus.length)),
  );
  return machine.gpus.length === 0 ? 0 : end === -1 ? listed.length : end;
}

const BY: Readonly<Record<Launcher, string>> = {
  stroma: "the launcher",
  torchrun: "torchrun (WORLD_SIZE)",
  slurm: "srun",
  openmpi: "mpirun",
};

const RESTARTS: Readonly<Record<Exclude<Launcher, "stroma">, string>> = {
  torchrun: "It restarts them itself: torchrun --max-restarts N, with --resume auto here",
  slurm: "In the batch script: srun … --resume auto || scontrol requeue $SLURM_JOB_ID",
  openmpi: "mpirun starts nothing again: call it once more, with --resume auto here",
};

const plural = (n: number, noun: string): string => (n === 1 ? noun : `${noun}s`);

const config = (message: string): StromaError => new StromaError("CONFIG", `[cli] ${message}`);
