/**
 * Who a rank is among the ranks of a run. A stage's ranks are its members, numbered replica by replica; shards of one
 * replica are neighbours: rank = (stage x replicas + replica) x shards + shard.
 */
import type { Stages } from "./types.js";

export const shardsOf = (stages?: Stages): number => stages?.shards ?? 1;
export const replicasOf = (stages?: Stages): number => stages?.replicas ?? 1;
/** Ranks that a stage has. */
export const membersOf = (stages?: Stages): number => shardsOf(stages) * replicasOf(stages);
export const stageCount = (stages: Stages): number => stages.ranks / membersOf(stages);
export const stageOf = (stages: Stages, rank = stages.rank): number => Math.floor(rank / membersOf(stages));
export const memberOf = (stages: Stages, rank = stages.rank): number => rank % membersOf(stages);
export const shardOf = (stages: Stages, rank = stages.rank): number => rank % shardsOf(stages);
export const replicaOf = (stages: Stages, rank = stages.rank): number =>
  Math.floor(memberOf(stages, rank) / shardsOf(stages));
export const rankAt = (stages: Stages, stage: number, member: number): number => stage * membersOf(stages) + member;

/** Whether the ranks of a replica read parameters from host memory that they have in common. */
export const sharesHost = (stages?: Stages): boolean => stages?.sharedHost === true && shardsOf(stages) > 1;

/** Ranks that share each row. */
export const sharersOf = (stages?: Stages): number => stages?.context ?? 1;
/** Groups of members that have micro-batches of their own. */
export const groupsOf = (stages?: Stages): number => membersOf(stages) / sharersOf(stages);

/** The micro-batches that a rank runs, ascending: dealt out to the groups of every stage in turn. */
export function batchesOf(stages: Stages | undefined, microBatches: number): number[] {
  const all = [...Array(microBatches).keys()];
  if (stages === undefined) return all;
  const mine = Math.floor(memberOf(stages) / sharersOf(stages));
  return all.filter((m) => m % groupsOf(stages) === mine);
}
