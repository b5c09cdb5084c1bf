/**
 * Which device trains: what this machine has, what of it the build in use can reach, and why the rest is out. Told from the
 * probe's report and the build's record alone, so that nothing native is loaded for a choice.
 */
import { invalidArgument, StromaError } from "./errors.js";
import { type BuildRecord, type ProbeReport, probeMachine, readBuildRecord } from "./native.js";
import type { SessionOptions } from "./train/native-session.js";

export type Device = SessionOptions["device"];
export type CardDevice = `cuda:${number}`;

/** auto: the first card that can be used, else the processors. cuda: that card, or an error that says what is missing. */
export type DeviceOption = "auto" | "cuda" | Device;

export const DEVICE_PATTERN = /^(?:auto|cpu|sim|cuda|cuda:\d{1,2})$/;
export const DEVICE_EXPECTS = "auto, cpu, cuda, cuda:<n> or sim";

export interface MachineFacts {
  /** null: the probe is not built. */
  probe: ProbeReport | null;
  /** Of the build in use; null: there is none. */
  build: Pick<BuildRecord["libtorch"], "version" | "cuda"> | null;
  /** CUDA_VISIBLE_DEVICES. */
  visible?: string;
}

/** A card as CUDA counts them in this process. What is null is not known: of a part of a card (MIG), for example. */
export interface Card {
  device: CardDevice;
  name: string | null;
  memoryBytes: number | null;
  freeBytes: number | null;
  /** Why the build in use cannot train on it; null: it can. */
  unusable: string | null;
}

export interface DeviceChoice {
  device: Device;
  /** For a person, where the choice was left to us. */
  why: string | null;
}

/** Of a chip that the kernels are built for (cmake/cuda.cmake). */
const OLDEST_CAPABILITY = 8;
const SETUP_CUDA = "`npx stroma setup --cuda`";

export function machineFacts(env: Readonly<Record<string, string | undefined>> = process.env): MachineFacts {
  let build: MachineFacts["build"] = null;
  try {
    build = readBuildRecord().libtorch;
  } catch {
    // Whoever needs the addon says so.
  }
  return { probe: probeMachine(), build, visible: env.CUDA_VISIBLE_DEVICES };
}

/** The cards that this process sees. The addon makes CUDA count them as the driver does (CUDA_DEVICE_ORDER, native.ts). */
export function visibleCards({ probe, build, visible }: MachineFacts): Card[] {
  const gpus = probe?.gpus ?? [];
  let shown: (ProbeReport["gpus"][number] | null)[] = gpus;
  if (visible !== undefined) {
    shown = [];
    for (const entry of visible.split(",").map((text) => text.trim())) {
      const gpu = /^\d+$/.test(entry)
        ? gpus.find((g) => g.index === Number(entry))
        : entry.startsWith("GPU-")
          ? (gpus.find((g) => g.uuid?.startsWith(entry)) ?? (gpus.some((g) => g.uuid) ? undefined : null))
          : entry.startsWith("MIG-") && gpus.length > 0
            ? null
            : undefined;
      // CUDA takes the list up to the first entry that names no card.
      if (gpu === undefined) break;
      shown.push(gpu);
    }
    if (gpus.length === 0) shown = [];
  }
  return shown.map((gpu, n) => ({
    device: `cuda:${n}`,
    name: gpu?.name ?? null,
    memoryBytes: gpu?.memoryBytes ?? null,
    freeBytes: gpu?.freeBytes ?? null,
    unusable: gpu === null ? null : tooOld(gpu.computeCapability, build?.cuda ?? null),
  }));
}

function tooOld(capability: string, cuda: string | null): string | null {
  if (capability === "" || Number(capability) >= OLDEST_CAPABILITY) return null;
  return `it is of compute capability ${capability}, and the kernels${cuda === null ? "" : ` for CUDA ${cuda}`} are built for ${OLDEST_CAPABILITY}.0 and later`;
}

