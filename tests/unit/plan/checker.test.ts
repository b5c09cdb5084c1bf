import { describe, expect, it } from "vitest";
import { type BlockScope, model } from "../../../src/graph/model.js";
import * as ops from "../../../src/graph/ops.js";
import { traceModel } from "../../../src/graph/trace.js";
import type { Graph } from "../../../src/graph/types.js";
import type { Value } from "../../../src/graph/value.js";
import { findModel } from "../../../src/models/registry.js";
import { checkTape } from "../../../src/plan/checker.js";
import { Intervals } from "../../../src/plan/intervals.js";
import { blockLayouts } from "../../../src/plan/layout.js";
import type { Policy } from "../../../src/plan/policy.js";
import type { Instruction, Tape } from "../../../src/plan/types.js";
import { writeTape } from "../../../src/plan/write-tape.js";
import { deriveWaits } from "./adversary.js";

/** A chain of six blocks; the last one, a loss, shares the first one's weight. */
const WIDTH = 48;
const tiny: Graph = traceModel(
  model<null>("chain", (m) => {
    const labels = m.input("labels", "int64", ["B"]);
    const input = m.input("x", "float32", ["B", WIDTH]);
    const layer = (p: BlockScope, x: Value) => ops.linear(x, p.param("weight", [WIDTH, WIDTH]));
    const x = m.block("first", (p) => layer(p, input));
    const y = m.repeat("layers", 4, x, layer);
    m.block("loss", (p) => {
      const z = ops.mul(layer(p.at("first"), y), p.lossScale("loss"));
      const loss = ops.sum(z, []);
      p.loss("loss", loss, { count: labels, ignore: -100 });
      return loss;
    });
    return undefined;
  }),
  null,
);
const resident: Policy = {
  schedule: "breadthFirst",
  recompute: "all",
  update: "end",
  clip: "global",
  state: { storage: "float32", masterWeight: "none", optimizer: "adamw" },
  microBatches: 3,
  dims: null,
  param: "device",
  optimizer: "device",
  boundary: "slot",
  retained: "device",
  retainedDType: "float32",
  prefetch: 0,
  parts: 1,
};
const streamed: Policy = {
  ...resident,
  update: "backward",
  clip: "block",
  dims: { B: 12 },
  param: "host",
  optimizer: "host",
  boundary: "host",
  prefetch: 1,
  parts: 2,
};
const forward: Policy = { ...streamed, update: "forward", clip: "global", retained: "host" };
const fromDisk: Policy = { ...streamed, optimizer: "disk" };
const mixed: Policy = {
  ...streamed,
  state: { storage: "bfloat16", masterWeight: "split16", optimizer: "adamw8bit" },
};
const kept: Policy = { ...resident, recompute: "none" };

type Of<K extends Instruction["op"]> = Extract<Instruction, { op: K }>;
type Wanted = Partial<Record<string, unknown>>;

/** Positions of the instructions with these fields. */
const all = (tape: Tape, wanted: Wanted): number[] =>
  [...tape.instructions.keys()].filter((k) =>
    Object.entries(wanted).every(([key, value]) => {
      const i = tape.instructions[k] as unknown as Record<string, unknown>;
      return key === "kind" ? (i.operand as { kind: string } | undefined)?.kind === value : i[key] === value;
    }),
  );
const at = (tape: Tape, wanted: Wanted): number => {
  const [first] = all(tape, wanted);
  if (first === undefined) throw new Error(`no ${JSON.stringify(wanted)}`);
  return first;
};
const get = <K extends Instruction["op"]>(tape: Tape, wanted: Wanted & { op: K }): Of<K> =>
  tape.instructions[at(tape, wanted)] as Of<K>;

/** Moves an instruction; every wait is derived anew for the new order, so that only the contents can be wrong. */
function move(tape: Tape, from: number, to: number): void {
  const [moved] = tape.instructions.splice(from, 1);
  tape.instructions.splice(to, 0, moved!);
  deriveWaits(tiny, tape);
}

