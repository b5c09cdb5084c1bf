/** Profiles of a step: numbers, a page that one looks at, a trace for Perfetto. */
import { mkdir, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { gunzipSync, gzipSync } from "node:zlib";
import { agreeOnClock } from "../distributed/clock.js";
import type { NativeRanks } from "../train/native-session.js";
import { type ProfileDocument, type ProfileInput, profileDocument } from "./document.js";
import { profilePage } from "./page.js";
import { sideBySide } from "./ranks.js";
import { ranksPage } from "./ranks-page.js";
import { traceOf } from "./trace.js";

export { type Prediction, type ProfileDocument, type ProfileInput, predictStep, profileDocument } from "./document.js";
export { profilePage } from "./page.js";
export { sideBySide } from "./ranks.js";
export { ranksPage } from "./ranks-page.js";
export { type TraceEvent, traceOf } from "./trace.js";

/**
 * Writes profile.json (the document, versioned), profile.html (self-contained) and profile.trace.json (Perfetto) into
 * `folder`, which is made where it is missing.
 * @returns the three paths
 * @throws INVALID_ARGUMENT where the profile is not of this tape, NON_FINITE for a step that ran only in part
 */
export async function writeProfile(folder: string, input: ProfileInput): Promise<string[]> {
  const document = profileDocument(input);
  return writeAll(folder, {
    "profile.json": JSON.stringify(document),
    "profile.html": profilePage(document),
    "profile.trace.json": JSON.stringify(traceOf(document)),
  });
}

/**
 * The same of all ranks of a step: profile.html and profile.trace.json of all, beside profile-rank-<rank>.json and .html of
 * each. Rank 0 writes them, so that folders need not be shared. Collective.
 * @param beganMs of the step on this rank, on the clock of monotonicMs()
 * @returns the paths, those of all ranks first; none on another rank than 0
 */
export async function writeProfilesOfRanks(
  ranks: NativeRanks,
  folder: string,
  input: ProfileInput,
  beganMs: number,
): Promise<string[]> {
  const { offsetMs, uncertainMs } = await agreeOnClock(ranks);
  const mine = profileDocument(input);
  const rank = { rank: ranks.rank, ranks: ranks.size, beganMs: beganMs + offsetMs };
  // Everyone hears all: a tenth of the bytes is enough.
  const said = gzipSync(JSON.stringify({ uncertainMs, document: { ...mine, rank } })).toString("base64");
  const all = await ranks.gather(said);
  if (ranks.rank !== 0) return [];
  const told = all.map(unpack);
  const documents = sideBySide(told.map((t) => t.document));
  return writeAll(folder, {
    "profile.html": ranksPage(documents, Math.max(...told.map((t) => t.uncertainMs))),
    "profile.trace.json": JSON.stringify(traceOf(...documents)),
    ...Object.fromEntries(
      documents.flatMap((document, r) => [
        [`profile-rank-${r}.json`, JSON.stringify(document)],
        [`profile-rank-${r}.html`, profilePage(document)],
      ]),
    ),
  });
}

const unpack = (text: string): { uncertainMs: number; document: ProfileDocument } =>
  JSON.parse(gunzipSync(Buffer.from(text, "base64")).toString());

async function writeAll(folder: string, files: Readonly<Record<string, string>>): Promise<string[]> {
  await mkdir(folder, { recursive: true });
  const paths = Object.keys(files).map((name) => join(folder, name));
  await Promise.all(Object.values(files).map((text, k) => writeFile(paths[k]!, text)));
  return paths;
}
