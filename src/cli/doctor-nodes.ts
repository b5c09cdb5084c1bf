/** What the doctor says of the host memory beside cards, on machines of several memory nodes (sockets). */
import type { Device } from "../device.js";
import type { MemoryNodes } from "../native.js";

export interface BesideCard extends MemoryNodes {
  device: Device;
}

/** Nothing where there is one node. A card whose node is not told reads from anywhere, which is slower from another socket. */
export function besideCards(cards: readonly BesideCard[]): { detail: string[]; cure: string | null } {
  const told = cards.filter(({ nodes, near }) => nodes.length > 1 && near !== null);
  if (told.length === 0) return { detail: [], cure: null };
  const refused = told.filter(({ near, given }) => given !== near);
  if (refused.length === 0)
    return {
      detail: [`host memory beside ${told.map(({ device, near }) => `${device} is of node ${near}`).join(", ")}`],
      cure: null,
    };
  const which = refused.map(({ device, near }) => `${device} (node ${near})`).join(", ");
  return {
    detail: [`host memory cannot be asked of the node beside ${which}, and copies may cross between sockets`],
    cure: "let the process place its memory (docker run --cap-add SYS_NICE), or start it there (numactl --preferred)",
  };
}
