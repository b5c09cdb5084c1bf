import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { describe, expect, it, vi } from "vitest";
import { type PlanArguments, plan } from "../../../src/cli/plan.js";
import type { ProbeReport } from "../../../src/native.js";
import type { PlanReport } from "../../../src/plan/auto.js";
import type { RanksReport } from "../../../src/plan/auto-ranks.js";
import { storeMeasured } from "../../../src/plan/measured.js";
import { findProfile } from "../../../src/plan/profiles.js";
import type { ScaleRow } from "../../../src/plan/scale-table.js";

const machine = (cgroupBytes: number | null, gpus: ProbeReport["gpus"] = []): ProbeReport => ({
  gpus,
  driver: null,
  nvmlError: null,
  memory: { totalBytes: 64e9, availableBytes: 60e9, cgroupBytes },
  cpus: { online: 2, affinity: 2, cgroup: null },
  memlock: { softBytes: null, hardBytes: null },
  cpuFlags: { avx2: true, avx512f: false, avx512Bf16: false, amxBf16: false },
  hugePages: { transparent: null, sizeBytes: 0 },
  glibc: "2.36",
});
const card = { index: 0, name: "NVIDIA RTX A5000", memoryBytes: 24e9, freeBytes: 24e9, computeCapability: "8.6" };

const given = (more: Partial<PlanArguments> = {}): PlanArguments => ({
  model: "tiny",
  devices: 1,
  disk: "0",
  "sequence-length": 128,
  "micro-batch-size": 1,
  "gradient-accumulation-steps": 4,
  clip: "global",
  ...more,
});

