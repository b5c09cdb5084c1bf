/**
 * What a second rank buys: two ranks of one thread each (a pipeline over blocks, in processes' stead two sessions of one
 * process that talk over Gloo and loopback) against one rank of one thread, on the same batch, steps in turn. ratio = seconds of
 * one / seconds of two; 2 is the most. Losses and norms must be equal to the bit. `orders`: the same for each schedule and
 * rule of stages. `wire`: bytes sent in a step by both ranks, over those that the tapes say.
 *
 * `ceiling`: what the machine lets two processors gain: the whole step twice at once, by two runs of one thread that say nothing
 * to each other, against once alone: 2 x seconds of one / seconds until both are done; below 2 where they share caches, memory or
 * a processor with others. `ofCeiling`: ratio / ceiling. All are measured in turn, step by step.
 *
 *   npm run bench -- ranks [--dim 512] [--layers 10] [--tokens 128] [--micro-batches 16] [--steps 4] [--json]
 */
import { createServer } from "node:net";
import { parseArgs } from "node:util";
import { traceModel } from "../src/graph/index.js";
import { decoderConfig } from "../src/models/decoder/config.js";
import { decoder } from "../src/models/decoder/model.js";
import { loadAddon } from "../src/native.js";
import { residentPolicy } from "../src/plan/planner.js";
import type { Policy } from "../src/plan/policy.js";
import { assignStages, type StageRule } from "../src/plan/stages.js";
import type { Schedule } from "../src/plan/types.js";
import { decoderBatch, median, openRun, type Run } from "./support/steps.js";

const { values } = parseArgs({
  options: {
    dim: { type: "string", default: "512" },
    layers: { type: "string", default: "10" },
    tokens: { type: "string", default: "128" },
    "micro-batches": { type: "string", default: "16" },
    steps: { type: "string", default: "4" },
    json: { type: "boolean", default: false },
  },
});
const [dim, layers, T, microBatches, steps] = [
  values.dim,
  values.layers,
  values.tokens,
  values["micro-batches"],
  values.steps,
].map(Number) as [number, number, number, number, number];
// As many as bytes and a few: a head that weighs as much as half a layer is half a layer that the other rank has not.
const vocabSize = 512;
const config = decoderConfig({ vocabSize, dim, layers, heads: dim / 64, kvHeads: 2, ffn: dim * 3 });
const graph = traceModel(decoder, config, { mode: "train", dtype: "float32" });
const batches = Array.from({ length: microBatches }, (_, m) => decoderBatch(graph, vocabSize, 1, T, m));
const policy = (schedule: Schedule): Policy => ({
  ...residentPolicy(graph, { microBatches, schedule }),
  dims: { B: 1, T },
  boundary: "device",
});

const port = await new Promise<number>((done) => {
  const server = createServer().listen(0, "127.0.0.1", () => {
    const { port: free } = server.address() as { port: number };
    server.close(() => done(free));
  });
});
const spec = { size: 2, address: "127.0.0.1", port, serve: true, prefix: "", joinSeconds: 30, silenceSeconds: 60 };
const ranks = await Promise.all([0, 1].map((rank) => loadAddon().joinRanks({ ...spec, rank })));

/** A step of each; seconds until all are done. */
async function atOnce(runs: readonly Run[]) {
  const began = performance.now();
  const results = await Promise.all(runs.map((r) => r.step()));
  return { results, seconds: (performance.now() - began) / 1000 };
}

async function compare(rule: StageRule, schedule: Schedule) {
  const of = assignStages(graph, 2, rule);
  const options = { device: "cpu", threads: 1 } as const;
  const one = await openRun(graph, policy("depthFirst"), batches, options);
  const two = await Promise.all(
    ranks.map((r) =>
      openRun(graph, { ...policy(schedule), stages: { rank: r.rank, ranks: 2, of } }, batches, {
        ...options,
        ranks: r,
      }),
    ),
  );
  const twins = await Promise.all([0, 1].map(() => openRun(graph, policy("depthFirst"), batches, options)));
  const alone: number[] = [];
  const together: number[] = [];
  const apart: number[] = [];
  let sent = 0;
  for (let i = 0; i <= steps; i++) {
    const a = await one.step();
    const ranked = await atOnce(two);
    const whole = await atOnce(twins);
    sent = ranked.results.reduce((n, r) => n + r.bytesSent, 0);
    for (const [what, { results }] of Object.entries({
      "two ranks compute": ranked,
      "two runs at once compute": whole,
    }))
      if (results.some((b) => a.loss !== b.loss || a.gradNorm !== b.gradNorm))
        throw new Error(`${what} something else than one`);
    if (i === 0) continue;
    alone.push(a.seconds);
    together.push(ranked.seconds);
    apart.push(whole.seconds);
  }
  const planned = two.reduce(
    (n, r) => n + r.tape.instructions.reduce((m, i) => m + (i.op === "send" ? i.bytes : 0), 0),
    0,
  );
  await Promise.all([one, ...two, ...twins].map((r) => r.session.dispose()));
  const [oneSeconds, twoSeconds, apartSeconds] = [median(alone), median(together), median(apart)];
  const [ratio, ceiling] = [oneSeconds / twoSeconds, (2 * oneSeconds) / apartSeconds];
  return {
    rule,
    schedule,
    oneSeconds,
    twoSeconds,
    apartSeconds,
    ratio,
    ceiling,
    ofCeiling: ratio / ceiling,
    sentBytes: sent,
    wire: sent / planned,
  };
}

const orders = [];
for (const [rule, schedule] of [
  ["alternating", "breadthFirst"],
  ["contiguous", "oneForwardOneBackward"],
  ["contiguous", "breadthFirst"],
] as const) {
  const figures = await compare(rule, schedule);
  orders.push(figures);
  if (!values.json)
    console.log(
      `${rule} ${schedule}: ${figures.oneSeconds.toFixed(3)} s on one, ${figures.twoSeconds.toFixed(3)} s on two: ${figures.ratio.toFixed(2)} of ${figures.ceiling.toFixed(2)} that two runs apart gain`,
    );
}
await Promise.all(ranks.map((r) => r.leave()));
const parameters = graph.parameters.reduce((n, p) => n + p.shape.reduce((a, b) => a * b, 1), 0);
const { ratio, ceiling, ofCeiling } = orders[0]!;
console.log(
  JSON.stringify({
    name: "ranks",
    ratio,
    ceiling,
    ofCeiling,
    unit: "seconds of one rank / of two",
    aim: 1.9,
    parameters,
    T,
    microBatches,
    orders,
  }),
);
