/**
 * Proves a tape against a graph without knowing how it was planned, in three passes:
 *
 * 1. check-form.ts: places lie inside their arenas, operands are where the graph has them and of their size.
 * 2. check-order.ts: waits order every two accesses of two queues to the same bytes, one of them a write.
 * 3. check-contents.ts: played in its written order, every instruction finds just its operands in its places, by bytes;
 *    micro-batches add to sums in index order, contributions to a boundary's gradient in the reverse order of their
 *    consumers (TAPE.md 2, rules 1, 2 and 9); every pass, norm, coefficient and update runs once, passes with parameters
 *    of the step's version; at the end every home holds the last version.
 */
import { StromaError } from "../errors.js";
import type { Graph } from "../graph/types.js";
import { Memory } from "./check-contents.js";
import { Facts, refuse } from "./check-facts.js";
import { checkForm, checkHeader } from "./check-form.js";
import { checkOrder } from "./check-order.js";
import type { Tape } from "./types.js";

export interface CheckOptions {
  /** The step tape that ran before. A flush needs it; a step with update "forward" follows itself by default. */
  after?: Tape;
}

/**
 * A step with update "forward" is checked as the first one, where no update is pending, and as one that follows `after`;
 * a flush after a step, and after itself, when it has nothing to do.
 *
 * Throws TAPE with the position and operation of the first instruction that is wrong (details.instruction), its operand,
 * what the place holds and what it should.
 */
export function checkTape(graph: Graph, tape: Tape, options: CheckOptions = {}): void {
  const { after } = options;
  checkHeader(graph, tape);
  const facts = new Facts(graph, tape.state, tape.stages);
  checkForm(facts, tape);
  checkOrder(facts, tape);
  if (after !== undefined) {
    checkHeader(graph, after);
    checkForm(facts, after);
    for (const field of ["placement", "state", "stages"] as const)
      if (JSON.stringify(after[field]) !== JSON.stringify(tape[field]))
        refuse(tape, -1, `its ${field} differs from that of the tape before it`);
    if (after.kind !== "step" || after.update !== tape.update)
      refuse(
        tape,
        -1,
        `expected a step with update "${tape.update}" before it, got a ${after.kind} with "${after.update}"`,
      );
  }
  const memory = () => new Memory(facts, tape.placement, Math.max(1, tape.microBatches, after?.microBatches ?? 0));
  if (tape.kind === "flush") {
    if (after === undefined) throw new StromaError("TAPE", "[tape] a flush is checked after the step that it ends");
    const session = memory();
    for (const played of [after, tape, tape]) session.play(played);
    return;
  }
  const fresh = memory();
  fresh.play(tape);
  if (tape.update !== "forward") return;
  if (after === undefined) {
    fresh.play(tape);
    return;
  }
  const session = memory();
  session.play(after);
  session.play(tape);
}
