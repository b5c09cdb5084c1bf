/**
 * What many machines can do together, as plain data: cards, what links the cards of a machine, and the network between
 * machines. As in profiles.ts rates are what long transfers reach, not a data sheet's peaks, and the sheet's number stands
 * beside them. None has been measured by us; docs/scale.md compares what follows from them with published runs.
 */
import { StromaError } from "../errors.js";
import { findProfile, type MachineProfile } from "./profiles.js";

export interface ClusterProfile {
  name: string;
  /** Rates of one card. */
  card: MachineProfile;
  cardBytes: number;
  /** Cards of a node (a machine). */
  perNode: number;
  /** Bytes a second that pass through each card of a node in a ring, each way (nccl-tests' bus bandwidth). */
  nodeLink: number;
  /** Bytes a second of one card's share of the network, each way. */
  network: number;
  /** Seconds before a collective's first byte, and of each step of its ring inside a node and between nodes. */
  launchSeconds: number;
  nodeStepSeconds: number;
  networkStepSeconds: number;
  /** Share of a card's processors that a collective holds while it runs. */
  collectiveShare: number;
  /** Standard deviation of cards' speed over its mean: the slowest of all sets the pace. */
  spread: number;
}

const G = 1e9;

/**
 * NCCL's own model of a ring with the "simple" protocol (NVIDIA/nccl, src/graph/tuning.cc: baseLat 8.4 us, hwLat 3.4 us over
 * NVLink and 14.0 us over a network).
 */
const ring = { launchSeconds: 8.4e-6, nodeStepSeconds: 3.4e-6, networkStepSeconds: 14e-6 };

/**
 * Sinha et al., SC22 (arXiv 2208.11035), over five computing centers: cards of one kind vary by 8 % on average. That is taken
 * for the width of a box plot's whiskers, 5.4 standard deviations of a normal distribution; which width they mean was not
 * read, so this is an assumption.
 */
const SPREAD = 0.08 / 5.4;

const clusters: Readonly<Record<string, ClusterProfile>> = {
  // DGX A100: NVLink 3 of 300 GB/s each way, of which NCCL counts on 235 (tuning.cc, compCap80); 8 x 200 Gb/s of InfiniBand
  // HDR, of which 94 % as of the H100's. NCCL runs on 16 of 108 processors (its maintainer, NVIDIA/nccl#689: up to 16, none
  // shared with other kernels).
  a100: {
    name: "a100",
    card: findProfile("a100"),
    cardBytes: 80 * G,
    perNode: 8,
    nodeLink: 235 * G,
    network: 23.5 * G,
    ...ring,
    collectiveShare: 16 / 108,
    spread: SPREAD,
  },
  // DGX H100: NVLink 4 of 450 GB/s each way, 370 after the protocol (NCCL's maintainer, NVIDIA/nccl-tests#212); 8 x 400 Gb/s,
  // 46 to 48 GB/s each (NVIDIA/nccl-tests#290). 16 of 132 processors: as above; 15 % were seen in NVIDIA/nccl#1432.
  h100: {
    name: "h100",
    card: findProfile("h100"),
    cardBytes: 80 * G,
    perNode: 8,
    nodeLink: 370 * G,
    network: 47 * G,
    ...ring,
    collectiveShare: 16 / 132,
    spread: SPREAD,
  },
  // DGX H200: the H100's links, 141 GB a card.
  h200: {
    name: "h200",
    card: findProfile("h200"),
    cardBytes: 141 * G,
    perNode: 8,
    nodeLink: 370 * G,
    network: 47 * G,
    ...ring,
    collectiveShare: 16 / 132,
    spread: SPREAD,
  },
};

export const clusterNames = (): string[] => Object.keys(clusters);

/** Throws CONFIG for a name that is not one of `clusterNames()`. */
export function findCluster(name: string): ClusterProfile {
  const found = Object.hasOwn(clusters, name) ? clusters[name] : undefined;
  if (found === undefined)
    throw new StromaError(
      "CONFIG",
      `[plan] nothing is known of machines with ${JSON.stringify(name)} cards together. Profiles: ${clusterNames().join(", ")}`,
    );
  return found;
}
