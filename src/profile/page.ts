/** profile.html: one file that needs no network. The text says the figures; canvases show memory and queues over time. */
import { showSize } from "../plan/budget.js";
import { type Holder, MEMORY_KINDS, type ProfileDocument } from "./document.js";
import { collectiveMs, movingMs } from "./lanes.js";
import { blocksOf, card, html, KIND_WORDS, lanesOf, page, percent, ratio, share, time, wordsOf } from "./page-parts.js";
import { PAGE_SCRIPT } from "./page-script.js";

export function profilePage(document: ProfileDocument): string {
  const { summary: s, plan, rank } = document;
  const whose = rank === null ? "" : `, rank ${rank.rank} of ${rank.ranks}`;
  const facts = [
    `${document.parameters.toLocaleString("en-US")} parameters`,
    plan.schedule === "breadthFirst" ? "breadth-first" : "depth-first",
    `update ${plan.update}`,
    `recompute ${plan.recompute}`,
    `clip ${plan.clip}`,
    `${plan.microBatches} micro-batch${plan.microBatches === 1 ? "" : "es"}`,
    ...(plan.dims === null
      ? []
      : [
          Object.entries(plan.dims)
            .map(([name, size]) => `${name} ${size}`)
            .join(", "),
        ]),
    `${plan.state.storage}, ${plan.state.optimizer}`,
    ...(document.device === null ? [] : [`device ${document.device}`]),
  ];
  const compute = s.busyMs.compute / s.stepMs;
  const moved = [
    [s.bytes.bytesToDevice, "in"],
    [s.bytes.bytesFromDevice, "out"],
    [s.bytes.bytesLoaded, "loaded"],
    [s.bytes.bytesSaved, "saved"],
  ] as const;
  const traffic = moved.filter(([bytes]) => bytes > 0).map(([bytes, way]) => `${showSize(bytes)} ${way}`);
  const cards = [
    card("Step time", time(s.stepMs), `predicted ${time(s.predictedStepMs)}, ${ratio(s.stepMs, s.predictedStepMs)}`),
    card(
      "Device peak",
      showSize(s.peakDeviceBytes),
      `predicted ${showSize(s.predictedPeakDeviceBytes)}, ${ratio(s.peakDeviceBytes, s.predictedPeakDeviceBytes)}` +
        (s.capBytes === null
          ? ""
          : `; ${percent(s.peakDeviceBytes / s.capBytes)} of the ${showSize(s.capBytes)} there is`),
    ),
    s.copyMs === 0
      ? card("Copying hidden", "none", "nothing was copied: everything stays on the device")
      : card(
          "Copying hidden",
          percent(s.hiddenCopyMs / s.copyMs),
          `of ${time(s.copyMs)} ran while compute was busy; ${traffic.join(", ")}`,
        ),
    ...(s.messages === null
      ? []
      : [
          card(
            "Messages hidden",
            share(s.messages.hiddenMs, s.messages.movingMs),
            `of ${time(s.messages.movingMs)} passed while compute was busy; ${showSize(s.bytes.bytesSent)} sent, ${showSize(s.bytes.bytesReceived)} received`,
          ),
        ]),
    card("Compute busy", percent(compute), `${time(s.stepMs - s.busyMs.compute)} of the step without work on it`),
  ];
  const body = `<header><h1>${html(document.model)}: one optimizer step${whose}</h1><p class="facts">${facts.map(html).join(" · ")}</p></header>
<section class="cards">${cards.join("")}</section>
<p class="headline">${headline(document)}</p>
<section class="chart">
<h2>Device memory</h2>
<div class="legend" id="memory-legend"></div>
<canvas id="memory" height="300" role="img" aria-label="Bytes held on the device over the step, by kind"></canvas>
<h2>Queues</h2>
<div class="legend" id="queue-legend"></div>
<canvas id="queues" role="img" aria-label="What ran on each queue over the step"></canvas>
<p class="hint">Wheel: zoom. Drag: move. Double click: the whole step. Hover for what, when and how much.${rank === null ? "" : ` Pale: a message that waited for the other rank. <a href="profile.html">All ranks</a>`}</p>
</section>
<section class="tables">
<div><h2>Held at the peak</h2>${holders(document)}</div>
<div><h2>Time by operation</h2>${operations(document)}</div>
</section>`;
  return page(`${document.model}: profile of a step${whose}`, body, pageData(document), PAGE_SCRIPT);
}

