/** Models by name: each family's presets. A new family adds one line to FAMILIES. */
import { readFileSync, statSync } from "node:fs";
import { join } from "node:path";
import { StromaError } from "../errors.js";
import { isTooDeep } from "../graph/hash.js";
import type { ModelDefinition } from "../graph/model.js";
import { type TraceOptions, traceModel } from "../graph/trace.js";
import type { Graph } from "../graph/types.js";
import { fromHuggingFace } from "./decoder/huggingface.js";
import { decoder } from "./decoder/model.js";
import { decoderPresets } from "./decoder/presets.js";

export interface RegisteredModel {
  readonly name: string;
  readonly family: string;
  /** Plain JSON. */
  readonly config: unknown;
  /** Throws SHAPE or GRAPH. */
  graph(options?: TraceOptions): Graph;
}

// biome-ignore lint/suspicious/noExplicitAny: each family's config is its own
type Family = { definition: ModelDefinition<any>; presets: Readonly<Record<string, () => unknown>> };

const FAMILIES: readonly Family[] = [{ definition: decoder, presets: decoderPresets }];

/** Names of all presets, smallest first in each family. */
export const modelNames = (): string[] => FAMILIES.flatMap((f) => Object.keys(f.presets));

/**
 * A preset by name, or a Hugging Face model by the path of its folder or config.json. Throws CONFIG for a name that is
 * neither, listing the presets, and FILE_FORMAT for a file that is not JSON.
 */
export function findModel(name: string): RegisteredModel {
  for (const { definition, presets } of FAMILIES) {
    if (Object.hasOwn(presets, name)) return registered(name, definition, presets[name]!());
  }
  const stats = statSync(name, { throwIfNoEntry: false });
  if (stats === undefined) {
    throw new StromaError(
      "CONFIG",
      `[model] there is no preset and no file ${JSON.stringify(name)}. Presets: ${modelNames().join(", ")}`,
      { presets: modelNames() },
    );
  }
  const path = stats.isDirectory() ? join(name, "config.json") : name;
  return registered(name, decoder, fromHuggingFace(readJson(path)));
}

function registered<C>(name: string, definition: ModelDefinition<C>, config: C): RegisteredModel {
  return {
    name,
    family: definition.name,
    config,
    graph: (options) => traceModel(definition, config, options),
  };
}

function readJson(path: string): Record<string, unknown> {
  let text: string;
  try {
    text = readFileSync(path, "utf8");
  } catch (error) {
    throw new StromaError(
      "CONFIG",
      `[model] cannot read ${path}: ${(error as Error).message}`,
      { path },
      { cause: error },
    );
  }
  try {
    const json: unknown = JSON.parse(text);
    if (json !== null && typeof json === "object" && !Array.isArray(json) && !isTooDeep(json))
      return json as Record<string, unknown>;
  } catch (error) {
    throw new StromaError("FILE_FORMAT", `[model] ${path} is not JSON: ${(error as Error).message}`, { path });
  }
  throw new StromaError("FILE_FORMAT", `[model] ${path} is not a JSON object, or nested too deep`, { path });
}
