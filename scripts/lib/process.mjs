// Running other programs: visible progress on stderr, a clean end on Ctrl-C, and locks that a killed holder lets go.
import { spawn, spawnSync } from "node:child_process";
import { accessSync, constants, existsSync, mkdirSync, statSync } from "node:fs";
import { delimiter, dirname, join } from "node:path";

/** What stops set-up: what is missing, and the cure. Shown without a stack. */
export class SetupError extends Error {
  constructor(message, cure) {
    super(message);
    this.name = "SetupError";
    this.cure = cure;
  }
}

export function say(text) {
  process.stderr.write(`${text}\n`);
}

/** One line before a step and its seconds after it. */
export async function step(title, work) {
  const started = Date.now();
  say(`stroma: ${title} ...`);
  const result = await work();
  say(`stroma: ${title}: done in ${((Date.now() - started) / 1000).toFixed(1)} s`);
  return result;
}

/** The first executable of that name on PATH; null when there is none. A name with a slash is a path. */
export function which(name) {
  const candidates = name.includes("/")
    ? [name]
    : (process.env.PATH ?? "")
        .split(delimiter)
        .filter(Boolean)
        .map((folder) => join(folder, name));
  for (const path of candidates) {
    try {
      accessSync(path, constants.X_OK);
      if (statSync(path).isFile()) return path;
    } catch {
      // not here
    }
  }
  return null;
}

const SIGNALS = { SIGINT: 130, SIGTERM: 143, SIGHUP: 129 };
const handlers = new Map();
const children = new Set();
const held = []; // locks, as the pipes to their holders
let watching = false;
let interrupted = 0; // the status to end with, once a signal came
let interruptedAt = 0;
const ECHO_MS = 400;

function watchSignals() {
  if (watching) return;
  watching = true;
  for (const [signal, code] of Object.entries(SIGNALS)) {
    const handler = () => {
      if (interrupted) {
        // npm passes a Ctrl-C on that the terminal has sent too: what comes with the first one is the same press.
        if (Date.now() - interruptedAt > ECHO_MS) for (const child of children) child.kill("SIGKILL");
        return;
      }
      interrupted = code;
      interruptedAt = Date.now();
      say("stroma: interrupted; what is complete stays, the rest is done again next time");
      // The locks are let go when this process ends, so it outlives what works under them.
      for (const child of children) child.kill("SIGTERM");
      setTimeout(() => {
        for (const child of children) child.kill("SIGKILL");
      }, 10_000).unref();
    };
    handlers.set(signal, handler);
    process.on(signal, handler);
  }
}

/** The CLI that runs next in this process has handlers of its own: none of ours stays. */
function unwatchSignals() {
  if (children.size > 0 || !watching) return;
  watching = false;
  for (const [signal, handler] of handlers) process.off(signal, handler);
  handlers.clear();
}

/** Runs a program; its output goes to stderr. `quiet` keeps it back and shows it only on failure. Resolves to the output. */
export function run(program, args, { cwd, env, quiet = false, allowFailure = false } = {}) {
  return new Promise((resolve, reject) => {
    watchSignals();
    const child = spawn(program, args, {
      cwd,
      env: env ? { ...process.env, ...env } : process.env,
      // A child also holds our locks' pipes open: if this process is killed outright, they stay until the child ends.
      stdio: ["ignore", ...(quiet ? ["pipe", "pipe"] : [process.stderr, process.stderr]), ...held],
    });
    children.add(child);
    let output = "";
    for (const stream of [child.stdout, child.stderr]) {
      stream?.setEncoding("utf8").on("data", (text) => {
        output += text;
      });
    }
    const ended = () => {
      children.delete(child);
      if (interrupted && children.size === 0) process.exit(interrupted);
      unwatchSignals();
    };
    child.on("error", (error) => {
      ended();
      reject(new SetupError(`${program} could not be started: ${error.message}`));
    });
    child.on("close", (code, signal) => {
      ended();
      if (code === 0 || allowFailure) return resolve({ code, output });
      if (quiet) say(output.trimEnd().split("\n").slice(-60).join("\n"));
      reject(
        Object.assign(
          new SetupError(`${program} ${args.slice(0, 3).join(" ")} ended with ${signal ?? `status ${code}`}`),
          {
            output,
          },
        ),
      );
    });
  });
}

/** A short question to a program; null when it fails. */
export function ask(program, args, env) {
  const result = spawnSync(program, args, {
    encoding: "utf8",
    env: env ? { ...process.env, ...env } : process.env,
    stdio: ["ignore", "pipe", "pipe"],
    timeout: 60_000,
  });
  return result.status === 0 ? result.stdout.trim() : null;
}

/**
 * Runs `work` while this process alone holds the lock file. The lock is the kernel's (flock), held by a child whose
 * stdin is ours: however this process ends, the child ends and the lock is free. Needs flock(1) or Python.
 */
export async function withLock(file, work) {
  mkdirSync(dirname(file), { recursive: true });
  const flock = which("flock");
  const python = flock ? null : (which("python3") ?? which("python"));
  if (!flock && !python) return work(); // neither: nothing that runs twice at once could be built either
  const [program, args] = flock
    ? [flock, ["-x", file, "sh", "-c", "echo locked; exec cat"]]
    : [
        python,
        [
          "-c",
          "import fcntl,sys; f=open(sys.argv[1],'a'); fcntl.flock(f,fcntl.LOCK_EX); print('locked',flush=True); sys.stdin.read()",
          file,
        ],
      ];
  // Detached: a Ctrl-C reaches the terminal's whole group, and the lock must outlive the programs that it guards.
  const holder = spawn(program, args, { stdio: ["pipe", "pipe", "ignore"], detached: true });
  await new Promise((resolve, reject) => {
    const waiting = setTimeout(() => say(`stroma: another set-up is running; waiting for it (${file})`), 1000);
    holder.on("error", reject);
    holder.on("exit", () =>
      reject(new SetupError(`the lock ${file} could not be taken`, "check that its folder is writable")),
    );
    holder.stdout.once("data", () => {
      clearTimeout(waiting);
      resolve();
    });
  });
  holder.removeAllListeners("exit");
  held.push(holder.stdin);
  try {
    return await work();
  } finally {
    held.splice(held.indexOf(holder.stdin), 1);
    holder.stdin.end();
    holder.unref();
  }
}

/** Runs a command-line script's main function; failures are one message and a cure, and exit status 1. */
export async function main(work) {
  try {
    await work();
  } catch (error) {
    if (!(error instanceof SetupError)) throw error;
    say(`stroma: ${error.message}`);
    if (error.cure) say(`stroma: cure: ${error.cure}`);
    process.exit(1);
  }
}

export function isFolder(path) {
  return existsSync(path) && statSync(path).isDirectory();
}
