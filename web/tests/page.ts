// What the tests share: asking in the chat, and what the server answered.

import { statSync } from "node:fs";
import { join } from "node:path";
import { type Locator, type Page, expect } from "@playwright/test";

export const QUESTION =
  "Mia has 5 boxes with 5 marbles in each of them. The next day a kind friend helps to double " +
  "the number of marbles. Then she picks up 23 more marbles in the park. How many marbles does " +
  "Mia have now?";

export interface TraceEntry {
  token: string;
  id: number;
  source: string;
  forward: number;
}
export interface Window {
  forward: number;
  plan: string;
  pending: { token: string };
  drafts: { token: string }[];
  accepted: number;
  outcomes: number[];
  masks: number;
}
export interface Answer {
  text: string;
  trace: TraceEntry[];
  windows: Window[];
  tpf: number;
}

/** What a stream of the API came to, read without the page's own code. */
export function read(body: string): Answer {
  const answer: Answer = { text: "", trace: [], windows: [], tpf: 0 };
  for (const line of body.split("\n")) {
    if (!line.startsWith("data: {")) continue;
    const choice = JSON.parse(line.slice(6)).choices[0];
    answer.text += choice?.delta?.content ?? "";
    answer.trace.push(...(choice?.idlm?.trace ?? []));
    answer.windows.push(...(choice?.idlm?.windows ?? []));
    answer.tpf = choice?.idlm?.tpf ?? answer.tpf;
  }
  return answer;
}

export const messageBox = (page: Page): Locator => page.getByPlaceholder("Message; Enter sends");

/** Keep a copy of what the server sends; call it before the page is opened. */
export async function listen(page: Page): Promise<void> {
  await page.addInitScript(() => {
    const bodies: Promise<string>[] = [];
    const plain = window.fetch;
    window.fetch = async (...given) => {
      const response = await plain(...given);
      if (response.url.endsWith("/chat/completions")) bodies.push(response.clone().text());
      return response;
    };
    Object.assign(window, { bodies });
  });
}

/** Ask in the chat and wait for the whole answer; `listen` must have been called. */
export async function ask(page: Page, text: string): Promise<Answer> {
  await messageBox(page).fill(text);
  await page.keyboard.press("Enter");
  await expect(page.getByRole("button", { name: "Stop" })).toBeVisible();
  await expect(page.getByRole("button", { name: "Regenerate" }).last()).toBeEnabled();
  const body = await page.evaluate(() => (window as unknown as { bodies: Promise<string>[] }).bodies.at(-1));
  return read(body ?? "");
}

export async function setting(page: Page, label: string, value: string): Promise<void> {
  const panel = page.locator("details.settings");
  if (!(await panel.evaluate((one: HTMLDetailsElement) => one.open)))
    await panel.locator("summary").click();
  await panel.getByLabel(label, { exact: true }).fill(value);
}

const MOST_BYTES = 150_000;
/** A picture for the docs. */
export async function picture(page: Page, name: string): Promise<void> {
  const path = join(import.meta.dirname, "..", "..", "docs", "images", `ui-${name}.png`);
  await page.screenshot({ path });
  expect(statSync(path).size).toBeLessThan(MOST_BYTES);
}

/** Every error of the page: of scripts, and what the policy blocked. */
export function errors(page: Page): string[] {
  const found: string[] = [];
  page.on("pageerror", (error) => found.push(error.message));
  page.on("console", (message) => message.type() === "error" && found.push(message.text()));
  return found;
}