describe("stroma plan", () => {
  it("says at a glance where every byte lives, how fast, and why not otherwise", () => {
    const text = plan(given({ "device-memory": "16MB", "host-memory": "1GB", profile: "a5000" }), null);
    expect(text).toContain("It fits. The whole batch passes through a block before the next is fetched");
    expect(text).toMatch(/^where +card +host$/m);
    expect(text).toMatch(/^optimizer state /m);
    expect(text).toMatch(/^card {3}\[#+·*x*\] [\d.]+ MB of 15.2 MB usable \(16 MB\)$/m);
    expect(text).toMatch(/^time .* tokens\/s predicted on a5000; bound by /m);
    expect(text).toMatch(/Not taken:\n {2}.*\n {6}(does not fit by|\d+\.\d % slower|no faster)/);
  });

  it("gives the report's fields as JSON", () => {
    const report = JSON.parse(plan(given({ json: true }), machine(null))) as PlanReport;
    expect(report).toMatchObject({ fits: true, order: "depthFirst", microBatch: { rows: 4, fused: 4, count: 1 } });
  });

  it("says that processors were never measured, until they are", () => {
    const folder = mkdtempSync(join(tmpdir(), "stroma-plan-"));
    vi.stubEnv("STROMA_CACHE", folder);
    try {
      expect(plan(given(), machine(null))).toContain(
        "have not been measured: speed is a guess; stroma doctor --measure",
      );
      storeMeasured(findProfile("cpu"));
      expect(plan(given(), machine(null))).not.toContain("have not been measured");
    } finally {
      vi.unstubAllEnvs();
      rmSync(folder, { recursive: true });
    }
  });

  it("prints every instruction with --tape", () => {
    const text = plan(given({ tape: true }), machine(null));
    const [, count] = /(\d+) instructions/.exec(text)!;
    expect(text.match(/^ *\d+ +[\d.]+ +[\d.]+ ms {2}/gm)).toHaveLength(Number(count));
    expect(text).toMatch(/forward model\.layers\.0 #0 {2}d@\d+ .*-> d@\d+/);
  });

  it("plans only with the recompute and the layers a block that are asked for", () => {
    const text = (more: object) =>
      plan(given({ "device-memory": "24GB", "host-memory": "1GB", profile: "a5000", ...more }), null);
    expect(text({})).toContain("Autograd graphs are kept.");
    expect(text({ recompute: "selective" })).toContain("but for results of products and attention, which are kept.");
    const merged = text({ recompute: "all", "layers-per-block": 2 });
    expect(merged).toMatch(/Forwards run again in the backward\. 2 layers make a block \(4 blocks\)\./);
  });

  it("takes this machine's budgets: the card's memory, and the container's limit before the machine's", () => {
    expect(plan(given(), machine(8e9, [card]))).toMatch(/\(24 GB\)[\s\S]*\(8 GB\)[\s\S]*predicted on a5000/);
    expect(plan(given(), machine(8e9))).toMatch(/^memory .*usable \(8 GB\)$/m);
    expect(plan(given(), machine(null))).toMatch(/^memory .*usable \(64 GB\)$/m);
  });

  it("says by how much nothing fits, and what would, in the leanest format of those that are open", () => {
    const none = { "device-memory": "4MB", "host-memory": "2MB", profile: "a5000" } as const;
    const text = plan(given(none), null);
    expect(text).toMatch(/in bfloat16, adamw8bit,[\s\S]*It does not fit: [\d.]+ [kM]B are missing\. It fits with/);
    expect(text).toMatch(/this is with --master-weight none --optimizer adamw8bit; float32 master weights and adamw/);
    const asked = plan(given({ ...none, optimizer: "adamw", "master-weight": "float32" }), null);
    expect(asked).toMatch(/float32 master weights, adamw,[\s\S]*It does not fit/);
    expect(asked).not.toContain("this is with");
    const { fits, missing } = JSON.parse(plan(given({ ...none, json: true }), null));
    expect([fits, missing.bytes > 1e5, missing.cure.startsWith("It fits with")]).toEqual([false, true, true]);
  });

  it("takes the widest format of state that fits, and says with which flags to train so", () => {
    const json = (more: object) =>
      JSON.parse(
        plan(given({ "device-memory": "8MB", profile: "a5000", clip: "none", json: true, ...more }), null),
      ) as PlanReport & Record<"precision" | "masterWeight" | "optimizer", string>;
    const formats = (more: object) => {
      const { fits, precision, masterWeight, optimizer } = json(more);
      return [fits, precision, masterWeight, optimizer];
    };
    // 0.77 M parameters, of which a few vectors keep float32 moments in every format.
    expect(formats({ "host-memory": "20MB" })).toEqual([true, "bfloat16", "float32", "adamw"]);
    expect(formats({ "host-memory": "7MB" })).toEqual([true, "bfloat16", "split16", "adamw8bit"]);
    expect(formats({ "host-memory": "7MB", "master-weight": "none" })).toEqual([true, "bfloat16", "none", "adamw"]);
    expect(formats({ "host-memory": "7MB", optimizer: "adamw8bit" })[2]).not.toBe("none");
    const text = plan(given({ "device-memory": "8MB", "host-memory": "7MB", profile: "a5000", clip: "none" }), null);
    expect(text).toMatch(
      /^note +train with --master-weight split16 --optimizer adamw8bit: float32 master weights and/m,
    );
  });

  it("of astro-13b beside 64 GB one card and two, clipped by the global norm, with nothing else said", () => {
    const size = { "sequence-length": 512, "gradient-accumulation-steps": 32, json: true } as const;
    const box = given({ model: "astro-13b", "device-memory": "24GB", "host-memory": "64GB", ...size });
    expect(JSON.parse(plan(box, null))).toMatchObject({ fits: true, masterWeight: "none", optimizer: "adamw8bit" });
    const two = JSON.parse(plan({ ...box, devices: 2 }, null)) as RanksReport;
    expect(two.fits).toBe(true);
    expect(Math.max(...two.perRank.map((r) => r.peakDeviceBytes))).toBeLessThan(18e9);
    expect(two.peakHostBytes).toBeLessThan(55e9);
  });

  it("plans for several cards: each, all together, and which stages", () => {
    const size = { "sequence-length": 1024, "gradient-accumulation-steps": 16 };
    const two = given({ devices: 2, "device-memory": "24GB", "host-memory": "64GB", profile: "a5000", ...size });
    const text = plan({ ...two, shards: 1 }, null);
    // Of a model this small two stretches a card cost the least: fewer boundaries cross than dealt out in turn.
    expect(text).toMatch(/^2 cards, interleaved stages: /m);
    expect(text).toMatch(/^where +card 0 +card 1/m);
    expect(text).toMatch(/^between {3}.* from card to card a step, at 4 GB\/s each way \(assumed\)$/m);
    expect(text).toMatch(/^rank 1 .* bubble [\d.]+ %$/m);
    expect(text).toMatch(/Not taken:\n {2}alternating stages: [\s\S]*\n {2}contiguous stages: [\s\S]*\n {2}one card\n/);
    // A model this small crosses between cards sooner than its boundaries do.
    const free = plan(two, null);
    expect(free).toMatch(/^2 cards, sharded: /m);
    expect(free).toMatch(/Not taken:\n[\s\S]*\n {2}interleaved stages with tied blocks on one card: /);
    for (const other of ["replicas", "alternating stages", "one card"]) expect(free).toContain(`\n  ${other}`);
    expect(plan({ ...two, replicas: 2 }, null)).toMatch(/^2 cards, replicas: each runs all blocks on its part/m);
    expect(plan({ ...two, devices: 4, shards: 2, replicas: 2 }, null)).toMatch(
      /^4 cards, sharded: .* state, 2 times over/m,
    );
    const report = JSON.parse(plan({ ...two, json: true }, null)) as RanksReport;
    expect(report).toMatchObject({ fits: true, devices: 2, shards: 2 });
    expect(report.perRank.map((r) => r.rank)).toEqual([0, 1]);
    const lines = (rank?: number) => plan({ ...two, tape: true, rank }, null).match(/^ *\d+ +[\d.]+ +[\d.]+ ms {2}/gm)!;
    expect(lines().length).toBe(lines(0).length + lines(1).length);
    expect(lines(1).length).toBeGreaterThan(20);
  });

  it("plans rows that cards share, beside whole ones, and names the sharing where whole ones do not fit", () => {
    const rows = { "sequence-length": 16384, "gradient-accumulation-steps": 2, "host-memory": "1GB" };
    const two = given({ devices: 2, profile: "a5000", ...rows, "device-memory": "100MB" });
    const text = plan({ ...two, context: 2 }, null);
    expect(text).toMatch(/2 micro-batches of 1 x 16384 tokens[\s\S]*It fits\./);
    expect(text).toMatch(/^2 cards, (sharded|replicas): each runs all blocks on 1\/2 of each row and holds/m);
    expect(text).toMatch(/^rows {6}[\d.]+ [MG]B more inside passes/m);
    expect(text).toContain("note      whole rows do not fit");
    expect(plan(two, null)).toMatch(/It does not fit[\s\S]*note +it fits with --context 2: 2 cards share each row/);
    const room = { ...two, "device-memory": "24GB", "sequence-length": 512 };
    expect(plan({ ...room, context: 2 }, null)).toMatch(
      /note +whole rows fit, too, with [\d.]+ MB a card: this is 0\.\d+ x/,
    );
    expect(() => plan({ ...room, context: 2, "sequence-length": 510 }, null)).toThrow(/510 = 127 x 4 \+ 2/);
    expect(() => plan({ ...room, context: 3, "sequence-length": 510 }, null)).toThrow(/context 3 is no divisor/);
    expect(() => plan({ ...room, devices: 1, context: 2 }, null)).toThrow("--context is for --devices 2 or more");
  });

  it("says how training grows from one machine to many", () => {
    const many = given({ ranks: "8-32", "micro-batch-size": 2, "gradient-accumulation-steps": 1 });
    const text = plan(many, null);
    expect(text).toMatch(
      /^h100 cards of 80 GB, 8 a machine; 370 GB\/s between cards of a machine, 47 GB\/s of network/m,
    );
    expect(text).toMatch(/^cards +sharded over +recompute +order +a card holds +step +tokens\/s a card/m);
    expect(text.match(/^ +(8|16|32) .* (arithmetic|the card's memory|collectives' latency)$/gm)).toHaveLength(3);
    expect(text).toContain("Predicted, not measured");
    const json = JSON.parse(plan({ ...many, json: true, network: "1GB", "shard-group": 8 }, null));
    expect(json).toMatchObject({ model: "tiny", microBatches: 1, cluster: { name: "h100", network: 1e9 } });
    expect(json.rows.map((r: ScaleRow) => [r.ranks, r.shardGroup])).toEqual([
      [8, 8],
      [16, 8],
      [32, 8],
    ]);
  });

  it.each([
    [{ devices: 0 }, /expected --devices to be a whole number of at least 1/],
    [{ rank: 0 }, /--rank is for --devices 2 or more/],
    [{ shards: 2 }, /--shards is for --devices 2 or more/],
    [{ replicas: 2 }, /--replicas is for --devices 2 or more/],
    [
      { devices: 6, shards: 2, replicas: 2 },
      /6 devices are no whole number of stages of 2 shards x 2 replicas: 6 \/ 4/,
    ],
    [{ devices: 3, shards: 2 }, /3 devices are no whole number of stages of 2 shards: 3 \/ 2/],
    [{ devices: 2, rank: 2 }, /expected --rank to be one of 0 to 1, got 2/],
    [{ "device-memory": "many" }, /expected --device-memory to be a size like 24GB/],
    [{ "sequence-length": 0 }, /expected --sequence-length to be a whole number of at least 1/],
    [{ "layers-per-block": 0 }, /expected --layers-per-block to be a whole number of at least 1/],
    [{ profile: "a5000" }, /no card is here whose memory could be read. Say --device-memory/],
    [{ model: "none-such" }, /there is no preset/],
    [{ ranks: "8", devices: 2 }, /--devices is for the cards of one machine, and --ranks for many machines/],
    [{ ranks: "8", disk: "9GB" }, /--disk is for the cards of one machine/],
    [{ ranks: "8", profile: "a5000" }, /nothing is known of machines with "a5000" cards together/],
    [{ ranks: "eight" }, /expected --ranks to be whole numbers from 1 to 65536 like 8,64 or 8-4096/],
    [{ ranks: "8", "shard-group": 0 }, /expected --shard-group to be a whole number of at least 1/],
    [{ ranks: "8", "shard-group": 3 }, /8 ranks cannot be groups of 3/],
    [{ ranks: "8", network: "fast" }, /expected --network to be a size/],
    [{ compiled: true }, /--compiled is for --ranks/],
    [{ network: "1GB" }, /--network is for --ranks/],
  ])("refuses %o", (more, message) => {
    expect(() => plan(given(more), null)).toThrow(message);
  });
});
