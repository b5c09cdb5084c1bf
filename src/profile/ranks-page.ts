/** profile.html of several ranks: what each rank's memory and time went into, on one axis. */
import { showSize } from "../plan/budget.js";
import type { ProfileDocument } from "./document.js";
import { collectiveMs, LANES } from "./lanes.js";
import { blocksOf, card, html, lanesOf, page, percent, ratio, share, time, wordsOf } from "./page-parts.js";
import { RANKS_PAGE_SCRIPT } from "./ranks-page-script.js";

/** A peak further from what was planned is marked: the plan promises 5 %. */
const PROMISED = 0.05;

const sum = <T>(list: readonly T[], of: (at: T) => number): number => list.reduce((total, at) => total + of(at), 0);
const off = ({ peakDeviceBytes: measured, predictedPeakDeviceBytes: planned }: ProfileDocument["summary"]): number =>
  Math.abs(measured / planned - 1);

/**
 * @param documents of all ranks, side by side
 * @param uncertainMs by how much the clocks of two ranks may differ
 */
export function ranksPage(documents: readonly ProfileDocument[], uncertainMs: number): string {
  const { model, parameters, plan } = documents[0]!;
  const endMs = Math.max(...documents.map((d) => d.rank!.beganMs + d.summary.stepMs));
  const busy = (d: ProfileDocument) => d.summary.busyMs.compute / endMs;
  const moving = sum(documents, (d) => d.summary.messages!.movingMs);
  const hidden = sum(documents, (d) => d.summary.messages!.hiddenMs);
  const highest = documents.reduce((a, b) => (b.summary.peakDeviceBytes > a.summary.peakDeviceBytes ? b : a));
  const worst = documents.reduce((a, b) => (off(b.summary) > off(a.summary) ? b : a));
  const facts = [
    `${documents.length} ranks`,
    `${parameters.toLocaleString("en-US")} parameters`,
    plan.schedule,
    `update ${plan.update}`,
    `recompute ${plan.recompute}`,
    `${plan.microBatches} micro-batch${plan.microBatches === 1 ? "" : "es"} on rank 0`,
    `clocks agree within ${time(uncertainMs)}`,
  ];
  const cards = [
    card(
      "Step time",
      time(endMs),
      `predicted ${time(Math.max(...documents.map((d) => d.summary.predictedStepMs)))} for the slowest rank, were no other waited for`,
    ),
    card(
      "Highest device peak",
      showSize(highest.summary.peakDeviceBytes),
      `on rank ${highest.rank!.rank}; furthest from its plan: rank ${worst.rank!.rank}, ${ratio(worst.summary.peakDeviceBytes, worst.summary.predictedPeakDeviceBytes)}`,
    ),
    card(
      "Messages hidden",
      share(hidden, moving),
      moving === 0
        ? "no messages but what all ranks agree on"
        : `of ${time(moving)} on their way, over all ranks, passed while the rank computed; ${showSize(sum(documents, (d) => d.summary.bytes.bytesSent))} sent`,
    ),
    card(
      "Compute busy",
      percent(sum(documents, busy) / documents.length),
      `the least on rank ${documents.reduce((a, b) => (busy(b) < busy(a) ? b : a)).rank!.rank}: ${percent(Math.min(...documents.map(busy)))}`,
    ),
  ];
  const blocks = blocksOf(documents);
  const data = {
    ...wordsOf(documents),
    endMs,
    ranks: documents.map((d) => ({
      ...lanesOf(d, blocks),
      beganMs: d.rank!.beganMs,
      busy: Object.fromEntries(LANES.map((lane) => [lane, lane === "compute" ? percent(busy(d)) : ""])),
    })),
  };
  const body = `<header><h1>${html(model)}: one optimizer step on ${documents.length} ranks</h1><p class="facts">${facts.map(html).join(" · ")}</p></header>
<section class="cards">${cards.join("")}</section>
<section class="chart" style="margin-top:12px">
<h2>What ran when</h2>
<div class="legend" id="legend"></div>
<canvas id="ranks" role="img" aria-label="What ran on each queue of each rank over the step"></canvas>
<p class="hint">Beside a rank's name: the share of the step in which it computed. Pale: a message that waited for the other end.
A lane of messages has a row for each other rank. Wheel: zoom. Drag: move. Double click: the whole step. Hover for what, when and how much.</p>
</section>
<section class="tables">
<div><h2>Device peaks</h2>${peaks(documents)}</div>
<div><h2>Time and messages</h2>${times(documents, endMs)}</div>
</section>`;
  return page(`${model}: profile of a step on ${documents.length} ranks`, body, data, RANKS_PAGE_SCRIPT);
}

const named = ({ rank }: ProfileDocument): string => `<a href="profile-rank-${rank!.rank}.html">rank ${rank!.rank}</a>`;

function peaks(documents: readonly ProfileDocument[]): string {
  const most = Math.max(...documents.flatMap((d) => [d.summary.peakDeviceBytes, d.summary.predictedPeakDeviceBytes]));
  const width = (bytes: number) => `style="width:${((bytes / most) * 100).toFixed(1)}%"`;
  const rows = documents.map((d) => {
    const { peakDeviceBytes: measured, predictedPeakDeviceBytes: planned } = d.summary;
    return (
      `<tr><td>${named(d)}</td><td class="pair"><span ${width(measured)}></span><span class="planned" ${width(planned)}></span></td>` +
      `<td class="n">${showSize(measured)}</td><td class="n">${showSize(planned)}</td>` +
      `<td class="n${off(d.summary) > PROMISED ? " over" : ""}">${(measured / planned).toFixed(3)}</td></tr>`
    );
  });
  return `<table><thead><tr><th></th><th>measured over predicted</th><th class="n">measured</th><th class="n">predicted</th><th class="n">ratio</th></tr></thead><tbody>${rows.join("")}</tbody></table>`;
}

function times(documents: readonly ProfileDocument[], endMs: number): string {
  const rows = documents.map((d) => {
    const { busyMs, bytes, messages } = d.summary;
    const { waitMs, movingMs, hiddenMs } = messages!;
    const figures = [
      percent(busyMs.compute / endMs),
      percent(collectiveMs(d) / endMs),
      showSize(bytes.bytesSent),
      showSize(bytes.bytesReceived),
      time(waitMs),
      time(movingMs),
      share(hiddenMs, movingMs),
    ];
    return `<tr><td>${named(d)}</td>${figures.map((f) => `<td class="n">${f}</td>`).join("")}</tr>`;
  });
  const heads = ["computes", "with all", "sent", "received", "messages wait", "on their way", "hidden"];
  return `<table><thead><tr><th></th>${heads.map((h) => `<th class="n">${h}</th>`).join("")}</tr></thead><tbody>${rows.join("")}</tbody></table>`;
}
