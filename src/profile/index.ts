/** Profiles of a step: numbers, a page that one looks at, a trace for Perfetto. */
import { mkdir, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { type ProfileInput, profileDocument } from "./document.js";
import { profilePage } from "./page.js";
import { traceOf } from "./trace.js";

export { type Prediction, type ProfileDocument, type ProfileInput, predictStep, profileDocument } from "./document.js";
export { profilePage } from "./page.js";
export { type TraceEvent, traceOf } from "./trace.js";

/**
 * Writes profile.json (the document, versioned), profile.html (self-contained) and profile.trace.json (Perfetto) into
 * `folder`, which is made where it is missing.
 * @returns the three paths
 * @throws INVALID_ARGUMENT where the profile is not of this tape, NON_FINITE for a step that ran only in part
 */
export async function writeProfile(folder: string, input: ProfileInput): Promise<string[]> {
  const document = profileDocument(input);
  await mkdir(folder, { recursive: true });
  const files: [string, string][] = [
    [join(folder, "profile.json"), JSON.stringify(document)],
    [join(folder, "profile.html"), profilePage(document)],
    [join(folder, "profile.trace.json"), JSON.stringify(traceOf(document))],
  ];
  await Promise.all(files.map(([path, text]) => writeFile(path, text)));
  return files.map(([path]) => path);
}
