// npm run laws -- [--cases N] [--seed S] [ARGS of vitest]: the laws over N random cases from seed S on. A case that fails
// names its seed, and of random plans the simplest that still fails.

import { spawn } from "node:child_process";
import { join } from "node:path";
import { parseArgs } from "node:util";
import { root } from "./lib/record.mjs";

const LAWS = ["offload", "corrupt", "plan-true", "ranks", "sharding", "shared-host", "context"];
const { values, tokens } = parseArgs({
  args: process.argv.slice(2),
  options: { cases: { type: "string" }, seed: { type: "string" } },
  strict: false,
  allowPositionals: true,
  tokens: true,
});
for (const name of ["cases", "seed"]) {
  if (values[name] === undefined || /^\d+$/.test(values[name])) continue;
  process.stderr.write(`stroma: expected --${name} with a whole number, got ${values[name]}\n`);
  process.exit(2);
}
const own = new Set(
  tokens
    .filter((t) => t.name === "cases" || t.name === "seed")
    .flatMap((t) => (t.inlineValue === false ? [t.index, t.index + 1] : [t.index])),
);
const rest = process.argv.slice(2).filter((_, i) => !own.has(i));
const env = { ...process.env, STROMA_REQUIRE_NATIVE: "1" };
if (values.cases !== undefined) env.STROMA_CASES = values.cases;
if (values.seed !== undefined) env.STROMA_SEED = values.seed;
const files = LAWS.map((name) => `tests/laws/${name}.test.ts`);
const child = spawn(join(root, "node_modules", ".bin", "vitest"), ["run", ...files, ...rest], {
  cwd: root,
  env,
  stdio: "inherit",
});
// Ctrl-C reaches vitest through the terminal; it stops its workers itself.
for (const signal of ["SIGINT", "SIGTERM"]) process.on(signal, () => child.kill(signal));
child.on("close", (code) => process.exit(code ?? 1));
