/**
 * Every failure that a user can meet is a StromaError: a stable `code` for programs, and a message for people that
 * names the component, what was expected, what was found, where, and the cure when it is known.
 */
export type ErrorCode =
  | "INVALID_ARGUMENT" // a value of the wrong type, shape, dtype or range
  | "UNKNOWN_OPERATOR" // no such overload in the dispatcher
  | "UNSUPPORTED_TYPE" // a schema type that JavaScript cannot express
  | "DISPOSED" // a handle used after dispose()
  | "NATIVE" // an exception of libtorch or of the engine, its text kept
  | "OUT_OF_MEMORY"
  | "NOT_SET_UP" // the addon or libtorch is missing: `npx stroma setup`
  | "VERSION_MISMATCH" // addon and libtorch, or file format and reader, differ
  | "SHAPE" // the model's shapes do not fit, found while it is being defined or bound
  | "GRAPH" // a graph that is malformed
  | "TAPE" // a tape that the checker or the engine refuses
  | "NON_FINITE" // NaN or infinity in a loss
  | "ABORTED" // cancelled by the caller
  | "BUSY" // more steps in flight than the session takes
  | "CHECKPOINT" // a checkpoint that is missing, damaged or of another model
  | "FILE_FORMAT" // a file that is not what its name says
  | "DATA" // a record or source that is refused
  | "DISK_FULL"
  | "RANKS" // a rank that is missing, lost or disagrees
  | "CONFIG"; // contradictory or unknown options

export class StromaError extends Error {
  override readonly name = "StromaError";
  readonly code: ErrorCode;
  /** Facts for programs: file, line, op, argument, expected, actual. */
  readonly details: Readonly<Record<string, unknown>>;

  constructor(code: ErrorCode, message: string, details: Record<string, unknown> = {}, options?: ErrorOptions) {
    super(message, options);
    this.code = code;
    this.details = details;
  }
}

/** The one validator's message: `[component] expected X, got Y, at Z. Cure`. */
export function invalidArgument(component: string, expected: string, actual: unknown, at?: string, cure?: string) {
  const where = at === undefined ? "" : `, at ${at}`;
  const how = cure === undefined ? "" : `. ${cure}`;
  return new StromaError("INVALID_ARGUMENT", `[${component}] expected ${expected}, got ${show(actual)}${where}${how}`, {
    component,
    expected,
    at,
  });
}

function show(value: unknown): string {
  if (typeof value === "string") return JSON.stringify(value.length > 80 ? `${value.slice(0, 77)}...` : value);
  if (typeof value === "bigint") return `${value}n`;
  if (typeof value === "function") return `function ${value.name || "(anonymous)"}`;
  if (value !== null && typeof value === "object") {
    const name = value.constructor?.name ?? "object";
    return Array.isArray(value) ? `array of ${value.length}` : name;
  }
  return String(value);
}