function drop(tape: Tape, at: number): void {
  tape.instructions.splice(at, 1);
  deriveWaits(tiny, tape);
}

const check = (policy: Policy, change: (tape: Tape) => void, graph: Graph = tiny) => {
  const tape = structuredClone(writeTape(graph, policy).step);
  change(tape);
  return () => checkTape(graph, tape);
};

describe("the checker", () => {
  it.each(Object.entries({ resident, streamed, forward, fromDisk, mixed, kept }))(
    "accepts a tape that is %s",
    (_, policy) => {
      expect(check(policy, () => {})).not.toThrow();
      // Waits of another making are as good.
      expect(check(policy, (tape) => deriveWaits(tiny, tape))).not.toThrow();
    },
  );

  it("refuses a tape with any one of its waits left out", () => {
    for (const policy of [streamed, forward, fromDisk]) {
      const { step } = writeTape(tiny, policy);
      let waits = 0;
      for (const k of step.instructions.keys())
        for (const w of step.instructions[k]!.waits) {
          const tape = structuredClone(step);
          tape.instructions[k]!.waits = tape.instructions[k]!.waits.filter((other) => other !== w);
          expect(() => checkTape(tiny, tape), `wait of ${k} for ${w}`).toThrow(/does not wait for it/);
          waits++;
        }
      expect(waits).toBeGreaterThan(50);
    }
  });

  it("refuses a slab that is released one instruction early", () => {
    // Each fetch, moved to stand before the instruction that last reads what lies in its slab.
    const { step } = writeTape(tiny, { ...streamed, prefetch: 0, parts: 1 });
    let moved = 0;
    for (const k of all(step, { op: "copy", queue: "in", kind: "param" })) {
      const { to } = step.instructions[k] as Of<"copy">;
      const { offset, bytes } = step.places[to]!;
      const reader = step.instructions.slice(0, k).findLastIndex(
        (i) =>
          "params" in i &&
          i.params.some((p) => {
            const place = step.places[p]!;
            return place.space === "device" && place.offset < offset + bytes && offset < place.offset + place.bytes;
          }),
      );
      if (reader < 0) continue;
      const tape = structuredClone(step);
      move(tape, k, reader);
      expect(() => checkTape(tiny, tape), `fetch ${k} before ${reader}`).toThrow(/holds .*, expected/);
      moved++;
    }
    expect(moved).toBeGreaterThan(5);
  });

  it("refuses micro-batches that are summed in another order", () => {
    const last = (tape: Tape, microBatch: number) => at(tape, { op: "backward", block: 3, microBatch });
    const swap = (tape: Tape, again: boolean) => {
      const [a, b] = [last(tape, 1), last(tape, 2)];
      [tape.instructions[a], tape.instructions[b]] = [tape.instructions[b]!, tape.instructions[a]!];
      if (again) deriveWaits(tiny, tape);
    };
    expect(check(resident, (tape) => swap(tape, false))).toThrow(
      /adds micro-batch 2 to sums of block 3, which have seen 1/,
    );
    expect(check(streamed, (tape) => swap(tape, true))).toThrow(/micro-batch 2/);
  });

  it("refuses a tape that lacks any one write-back", () => {
    for (const policy of [streamed, fromDisk]) {
      const { step } = writeTape(tiny, policy);
      const stores = [...all(step, { op: "copy", queue: "out" }), ...all(step, { op: "copy", queue: "save" })];
      expect(stores.length).toBeGreaterThan(20);
      for (const k of stores) {
        const tape = structuredClone(step);
        drop(tape, k);
        expect(() => checkTape(tiny, tape), `store ${k}`).toThrow(/holds .*, expected/);
      }
    }
  });

  it("refuses a tape that lacks any one instruction", () => {
    for (const policy of [resident, forward, mixed]) {
      const { step } = writeTape(tiny, policy);
      for (const k of step.instructions.keys()) {
        const tape = structuredClone(step);
        drop(tape, k);
        expect(() => checkTape(tiny, tape), `instruction ${k}`).toThrow(/^\[tape\] /);
      }
    }
  });

  it("refuses an operand that is only partly there", () => {
    const half = (tape: Tape, kind: string) => {
      const copies = all(tape, { op: "copy", queue: "in", kind });
      const second = copies.find((k) => (tape.instructions[k] as Of<"copy">).at > 0)!;
      drop(tape, second);
    };
    expect(check(streamed, (tape) => half(tape, "state"))).toThrow(/state: device \d+\.\.\d+ holds .*, expected state/);
    expect(check(streamed, (tape) => half(tape, "param"))).toThrow(
      /params 0: device \d+\.\.\d+ holds .*, expected param/,
    );
  });

  it("refuses a range that stands at another offset inside its operand", () => {
    // Both halves of state land in the first half's place.
    const shifted = (tape: Tape) => {
      const copy = tape.instructions[at(tape, { op: "copy", queue: "in", kind: "state" })] as Of<"copy">;
      const place = tape.places[copy.to]!;
      tape.places.push({ ...place, offset: place.offset + 256 });
      copy.to = tape.places.length - 1;
      deriveWaits(tiny, tape);
    };
    expect(check({ ...streamed, parts: 1 }, shifted)).toThrow(/holds .*, expected/);
  });

  it("refuses the right bytes of an operand in the wrong half of a place", () => {
    const doubled = (tape: Tape) => {
      const second = tape.instructions[all(tape, { op: "copy", queue: "in", kind: "param" })[1]!] as Of<"copy">;
      const place = tape.places[second.to]!;
      // The first bytes again, to where the second part belongs.
      second.to = tape.places.push({ ...place, offset: place.offset + second.at }) - 1;
      second.at = 0;
      tape.placement.arenas.deviceBytes += place.bytes;
      deriveWaits(tiny, tape);
    };
    expect(check({ ...streamed, parts: 2 }, doubled)).toThrow(
      /holds param\(0\) after 0 updates from its byte 0 on, expected param\(0\) after 0 updates from its byte \d+ on/,
    );
  });

  it("refuses two writes that race, though nobody reads the first", () => {
    const { step } = writeTape(tiny, streamed);
    const tape = structuredClone(step);
    const out = tape.places[get(tape, { op: "forward", block: 0 }).out[0]!]!;
    const { from } = get(tape, { op: "copy", queue: "in", kind: "param" });
    const pass = at(tape, { op: "forward", block: 0 });
    const to = tape.places.push({ ...tape.places[from]!, space: "device", offset: out.offset }) - 1;
    tape.placement.arenas.deviceBytes += tape.places[from]!.bytes;
    for (const i of tape.instructions) i.waits = i.waits.map((w) => (w < pass ? w : w + 1));
    tape.instructions.splice(pass, 0, {
      op: "copy",
      queue: "in",
      operand: { kind: "param", block: 0 },
      from,
      to,
      at: 0,
      bytes: 256,
      waits: [],
    });
    expect(() => checkTape(tiny, tape)).toThrow(
      /forward of block 0.*writes device .*, which instruction \d+ \(.*\) writes, and does not wait for it/,
    );
  });

  it("refuses a cast of the version before its update", () => {
    const policy: Policy = { ...forward, state: mixed.state };
    const early = (tape: Tape) => move(tape, at(tape, { op: "cast", block: 2 }), at(tape, { op: "update", block: 2 }));
    expect(check(policy, () => {})).not.toThrow();
    expect(check(policy, early)).toThrow(/holds compute\(2\) after 0 updates, expected compute\(2\) after 1 updates/);
  });

  it("knows frozen parameters, which no update changes", () => {
    const graph = traceModel(
      model<null>("frozen", (m) => {
        const labels = m.input("labels", "int64", ["B"]);
        const weight = (p: BlockScope, name: string, trainable = true) => p.param(name, [WIDTH, WIDTH], { trainable });
        const input = m.input("x", "float32", ["B", WIDTH]);
        const x = m.block("first", (p) => ops.linear(input, weight(p, "a")));
        const y = m.block("half", (p) => ops.linear(ops.linear(x, weight(p, "a")), weight(p, "b", false)));
        const z = m.block("frozen", (p) => ops.linear(y, weight(p, "a", false)));
        m.block("loss", (p) => {
          const loss = ops.mul(ops.sum(z, []), p.lossScale("loss"));
          p.loss("loss", loss, { count: labels, ignore: -100 });
          return loss;
        });
        return undefined;
      }),
      null,
    );
    for (const policy of [resident, streamed, forward, mixed]) expect(check(policy, () => {}, graph)).not.toThrow();
    // The tail of half's parameters stays behind.
    const trainable = blockLayouts(graph, streamed.state)[1]!.trainableBytes;
    const headOnly = (tape: Tape) => {
      for (const i of tape.instructions)
        if (i.op === "copy" && i.queue === "in" && i.operand.kind === "param" && i.operand.block === 1)
          i.bytes = trainable;
    };
    expect(check({ ...streamed, parts: 1 }, headOnly, graph)).toThrow(/expected the frozen part of param\(1\)/);
  });

  it("knows a boundary of the step before from this step's", () => {
    // The host place of a boundary still holds the last step's when its store is gone.
    const lost = (tape: Tape) => drop(tape, at(tape, { op: "copy", queue: "out", kind: "x" }));
    expect(check(streamed, lost)).toThrow(/holds nothing, expected x/);
    const { step } = writeTape(tiny, forward);
    const first = at(step, { op: "copy", queue: "out", kind: "x" });
    const copy = step.instructions[first] as Of<"copy">;
    const tape = structuredClone(step);
    drop(tape, first);
    expect(() => checkTape(tiny, tape, { after: step }), JSON.stringify(copy)).toThrow(/expected x/);
  });

  describe("with update forward", () => {
    const { step, flush } = writeTape(tiny, forward);

    it("follows a step, and a flush follows both", () => {
      checkTape(tiny, step, { after: step });
      checkTape(tiny, flush!, { after: step });
      expect(() => checkTape(tiny, flush!)).toThrow(/a flush is checked after the step/);
      expect(() => checkTape(tiny, flush!, { after: writeTape(tiny, streamed).step })).toThrow(
        /differs|expected a step/,
      );
    });

    it("refuses a step that does not carry out what is pending before it computes", () => {
      const late = structuredClone(step);
      move(late, at(late, { op: "update", block: 2 }), at(late, { op: "forward", block: 2, microBatch: 1 }));
      expect(() => checkTape(tiny, late)).toThrow(
        /holds param\(2\) after 0 updates, expected param\(2\) after 1 updates/,
      );
    });

    it("refuses a retained gradient that the next step does not find", () => {
      const elsewhere = structuredClone(step);
      for (const k of all(elsewhere, { op: "copy", queue: "out", kind: "retained" })) {
        const copy = elsewhere.instructions[k] as Of<"copy">;
        if (copy.operand.block === 3) copy.to = elsewhere.places.push({ ...elsewhere.places[copy.to]!, offset: 0 }) - 1;
      }
      deriveWaits(tiny, elsewhere);
      expect(() => checkTape(tiny, elsewhere)).toThrow(/holds .*, expected/);
      const other = structuredClone(step);
      for (const i of other.instructions) if (i.op === "pack" && i.block === 3) i.dtype = "bfloat16";
      expect(() => checkTape(tiny, other)).toThrow(/block 3/);
    });

    it("refuses a flush that leaves an update out or at home unwritten", () => {
      const without = structuredClone(flush!);
      drop(without, at(without, { op: "update", block: 4 }));
      expect(() => checkTape(tiny, without, { after: step })).toThrow(/flush, .*lacks the update of block 4|expected/);
      const unwritten = structuredClone(flush!);
      drop(unwritten, at(unwritten, { op: "copy", queue: "out", kind: "state" }));
      expect(() => checkTape(tiny, unwritten, { after: step })).toThrow(
        /home of block \d: host .* expected state\(\d\) after 1 updates/,
      );
    });
  });

  it("refuses to go back through a kept graph whose parameters or inputs were written since", () => {
    const overwritten = (tape: Tape) => {
      // Block 0's forward again would give the very same numbers, into the place that block 1's graph holds.
      const input = get(tape, { op: "forward", block: 1, microBatch: 0 }).in[0]!;
      get(tape, { op: "forward", block: 0, microBatch: 2 }).out[0] = input;
      for (const i of tape.instructions) if ("microBatch" in i && i.block === 1 && i.microBatch === 2) i.in[0] = input;
    };
    expect(check(kept, overwritten)).toThrow(/holds x\(0, 0, 2\), expected x\(0, 0, 0\)/);
    const renamed = (tape: Tape) => {
      const i = get(tape, { op: "backward", block: 2, microBatch: 0 });
      i.params = [tape.places.push({ ...tape.places[i.params[0]!]! }) - 1];
    };
    expect(check(kept, renamed)).toThrow(/names other places than the forward/);
    // The same bytes cast anew.
    const recast = (tape: Tape) => {
      const again = structuredClone(get(tape, { op: "cast", block: 2 }));
      tape.instructions.splice(at(tape, { op: "backward", block: 2 }), 0, again);
      deriveWaits(tiny, tape);
    };
    const casting: Policy = { ...kept, state: mixed.state };
    expect(check(casting, () => {})).not.toThrow();
    expect(check(casting, recast)).toThrow(/was written after the forward whose graph still reads it/);
  });

  const tied = at(writeTape(tiny, resident).step, { op: "norm", block: 0 });

  it.each<[string, Policy, RegExp, (t: Tape) => void]>([
    [
      "a norm before a tied user's last backward",
      resident,
      /norm of block 0.*sums 0: .* holds .*, expected sums\(0\) of 3/,
      (t) => move(t, tied, at(t, { op: "turn", block: 5, microBatch: 2 })),
    ],
    [
      "a norm taken twice",
      resident,
      /takes the norm of block 0 again/,
      (t) => {
        t.instructions.splice(tied + 1, 0, structuredClone(t.instructions[tied]!));
      },
    ],
    [
      "an update before the coefficient",
      resident,
      /updates before the coefficient/,
      (t) => move(t, at(t, { op: "update", block: 2 }), at(t, { op: "coefficient" })),
    ],
    [
      "an update before its norm",
      { ...streamed, clip: "none" },
      /updates before the norm/,
      (t) => move(t, at(t, { op: "norm", block: 2 }), at(t, { op: "update", block: 2 })),
    ],
    [
      "a coefficient before a norm",
      resident,
      /without the norm of block/,
      (t) => move(t, at(t, { op: "coefficient" }), at(t, { op: "norm" })),
    ],
    [
      "a second coefficient",
      resident,
      /closes the step again/,
      (t) => {
        t.instructions.push({ op: "coefficient", waits: [] });
      },
    ],
    [
      "an update carried out twice",
      resident,
      /updates again/,
      (t) => {
        t.instructions.push(structuredClone(get(t, { op: "update", block: 1 })));
      },
    ],
    [
      "an update that is lacking",
      resident,
      /at its end: lacks the update of block 1/,
      (t) => drop(t, at(t, { op: "update", block: 1 })),
    ],
    [
      "a backward that is lacking",
      { ...resident, update: "backward", clip: "none" },
      /block 4.* holds sums\(4\) of 2 micro-batches|lacks the backward/,
      (t) => drop(t, at(t, { op: "backward", block: 4, microBatch: 2 })),
    ],
    [
      "a pack that is lacking",
      { ...forward, retained: "device" },
      /retained\(1\)|lacks the pack of block 1/,
      (t) => drop(t, at(t, { op: "pack", block: 1 })),
    ],
    [
      "a backward before its forward",
      resident,
      /runs before its forward/,
      (t) =>
        move(t, at(t, { op: "backward", block: 4, microBatch: 0 }), at(t, { op: "forward", block: 4, microBatch: 0 })),
    ],
    [
      "an update before another block's backward",
      { ...resident, clip: "none" },
      /updates before all backwards of block 0/,
      (t) => move(t, at(t, { op: "update", block: 3 }), at(t, { op: "backward", block: 0, microBatch: 1 })),
    ],
    [
      "a pack before its norm",
      forward,
      /packs a gradient before its norm/,
      (t) => move(t, at(t, { op: "norm", block: 2 }), at(t, { op: "pack", block: 2 })),
    ],
    [
      "an update after the next record is closed",
      { ...forward, retained: "device" },
      /updates after the record of its step/,
      (t) => move(t, at(t, { op: "update", block: 0 }), t.instructions.length - 1),
    ],
    [
      "a first micro-batch that adds",
      resident,
      /first is false at micro-batch 0/,
      (t) => {
        get(t, { op: "turn", microBatch: 0 }).first = false;
      },
    ],
    [
      "a gradient that is added to nothing",
      resident,
      /dIn 0 adds as contribution 1 of 1/,
      (t) => {
        get(t, { op: "backward", block: 2 }).add[0] = true;
      },
    ],
    [
      "a graph kept for nothing",
      resident,
      /keep is true; recompute all wants false/,
      (t) => {
        get(t, { op: "forward", block: 2 }).keep = true;
      },
    ],
    [
      "an update from another gradient",
      resident,
      /takes its gradient from retained; update end wants sums/,
      (t) => {
        get(t, { op: "update", block: 2 }).from = "retained";
      },
    ],
    [
      "state of another size",
      streamed,
      /state: place \d+ .* has \d+ bytes, expected/,
      (t) => {
        const u = get(t, { op: "update", block: 2 });
        u.state = u.param;
      },
    ],
    [
      "a copy beyond its place",
      streamed,
      /end beyond from/,
      (t) => {
        get(t, { op: "copy", queue: "in" }).bytes += 4096 * 9;
      },
    ],
    [
      "a pass that runs twice",
      resident,
      /runs again/,
      (t) => {
        t.instructions.splice(1, 0, structuredClone(t.instructions[0]!));
      },
    ],
    [
      "a gradient over its own input",
      resident,
      /writes bytes that it also reads/,
      (t) => {
        const i = get(t, { op: "backward", block: 3, microBatch: 1 });
        i.dIn[0] = i.in[0]!;
      },
    ],
    [
      "a wait that points forward",
      streamed,
      /waits for 9, which does not come before it/,
      (t) => {
        t.instructions[9]!.waits = [9];
      },
    ],
    [
      "a wait for the own queue",
      streamed,
      /of its own queue/,
      (t) => {
        const k = all(t, { op: "forward" })[1]!;
        t.instructions[k]!.waits = [all(t, { op: "forward" })[0]!];
      },
    ],
    [
      "a place beyond its arena",
      streamed,
      /ends beyond its arena/,
      (t) => {
        t.placement.arenas.deviceBytes -= 4096;
      },
    ],
    [
      "a place that is not aligned",
      streamed,
      /is not on a multiple of 256/,
      (t) => {
        t.places[get(t, { op: "turn" }).sums]!.offset += 4;
      },
    ],
    [
      "a slot beyond the tape's",
      resident,
      /ends beyond its slots/,
      (t) => {
        t.places.find((p) => p.space === "slot")!.offset = 99;
      },
    ],
    [
      "a disk copy of half a page",
      fromDisk,
      /no range of whole 4096 bytes/,
      (t) => {
        get(t, { op: "copy", queue: "load" }).bytes -= 256;
      },
    ],
    [
      "a copy on the wrong queue",
      streamed,
      /queue out wants/,
      (t) => {
        get(t, { op: "copy", queue: "in" }).queue = "out";
      },
    ],
    [
      "a boundary that is too small",
      streamed,
      /bytes, expected/,
      (t) => {
        t.dims = { B: 40 };
      },
    ],
    [
      "a home of another size",
      resident,
      /home of state\(1\) has/,
      (t) => {
        t.placement.homes[1]!.state!.bytes -= 4096;
      },
    ],
    [
      "homes that overlap",
      resident,
      /homes overlap/,
      (t) => {
        t.placement.homes[1]!.state!.offset = t.placement.homes[0]!.param!.offset;
      },
    ],
    [
      "a place that does not exist",
      resident,
      /place 999 is not one of/,
      (t) => {
        get(t, { op: "forward", block: 1 }).in[0] = 999;
      },
    ],
    [
      "parameters of another block",
      resident,
      /params 0: .*holds param\(2\).*, expected param\(1\)/,
      (t) => {
        get(t, { op: "forward", block: 1 }).params = get(t, { op: "forward", block: 2 }).params;
      },
    ],
    [
      "an operation that is none",
      resident,
      /jump is no operation/,
      (t) => {
        t.instructions[3] = { op: "jump" } as never;
      },
    ],
    [
      "a word that is none",
      resident,
      /expected clip to be one of none, block, global, got never/,
      (t) => {
        t.clip = "never" as never;
      },
    ],
    [
      "a file of another kind",
      resident,
      /is not a stromatolite tape of version 2/,
      (t) => {
        t.version = 1 as never;
      },
    ],
  ])("refuses %s", (_, policy, message, change) => {
    expect(check(policy, change)).toThrow(message);
    expect(check(policy, change)).toThrow(expect.objectContaining({ code: "TAPE" }));
  });

  it("names the instruction, its queue's place and what it holds", () => {
    const changed = check(streamed, (t) => drop(t, at(t, { op: "copy", queue: "in", kind: "state" })));
    expect(changed).toThrow(expect.objectContaining({ details: { instruction: expect.any(Number) } }));
    expect(changed).toThrow(
      /^\[tape\] instruction \d+ \(update of block \d\): state: device \d+\.\.\d+ holds .*, expected state\(\d\) after 0 updates$/,
    );
  });

  it("checks 25,000 instructions in about a second", () => {
    const graph = findModel("astro-13b").graph();
    const { step } = writeTape(graph, { ...streamed, microBatches: 105, dims: { B: 1, T: 512 }, parts: 4 });
    expect(step.instructions.length).toBeGreaterThan(25_000);
    const before = process.cpuUsage().user;
    checkTape(graph, step);
    // CPU time, so that a busy machine does not fail it; a scan over all places would take minutes.
    expect((process.cpuUsage().user - before) / 1e6).toBeLessThan(5);
  });
});

describe("intervals", () => {
  it("agree with a table of bytes", () => {
    const intervals = new Intervals<number>();
    const table: (number | undefined)[] = new Array(64).fill(undefined);
    let state = 1;
    const next = (n: number) => {
      state = (state * 48271) % 2147483647;
      return state % n;
    };
    for (let n = 0; n < 3000; n++) {
      const start = next(63);
      const end = start + 1 + next(64 - start);
      const kind = next(3);
      if (kind === 0) {
        intervals.set(start, end, n);
        table.fill(n, start, end);
      } else if (kind === 1) {
        intervals.set(start, end, undefined);
        table.fill(undefined, start, end);
      } else {
        intervals.change(start, end, (v) => (v ?? 0) + 1);
        for (let k = start; k < end; k++) table[k] = (table[k] ?? 0) + 1;
      }
      const [from, to] = [next(32), 32 + next(33)];
      const seen: (number | undefined)[] = [];
      intervals.each(from, to, (v, a, b) => {
        expect(a).toBe(from + seen.length);
        for (let k = a; k < b; k++) seen.push(v);
      });
      expect(seen).toEqual(table.slice(from, to));
    }
  });
});
