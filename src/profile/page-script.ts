/** The page's own script, plain text: it runs in the reader's browser and imports nothing. */
export const PAGE_SCRIPT = `
const LANE = 30, GAP = 6;
showTime(Math.max(data.stepMs, data.time[data.time.length - 1]));
const [memory, queues] = ["memory", "queues"].map((id) => document.getElementById(id));
const lanes = data.lanes.filter(([lane]) => data.run.some((r) => r[0] === lane));
const total = data.time.map((_, k) => data.stack.reduce((sum, column) => sum + column[k], 0));
/** All of the arena is allocated, used or not; the workspace stands on top. */
const workspace = data.stack[data.stack.length - 1];
const planned = data.time.map((_, k) => total[k] - workspace[k] + data.unused[k]);
const held = planned.map((below, k) => below + workspace[k]);

/** Index of the last time at or before t. */
function timeAt(t) {
  let low = 0, high = data.time.length;
  while (low < high) { const mid = (low + high) >> 1; if (data.time[mid] <= t) low = mid + 1; else high = mid; }
  return Math.max(0, low - 1);
}

/** The area between two step functions of data.time. */
function area({ g, x }, from, to, below, above, y, fill) {
  g.beginPath();
  for (let k = from; k <= to; k++) {
    const left = x(Math.max(data.time[k], view.from)), right = x(Math.min(data.time[k + 1] ?? whole.to, view.to));
    g.lineTo(left, y(above(k))); g.lineTo(right, y(above(k)));
  }
  for (let k = to; k >= from; k--) {
    const left = x(Math.max(data.time[k], view.from)), right = x(Math.min(data.time[k + 1] ?? whole.to, view.to));
    g.lineTo(right, y(below(k))); g.lineTo(left, y(below(k)));
  }
  g.closePath();
  g.fillStyle = fill;
  g.fill();
}

function hatch(g) {
  const tile = document.createElement("canvas");
  tile.width = tile.height = 8;
  const h = tile.getContext("2d");
  h.strokeStyle = style("unused");
  h.lineWidth = 1.5;
  h.beginPath(); h.moveTo(-2, 10); h.lineTo(10, -2); h.moveTo(-2, 2); h.lineTo(2, -2); h.moveTo(6, 10); h.lineTo(10, 6); h.stroke();
  return g.createPattern(tile, "repeat");
}

function line(g, width, y, colour, dash, text, above) {
  g.save();
  g.strokeStyle = g.fillStyle = style(colour);
  g.setLineDash(dash);
  g.lineWidth = 1.5;
  g.beginPath(); g.moveTo(LEFT, y); g.lineTo(width - RIGHT, y); g.stroke();
  g.textAlign = "right";
  g.setLineDash([]);
  const w = g.measureText(text).width, at = y + (above ? -9 : 10);
  g.globalAlpha = 0.85; g.fillStyle = style("panel"); g.fillRect(width - RIGHT - w - 8, at - 8, w + 6, 16);
  g.globalAlpha = 1; g.fillStyle = style(colour); g.fillText(text, width - RIGHT - 5, at);
  g.restore();
}

function drawMemory() {
  const c = begin(memory, 320), { g, width } = c, top = 22, bottom = c.height - 24;
  const highest = data.predicted.reduce((m, p) => Math.max(m, p[2]), data.peakBytes);
  const capped = data.capBytes !== null && data.capBytes < 2.2 * highest;
  const most = (capped ? Math.max(highest, data.capBytes) : highest) * 1.04;
  const y = (bytes) => bottom - (bytes / most) * (bottom - top);
  const step = steps(most, 5);
  g.textAlign = "right";
  for (let b = 0; b <= most; b += step) {
    g.strokeStyle = style("grid");
    g.beginPath(); g.moveTo(LEFT, y(b)); g.lineTo(width - RIGHT, y(b)); g.stroke();
    g.fillStyle = style("soft");
    g.fillText(size(b), LEFT - 8, y(b));
  }
  drawTimeAxis(c, top, bottom);
  g.save();
  g.beginPath(); g.rect(LEFT, 0, width - LEFT - RIGHT, bottom); g.clip();
  const [from, to] = [timeAt(view.from), timeAt(view.to)];
  const sum = new Float64Array(data.time.length);
  const inner = data.stack.length - 1;
  for (let s = 0; s < inner; s++) {
    const below = sum.slice(), column = data.stack[s];
    for (let k = 0; k < sum.length; k++) sum[k] += column[k];
    area(c, from, to, (k) => below[k], (k) => sum[k], y, style(data.kinds[s][0]));
  }
  area(c, from, to, (k) => sum[k], (k) => planned[k], y, hatch(g));
  area(c, from, to, (k) => planned[k], (k) => held[k], y, style("workspace"));
  g.strokeStyle = style("predicted");
  g.lineWidth = 1.25;
  g.setLineDash([4, 3]);
  g.beginPath();
  for (const [a, b, bytes] of data.predicted) {
    if (b < view.from || a > view.to) continue;
    g.lineTo(c.x(a), y(bytes)); g.lineTo(c.x(b), y(bytes));
  }
  g.stroke();
  g.restore();
  if (capped) line(g, width, y(data.capBytes), "cap", [7, 4], "device memory " + size(data.capBytes), y(data.capBytes) > 30);
  else if (data.capBytes !== null) {
    g.fillStyle = style("cap"); g.textAlign = "right";
    g.fillText("device memory " + size(data.capBytes) + ", far above", width - RIGHT - 5, 10);
  }
  const near = capped && Math.abs(y(data.capBytes) - y(data.peakBytes)) < 20;
  line(g, width, y(data.peakBytes), "ink", [], "peak " + size(data.peakBytes), !near && y(data.peakBytes) > 18);
  const px = c.x(data.peakAtMs);
  if (px >= LEFT && px <= width - RIGHT) {
    g.fillStyle = style("ink");
    g.beginPath(); g.moveTo(px, y(data.peakBytes)); g.lineTo(px - 6, y(data.peakBytes) - 9); g.lineTo(px + 6, y(data.peakBytes) - 9); g.fill();
  }
}

function drawQueues() {
  const c = begin(queues, lanes.length * (LANE + GAP) + 26), { g, width } = c, bottom = c.height - 22;
  drawTimeAxis(c, 0, bottom);
  for (const [n, [queue]] of lanes.entries()) {
    const top = n * (LANE + GAP);
    g.textAlign = "right";
    g.fillStyle = style("ink");
    g.fillText(queue, LEFT - 8, top + LANE / 2 - 6);
    g.fillStyle = style("soft");
    g.fillText(Math.round((data.busyMs[queue] / data.stepMs) * 100) + " % busy", LEFT - 8, top + LANE / 2 + 8);
    g.save();
    g.beginPath(); g.rect(LEFT, top, width - LEFT - RIGHT, LANE); g.clip();
    g.globalAlpha = 0.45; g.fillStyle = style("grid"); g.fillRect(LEFT, top, width, LANE); g.globalAlpha = 1;
    for (const r of data.run) {
      if (r[0] !== queue || r[5] < view.from || r[4] > view.to) continue;
      bar(c, r, ...row(data.peers[queue] ?? [], r[8], top, LANE));
    }
    g.restore();
  }
}

function legends() {
  const chip = (colour, words) => "<span><i style='background:" + colour + "'></i>" + words + "</span>";
  const stroke = (colour, kind, words) => "<span><i class='stroke' style='border-top:2px " + kind + " " + colour + "'></i>" + words + "</span>";
  const present = data.kinds.filter((_, s) => data.stack[s].some((b) => b > 0));
  document.getElementById("memory-legend").innerHTML = present.map(([k, words]) => chip("var(--" + k + ")", words)).join("") +
    chip("repeating-linear-gradient(135deg, var(--unused) 0 2px, transparent 2px 4px)", "arena, nothing in it") +
    stroke("var(--predicted)", "dashed", "predicted") + stroke("var(--ink)", "solid", "measured peak") +
    (data.capBytes === null ? "" : stroke("var(--cap)", "dashed", "device memory"));
  const used = data.ops.map((op, k) => [op, k]).filter(([, k]) => data.run.some((r) => r[1] === k));
  const words = Object.fromEntries(data.kinds);
  document.getElementById("queue-legend").innerHTML = used.map(([op, k]) => chip("var(--" + op + ")", k < data.computeOps ? op : data.copies + " of " + words[op])).join("");
}

const running = (lane, t, peer = -1) => data.run.find((r) => r[0] === lane && r[8] === peer && r[4] <= t && t < r[5]);
function hover(event, canvas) {
  const t = timeOf(event, canvas);
  if (t < view.from || t > view.to) return show(event, []);
  if (canvas === queues) {
    const y = event.clientY - canvas.getBoundingClientRect().top, lane = lanes[Math.floor(y / (LANE + GAP))];
    const r = lane && running(lane[0], t, peerAt(data.peers[lane[0]] ?? [], y % (LANE + GAP), LANE) ?? -1);
    return show(event, r ? describe(r) : lane ? [lane[1] + ": idle at " + ms(t)] : []);
  }
  const k = timeAt(t), lines = [ms(t) + ": " + size(held[k]) + " held"];
  for (let s = data.stack.length - 1; s >= 0; s--) if (data.stack[s][k] > 0) lines.push("  " + size(data.stack[s][k]).padEnd(9) + data.kinds[s][1]);
  const unused = data.unused[k];
  if (unused > 0) lines.push("  " + size(unused).padEnd(9) + "arena, nothing in it");
  const r = running("compute", t);
  if (r) lines.push(describe(r)[0]);
  show(event, lines);
}
legends();
follow([memory, queues], () => { drawMemory(); drawQueues(); }, hover);
`;
