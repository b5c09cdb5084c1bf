/**
 * The checkpoints of one output folder:
 *
 *   checkpoints/step-000123/     whole, always: it got its name by a rename after every byte was synced
 *   checkpoints/.tmp-<process>-… being written; rubbish once that process is dead
 *   checkpoints/.old-step-…      a checkpoint whose place another of the same step is taking
 *   checkpoints/latest           symbolic link for people; readers trust the sequence in state.json
 */
import { mkdir, readdir, rename, rm, stat, symlink } from "node:fs/promises";
import { join, resolve } from "node:path";
import { StromaError } from "../errors.js";
import { isAlive, processTag, readJson, replaceFile, syncFolder } from "./files.js";
import { type CheckpointState, decodeState, FILES } from "./format.js";
import { type Checkpoint, verifyCheckpoint } from "./read.js";

export interface Listed {
  path: string;
  step: number;
  /** null: state.json cannot be read, for the reason in `error`. */
  state: CheckpointState | null;
  error: StromaError | null;
}

export interface Found {
  checkpoint: Checkpoint;
  /** Newer or unreadable ones that were passed over, each with its reason. */
  skipped: StromaError[];
}

const NAME = /^step-(\d{6,15})$/;
const nameOf = (step: number): string => `step-${String(step).padStart(6, "0")}`;
let temporaries = 0;

export class CheckpointStore {
  /** `<outputDir>/checkpoints` */
  readonly folder: string;
  #sequence = 0;

  constructor(outputDir: string) {
    this.folder = join(resolve(outputDir), "checkpoints");
  }

  /** For a writer: makes the folder, removes what dead processes left, undoes a replacement that was cut short. */
  async prepare(): Promise<void> {
    await mkdir(this.folder, { recursive: true });
    for (const name of await readdir(this.folder)) {
      const path = join(this.folder, name);
      const temporary = /^(?:\.tmp-|latest\.tmp-)(\d+-\d+)/.exec(name);
      if (temporary !== null) {
        if (!isAlive(temporary[1]!)) await rm(path, { recursive: true, force: true });
      } else if (name.startsWith(".old-step-")) {
        const place = join(this.folder, name.slice(".old-".length));
        if (await exists(place)) await rm(path, { recursive: true, force: true });
        else await rename(path, place);
      }
    }
    this.#sequence = Math.max(0, ...(await this.list()).map((c) => c.state?.sequence ?? 0));
  }

  /** Number of the next save. */
  nextSequence(): number {
    return ++this.#sequence;
  }

  /** Latest first; those whose state cannot be read by step, before the others of that step. */
  async list(): Promise<Listed[]> {
    const names = await readdir(this.folder).catch(() => [] as string[]);
    const found: Listed[] = [];
    for (const name of names) {
      const match = NAME.exec(name);
      if (match === null) continue;
      const path = join(this.folder, name);
      const entry: Listed = { path, step: Number(match[1]), state: null, error: null };
      try {
        const file = join(path, FILES.state);
        entry.state = decodeState(await readJson(file), file);
      } catch (error) {
        entry.error = error as StromaError;
      }
      found.push(entry);
    }
    return found.sort((a, b) =>
      a.state !== null && b.state !== null
        ? b.state.sequence - a.state.sequence
        : b.step - a.step || (a.state === null ? -1 : 1),
    );
  }

  /**
   * The latest checkpoint whose every hash agrees; null when there is none at all.
   * @throws CHECKPOINT when there are some and every one is damaged, with each reason
   */
  async latest(): Promise<Found | null> {
    const listed = await this.list();
    const skipped: StromaError[] = [];
    for (const { path, error } of listed) {
      if (error !== null) {
        skipped.push(error);
        continue;
      }
      try {
        return { checkpoint: await verifyCheckpoint(path), skipped };
      } catch (cause) {
        if (!(cause instanceof StromaError)) throw cause;
        skipped.push(cause);
      }
    }
    if (listed.length === 0) return null;
    const reasons = skipped.map((e) => `\n  ${e.message}`).join("");
    throw new StromaError(
      "CHECKPOINT",
      `[checkpoint] none of the ${listed.length} in ${this.folder} is whole:${reasons}`,
      {
        path: this.folder,
      },
    );
  }

  /** An empty folder of this process, to be filled and then published or removed. */
  async temporary(): Promise<string> {
    const path = join(this.folder, `.tmp-${processTag()}-${++temporaries}`);
    await mkdir(path, { recursive: true });
    return path;
  }

  /** Of the checkpoint of a step. */
  pathOf(step: number): string {
    return join(this.folder, nameOf(step));
  }

  /** Gives a filled, synced temporary folder its name: the moment at which the checkpoint exists. */
  async publish(temporary: string, step: number): Promise<string> {
    const path = this.pathOf(step);
    const old = join(this.folder, `.old-${nameOf(step)}`);
    const replaces = await exists(path);
    if (replaces) {
      await rm(old, { recursive: true, force: true });
      await rename(path, old);
    }
    await rename(temporary, path);
    await syncFolder(this.folder);
    await this.#point(nameOf(step));
    if (replaces) await rm(old, { recursive: true, force: true });
    return path;
  }

  /** Removes all but the `keep` latest; call it once a new one stands. Unreadable ones stay for a person to judge. */
  async prune(keep: number): Promise<void> {
    const whole = (await this.list()).filter((c) => c.state !== null);
    for (const { path } of whole.slice(Math.max(1, keep))) {
      // Renamed first: a kill in the middle of a removal must not leave half a folder under a checkpoint's name.
      const aside = join(this.folder, `.tmp-${processTag()}-${++temporaries}`);
      await rename(path, aside);
      await rm(aside, { recursive: true, force: true });
    }
  }

  async #point(name: string): Promise<void> {
    const link = join(this.folder, "latest");
    const aside = `${link}.tmp-${processTag()}`;
    await rm(aside, { force: true });
    try {
      await symlink(name, aside);
      await rename(aside, link);
      await syncFolder(this.folder);
    } catch (error) {
      const { code } = error as NodeJS.ErrnoException;
      // Some network file systems have no symbolic links: a file with the name then.
      if (code !== "EPERM" && code !== "ENOTSUP" && code !== "EOPNOTSUPP") throw error;
      await replaceFile(link, `${name}\n`);
    }
  }
}

async function exists(path: string): Promise<boolean> {
  return stat(path).then(
    () => true,
    () => false,
  );
}
