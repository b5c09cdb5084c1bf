import { defineConfig } from "vitest/config";

export default defineConfig({
  test: {
    include: ["tests/**/*.test.ts"],
    // Forked: a native fault then ends one file's worker and is reported, not the whole run. Two at a time: a third of the time
    // a file waits (for processes that start, ranks that are silent, a disk); more would only share the cores, all of which
    // each may use through libtorch.
    pool: "forks",
    maxWorkers: 2,
    testTimeout: 120_000,
    hookTimeout: 240_000,
    teardownTimeout: 20_000,
  },
});
