/** The script of the page of all ranks, after TIME_AXIS: the lanes of every rank under each other. */
export const RANKS_PAGE_SCRIPT = `
const LANE = 20, GAP = 2, BETWEEN = 18;
showTime(data.endMs);
const canvas = document.getElementById("ranks");
/** Lanes of all ranks from top to bottom, each with its rank. */
const shown = [];
let height = 0;
for (const [rank, { run, peers, beganMs, busy }] of data.ranks.entries()) {
  const used = data.lanes.filter(([lane]) => run.some((r) => r[0] === lane));
  for (const [n, [lane, words]] of used.entries()) {
    const rows = (peers[lane] ?? []).length;
    const tall = lane === "compute" ? LANE + 4 : Math.max(LANE, Math.min(rows, 8) * 7);
    shown.push({ rank, lane, words, top: height, tall, first: n === 0, peers: peers[lane] ?? [], beganMs, busy: busy[lane],
      run: run.filter((r) => r[0] === lane).map((r) => { const t = r.slice(); t[4] += beganMs; t[5] += beganMs; if (t[9] !== null) t[9] += beganMs; return t; }) });
    height += tall + GAP;
  }
  height += BETWEEN;
}

function draw() {
  const c = begin(canvas, height + 12), { g, width } = c, bottom = height - BETWEEN + 4;
  drawTimeAxis(c, 0, bottom);
  for (const l of shown) {
    g.textAlign = "right";
    g.fillStyle = style(l.first ? "ink" : "soft");
    g.fillText(l.first ? "rank " + l.rank : l.lane, LEFT - 8, l.top + l.tall / 2);
    if (l.first) {
      g.textAlign = "left"; g.fillStyle = style("soft"); g.font = "11px system-ui, 'DejaVu Sans', sans-serif";
      g.fillText(l.busy, 4, l.top + l.tall / 2);
      g.font = "12px system-ui, 'DejaVu Sans', sans-serif";
    }
    g.save();
    g.beginPath(); g.rect(LEFT, l.top, width - LEFT - RIGHT, l.tall); g.clip();
    g.globalAlpha = 0.45; g.fillStyle = style("grid"); g.fillRect(LEFT, l.top, width, l.tall); g.globalAlpha = 1;
    for (const r of l.run) {
      if (r[5] < view.from || r[4] > view.to) continue;
      bar(c, r, ...row(l.peers, r[8], l.top, l.tall));
    }
    g.restore();
  }
}
function hover(event) {
  const t = timeOf(event, canvas), y = event.clientY - canvas.getBoundingClientRect().top;
  const l = shown.find((s) => y >= s.top && y < s.top + s.tall + GAP);
  if (t < view.from || t > view.to || !l) return show(event, []);
  const peer = peerAt(l.peers, y - l.top, l.tall) ?? -1;
  const r = l.run.find((i) => i[8] === peer && i[4] <= t && t < i[5]);
  const where = "rank " + l.rank + ", " + l.words + (peer < 0 ? "" : ", rank " + peer);
  show(event, r ? [where, ...describe(r)] : [where, "idle at " + ms(t)]);
}
const used = data.ops.map((op, k) => [op, k]).filter(([, k]) => data.ranks.some(({ run }) => run.some((r) => r[1] === k)));
const words = Object.fromEntries(data.kinds);
document.getElementById("legend").innerHTML = used.map(([op, k]) =>
  "<span><i style='background:var(--" + op + ")'></i>" + (k < data.computeOps ? op : data.copies + " of " + words[op]) + "</span>").join("");
follow([canvas], draw, hover);
`;
