/** What the pages of a profile have in common: words, figures, the frame, and the rows that the scripts draw. */
import { MEMORY_KINDS, type MemoryKind, type ProfileDocument } from "./document.js";
import { LANE_WORDS, LANES, laneOf, peersOf } from "./lanes.js";
import { TIME_AXIS } from "./page-axis.js";
import { PAGE_STYLE } from "./page-style.js";

export const KIND_WORDS: Readonly<Record<MemoryKind, string>> = {
  parameters: "parameters",
  optimizer: "optimizer state",
  compute: "compute copies",
  sums: "gradient sums",
  retained: "retained gradients",
  boundaries: "boundaries",
  workspace: "workspace",
};

/** What the compute queue carries out: colours of their own; a copy has that of what it carries. */
const OPERATIONS = [
  ...["forward", "turn", "backward", "cast", "partial", "reduce", "norm", "pack", "update"],
  ...["report", "agree", "coefficient"],
] as const;

const OPS: readonly string[] = [...OPERATIONS, ...MEMORY_KINDS];

export const card = (title: string, figure: string, note: string): string =>
  `<div class="card"><h3>${title}</h3><b>${figure}</b><span>${html(note)}</span></div>`;

/** One file that needs no network; `data` is what the script draws. */
export const page = (title: string, body: string, data: unknown, script: string): string => `<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>${html(title)}</title>
<style>${PAGE_STYLE}</style>
</head>
<body>
<main>
${body}
</main>
<div id="tip" hidden></div>
<script type="application/json" id="data">${JSON.stringify(data).replaceAll("<", "\\u003c")}</script>
<script>${TIME_AXIS}${script}</script>
</body>
</html>
`;

export const blocksOf = (documents: readonly ProfileDocument[]): string[] => [
  ...new Set(documents.flatMap((d) => d.instructions.flatMap((i) => i.block ?? []))),
];

/** Names that rows give by number, and words for them. */
export const wordsOf = (documents: readonly ProfileDocument[]) => ({
  kinds: MEMORY_KINDS.map((kind) => [kind, KIND_WORDS[kind]]),
  ops: OPS,
  computeOps: OPERATIONS.length,
  copies: documents.some((d) => d.rank !== null) ? "copy or message" : "copy",
  blocks: blocksOf(documents),
  lanes: LANES.map((lane) => [lane, LANE_WORDS[lane]]),
});

/** The document in rows: lane, operation, block, micro-batch, start, end, predicted, bytes, peer, when both ends were there. */
export function lanesOf({ instructions, rank }: ProfileDocument, blocks: readonly string[]) {
  const number = new Map(blocks.map((name, k) => [name, k]));
  return {
    peers: { send: peersOf(instructions, "send"), receive: peersOf(instructions, "receive") },
    run: instructions.map((i) => [
      laneOf(i, rank?.ranks ?? 1),
      OPS.indexOf(i.operand ?? i.op),
      i.block === null ? -1 : number.get(i.block)!,
      i.microBatch ?? -1,
      i.startMs,
      i.endMs,
      Math.round((i.predictedEndMs - i.predictedStartMs) * 1e3) / 1e3,
      i.bytes,
      i.peer ?? -1,
      i.bothMs,
    ]),
  };
}

export const time = (ms: number): string =>
  ms >= 1e4
    ? `${(ms / 1e3).toFixed(1)} s`
    : ms >= 1e3
      ? `${(ms / 1e3).toFixed(2)} s`
      : `${Number(ms.toPrecision(3))} ms`;
export const percent = (share: number): string =>
  `${share < 0.0995 ? (share * 100).toFixed(1) : Math.round(share * 100)} %`;
export const ratio = (measured: number, predicted: number): string =>
  `measured / predicted ${(measured / predicted).toFixed(2)}`;
export const html = (text: string): string =>
  text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;").replaceAll('"', "&quot;");
/** Of something that there may be none of. */
export const share = (part: number, of: number): string => (of === 0 ? "none" : percent(part / of));
