/** Rows into text: a template with the user's words, or `key=value` lines of what is there. */
import { invalidArgument } from "../../errors.js";
import type { Cell, Row } from "./rows.js";

type Part = string | { column: string; digits: number | null };

/** What stands in a template's place where the cell is missing. */
export const MISSING_TEXT = "?";

/**
 * `planet {pl_name}: radius {pl_rade}`: a column's cell in braces, `{st_teff:.3}` with that many significant digits,
 * `{{` and `}}` for braces, `\n` for a line break. Throws INVALID_ARGUMENT when malformed.
 */
export function parseTemplate(template: string): Part[] {
  const parts: Part[] = [];
  let text = "";
  for (let i = 0; i < template.length; i++) {
    const c = template[i]!;
    const twice = template[i + 1] === c;
    if (c === "\\" && template[i + 1] === "n") {
      text += "\n";
      i++;
    } else if ((c === "{" || c === "}") && twice) {
      text += c;
      i++;
    } else if (c === "}") throw invalidArgument("data", "a { before each }", template, `template, character ${i + 1}`);
    else if (c === "{") {
      const end = template.indexOf("}", i);
      const match = end < 0 ? null : /^([^:{]+)(?::\.([1-9]\d?))?$/.exec(template.slice(i + 1, end));
      if (match === null)
        throw invalidArgument(
          "data",
          "{column} or {column:.digits}",
          template.slice(i, i + 40),
          `template, character ${i + 1}`,
        );
      if (text !== "") parts.push(text);
      text = "";
      parts.push({ column: match[1]!.trim(), digits: match[2] === undefined ? null : Number(match[2]) });
      i = end;
    } else text += c;
  }
  if (text !== "") parts.push(text);
  if (!parts.some((p) => typeof p !== "string"))
    throw invalidArgument("data", "at least one {column}", template, "template");
  return parts;
}

/** Columns a template names. */
export function templateColumns(parts: Part[]): string[] {
  return parts.flatMap((p) => (typeof p === "string" ? [] : [p.column]));
}

function show(cell: Cell, digits: number | null): string {
  if (cell === null) return MISSING_TEXT;
  if (digits !== null) {
    const value = Number(cell);
    if (Number.isFinite(value)) return String(Number(value.toPrecision(digits)));
  }
  return String(cell);
}

export function renderTemplate(parts: Part[], row: Row): string {
  return parts.map((p) => (typeof p === "string" ? p : show(row[p.column] ?? null, p.digits))).join("");
}

/** Columns of the two exoplanet catalogues that hold uncertainties, limits, flags, counts and references, not values. */
const CATALOGUE_NOISE =
  /(_error_(min|max)|err[12]?|_?lim|_reflink|_refname|_solnid|str|symerr|_format|_solution_type|_systemref|_flag)$|^(st_n(ts|plc|glc|rvc|aod|axa|img|phot|spec)|pl_n(notes|espec|transpec|dispec))$|^(pl_pubdate|releasedate|rowupdate|updated|publication|alternate_names|star_alternate_names|loc_rowid|disc_refname|htm20|x|y|z|elon|elat|glon|glat)$/;

/** Known catalogues by columns they always have. */
function isCatalogue(columns: string[]): boolean {
  const has = (...names: string[]) => names.every((n) => columns.includes(n));
  return has("star_name", "planet_status") || has("pl_name", "hostname");
}

/** Columns that the default text leaves out, with why: shown by `inspect`. Decided on the first rows. */
export function leftOutColumns(columns: string[], rows: Row[]): Record<string, string> {
  const out: Record<string, string> = Object.create(null); // a column may be called "constructor"
  const catalogue = isCatalogue(columns);
  for (const column of columns) {
    const cells = rows.map((r) => r[column]).filter((c): c is string => typeof c === "string");
    const length = cells.reduce((n, c) => n + c.length, 0) / Math.max(1, cells.length);
    if (cells.some((c) => /https?:\/\/|<a\s/i.test(c))) out[column] = "links";
    else if (length > 120) out[column] = "long text";
    else if (catalogue && CATALOGUE_NOISE.test(column)) out[column] = "uncertainty, limit, flag or reference";
  }
  return out;
}

/** `key=value` lines of the cells that are there. A `text` column alone is the document as it stands. */
export function renderDefault(columns: string[], row: Row): string {
  if (columns.length === 1 && columns[0] === "text") return String(row.text ?? "");
  const lines: string[] = [];
  for (const column of columns) {
    const cell = row[column] ?? null;
    if (cell !== null) lines.push(`${column}=${String(cell).replace(/\s+/g, " ")}`);
  }
  return lines.length === 0 ? "" : `${lines.join("\n")}\n`;
}

/** The column of the host star in the catalogues known, most specific first. */
const HOST_COLUMNS = ["hostname", "star_name", "host_name", "host", "pl_hostname", "kepid", "tic_id"];

export function guessSplitKey(columns: string[]): string | null {
  return HOST_COLUMNS.find((c) => columns.includes(c)) ?? null;
}
