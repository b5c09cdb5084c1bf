/** The two short forms in which Slurm's environment tells where a step runs: host lists and counts per node. */
import { StromaError } from "../errors.js";

/** More than any cluster has; a range beyond it is a mistake, not a list. */
const MOST_HOSTS = 100_000;

/**
 * `node[01-03,7],gpu5` -> node01, node02, node03, node7, gpu5: in the order of the list, which is that of the nodes. Also
 * several brackets in one name (`rack[1-2]n[1-2]`: the last varies fastest) and text after them.
 * @param name of the variable, for the message
 * @throws CONFIG naming the variable and the part that is malformed
 */
export function expandHosts(list: string, name = "host list"): string[] {
  const refuse = (why: string) =>
    new StromaError("CONFIG", `[distributed] ${name} ${JSON.stringify(list)}: ${why}`, { name, value: list });
  const hosts: string[] = [];
  for (const entry of splitOutside(list)) {
    let expanded = [""];
    for (const part of entry.match(/\[[^[\]]*\]|[^[\]]+|[[\]]/g) ?? []) {
      if (part === "[" || part === "]") throw refuse("a bracket without its other half");
      const choices = part.startsWith("[")
        ? part
            .slice(1, -1)
            .split(",")
            .flatMap((r) => range(r, refuse))
        : [part];
      if (hosts.length + expanded.length * choices.length > MOST_HOSTS) throw refuse(`more than ${MOST_HOSTS} hosts`);
      expanded = expanded.flatMap((head) => choices.map((tail) => head + tail));
    }
    for (const host of expanded) {
      if (!/^[\w.:-]+$/.test(host)) throw refuse(`${JSON.stringify(host)} is not the name of a host`);
      hosts.push(host);
    }
  }
  return hosts;
}

/** At commas that stand outside of brackets. */
const splitOutside = (list: string): string[] => list.split(/,(?![^[\]]*\])/);

/** `01-03` -> 01, 02, 03: as wide as the first; `7` -> 7. */
function range(text: string, refuse: (why: string) => StromaError): string[] {
  const [, from, to] = /^(\d{1,15})(?:-(\d{1,15}))?$/.exec(text) ?? [];
  if (from === undefined) throw refuse(`${JSON.stringify(text)} in brackets is neither a number nor a range`);
  const first = Number(from);
  const last = Number(to ?? from);
  if (last < first) throw refuse(`the range ${text} runs backwards`);
  if (last - first >= MOST_HOSTS) throw refuse(`the range ${text} has more than ${MOST_HOSTS} hosts`);
  return Array.from({ length: last - first + 1 }, (_, i) => String(first + i).padStart(from.length, "0"));
}

/**
 * `2(x3),1` -> 2, 2, 2, 1: tasks of each node, in the order of the nodes.
 * @throws CONFIG naming the variable and the part that is malformed
 */
export function expandCounts(list: string, name = "counts"): number[] {
  const counts: number[] = [];
  for (const entry of list.split(",")) {
    const [, count, times] = /^(\d{1,9})(?:\(x(\d{1,9})\))?$/.exec(entry) ?? [];
    const repeat = Number(times ?? 1);
    if (count === undefined || Number(count) === 0 || repeat === 0 || counts.length + repeat > MOST_HOSTS)
      throw new StromaError(
        "CONFIG",
        `[distributed] ${name} ${JSON.stringify(list)}: ${JSON.stringify(entry)} is not a count of tasks like 2 or 2(x3)`,
        { name, value: list },
      );
    for (let i = 0; i < repeat; i++) counts.push(Number(count));
  }
  return counts;
}
