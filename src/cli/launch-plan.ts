/** Whether this process trains alone, starts ranks, or is one: from the flags, the environment and the machine. */

import { type CardDevice, type MachineFacts, machineFacts, visibleCards, whyNoCard } from "../device.js";
import {
  ATTEMPT,
  type Environment,
  type Launcher,
  type RankSpec,
  rankFromEnvironment,
} from "../distributed/environment.js";
import { StromaError } from "../errors.js";
import { DEFAULT_RANK_TIMEOUT, type TrainFlags } from "./options.js";

export type DistributedPlan =
  | { mode: "single"; device?: CardDevice }
  | { mode: "launch"; ranks: number }
  /** `timeoutSeconds`: of silence, after which a rank counts as lost. */
  | { mode: "rank"; spec: RankSpec; device?: CardDevice; timeoutSeconds: number };

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
  const card = device === "cuda" || device?.startsWith("cuda:");
  if (onCards && device !== undefined && device !== "auto" && device !== "cuda")
    throw config(
      `${asked} trains on ${gpus === 1 ? "a card" : "cards"}, and --device ${device} is given: leave one out${card ? "; CUDA_VISIBLE_DEVICES says which cards" : ""}`,
    );

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
    if (card && !onCards && size > 1) throw onOneCard(device!, `${by} started ${size} ranks`);
    return {
      mode: "rank",
      spec,
      ...(onCards
        ? { device: cardOf(spec, asked, cards()) }
        : launcher === "stroma"
          ? {}
          : ownCard(spec, device, cards)),
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
  if (card && !onCards && wanted > 1) throw onOneCard(device!, `--ranks ${wanted}`);
  // A launcher started this one process, to start it again after a failure.
  const launched = env[ATTEMPT] !== undefined && env[ATTEMPT] !== "";
  if (wanted === 1 && rankTimeout !== undefined)
    throw config(`--rank-timeout ${rankTimeout} is for a run over several ranks, and this is one alone: leave it out`);
  if (wanted === 1 && transport !== undefined)
    throw config(`--transport ${transport} is how several ranks exchange, and this is one alone: leave it out`);
  if (wanted === 1 && (restart === 0 || launched)) return { mode: "single", ...(onCards ? { device: "cuda:0" } : {}) };
  return { mode: "launch", ranks: wanted };
}

const onOneCard = (device: string, who: string): StromaError =>
  config(
    `${who} and --device ${device}: all ranks would be on one card. --gpus N, or --distributed, gives each its own`,
  );

/** Without a word of devices, ranks that a cluster's launcher started are on cards where each has one: as in PyTorch. */
function ownCard(spec: RankSpec, device: TrainFlags["device"], cards: () => number): { device?: CardDevice } {
  if (device !== undefined && device !== "auto") return {};
  try {
    return cards() >= spec.localSize ? { device: `cuda:${spec.localRank}` } : {};
  } catch {
    return {}; // nothing can count them: whoever asks for cards hears why
  }
}

/** The rank's own card; the only one, where the launcher shows each rank one alone. */
function cardOf({ localRank, localSize }: RankSpec, asked: string, available: number): CardDevice {
  if (available >= localSize) return `cuda:${localRank}`;
  if (available === 1) return "cuda:0";
  throw config(
    `${asked}: ${localSize} ranks were started on this machine, which has ${available} ${plural(available, "card")} to use: ${localSize} > ${available}`,
  );
}

/**
 * Cards that this process may train on: of those of the machine that CUDA_VISIBLE_DEVICES shows.
 * @throws NOT_SET_UP where it is not the lack of cards that is in the way: no probe, no CUDA build, a driver too old for it
 */
export function countCards(env: Environment = process.env, facts: MachineFacts = machineFacts(env)): number {
  const cards = visibleCards(facts);
  const none = whyNoCard(facts, cards);
  if (none === null) return cards.filter((card) => card.unusable === null).length;
  if (none.code === "NOT_SET_UP" && (facts.probe === null || cards.length > 0)) throw none;
  return 0;
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
