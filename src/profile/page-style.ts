/** Colours by kind and by operation are custom properties, which the script reads too. */
export const PAGE_STYLE = `
:root { color-scheme: light dark; --bg: #fbfbfa; --panel: #ffffff; --ink: #1c1e21; --soft: #5c636b; --line: #dfe2e5; --grid: #eceef0;
  --unused: #d9dde1; --cap: #c62f2f; --predicted: #1c1e21;
  --parameters: #4e79a7; --optimizer: #a77bb5; --compute: #5fb0ab; --sums: #f0932f; --retained: #dc5a5c; --boundaries: #5aa154; --workspace: #e8c23d;
  --forward: #a3b7cc; --turn: #8a6548; --backward: #4d6179; --cast: #5fb0ab; --partial: #c9924f; --reduce: #8c6a2f; --report: #5c636b; --agree: #5c636b; --norm: #9aa3ab; --coefficient: #5c636b; --pack: #c78d8e; --update: #d6609a; }
@media (prefers-color-scheme: dark) { :root { --bg: #15171a; --panel: #1d2024; --ink: #e9ebed; --soft: #9aa3ad; --line: #33383e; --grid: #292d32;
  --unused: #3a4047; --cap: #ff6b6b; --predicted: #f4f5f6;
  --parameters: #5f8fc4; --optimizer: #b48ac3; --backward: #64798f; --turn: #b08462; --norm: #7d868f; --coefficient: #aab2ba; --report: #aab2ba; --agree: #aab2ba; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--bg); color: var(--ink); font: 14px/1.45 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; font-variant-numeric: tabular-nums; }
main { max-width: 1400px; margin: 0 auto; padding: 20px 24px 40px; }
h1 { font-size: 21px; margin: 0; } h2 { font-size: 14px; margin: 14px 0 4px; } h3 { font-size: 12px; font-weight: 600; margin: 0; color: var(--soft); }
.facts { margin: 2px 0 14px; color: var(--soft); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(230px, 1fr)); gap: 12px; }
.card { background: var(--panel); border: 1px solid var(--line); border-radius: 8px; padding: 10px 14px; display: flex; flex-direction: column; }
.card b { font-size: 25px; line-height: 1.3; } .card span { color: var(--soft); font-size: 12.5px; }
.headline { margin: 14px 2px 10px; }
.chart, .tables > div { background: var(--panel); border: 1px solid var(--line); border-radius: 8px; padding: 2px 14px 10px; }
canvas { width: 100%; display: block; cursor: crosshair; touch-action: pan-y; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; font-size: 12.5px; color: var(--soft); margin-bottom: 4px; }
.legend i, td i { display: inline-block; width: 11px; height: 11px; border-radius: 2px; margin-right: 6px; vertical-align: -1px; }
.legend i.stroke { height: 0; width: 18px; border-radius: 0; vertical-align: 4px; }
.hint { color: var(--soft); font-size: 12px; margin: 6px 0 0; }
.tables { display: grid; grid-template-columns: repeat(auto-fit, minmax(520px, 1fr)); gap: 12px; margin-top: 12px; align-items: start; }
table { border-collapse: collapse; width: 100%; font-size: 13px; } th { text-align: left; font-weight: 600; color: var(--soft); font-size: 12px; }
th, td { padding: 3px 8px 3px 0; border-bottom: 1px solid var(--grid); } .n { text-align: right; white-space: nowrap; }
td.bar { width: 24%; } td.bar span { display: block; height: 10px; border-radius: 2px; }
${["parameters", "optimizer", "compute", "sums", "retained", "boundaries", "workspace"].map((k) => `i.${k}, span.${k} { background: var(--${k}); }`).join(" ")}
td.pair { width: 34%; } td.pair span { display: block; height: 8px; border-radius: 2px; background: var(--parameters); } td.pair span.planned { background: var(--forward); margin-top: 2px; }
a { color: inherit; } .over { color: var(--cap); font-weight: 600; }
#tip { position: fixed; pointer-events: none; background: var(--panel); color: var(--ink); border: 1px solid var(--line); border-radius: 6px; padding: 6px 10px; font-size: 12.5px; white-space: pre; box-shadow: 0 3px 14px rgb(0 0 0 / 25%); }
`;
