/** From what the user names (a preset, a folder, a config, a model function) to graphs in every mode. */
import { invalidArgument } from "../errors.js";
import type { ContextOptions } from "../graph/context.js";
import type { ModelDefinition } from "../graph/model.js";
import { traceModel } from "../graph/trace.js";
import type { DType, Graph, Mode } from "../graph/types.js";
import { type DecoderConfig, type DecoderOptions, decoderConfig } from "../models/decoder/config.js";
import { toHuggingFace } from "../models/decoder/huggingface.js";
import { decoder } from "../models/decoder/model.js";
import { findModel } from "../models/registry.js";

/** A preset's name or a Hugging Face folder; a config of the decoder; or a model function of your own and its config. */
export type ModelSpec =
  | string
  | { config: DecoderOptions }
  // biome-ignore lint/suspicious/noExplicitAny: the config is the definition's own business
  | { definition: ModelDefinition<any>; config: unknown };

export interface ResolvedModel {
  name: string;
  /** Plain JSON that resolves to the same model again; null for a model function, which has to be passed again. */
  spec: string | { config: unknown } | null;
  /** Traced for parameters of this dtype; context: for rows that ranks share. @throws SHAPE, GRAPH */
  graph(mode: Mode, dtype: DType, context?: ContextOptions | null): Graph;
  /** config.json as Hugging Face writes it; null when there is no such thing for this model. */
  huggingFaceConfig: Record<string, unknown> | null;
}

/** config.json of those families that Hugging Face has, by the name that their graphs bear. */
const EXPORTS: Readonly<Record<string, (config: never) => Record<string, unknown> | null>> = {
  [decoder.name]: (config: DecoderConfig) => toHuggingFace(config),
};

/** @throws CONFIG for a name that is neither preset nor folder, naming the presets; INVALID_ARGUMENT for a bad config */
export function resolveModel(spec: ModelSpec): ResolvedModel {
  if (typeof spec === "string") {
    const { name, family, config, graph } = findModel(spec);
    return {
      name,
      spec,
      graph: (mode, dtype, context) => graph({ mode, dtype, context }),
      huggingFaceConfig: EXPORTS[family]?.(config as never) ?? null,
    };
  }
  if (spec === null || typeof spec !== "object")
    throw invalidArgument("model", "a preset's name, { config } or { definition, config }", spec, "model");
  if ("definition" in spec) {
    const { definition, config } = spec;
    return {
      name: definition.name,
      spec: null,
      graph: (mode, dtype, context) => traceModel(definition, config, { mode, dtype, context }),
      huggingFaceConfig: null,
    };
  }
  const config = decoderConfig(spec.config);
  return {
    name: decoder.name,
    spec: { config },
    graph: (mode, dtype, context) => traceModel(decoder, config, { mode, dtype, context }),
    huggingFaceConfig: toHuggingFace(config),
  };
}
