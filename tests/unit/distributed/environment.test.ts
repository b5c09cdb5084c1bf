import { execFileSync } from "node:child_process";
import { existsSync } from "node:fs";
import { homedir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import fc from "fast-check";
import { describe, expect, it } from "vitest";
import { type Environment, isFirstRank, PORTS, rankFromEnvironment } from "../../../src/distributed/environment.js";
import { StromaError } from "../../../src/errors.js";

function refused(env: Environment): StromaError {
  try {
    rankFromEnvironment(env);
  } catch (error) {
    if (error instanceof StromaError) return error;
    throw error;
  }
  throw new Error(`nothing was thrown for ${JSON.stringify(env)}`);
}

const TORCHRUN = {
  RANK: "5",
  WORLD_SIZE: "8",
  LOCAL_RANK: "1",
  LOCAL_WORLD_SIZE: "4",
  MASTER_ADDR: "node7.cluster",
  MASTER_PORT: "29400",
};
const AGENT = { TORCHELASTIC_USE_AGENT_STORE: "True", TORCHELASTIC_RESTART_COUNT: "2" };

describe("torchrun's variables", () => {
  it("with the agent's store: join it, under a prefix that all agents' ranks agree on, however often each was restarted", () => {
    expect(rankFromEnvironment({ ...TORCHRUN, ...AGENT })).toEqual({
      rank: 5,
      size: 8,
      localRank: 1,
      localSize: 4,
      address: "node7.cluster",
      port: 29400,
      store: "join",
      prefix: "/stroma",
      launcher: "torchrun",
    });
  });

  it("set by hand, or by a launcher whose agent serves no store: rank 0 serves it", () => {
    for (const agent of [undefined, "False"])
      expect(rankFromEnvironment({ ...TORCHRUN, TORCHELASTIC_USE_AGENT_STORE: agent })).toMatchObject({
        store: "host",
        launcher: "torchrun",
      });
  });

  it("of our own launcher: the attempt is in the prefix", () => {
    expect(rankFromEnvironment({ ...TORCHRUN, STROMA_ATTEMPT: "3" })).toMatchObject({
      store: "host",
      launcher: "stroma",
      prefix: "/stroma/attempt_3",
    });
  });

  it("an address and a port alone, or empty variables, are no rank", () => {
    expect(rankFromEnvironment({})).toBeNull();
    expect(rankFromEnvironment({ MASTER_ADDR: "a", MASTER_PORT: "1" })).toBeNull();
    expect(rankFromEnvironment({ RANK: "", WORLD_SIZE: "" })).toBeNull();
  });

  it("a half of them is refused, naming what is set and what is missing: any half", () => {
    const names = Object.keys(TORCHRUN) as (keyof typeof TORCHRUN)[];
    fc.assert(
      fc.property(fc.subarray(names, { maxLength: names.length - 1 }), (kept) => {
        fc.pre(kept.some((name) => !name.startsWith("MASTER")));
        const { code, message, details } = refused(Object.fromEntries(kept.map((name) => [name, TORCHRUN[name]])));
        expect(code).toBe("CONFIG");
        expect(details).toEqual({ set: kept, missing: names.filter((name) => !kept.includes(name)) });
        for (const name of kept) expect(message).toContain(`${name}=${TORCHRUN[name]}`);
      }),
    );
    const { LOCAL_RANK: _rank, LOCAL_WORLD_SIZE: _size, ...half } = TORCHRUN;
    expect(refused(half).message).toBe(
      "[distributed] the environment names a rank only in part: set are RANK=5, WORLD_SIZE=8, MASTER_ADDR=node7.cluster, " +
        "MASTER_PORT=29400; missing are LOCAL_RANK, LOCAL_WORLD_SIZE. One rank on each machine: LOCAL_RANK=0 " +
        "LOCAL_WORLD_SIZE=1. No rank at all: unset them",
    );
  });

  it("any complete set comes back as it was", () => {
    const layout = fc
      .tuple(fc.integer({ min: 1, max: 64 }), fc.integer({ min: 1, max: 64 }))
      .chain(([nodes, localSize]) =>
        fc.record({
          size: fc.constant(nodes * localSize),
          localSize: fc.constant(localSize),
          rank: fc.nat(nodes * localSize - 1),
          localRank: fc.nat(localSize - 1),
          port: fc.integer({ min: 1, max: 65_535 }),
          address: fc.oneof(fc.domain(), fc.ipV4(), fc.ipV6()),
        }),
      );
    fc.assert(
      fc.property(layout, (spec) => {
        const { rank, size, localRank, localSize, address, port } = spec;
        const env = { RANK: rank, WORLD_SIZE: size, LOCAL_RANK: localRank, LOCAL_WORLD_SIZE: localSize };
        const text = Object.fromEntries(Object.entries({ ...env, MASTER_PORT: port }).map(([k, v]) => [k, String(v)]));
        expect(rankFromEnvironment({ ...text, MASTER_ADDR: address })).toMatchObject(spec);
      }),
    );
  });

  it.each([
    ["RANK", "-1"],
    ["RANK", "NaN"],
    ["RANK", "1.5"],
    ["RANK", "0x1"],
    ["RANK", " 1"],
    ["RANK", "1e3"],
    ["RANK", "99999999999999999999"],
    ["WORLD_SIZE", "0"],
    ["WORLD_SIZE", "4294967296"],
    ["LOCAL_WORLD_SIZE", "0"],
    ["MASTER_PORT", "0"],
    ["MASTER_PORT", "70000"],
    ["MASTER_ADDR", "a b"],
    ["MASTER_ADDR", "tcp://a"],
    ["MASTER_ADDR", "a\n"],
  ])("%s=%j is refused by name", (name, value) => {
    const error = refused({ ...TORCHRUN, [name]: value });
    expect([error.code, error.details.name]).toEqual(["CONFIG", name]);
    expect(error.message).toContain(`at ${name}`);
  });

  it.each([
    [{ RANK: "8" }, "rank 8 of 8: ranks count from 0 to 7"],
    [{ LOCAL_RANK: "4" }, "local rank 4 of 4: they count from 0 to 3"],
    [{ LOCAL_WORLD_SIZE: "9" }, "9 ranks on this machine, of 8 in all"],
  ])("%j contradicts the others: the message shows them", (changed, message) => {
    const error = refused({ ...TORCHRUN, ...changed });
    expect(error.code).toBe("CONFIG");
    expect(error.message).toContain(message);
    for (const name of ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"])
      expect(error.message).toMatch(new RegExp(`\\b${name}=\\d`));
  });

  it("whatever stands in the variables: a rank within its bounds, null, or CONFIG", () => {
    const value = fc.oneof(
      fc.nat(9).map(String),
      fc.constantFrom("", "-1", "NaN", "1e2", "node[1-", "2(x3),1"),
      fc.string(),
    );
    const names = [
      ...[...Object.keys(TORCHRUN), "TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RESTART_COUNT", "STROMA_ATTEMPT"],
      ...["SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_STEP_ID", "SLURM_JOB_ID", "SLURM_NODEID"],
      ...["SLURM_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE", "SLURM_STEP_NODELIST"],
      ...["RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"].map((name) => `OMPI_COMM_WORLD_${name}`),
    ];
    let ranks = 0;
    fc.assert(
      fc.property(fc.record(Object.fromEntries(names.map((name) => [name, value])), { requiredKeys: [] }), (env) => {
        try {
          const spec = rankFromEnvironment(env as Environment);
          if (spec === null) return;
          ranks++;
          const { rank, size, localRank, localSize, address, port } = spec;
          expect(rank >= 0 && rank < size && localRank >= 0 && localRank < localSize && localSize <= size).toBe(true);
          expect(port > 0 && port < 65_536 && address.length > 0).toBe(true);
        } catch (error) {
          if (!(error instanceof StromaError)) throw error;
          expect(error.code).toBe("CONFIG");
        }
      }),
      { numRuns: 3000 },
    );
    expect(ranks).toBeLessThan(3000);
  });
});

const SLURM = {
  SLURM_JOB_ID: "4711",
  SLURM_STEP_ID: "3",
  SLURM_PROCID: "6",
  SLURM_LOCALID: "0",
  SLURM_NODEID: "3",
  SLURM_NTASKS: "7",
  SLURM_STEP_NUM_TASKS: "7",
  SLURM_STEP_TASKS_PER_NODE: "2(x3),1",
  SLURM_TASKS_PER_NODE: "4(x4)",
  SLURM_STEP_NODELIST: "node[09-11],gpu5",
  SLURM_JOB_NODELIST: "node[01-20],gpu5",
};

describe("Slurm's variables", () => {
  it("a step of several tasks: its first node is where ranks meet", () => {
    expect(rankFromEnvironment(SLURM)).toEqual({
      rank: 6,
      size: 7,
      localRank: 0,
      localSize: 1,
      address: "node09",
      port: PORTS.first + ((4711 * 17 + 3) % PORTS.count),
      store: "host",
      prefix: "/slurm/4711.3/attempt_0",
      launcher: "slurm",
      hosts: ["node09", "node10", "node11", "gpu5"],
    });
  });

  it("MASTER_ADDR and MASTER_PORT go first; a requeued job has another prefix", () => {
    expect(
      rankFromEnvironment({ ...SLURM, MASTER_ADDR: "10.0.0.1", MASTER_PORT: "1234", SLURM_RESTART_COUNT: "1" }),
    ).toMatchObject({ address: "10.0.0.1", port: 1234, prefix: "/slurm/4711.3/attempt_1" });
  });

  it("older names, and the request where no list tells", () => {
    expect(
      rankFromEnvironment({
        SLURM_JOBID: "9",
        SLURM_STEPID: "0",
        SLURM_PROCID: "3",
        SLURM_LOCALID: "1",
        SLURM_NPROCS: "4",
        SLURM_NTASKS_PER_NODE: "2",
        SLURM_NODELIST: "a[1-2]",
      }),
    ).toMatchObject({ rank: 3, size: 4, localRank: 1, localSize: 2, address: "a1", hosts: ["a1", "a2"] });
  });

  it("a batch script without srun, a single task and a job without a step are no ranks", () => {
    const { SLURM_STEP_ID: _id, SLURM_STEP_NUM_TASKS: _n, SLURM_STEP_NODELIST: _l, ...batch } = SLURM;
    expect(rankFromEnvironment({ ...batch, SLURM_PROCID: "0", SLURM_NODEID: "0" })).toBeNull();
    expect(
      rankFromEnvironment({ ...SLURM, SLURM_PROCID: "0", SLURM_NTASKS: "7", SLURM_STEP_NUM_TASKS: "1" }),
    ).toBeNull();
    expect(rankFromEnvironment({ SLURM_JOB_ID: "1", SLURM_JOB_NODELIST: "a", SLURM_NTASKS: "8" })).toBeNull();
    // No batch script has a task other than 0: something took the step away.
    expect(refused(batch).details.missing).toEqual(["SLURM_STEP_ID"]);
  });

  it("the port of every job and step is in the stated range, and neighbours differ", () => {
    fc.assert(
      fc.property(fc.nat(2 ** 31), fc.nat(1000), (job, step) => {
        const at = (j: number, s: number) =>
          rankFromEnvironment({ ...SLURM, SLURM_JOB_ID: String(j), SLURM_STEP_ID: String(s) })!.port;
        const port = at(job, step);
        expect(port >= PORTS.first && port < PORTS.first + PORTS.count).toBe(true);
        expect(at(job, step + 1)).not.toBe(port);
        expect(at(job + 1, step)).not.toBe(port);
      }),
    );
  });

  it("every rank of an uneven layout gets its node's count", () => {
    const counts = fc.array(fc.integer({ min: 1, max: 5 }), { minLength: 2, maxLength: 6 });
    fc.assert(
      fc.property(counts, (perNode) => {
        const size = perNode.reduce((a, b) => a + b, 0);
        let rank = 0;
        for (const [node, count] of perNode.entries())
          for (let local = 0; local < count; local++, rank++)
            expect(
              rankFromEnvironment({
                ...SLURM,
                SLURM_PROCID: String(rank),
                SLURM_LOCALID: String(local),
                SLURM_NODEID: String(node),
                SLURM_STEP_NUM_TASKS: String(size),
                SLURM_STEP_TASKS_PER_NODE: perNode.join(","),
              }),
            ).toMatchObject({ rank, size, localRank: local, localSize: count });
      }),
      { numRuns: 30 },
    );
  });

  it.each([
    [{ SLURM_STEP_NODELIST: "", SLURM_JOB_NODELIST: "" }, "missing is SLURM_STEP_NODELIST"],
    [{ SLURM_STEP_NODELIST: "node[1-" }, "a bracket without its other half"],
    [{ SLURM_STEP_TASKS_PER_NODE: "2(y3)" }, '"2(y3)" is not a count of tasks'],
    [{ SLURM_STEP_TASKS_PER_NODE: "3", SLURM_TASKS_PER_NODE: "" }, "SLURM_STEP_TASKS_PER_NODE=3 do not add up"],
    [{ SLURM_NODEID: "" }, "SLURM_NODEID, which says which one this is, is missing"],
    [{ SLURM_NODEID: "4" }, "counts 4 nodes"],
    [{ SLURM_LOCALID: "1" }, "local rank 1 of 1"],
    [{ SLURM_PROCID: "7" }, "rank 7 of 7"],
    [{ SLURM_PROCID: "-1" }, "at SLURM_PROCID"],
    [{ SLURM_STEP_ID: "batch" }, "at SLURM_STEP_ID"],
  ])("%j is refused", (changed, message) => {
    const error = refused({ ...SLURM, ...changed });
    expect(error.code).toBe("CONFIG");
    expect(error.message).toContain(message);
  });
});

const OPEN_MPI = {
  OMPI_COMM_WORLD_RANK: "3",
  OMPI_COMM_WORLD_SIZE: "4",
  OMPI_COMM_WORLD_LOCAL_RANK: "1",
  OMPI_COMM_WORLD_LOCAL_SIZE: "2",
};

describe("Open MPI's variables", () => {
  it("on one machine the loopback interface will do", () => {
    expect(
      rankFromEnvironment({ ...OPEN_MPI, OMPI_COMM_WORLD_LOCAL_RANK: "3", OMPI_COMM_WORLD_LOCAL_SIZE: "4" }),
    ).toMatchObject({
      rank: 3,
      size: 4,
      localRank: 3,
      localSize: 4,
      address: "127.0.0.1",
      port: 29_500,
      store: "host",
    });
  });

  it.each([
    ["1234.0;tcp://10.0.0.9,172.17.0.1:45919", "10.0.0.9"],
    ["prterun-a-7@0.0;tcp4://10.1.2.3:4000", "10.1.2.3"],
    ["1234.0;tcp6://[fe80::1,::2]:45919", "fe80::1"],
  ])("the machine of mpirun as stated by %s", (uri, address) => {
    for (const name of ["OMPI_MCA_orte_hnp_uri", "PRTE_MCA_prte_hnp_uri"])
      expect(rankFromEnvironment({ ...OPEN_MPI, [name]: uri })).toMatchObject({ address, launcher: "openmpi" });
  });

  it("on several machines without either it asks for MASTER_ADDR, which goes first", () => {
    expect(refused(OPEN_MPI).message).toContain("-x MASTER_ADDR=");
    const env = { ...OPEN_MPI, OMPI_MCA_orte_hnp_uri: "1.0;tcp://10.0.0.9:1", MASTER_ADDR: "b", MASTER_PORT: "77" };
    expect(rankFromEnvironment(env)).toMatchObject({ address: "b", port: 77 });
  });

  it("a job's number gives its ranks one port in the stated range, and other jobs others", () => {
    const ports = Array.from({ length: 50 }, (_, i) => {
      const env = { ...OPEN_MPI, MASTER_ADDR: "a", PMIX_NAMESPACE: `prterun-host-${i}@1` };
      return rankFromEnvironment(env)!.port;
    });
    for (const port of ports) expect(port >= PORTS.first && port < PORTS.first + PORTS.count).toBe(true);
    expect(new Set(ports).size).toBeGreaterThan(45);
  });

  it("one process is no distributed run; a half is refused; hostile values too", () => {
    const one = { RANK: "0", SIZE: "1", LOCAL_RANK: "0", LOCAL_SIZE: "1" };
    expect(
      rankFromEnvironment(Object.fromEntries(Object.entries(one).map(([k, v]) => [`OMPI_COMM_WORLD_${k}`, v]))),
    ).toBeNull();
    expect(refused({ ...OPEN_MPI, OMPI_COMM_WORLD_LOCAL_SIZE: "" }).details.missing).toEqual([
      "OMPI_COMM_WORLD_LOCAL_SIZE",
    ]);
    expect(refused({ ...OPEN_MPI, OMPI_COMM_WORLD_RANK: "4", MASTER_ADDR: "a" }).message).toContain("rank 4 of 4");
    expect(refused({ ...OPEN_MPI, OMPI_COMM_WORLD_SIZE: "-4" }).details.name).toBe("OMPI_COMM_WORLD_SIZE");
  });
});

describe("several sources at once", () => {
  it("torchrun's inside a Slurm task; mpirun's inside a Slurm task, whose number its ranks inherit; else Slurm's", () => {
    const mpi = { ...OPEN_MPI, MASTER_ADDR: "a" };
    expect(rankFromEnvironment({ ...SLURM, ...mpi, ...TORCHRUN })).toMatchObject({ launcher: "torchrun", rank: 5 });
    expect(rankFromEnvironment({ ...SLURM, ...mpi })).toMatchObject({ launcher: "openmpi", rank: 3 });
    expect(rankFromEnvironment(SLURM)).toMatchObject({ launcher: "slurm", rank: 6 });
    // Half of torchrun's does not fall through to the next: whoever set it meant it.
    expect(refused({ ...SLURM, RANK: "1" }).details.set).toEqual(["RANK"]);
  });

  it("only a rank other than 0 leaves stdout to the first", () => {
    expect([{}, { ...TORCHRUN, RANK: "0" }, TORCHRUN, { RANK: "1" }].map(isFirstRank)).toEqual([
      true,
      true,
      false,
      true,
    ]);
  });
});

const oracle = join(homedir(), ".cache/stromatolite/oracle/bin/torchrun");
if (!existsSync(oracle)) console.info(`left out: torchrun itself, which is not at ${oracle}`);

describe.skipIf(!existsSync(oracle))("torchrun itself", () => {
  it("starts ranks that know themselves and each other", { timeout: 300_000 }, () => {
    const script = fileURLToPath(new URL("../../support/print-rank.ts", import.meta.url));
    const node = [process.execPath, "--import", fileURLToPath(import.meta.resolve("tsx")), script];
    const clean = Object.fromEntries(Object.entries(process.env).filter(([name]) => !/^(VITEST|NODE_)/.test(name)));
    const ranksOf = (args: readonly string[]) =>
      execFileSync(oracle, [...args, "--nproc-per-node", "2", "--no-python", ...node], { env: clean, encoding: "utf8" })
        .trim()
        .split("\n")
        .map((line) => JSON.parse(line) as { rank: number; localRank: number; address: string })
        .sort((a, b) => a.rank - b.rank);
    const stated = (spec: object) =>
      [0, 1].map((rank) => ({ ...{ rank, size: 2, localRank: rank, localSize: 2, launcher: "torchrun" }, ...spec }));
    const own = ranksOf(["--master-addr", "127.0.0.1", "--master-port", "29417"]);
    expect(own).toMatchObject(stated({ address: "127.0.0.1", port: 29417 }));
    // Its agent serves a store of its own.
    expect(ranksOf(["--standalone"])).toMatchObject(stated({ store: "join", prefix: "/stroma" }));
  });
});
