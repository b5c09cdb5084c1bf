/** Which format of parameters and optimizer state `stroma plan` answers with, where a person left it open. */
import type { Graph } from "../graph/types.js";
import type { AutoPlan } from "../plan/auto.js";
import { showSize } from "../plan/budget.js";
import { stateBytes } from "../plan/formats.js";
import type { StateFormat } from "../plan/types.js";

/** A model, and how it is planned in any format. */
export interface Way {
  graph(dtype: StateFormat["storage"]): Graph;
  planned(graph: Graph, state: StateFormat): Answer;
}

export interface Answer {
  result: AutoPlan;
  /** Written when it is asked for, so that notes are complete. */
  text(): string;
}

/**
 * The widest of `formats` (widest first) that fits; where none does, the leanest.
 * @param room bytes of all memories together
 * @param notes gains a line where another than the first is taken
 */
export function widestThatFits(
  way: Way,
  formats: readonly StateFormat[],
  room: number,
  clip: "none" | "block" | "global",
  notes: string[],
): Answer & { state: StateFormat } {
  const [first] = formats as [StateFormat];
  const last = formats.at(-1)!;
  const answers = new Map<StateFormat, Answer & { state: StateFormat }>();
  const planned = (state: StateFormat): Answer & { state: StateFormat } => {
    const answer = answers.get(state) ?? { ...way.planned(way.graph(state.storage), state), state };
    answers.set(state, answer);
    return answer;
  };
  const may = (state: StateFormat): boolean => {
    const graph = way.graph(state.storage);
    // A global norm is known when all gradients are: they wait in bfloat16, or what the wider format keeps is lost there.
    if (stateBytes(graph, state) + (clip === "global" ? 2 * elementsOf(graph) : 0) > room) return false;
    const { report, policy } = planned(state).result;
    const squeezed = state !== first && policy.update === "forward" && policy.retainedDType === "dynamic8";
    return report.fits && !squeezed;
  };
  const taken = (state: StateFormat) => {
    const answer = planned(state);
    if (state !== first) notes.push(formatNote(way.graph(first.storage), first, state, answer.result.report.fits));
    return answer;
  };
  if (first === last || may(first)) return taken(first);
  // Where the leanest does not fit, none does.
  const between = planned(last).result.report.fits ? formats.slice(1, -1).find(may) : undefined;
  return taken(between ?? last);
}

const elementsOf = ({ parameters }: Graph): number =>
  parameters.reduce((sum, { shape }) => sum + shape.reduce((a, b) => a * b, 1), 0);

/** What was chosen in the stead of what stroma train takes unasked. */
function formatNote(graph: Graph, first: StateFormat, state: StateFormat, fits: boolean): string {
  const { storage, masterWeight, optimizer } = state;
  const flags = [
    ...(storage === first.storage ? [] : [`--precision ${storage}`]),
    ...(masterWeight === first.masterWeight ? [] : [`--master-weight ${masterWeight}`]),
    ...(optimizer === first.optimizer ? [] : [`--optimizer ${optimizer}`]),
  ].join(" ");
  const bytes = showSize(stateBytes(graph, first));
  const weights = first.masterWeight === "none" ? first.storage : `${first.masterWeight} master weights`;
  const wide = `${weights} and ${first.optimizer}, ${bytes} of state,`;
  return fits ? `train with ${flags}: ${wide} do not fit` : `this is with ${flags}; ${wide} fit still less`;
}
