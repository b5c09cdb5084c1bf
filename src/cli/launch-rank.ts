/** What a rank shows, and what rank 0 and its launcher tell each other. */
import { onLauncherNote, tellLauncher } from "../distributed/lifeline.js";
import type { TrainEvent } from "../train/events.js";
import type { TrainerOptions } from "../train/options.js";
import type { Context } from "./context.js";
import type { DistributedPlan } from "./launch-plan.js";
import type { RunsOnce } from "./train.js";
import type { View } from "./ui/view.js";

/** How long a rank waits for the others at the start: machines of a cluster begin minutes apart at most. */
const JOIN_SECONDS = 120;

/** This rank's part of the run; it joins the others when it runs. */
export async function joinAndTrain(
  options: TrainerOptions,
  { spec, timeoutSeconds }: Extract<DistributedPlan, { mode: "rank" }>,
): Promise<RunsOnce> {
  const { Trainer } = await import("../train/trainer.js");
  const { rank, size, localSize, address, port, store, prefix } = spec;
  return new Trainer({
    ...options,
    ranks: {
      ...{ rank, size, localSize, address, port, prefix },
      serve: store === "host",
      joinSeconds: JOIN_SECONDS,
      silenceSeconds: timeoutSeconds,
    },
  });
}

/**
 * Rank 0's, and that of a process alone: the person's view. Under a launcher it also shows the lines of other ranks above
 * a live picture, and tells where the run's checkpoints are.
 */
export class FirstRankView implements View {
  /**
   * @param live whether it is redrawn in place
   * @param folder of the run, known at its first event
   */
  constructor(
    private readonly view: View,
    live: boolean,
    private readonly folder: () => string | undefined,
  ) {
    if (!live) return;
    onLauncherNote((text) => this.note(text));
    void tellLauncher({ stroma: "view", live: true });
  }

  event(event: TrainEvent): void {
    this.view.event(event);
    const folder = event.event === "start" ? this.folder() : undefined;
    if (folder !== undefined) void tellLauncher({ stroma: "run", folder });
  }

  note(text: string): void {
    this.view.note(text);
  }

  stopping(text: string): void {
    this.view.stopping(text);
  }

  close(): void {
    void tellLauncher({ stroma: "view", live: false });
    this.view.close();
  }
}

/** Of the other ranks: what all say, rank 0 says. */
export class OtherRankView implements View {
  constructor(private readonly context: Context) {}

  event(_event: TrainEvent): void {}

  note(text: string): void {
    this.context.err.write(`${text}\n`);
  }

  stopping(_text: string): void {}

  close(): void {}
}
