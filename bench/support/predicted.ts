/** Predictions of the published runs on many cards: of each kind of card the rate of its products is fitted on one row. */
import type { ClusterProfile } from "../../src/plan/cluster.js";
import { type ScaleReport, simulateScale } from "../../src/plan/scale.js";
import { type PublishedRow, publishedRows } from "./published.js";

export interface Prediction {
  row: PublishedRow;
  report: ScaleReport;
  /** The row that its kind of card was fitted on. */
  fitted: boolean;
}

/** rates: fitted ones by kind of card, in floating-point operations a second. */
export function predictPublished(): { predictions: Prediction[]; rates: Record<string, number> } {
  const rates: Record<string, number> = {};
  const predictions = publishedRows().map((row): Prediction => {
    const { graph, request, fitted: kind } = row;
    const at = (flops: number) => simulateScale(graph, { ...request, cluster: withProducts(request.cluster, flops) });
    const first = kind !== null && rates[kind] === undefined;
    if (first) rates[kind] = rateFor(row.tokensPerSecond, (flops) => at(flops).tokensPerSecondPerRank);
    return { row, report: kind === null ? simulateScale(graph, request) : at(rates[kind]!), fitted: first };
  });
  return { predictions, rates };
}

/** The rate at which `predicted` is `published`, between bounds of what any card reaches. */
export function rateFor(published: number, predicted: (flops: number) => number): number {
  let [low, high] = [10e12, 2000e12];
  for (let i = 0; i < 30; i++) {
    const middle = Math.sqrt(low * high);
    if (predicted(middle) < published) low = middle;
    else high = middle;
  }
  return Math.sqrt(low * high);
}

function withProducts(cluster: ClusterProfile, flops: number): ClusterProfile {
  const { card } = cluster;
  return { ...cluster, card: { ...card, gemm: { ...card.gemm, bfloat16: { ...card.gemm.bfloat16, flops } } } };
}