/** Why no card of this machine can be used, with the cure; null: one can. */
export function whyNoCard(facts: MachineFacts, cards: readonly Card[] = visibleCards(facts)): StromaError | null {
  const { probe, build, visible } = facts;
  const no = (code: "CONFIG" | "NOT_SET_UP", why: string, cure: string) =>
    new StromaError(code, `[device] ${why}. ${cure}`, { why, cure });
  if (probe === null)
    return no("NOT_SET_UP", "nothing can count the cards of this machine yet", "Run `npx stroma setup`");
  const wanted = build?.cuda == null ? "an NVIDIA driver" : `an NVIDIA driver that runs CUDA ${build.cuda}`;
  if (probe.driver === null && probe.gpus.length === 0)
    return no("NOT_SET_UP", "there is no NVIDIA driver", `Install ${wanted}, or use --device cpu`);
  if (probe.gpus.length === 0)
    return no("CONFIG", `the driver shows no card (${probe.nvmlError ?? "it gives no reason"})`, "Use --device cpu");
  if (cards.length === 0)
    return no("CONFIG", `CUDA_VISIBLE_DEVICES=${visible} shows no card`, "Unset it, or use --device cpu");
  const here = `${cards.length} ${cards.length === 1 ? "card is" : "cards are"} here`;
  if (build === null) return no("NOT_SET_UP", `${here}, and the addon is not built`, `Run ${SETUP_CUDA}`);
  if (build.cuda === null) return no("NOT_SET_UP", `${here}, and this is the CPU build`, `Run ${SETUP_CUDA}`);
  const runs = probe.driver?.cuda ?? "";
  if (runs !== "" && Number.parseInt(runs, 10) < Number.parseInt(build.cuda, 10))
    return no(
      "NOT_SET_UP",
      `the driver (${probe.driver?.version}) runs CUDA ${runs}, and this build is for CUDA ${build.cuda}`,
      `Update the driver, or set up with a libtorch for CUDA ${Number.parseInt(runs, 10)} (npx stroma setup --help: STROMA_LIBTORCH, --pip-args)`,
    );
  if (cards.some((card) => card.unusable === null)) return null;
  return no("CONFIG", `no card here can be used: ${cards[0]!.name}: ${cards[0]!.unusable}`, "Use --device cpu");
}

/**
 * @param ranks this process is one of several: whoever starts them says which card is whose
 * @param needsBytes what the card must hold at the least, where that is known
 * @throws INVALID_ARGUMENT for no device; CONFIG and NOT_SET_UP for a card that cannot be used, with the cure
 */
export function chooseDevice(
  asked: DeviceOption = "auto",
  { ranks = false, needsBytes = 0 }: { ranks?: boolean; needsBytes?: number } = {},
  facts: () => MachineFacts = machineFacts,
): DeviceChoice {
  if (typeof asked !== "string" || !DEVICE_PATTERN.test(asked))
    throw invalidArgument("device", DEVICE_EXPECTS, asked, "device");
  if (asked === "cpu" || asked === "sim") return { device: asked, why: null };
  if (ranks && asked === "auto")
    return {
      device: "cpu",
      why: "not a card for each rank; --gpus N asks for them",
    };
  if (ranks && asked === "cuda")
    throw new StromaError("CONFIG", "[device] cuda of several ranks would be one card: --gpus N gives each its own");
  const machine = facts();
  const cards = visibleCards(machine);
  const none = whyNoCard(machine, cards);
  if (none !== null) {
    if (asked === "auto") return { device: "cpu", why: String(none.details.why) };
    throw none;
  }
  if (asked === "auto" || asked === "cuda") {
    const card = cards.find((c) => c.unusable === null)!;
    const why = `${card.name ?? "a card"}${cards.length > 1 ? `, the first of ${cards.length} cards` : ""}`;
    if (asked === "auto" && card.freeBytes !== null && needsBytes > card.freeBytes)
      return { device: "cpu", why: `the model's ${gigabytes(needsBytes)} are more than ${card.device} has free` };
    return { device: card.device, why };
  }
  const card = cards[Number(asked.slice("cuda:".length))];
  if (card === undefined)
    throw new StromaError(
      "CONFIG",
      `[device] there is no ${asked}: this machine has ${cards.length === 1 ? "cuda:0 alone" : `cuda:0 to cuda:${cards.length - 1}`}`,
    );
  if (card.unusable !== null)
    throw new StromaError("CONFIG", `[device] ${asked} (${card.name}) cannot be used: ${card.unusable}`);
  return { device: asked, why: null };
}

const gigabytes = (bytes: number): string => `${Number((bytes / 1e9).toPrecision(3))} GB`;
