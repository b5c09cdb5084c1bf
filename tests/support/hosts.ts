/**
 * Two machines on one: network namespaces with a cable between them (a veth pair), each with a name of its own and an
 * /etc/hosts of its own. They end with this process. Needs root, or a system that lets users have namespaces.
 */
import { type ChildProcess, execFileSync, spawn, spawnSync } from "node:child_process";
import { readlinkSync, writeFileSync } from "node:fs";
import { join } from "node:path";

const isRoot = process.getuid?.() === 0;
const USER = isRoot ? [] : ["--user", "--map-root-user"];
const NEW = ["--net", "--uts", "--mount"];

/** Prints why and returns false where this system lets nobody here have such machines. */
export function hostsOrSkip(): boolean {
  const trial = "ip link add name a0 type veth peer name a1 && hostname a && mount --bind /etc/hosts /etc/hosts";
  const { status, stderr, error } = spawnSync("unshare", [...USER, ...NEW, "sh", "-c", trial], { encoding: "utf8" });
  if (status === 0) return true;
  console.warn(`left out, this system allows no network namespaces: ${(error?.message ?? stderr).trim()}`);
  return false;
}

export const NAMES = ["alpha", "beta"] as const;
export type Host = (typeof NAMES)[number];

export class Hosts implements Disposable {
  readonly four = { alpha: "192.168.77.1", beta: "192.168.77.2" } as const;
  readonly six = { alpha: "fd77::1", beta: "fd77::2" } as const;
  private readonly holders: Record<Host, ChildProcess>;

  /** @param folder for the two files of names */
  constructor(private readonly folder: string) {
    // `cat` ends when this process does: its input closes.
    const hold = (command: string, args: string[]) =>
      spawn(command, [...args, "cat"], { stdio: ["pipe", "ignore", "inherit"] });
    const alpha = hold("unshare", [...USER, ...NEW]);
    awaitNamespace(alpha.pid!);
    const inside = isRoot ? [] : ["--user", "--preserve-credentials"];
    const beta = isRoot
      ? hold("unshare", NEW)
      : hold("nsenter", ["--target", String(alpha.pid), ...inside, "unshare", ...NEW]);
    awaitNamespace(beta.pid!, alpha.pid!);
    this.holders = { alpha, beta };
    this.run("alpha", `ip link add name eth0 type veth peer name eth0 netns ${beta.pid}`);
    for (const name of NAMES) {
      this.run(name, `hostname ${name} && ip link set lo up && ip link set eth0 address ${MAC[name]}`);
      this.names(name, "");
    }
    this.connect();
  }

  /** The arguments before a command that is to run there. */
  under(host: Host): string[] {
    const inside = isRoot ? [] : ["--user", "--preserve-credentials"];
    return ["nsenter", "--target", String(this.holders[host].pid), ...inside, ...NEW];
  }

  run(host: Host, script: string): string {
    const [command, ...args] = this.under(host);
    return execFileSync(command!, [...args, "sh", "-c", script], { encoding: "utf8" });
  }

  /** What the machine finds under names: loopback and the other, and what is given. */
  names(host: Host, more: string): void {
    const file = join(this.folder, `hosts-${host}`);
    const other = host === "alpha" ? "beta" : "alpha";
    writeFileSync(file, `127.0.0.1 localhost\n${this.four[other]} ${other}\n${more}\n`);
    this.run(host, `umount /etc/hosts 2>/dev/null; mount --bind ${file} /etc/hosts`);
  }

  /** As it is at first; also after cut() and drop(). */
  connect(): void {
    for (const name of NAMES)
      this.run(
        name,
        `ip link set eth0 down; ip addr flush dev eth0; ip neigh flush dev eth0; ip link set eth0 up && ip addr add ${this.four[name]}/24 dev eth0 && ip -6 addr add ${this.six[name]}/64 dev eth0 nodad`,
      );
  }

  /** The interface of one machine goes down, as when a person takes it down; the other's loses its carrier. */
  cut(host: Host): void {
    this.run(host, "ip link set eth0 down");
  }

  /** What these machines send is lost without a word: it goes to a hardware address that nobody has. */
  drop(...from: Host[]): void {
    for (const name of from) {
      const to = name === "alpha" ? "beta" : "alpha";
      for (const address of [this.four[to], this.six[to]])
        this.run(name, `ip neigh replace ${address} lladdr 02:00:00:00:00:99 dev eth0 nud permanent`);
    }
  }

  [Symbol.dispose](): void {
    for (const holder of Object.values(this.holders)) holder.kill("SIGKILL");
  }
}

const MAC: Readonly<Record<Host, string>> = { alpha: "02:00:00:00:00:01", beta: "02:00:00:00:00:02" };

/** Until the process has left this one's network, and that of `other`. */
function awaitNamespace(pid: number, ...other: number[]): void {
  const netOf = (of: number | "self") => readlinkSync(`/proc/${of}/ns/net`);
  const mntOf = (of: number | "self") => readlinkSync(`/proc/${of}/ns/mnt`);
  const taken = new Set([...other, "self" as const].flatMap((of) => [netOf(of), mntOf(of)]));
  for (const end = Date.now() + 10_000; Date.now() < end; )
    if (!taken.has(netOf(pid)) && !taken.has(mntOf(pid))) return;
  throw new Error(`process ${pid} got no namespace of its own in 10 s`);
}
