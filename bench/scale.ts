/**
 * Whether what the planner says of many cards, and of one card that offloads, is what others measured: published runs against
 * predictions. Of each kind of card one number is fitted, the rate of its products, on one row; all others are predicted.
 * ratio = predicted / published tokens a second, the median of the rows that nothing was fitted on. No GPU is used.
 *
 *   npm run bench -- scale [--json]
 */
import { parseArgs } from "node:util";
import { type PlanRequest, planAuto } from "../src/plan/auto.js";
import { planRanksAuto } from "../src/plan/auto-ranks.js";
import { type OffloadRow, offloadRows } from "./support/offloaded.js";
import { predictPublished, rateFor } from "./support/predicted.js";
import { median } from "./support/steps.js";

const { values } = parseArgs({ options: { json: { type: "boolean", default: false } } });

interface Row {
  source: string;
  what: string;
  published: number;
  predicted: number;
  errorPercent: number;
  /** The row that its kind of card was fitted on. */
  fitted: boolean;
  boundBy: string;
  publishedGiB?: number;
  predictedGiB?: number;
}
const rows: Row[] = [];
function record(row: Omit<Row, "errorPercent">): void {
  const errorPercent = (row.predicted / row.published - 1) * 100;
  rows.push({ ...row, errorPercent });
  if (values.json) return;
  const mark = row.fitted ? "fitted" : `${errorPercent >= 0 ? "+" : ""}${errorPercent.toFixed(1)} %`;
  const memory =
    row.publishedGiB === undefined ? "" : `  ${row.publishedGiB} GiB, predicted ${row.predictedGiB!.toFixed(1)}`;
  console.log(
    `${row.what.padEnd(74)}${row.published.toFixed(0).padStart(7)}${row.predicted.toFixed(0).padStart(7)}${mark.padStart(9)}  ${row.boundBy}${memory}`,
  );
}

const { rates, predictions } = predictPublished();
for (const { row, report, fitted } of predictions)
  record({
    source: row.source,
    what: row.what,
    published: row.tokensPerSecond,
    predicted: report.tokensPerSecondPerRank,
    fitted,
    boundBy: report.boundBy,
    publishedGiB: row.memory,
    predictedGiB: report.memory.total / 2 ** 30,
  });

const planned = ({ graph, request, devices, what }: OffloadRow, flops: number | null) => {
  const { profile } = request;
  const gemm = { ...profile.gemm, bfloat16: { ...profile.gemm.bfloat16, flops: flops ?? profile.gemm.bfloat16.flops } };
  const asked: PlanRequest = { ...request, profile: { ...profile, gemm } };
  const { report, policy } =
    devices === undefined ? planAuto(graph, asked) : planRanksAuto(graph, { ...asked, devices });
  if (!report.fits) throw new Error(`${what} does not fit: ${JSON.stringify(request.budget)}`);
  return {
    report,
    how: `our plan: ${devices === undefined ? "" : "pipeline, "}${report.order}, recompute ${policy.recompute}`,
  };
};
for (const row of offloadRows()) {
  const first = row.fitted !== null && rates[row.fitted] === undefined;
  if (first)
    rates[row.fitted!] = rateFor(row.tokensPerSecond, (flops) => planned(row, flops).report.predictedTokensPerSecond);
  const { report, how } = planned(row, row.fitted === null ? null : rates[row.fitted]!);
  record({
    source: row.source,
    what: `${row.what}; ${how}`,
    published: row.tokensPerSecond,
    predicted: report.predictedTokensPerSecond,
    fitted: first,
    boundBy: report.boundBy,
  });
}

const predicted = rows.filter((r) => !r.fitted);
const errors = predicted.map((r) => Math.abs(r.errorPercent));
const within = errors.filter((e) => e <= 15).length;
console.log(
  JSON.stringify({
    name: "scale",
    ratio: median(predicted.map((r) => r.predicted / r.published)),
    unit: "predicted / published tokens a second, the median of rows that nothing was fitted on",
    rows: predicted.length,
    within15Percent: within,
    medianErrorPercent: median(errors),
    worstErrorPercent: Math.max(...errors),
    fittedTeraflops: Object.fromEntries(Object.entries(rates).map(([kind, flops]) => [kind, flops / 1e12])),
    table: rows.map((r) => ({
      ...r,
      predicted: Math.round(r.predicted),
      errorPercent: Number(r.errorPercent.toFixed(1)),
    })),
  }),
);
