/**
 * The form of a graph from a file: every field is there and of its type, before anything reads it. What the fields say
 * together is validate.ts's to check.
 */
import { z } from "zod";
import { StromaError } from "../errors.js";
import type { DType, Graph } from "./types.js";
import { DTYPES } from "./value.js";

const count = z.number().int().nonnegative();
const number = z.number();
const text = z.string();
const dtype = z.enum(DTYPES as [DType, ...DType[]]);
const dim = z.union([number, text]);
const dims = z.array(dim);
const argument = z.record(text, z.unknown());

const init = z.union([
  z.object({ kind: z.literal("normal"), std: number }),
  z.object({ kind: z.literal("uniform"), low: number, high: number }),
  z.object({ kind: z.enum(["zeros", "ones"]) }),
]);
const source = z.union([
  z.strictObject({ block: count, output: count }),
  z.strictObject({ batch: text }),
  z.strictObject({ lossScale: text }),
  z.strictObject({ rngKey: z.literal(true) }),
]);
const program = z.object({
  name: text,
  inputs: z.array(
    z.object({
      name: text,
      kind: z.enum(["boundary", "batch", "lossScale", "rngKey"]),
      dtype,
      shape: dims,
      grad: z.boolean(),
    }),
  ),
  parameters: z.array(z.object({ name: text, shape: z.array(number) })),
  nodes: z.array(
    z.object({
      op: text,
      args: z.array(argument),
      kwargs: z.record(text, argument).optional(),
      outputs: z.array(count.nullable()),
    }),
  ),
  outputs: z.array(z.object({ name: text, value: count, dtype, shape: dims, grad: z.boolean() })),
  values: count,
});
const FORM = z.object({
  format: z.literal("stromatolite.graph"),
  version: z.literal(1),
  model: text,
  mode: z.enum(["train", "eval", "generate"]),
  dtype: dtype.optional(),
  config: z.unknown(),
  inputs: z.array(z.object({ name: text, dtype, shape: dims })),
  programs: z.array(program),
  blocks: z.array(z.object({ name: text, program: count, inputs: z.array(source), parameters: z.array(text) })),
  parameters: z.array(
    z.object({ name: text, shape: z.array(number), init, decay: z.boolean(), trainable: z.boolean(), owner: count }),
  ),
  losses: z.array(
    z.object({
      name: text,
      block: count,
      output: count,
      weight: number,
      count: z.object({ input: text, ignore: number }),
    }),
  ),
  outputs: z.array(z.object({ name: text, block: count, output: count })),
});

/** @returns `value` itself. @throws GRAPH naming `where` and the first field that is missing or malformed */
export function checkGraphForm(value: unknown, where: string): Graph {
  const checked = FORM.safeParse(value);
  if (checked.success) return value as Graph;
  const { path, message } = checked.error.issues[0]!;
  const field = path.length === 0 ? "it" : path.join(".");
  throw new StromaError(
    "GRAPH",
    `[graph] ${where}: ${field}: ${message}. It is not a graph as this program writes it`,
    {
      at: where,
      field,
    },
  );
}
