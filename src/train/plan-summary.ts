/** A run's plan in one line, for whoever starts it. */
import type { Graph } from "../graph/types.js";
import { showSize } from "../plan/budget.js";
import { replicasOf, shardsOf, sharersOf, stageCount } from "../plan/mesh.js";
import { assignStages, STAGE_RULES, type StageRule, type Ties } from "../plan/stages.js";
import type { Placement, Stages } from "../plan/types.js";
import type { SettledOptions } from "./options.js";
import type { PlanFacts, TrainingPlan } from "./plan.js";

export function summarize(
  f: PlanFacts,
  predicted: TrainingPlan["predicted"],
  o: SettledOptions,
  graph: Graph,
  placement: Placement,
): string {
  const { stages } = placement;
  const shared = placement.arenas.sharedBytes !== undefined;
  const order = {
    breadthFirst: "breadth-first",
    depthFirst: "depth-first",
    oneForwardOneBackward: "one forward, one backward",
  }[f.order];
  const where = {
    none: "all on the device",
    host: `state in host memory${shared ? ", parameters where its ranks share it" : ""}`,
    disk: "state on disk",
    auto: `chosen for the budgets${shared ? ", parameters in host memory that ranks share" : ""}`,
  }[o.offload];
  const parts = [
    ...(stages === undefined ? [] : [`rank ${stages.rank} of ${stages.ranks}, ${meshText(graph, stages)}`]),
    where,
    order,
    `recompute ${f.recompute}`,
    `update ${f.update}`,
  ];
  if (f.fused > 1) parts.push(`${f.fused} micro-batches at once`);
  if (f.blocksMerged > 1) parts.push(`${f.blocksMerged} layers a block`);
  if (predicted !== null) {
    const { deviceBytes, hostBytes, diskBytes } = predicted.peaks;
    const beside = [
      ...(hostBytes > 0 ? [`${showSize(hostBytes)} beside it`] : []),
      ...(diskBytes > 0 ? [`${showSize(diskBytes)} on disk`] : []),
    ];
    parts.push([`device ${showSize(deviceBytes)}`, ...beside].join(", "));
  }
  return parts.join(", ");
}

/** e.g. "2 stages (alternating) of 2 shards". */
function meshText(graph: Graph, stages: Stages): string {
  const rule = ruleOf(graph, stages);
  const [shards, replicas] = [shardsOf(stages), replicasOf(stages)];
  const members = shards * replicas;
  const rows = sharersOf(stages) > 1 ? [`rows of ${sharersOf(stages)} ranks`] : [];
  const among = [
    ...rows,
    ...(shards > 1 ? [`${shards} shards`] : []),
    ...(replicas > 1 ? [`${replicas} replicas`] : []),
  ].join(" x ");
  if (members === 1) return `blocks ${rule}`;
  return stages.ranks === members ? among : `${stages.ranks / members} stages (${rule}) of ${among}`;
}

/** Which rule dealt out the blocks so, whoever chose it. */
function ruleOf(graph: Graph, stages: Stages): string {
  const same = (ties?: Ties) => (rule: StageRule) => {
    try {
      return assignStages(graph, stageCount(stages), rule, ties).join() === stages.of.join();
    } catch {
      return false; // too few blocks for this rule
    }
  };
  return STAGE_RULES.find(same()) ?? STAGE_RULES.find(same("together")) ?? "dealt out";
}
