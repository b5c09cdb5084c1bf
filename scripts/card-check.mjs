#!/usr/bin/env node
// Everything that only a machine with a card can show, one after the other, each with a limit of its own: what each said, how it
// ended and how long it took, and all of it in a log. node scripts/card-check.mjs --help
import { spawn } from "node:child_process";
import { createWriteStream, mkdirSync } from "node:fs";
import { join } from "node:path";
import { parseArgs } from "node:util";

const { values } = parseArgs({
  options: {
    only: { type: "string" },
    out: { type: "string", default: `runs/card-check/${new Date().toISOString().slice(0, 19).replaceAll(":", "")}` },
    help: { type: "boolean", short: "h", default: false },
  },
});
const runs = join(values.out, "runs");
// Without a card these tests are left out: that is no success.
const vitest = "nvidia-smi -L && node node_modules/vitest/vitest.mjs run";
const train =
  "node bin/stroma.js train --sequence-length 512 --micro-batch-size 4 --gradient-accumulation-steps 8 --precision bfloat16";
const eightBit = "--optimizer adamw8bit --master-weight none --host-memory 64GB";
/** As a cluster's launcher would start them: two processes that see one card. */
const pair = (name, words, host = () => "") => {
  const rank = (r) =>
    `${host(r)}RANK=${r} WORLD_SIZE=2 LOCAL_RANK=${r} LOCAL_WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=29544 ` +
    `${train} --distributed --model 100m --steps 4 ${words} --output-dir ${join(runs, name)}`;
  return `${rank(0)} & ${rank(1)}; code=$?; wait $! || code=$?; exit $code`;
};
/** NCCL refuses two ranks on one card of one machine. */
const asMachines = (rank) => `NCCL_HOSTID=rank${rank} NCCL_SOCKET_IFNAME=lo `;

/** name: [seconds at the most, command] */
const CHECKS = {
  driver: [20, "nvidia-smi && nproc && free -g"],
  doctor: [90, "node bin/stroma.js doctor"],
  kernels: [90, `${vitest} tests/native/kernels-cuda.test.ts`],
  laws: [240, `${vitest} tests/laws/cuda.test.ts`],
  selftest: [120, "node bin/stroma.js selftest memory"],
  resident: [
    90,
    `${train} --model 100m --steps 10 --plan resident --profile-memory 5 --output-dir ${join(runs, "resident")}`,
  ],
  offload: [
    120,
    `${train} --model 1b --steps 4 ${eightBit} --device-memory 8GB --profile-memory 3 --output-dir ${join(runs, "offload")}`,
  ],
  use: [
    60,
    `node bin/stroma.js eval --checkpoint ${join(runs, "offload")} && node bin/stroma.js generate --checkpoint ${join(runs, "offload")} --prompt 'synthetic star'`,
  ],
  gloo: [90, pair("gloo", "")],
  nccl: [90, pair("nccl", "--transport nccl", asMachines)],
  context: [90, pair("context", "--context 2")],
  "context-nccl": [90, pair("context-nccl", "--context 2 --transport nccl", asMachines)],
  optimizer: [
    60,
    "node bench/run.mjs optimizer8bit --device cuda:0 --elements 134217728 --param bfloat16 --json && node bench/run.mjs optimizer8bit --device cuda:0 --elements 134217728 --json",
  ],
  measure: [150, "node bin/stroma.js doctor --measure"],
  astro: [300, "node bench/run.mjs card --json"],
};

if (values.help) {
  console.log(
    `node scripts/card-check.mjs [--only NAME,NAME] [--out FOLDER, default runs/card-check/<time>]\n\n${Object.entries(
      CHECKS,
    )
      .map(([name, [seconds, command]]) => `${name} (${seconds} s)\n  ${command}`)
      .join("\n")}`,
  );
  process.exit(0);
}
const names = values.only?.split(",") ?? Object.keys(CHECKS);
const unknown = names.find((name) => !(name in CHECKS));
if (unknown !== undefined) {
  console.error(`card-check: there is no ${unknown}; there are ${Object.keys(CHECKS).join(", ")}`);
  process.exit(2);
}
mkdirSync(values.out, { recursive: true });
const log = createWriteStream(join(values.out, "card-check.log"), { flags: "a" });
const say = (text) => {
  process.stdout.write(text);
  log.write(text);
};

const rows = [];
for (const name of names) {
  const [limit, command] = CHECKS[name];
  say(`\n== ${name}\n`);
  const began = performance.now();
  // A group of its own, so that nothing of it is left when its time is up.
  const child = spawn("bash", ["-c", `exec 2>&1\n${command}`], {
    stdio: ["ignore", "pipe", "inherit"],
    detached: true,
  });
  child.stdout.on("data", (data) => say(String(data)));
  const end = () => process.kill(-child.pid, "SIGKILL");
  for (const signal of ["SIGINT", "SIGTERM"])
    process.once(signal, () => {
      end();
      process.exit(130);
    });
  let late = false;
  const timer = setTimeout(() => {
    late = true;
    end();
  }, limit * 1000);
  const code = await new Promise((done) => child.on("close", (status, signal) => done(signal ?? status)));
  clearTimeout(timer);
  for (const signal of ["SIGINT", "SIGTERM"]) process.removeAllListeners(signal);
  rows.push([
    name,
    late ? `not over after ${limit} s` : code === 0 ? "ok" : `ended with ${code}`,
    ((performance.now() - began) / 1000).toFixed(1),
  ]);
}
say(
  `\n== all\n${rows.map(([name, how, seconds]) => `${name.padEnd(10)} ${how.padEnd(24)} ${seconds.padStart(6)} s`).join("\n")}\n`,
);
process.exitCode = rows.every(([, how]) => how === "ok") ? 0 : 1;
