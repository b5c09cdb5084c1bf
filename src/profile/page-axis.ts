/** What the scripts of the pages have in common: sizes, an axis of time that one zooms and moves, words beside the pointer. */

/** Before a page's own script. */
export const TIME_AXIS = String.raw`
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const LEFT = 84, RIGHT = 16;
const style = (name) => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
const tip = document.getElementById("tip");
/** Set by the page: the whole of its time, and the part that is shown. */
let whole = { from: 0, to: 1 }, view = whole;
function showTime(to) {
  whole = { from: 0, to: to || 1 };
  view = { ...whole };
}

function size(bytes) {
  const [unit, scale] = bytes >= 1e9 ? ["GB", 1e9] : bytes >= 1e6 ? ["MB", 1e6] : ["kB", 1e3];
  return bytes === 0 ? "0" : Number((bytes / scale).toPrecision(3)) + " " + unit;
}
const ms = (t) => (t >= 1e4 ? (t / 1e3).toFixed(1) + " s" : t >= 1e3 ? (t / 1e3).toFixed(2) + " s" : Number(t.toPrecision(3)) + " ms");
function steps(span, most) {
  const raw = span / most, unit = 10 ** Math.floor(Math.log10(raw));
  return [1, 2, 5, 10].map((m) => m * unit).find((s) => s >= raw);
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
/** One row for each peer, so that messages on their way at once are all seen. */
function row(peers, peer, top, height) {
  const n = Math.max(1, peers.length), k = Math.max(0, peers.indexOf(peer));
  return [top + (k * height) / n, height / n - (n > 1 ? 1 : 0)];
}
/** The peer in whose row the pointer is. */
const peerAt = (peers, y, height) => peers[Math.max(0, Math.min(peers.length - 1, Math.floor((y / height) * peers.length)))];
/** A row of the document: lane, operation, block, micro-batch, start, end, predicted, bytes, peer, when both ends were there. */
function describe(r) {
  const lasted = r[5] - r[4], moving = r[9] === null ? lasted : r[5] - r[9];
  const what = r[8] >= 0 ? (r[0] === "send" ? "to" : "from") + " rank " + r[8] + ": " : r[7] > 0 ? "copy " + r[0] + " of " : "";
  return [
    what + data.ops[r[1]] + (r[2] < 0 ? "" : ", " + data.blocks[r[2]]) + (r[3] < 0 ? "" : ", micro-batch " + r[3]),
    ms(r[4]) + " to " + ms(r[5]) + ": " + ms(lasted) + ", predicted " + ms(r[6]),
    ...(r[9] === null ? [] : ["waited " + ms(r[9] - r[4]) + " for the other end, on its way " + ms(moving)]),
    ...(r[7] > 0 ? [size(r[7]) + ", " + size(moving > 0 ? (r[7] / moving) * 1e3 : 0) + "/s"] : []),
  ];
}
/** A bar; what of a message was waiting for the other end is pale. */
function bar(c, r, top, height) {
  const { g } = c, at = (t) => c.x(t), left = at(r[4]), w = Math.max(0.6, at(r[5]) - left);
  g.fillStyle = style(data.ops[r[1]]);
  if (r[9] !== null) {
    g.globalAlpha = 0.28; g.fillRect(left, top, w, height); g.globalAlpha = 1;
    const moved = at(r[9]);
    g.fillRect(moved, top, Math.max(0.8, left + w - moved), height);
  } else g.fillRect(left, top, w > 3 ? w - 0.7 : w, height);
  if (w < 60 || height < 14 || r[9] !== null) return;
  g.fillStyle = "#ffffff"; g.textAlign = "left";
  const text = data.ops[r[1]] + (r[2] < 0 ? "" : " " + data.blocks[r[2]].split(".").slice(-2).join("."));
  if (g.measureText(text).width < w - 10) g.fillText(text, Math.max(left, LEFT) + 5, top + height / 2);
}

/** Wheel, drag and double click on canvases with the axis; draw() and hover(event, canvas) are the page's. */
function follow(canvases, draw, hover) {
  function look(from, to) {
    const span = Math.min(whole.to - whole.from, Math.max((whole.to - whole.from) / 1e4, to - from));
    const start = Math.max(whole.from, Math.min(from, whole.to - span));
    view = { from: start, to: start + span };
    draw();
  }
  let drag = null;
  for (const canvas of canvases) {
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
  draw();
}
`;
