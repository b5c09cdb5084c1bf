/** The page's own script, plain text: it runs in the reader's browser and imports nothing. */
export const PAGE_SCRIPT = String.raw`
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const LEFT = 84, RIGHT = 16, LANE = 30, GAP = 6;
const whole = { from: 0, to: Math.max(data.stepMs, data.time[data.time.length - 1]) || 1 };
let view = { ...whole };
const style = (name) => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
const tip = document.getElementById("tip");
const [memory, queues] = ["memory", "queues"].map((id) => document.getElementById(id));
const lanes = [["compute", "compute"], ["in", "host to device"], ["out", "device to host"], ["load", "disk to host"], ["save", "host to disk"], ["send", "to other ranks"], ["receive", "from other ranks"]]
  .filter(([queue]) => data.run.some((r) => r[0] === queue));
const total = data.time.map((_, k) => data.stack.reduce((sum, column) => sum + column[k], 0));
/** All of the arena is allocated, used or not; the workspace stands on top. */
const workspace = data.stack[data.stack.length - 1];
const planned = data.time.map((_, k) => total[k] - workspace[k] + data.unused[k]);
const held = planned.map((below, k) => below + workspace[k]);

function size(bytes) {
  const [unit, scale] = bytes >= 1e9 ? ["GB", 1e9] : bytes >= 1e6 ? ["MB", 1e6] : ["kB", 1e3];
  return bytes === 0 ? "0" : Number((bytes / scale).toPrecision(3)) + " " + unit;
}
const ms = (t) => (t >= 1e4 ? (t / 1e3).toFixed(1) + " s" : t >= 1e3 ? (t / 1e3).toFixed(2) + " s" : Number(t.toPrecision(3)) + " ms");
function steps(span, most) {
  const raw = span / most, unit = 10 ** Math.floor(Math.log10(raw));
  return [1, 2, 5, 10].map((m) => m * unit).find((s) => s >= raw);
}
/** Index of the last time at or before t. */
function timeAt(t) {
  let low = 0, high = data.time.length;
  while (low < high) { const mid = (low + high) >> 1; if (data.time[mid] <= t) low = mid + 1; else high = mid; }
  return Math.max(0, low - 1);
}

function begin(canvas, height) {
  const ratio = window.devicePixelRatio || 1, width = canvas.clientWidth;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  canvas.style.height = height + "px";
  const g = canvas.getContext("2d");
  g.setTransform(ratio, 0, 0, ratio, 0, 0);
  g.font = "12px system-ui, 'DejaVu Sans', sans-serif";
  g.textBaseline = "middle";
  const x = (t) => LEFT + ((t - view.from) / (view.to - view.from)) * (width - LEFT - RIGHT);
  return { g, width, height, x };
}

function drawTimeAxis({ g, width, x }, top, bottom) {
  const step = steps(view.to - view.from, Math.max(2, (width - LEFT) / 120));
  g.textAlign = "center";
  const digits = Math.max(0, -Math.floor(Math.log10(step / (view.to >= 2000 ? 1000 : 1))));
  for (let t = Math.ceil(view.from / step) * step; t <= view.to; t += step) {
    g.strokeStyle = style("grid");
    g.beginPath(); g.moveTo(x(t), top); g.lineTo(x(t), bottom); g.stroke();
    g.fillStyle = style("soft");
    const text = view.to >= 2000 ? (t / 1000).toFixed(digits) + " s" : t.toFixed(digits) + " ms";
    if (x(t) < width - RIGHT - 12) g.fillText(text, x(t), bottom + 11);
  }
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
  for (const [n, [queue, name]] of lanes.entries()) {
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
      const left = c.x(r[4]), w = Math.max(0.6, c.x(r[5]) - left);
      g.fillStyle = style(data.ops[r[1]]);
      g.fillRect(left, top, w > 3 ? w - 0.7 : w, LANE);
      if (w < 60) continue;
      g.fillStyle = "#ffffff"; g.textAlign = "left";
      const text = data.ops[r[1]] + (r[2] < 0 ? "" : " " + data.blocks[r[2]].split(".").slice(-2).join("."));
      if (g.measureText(text).width < w - 10) g.fillText(text, Math.max(left, LEFT) + 5, top + LANE / 2);
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
  document.getElementById("queue-legend").innerHTML = used.map(([op, k]) => chip("var(--" + op + ")", k < data.computeOps ? op : "copy of " + words[op])).join("");
}

function describe(r) {
  const copy = r[7] > 0, lasted = r[5] - r[4];
  return [
    (copy ? "copy " + r[0] + " of " : "") + data.ops[r[1]] + (r[2] < 0 ? "" : ", " + data.blocks[r[2]]) + (r[3] < 0 ? "" : ", micro-batch " + r[3]),
    ms(r[4]) + " to " + ms(r[5]) + ": " + ms(lasted) + ", predicted " + ms(r[6]),
    ...(copy ? [size(r[7]) + ", " + size(lasted > 0 ? (r[7] / lasted) * 1e3 : 0) + "/s"] : []),
  ];
}
const running = (queue, t) => data.run.find((r) => r[0] === queue && r[4] <= t && t < r[5]);
const timeOf = (event, canvas) => {
  const box = canvas.getBoundingClientRect();
  return view.from + ((event.clientX - box.left - LEFT) / (box.width - LEFT - RIGHT)) * (view.to - view.from);
};
function show(event, lines) {
  tip.hidden = lines.length === 0;
  if (tip.hidden) return;
  tip.textContent = lines.join("\n");
  tip.style.left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8) + "px";
  tip.style.top = Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 8) + "px";
}
function hover(event, canvas) {
  const t = timeOf(event, canvas);
  if (t < view.from || t > view.to) return show(event, []);
  if (canvas === queues) {
    const lane = lanes[Math.floor((event.clientY - canvas.getBoundingClientRect().top) / (LANE + GAP))];
    const r = lane && running(lane[0], t);
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
const draw = () => { drawMemory(); drawQueues(); };
function look(from, to) {
  const span = Math.min(whole.to - whole.from, Math.max((whole.to - whole.from) / 1e4, to - from));
  const start = Math.max(whole.from, Math.min(from, whole.to - span));
  view = { from: start, to: start + span };
  draw();
}
let drag = null;
for (const canvas of [memory, queues]) {
  canvas.addEventListener("wheel", (event) => {
    event.preventDefault();
    const t = timeOf(event, canvas), by = event.deltaY > 0 ? 1.25 : 0.8;
    look(t - (t - view.from) * by, t + (view.to - t) * by);
  }, { passive: false });
  canvas.addEventListener("pointerdown", (event) => { drag = { x: event.clientX, view }; canvas.setPointerCapture(event.pointerId); });
  canvas.addEventListener("pointerup", () => { drag = null; });
  canvas.addEventListener("pointermove", (event) => {
    if (drag === null) return hover(event, canvas);
    const shift = ((event.clientX - drag.x) / (canvas.clientWidth - LEFT - RIGHT)) * (drag.view.to - drag.view.from);
    look(drag.view.from - shift, drag.view.to - shift);
  });
  canvas.addEventListener("pointerleave", () => { tip.hidden = true; });
  canvas.addEventListener("dblclick", () => look(whole.from, whole.to));
}
addEventListener("resize", draw);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
legends();
draw();
`;
