/** Prints the rank that this process is, as one line of JSON. */
import { rankFromEnvironment } from "../../src/distributed/environment.js";

process.stdout.write(`${JSON.stringify(rankFromEnvironment())}\n`);
