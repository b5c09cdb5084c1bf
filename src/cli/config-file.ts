/** `--config FILE`: the options of a run in YAML or JSON, by the names of the flags, with or without dashes. */
import { readFile } from "node:fs/promises";
import { LineCounter, parseDocument } from "yaml";
import { StromaError } from "../errors.js";
import { camel, checkOption, kebab, type OptionSpec } from "./options.js";
import { didYouMean } from "./suggest.js";

/**
 * The checked options of the file.
 * @throws CONFIG for a file that is missing, malformed (with line and column), or has an unknown or doubled key;
 * INVALID_ARGUMENT for a value that its option does not take
 */
export async function readConfigFile(
  path: string,
  specs: Readonly<Record<string, OptionSpec>>,
): Promise<Record<string, unknown>> {
  let source: string;
  try {
    source = await readFile(path, "utf8");
  } catch (cause) {
    const { code, message } = cause as NodeJS.ErrnoException;
    const why = code === "ENOENT" ? "there is no such file" : code === "EISDIR" ? "it is a folder" : message;
    throw new StromaError("CONFIG", `[config] cannot read ${path}: ${why}`, { path }, { cause });
  }
  return parseConfig(source, path, specs);
}

export function parseConfig(
  source: string,
  path: string,
  specs: Readonly<Record<string, OptionSpec>>,
): Record<string, unknown> {
  const lines = new LineCounter();
  // `uniqueKeys` and the schema of YAML 1.2: `no` and `on` stay text.
  const document = parseDocument(source, {
    lineCounter: lines,
    prettyErrors: false,
    version: "1.2",
    logLevel: "error",
  });
  const problem = document.errors[0];
  if (problem !== undefined) {
    const { line, col } = lines.linePos(problem.pos[0]);
    throw new StromaError("CONFIG", `[config] ${path}:${line}:${col}: ${problem.message}`, { path, line });
  }
  let value: unknown;
  try {
    value = document.toJS({ maxAliasCount: 100 });
  } catch (cause) {
    // An alias without its anchor, or aliases of aliases that would unfold to gigabytes.
    throw new StromaError("CONFIG", `[config] ${path}: ${(cause as Error).message}`, { path }, { cause });
  }
  if (value === null || value === undefined) return {};
  if (typeof value !== "object" || Array.isArray(value))
    throw new StromaError(
      "CONFIG",
      `[config] expected options by name, got ${Array.isArray(value) ? "a list" : typeof value}, at ${path}`,
      { path },
    );
  const names = Object.keys(specs).filter((name) => !specs[name]!.commandLineOnly);
  const given: Record<string, unknown> = {};
  for (const [key, entry] of Object.entries(value)) {
    const name = camel(key);
    const where = `${path}: ${key}`;
    if (Object.hasOwn(specs, name) && specs[name]!.commandLineOnly)
      throw new StromaError("CONFIG", `[config] "${key}" belongs on the command line, at ${path}`, { path, key });
    if (!names.includes(name)) {
      const spelled = key.includes("-") ? names.map(kebab) : names;
      throw new StromaError("CONFIG", `[config] unknown option "${key}", at ${path}${didYouMean(key, spelled)}`, {
        path,
        key,
      });
    }
    if (Object.hasOwn(given, name))
      throw new StromaError("CONFIG", `[config] option "${name}" is given twice, at ${path}`, { path, key });
    given[name] = checkOption(specs, name, entry, where);
  }
  return given;
}
