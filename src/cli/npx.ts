/**
 * npx starts a command through a shell. Asked to end by SIGTERM it hands that on to the shell alone, which dies of it, and
 * the command would go on as nobody's. So a command that was started so looks whether its shell is still there.
 */
import { readFileSync } from "node:fs";

const LOOK_MS = 250;

/** Calls `gone` once when the shell between npx and this process has ended. Never where there is none. */
export function whenShellGone(gone: () => void, env: NodeJS.ProcessEnv = process.env): Disposable {
  const shell = process.ppid;
  if (env.npm_command !== "exec" || !isShell(shell)) return { [Symbol.dispose]() {} };
  const timer = setInterval(() => {
    if (process.ppid === shell) return;
    clearInterval(timer);
    gone();
  }, LOOK_MS);
  timer.unref();
  return {
    [Symbol.dispose]() {
      clearInterval(timer);
    },
  };
}

/** `sh -c …`: some shells stand in the command's way, others become the command. */
function isShell(pid: number): boolean {
  try {
    return readFileSync(`/proc/${pid}/cmdline`, "utf8").split("\0")[1] === "-c";
  } catch {
    return false; // no /proc
  }
}
