// The server's address, and features to check: functions that throw where the server does not do it.
import assert from "node:assert/strict";
import fs from "node:fs";
import { z } from "zod";

export { assert, z };
export const URL = `${process.env.SERVER}/v1`;
export const MODEL = process.env.MODEL;
export const KEY = "none";
export const QUESTION = "Say hello.";
export const Trip = z.object({
  city: z.object({ name: z.enum(["Oslo", "Rome"]) }),
  days: z.union([z.literal(1), z.literal(2), z.literal(3)]),
});

// A line of JSON for each feature. A refused one names a part of its error.
export async function check(client, features) {
  const { version } = JSON.parse(fs.readFileSync(`node_modules/${client}/package.json`));
  for (const [feature, run, refused] of features) {
    let verdict = refused ? "fails: it is not refused" : "passes";
    try {
      await run();
    } catch (error) {
      const text = `${error.name}: ${error.message} ${error.responseBody ?? ""}`.slice(0, 2000);
      verdict = refused && text.includes(refused) ? `refused: ${text}` : `fails: ${text}`;
    }
    console.log(JSON.stringify({ client, version, feature, verdict }));
  }
}