function headline({ summary, instructions }: ProfileDocument): string {
  const { peak, peakDeviceBytes } = summary;
  const at = instructions[peak.instruction]!;
  const where = `${at.op}${at.block === null ? "" : ` of ${at.block}`}${at.microBatch === null ? "" : `, micro-batch ${at.microBatch}`}`;
  const parts = MEMORY_KINDS.map((kind) => [KIND_WORDS[kind], peak.byKind[kind]] as const)
    .concat([["unused arena", peak.unusedBytes]])
    .filter(([, bytes]) => bytes / peakDeviceBytes >= 0.005)
    .sort((a, b) => b[1] - a[1])
    .map(([words, bytes]) => `${words} ${showSize(bytes)} (${percent(bytes / peakDeviceBytes)})`);
  return `Memory was highest in <b>${html(where)}</b>, ${time(peak.atMs)} into the step: ${parts.join(", ")}.`;
}

function holders({ summary: { peak, peakDeviceBytes } }: ProfileDocument): string {
  const most = peak.top[0]?.bytes ?? 1;
  const row = ({ kind, block, bytes }: Holder) =>
    `<tr><td><i class="${kind}"></i>${KIND_WORDS[kind]}</td><td>${html(block ?? "")}</td>` +
    `<td class="bar"><span class="${kind}" style="width:${((bytes / most) * 100).toFixed(1)}%"></span></td>` +
    `<td class="n">${showSize(bytes)}</td><td class="n">${percent(bytes / peakDeviceBytes)}</td></tr>`;
  return `<table><thead><tr><th>what</th><th>block</th><th></th><th class="n">bytes</th><th class="n">of peak</th></tr></thead><tbody>${peak.top.map(row).join("")}</tbody></table>`;
}

function operations({ instructions, summary }: ProfileDocument): string {
  const groups = new Map<string, { count: number; ms: number; predictedMs: number; bytes: number; queue: string }>();
  for (const i of instructions) {
    const key = i.operand === null ? i.op : `${i.queue}: ${KIND_WORDS[i.operand]}`;
    const group = groups.get(key) ?? { count: 0, ms: 0, predictedMs: 0, bytes: 0, queue: i.queue };
    group.count++;
    group.ms += i.endMs - i.startMs;
    group.predictedMs += i.predictedEndMs - i.predictedStartMs;
    group.bytes += i.bytes;
    groups.set(key, group);
  }
  const rows = [...groups]
    .sort((a, b) => b[1].ms - a[1].ms)
    .map(
      ([key, g]) =>
        `<tr><td>${key}</td><td class="n">${g.count.toLocaleString("en-US")}</td><td class="n">${time(g.ms)}</td>` +
        `<td class="n">${time(g.predictedMs)}</td><td class="n">${percent(g.ms / summary.stepMs)}</td>` +
        `<td class="n">${g.bytes === 0 ? "" : showSize(g.bytes)}</td></tr>`,
    );
  return `<table><thead><tr><th>what</th><th class="n">times</th><th class="n">measured</th><th class="n">predicted</th><th class="n">of the step</th><th class="n">copied</th></tr></thead><tbody>${rows.join("")}</tbody></table>`;
}

/** What the script draws: the document in columns, names by number. */
function pageData(document: ProfileDocument): unknown {
  const { memory, summary } = document;
  return {
    ...wordsOf([document]),
    ...lanesOf(document, blocksOf([document])),
    stepMs: summary.stepMs,
    capBytes: summary.capBytes,
    peakBytes: summary.peakDeviceBytes,
    peakAtMs: summary.peak.atMs,
    busyMs: {
      ...summary.busyMs,
      collective: collectiveMs(document),
      send: movingMs(document, "send"),
      receive: movingMs(document, "receive"),
    },
    time: memory.timeMs,
    stack: MEMORY_KINDS.map((kind) => memory.bytes[kind]),
    unused: memory.unusedBytes,
    predicted: predictedHeld(document),
  };
}

/** [time, bytes] at every instruction of the compute queue: arena, slots and workspace that the plan expected then. */
function predictedHeld({ instructions, summary, holdings }: ProfileDocument): [number, number, number][] {
  const slots = new Float64Array(instructions.length);
  for (const h of holdings)
    if (h.space === "slot")
      for (let i = h.from + 1; i <= Math.min(h.to, instructions.length - 1); i++) slots[i]! += h.bytes;
  return instructions.flatMap((i, k) =>
    i.queue === "compute"
      ? [
          [i.startMs, i.endMs, summary.arenaBytes.device + slots[k]! + i.predictedWorkspaceBytes] as [
            number,
            number,
            number,
          ],
        ]
      : [],
  );
}
