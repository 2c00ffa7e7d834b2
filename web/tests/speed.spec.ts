// What the page costs: its size, its first paint, and its longest task while tokens pour in.

import { once } from "node:events";
import { createServer } from "node:http";
import { readFile } from "node:fs/promises";
import type { AddressInfo } from "node:net";
import { join } from "node:path";
import { gzipSync } from "node:zlib";
import { type Browser, type Page, expect, test } from "@playwright/test";
import { messageBox } from "./page";

const PAGE = join(import.meta.dirname, "..", "..", "idlm", "ui", "page");
const FIRST_PAINT = 1000; // ms
const LONGEST_TASK = 100; // ms
const MOST_BYTES = 250_000; // compressed
const RATE = 500; // tokens a second
const TOKENS = 3000;

test("size and first paint", async ({ page }) => {
  const size = gzipSync(await readFile(join(PAGE, "app.js"))).length;
  expect(size).toBeLessThanOrEqual(MOST_BYTES);
  await page.goto("/");
  await expect(messageBox(page)).toBeVisible();
  const paint = await page.evaluate(
    () => performance.getEntriesByName("first-contentful-paint")[0]?.startTime,
  );
  console.log(`app.js: ${size} bytes compressed; first paint: ${paint?.toFixed(0)} ms`);
  expect(paint).toBeLessThanOrEqual(FIRST_PAINT);
});

/** The page, and an API that streams tokens at a steady rate, in the form of idlm's. */
function fast() {
  return createServer(async (request, response) => {
    const path = request.url ?? "/";
    if (path === "/v1/models") {
      response.setHeader("Content-Type", "application/json");
      response.end(JSON.stringify({ data: [{ id: "fast", owned_by: "idlm" }] }));
    } else if (path === "/v1/chat/completions") {
      response.setHeader("Content-Type", "text/event-stream");
      const began = performance.now();
      let sent = 0;
      const timer = setInterval(() => {
        const due = Math.min(TOKENS, Math.floor(((performance.now() - began) / 1000) * RATE));
        for (; sent < due; sent += 2) response.write(chunk(sent));
        if (sent < TOKENS) return;
        clearInterval(timer);
        response.end("data: [DONE]\n\n");
      }, 4);
    } else {
      const name = path === "/" ? "index.html" : path.replace("/ui/", "");
      const kind = { js: "text/javascript", css: "text/css", svg: "image/svg+xml" }[name.split(".").at(-1) ?? ""];
      response.setHeader("Content-Type", kind ?? "text/html");
      response.end(await readFile(join(PAGE, name)));
    }
  });
}

function chunk(at: number): string {
  const forward = at / 2 + 1;
  const named = (index: number) => ({ token: ` word${index}`, id: index });
  const likely = Array.from({ length: 5 }, (_, rank) => ({ token: `t${rank}`, logprob: -rank, bytes: [116] }));
  const logprob = (index: number) => ({ ...named(index), logprob: -0.1, bytes: [116], top_logprobs: likely });
  const trace = [
    { ...named(at), source: "accepted", forward },
    { ...named(at + 1), source: "bonus", forward },
  ];
  const windows = [
    {
      forward, position: at, plan: "all-4", width: 16, pending: named(at - 1), accepted: 1,
      drafts: [named(at), named(at + 1), named(at + 2)], outcomes: [0, 1, 2, 3], masks: 3,
    },
  ];
  const delta = { content: ` word${at} word${at + 1}` };
  const choice = { index: 0, delta, logprobs: { content: [logprob(at), logprob(at + 1)] }, idlm: { trace, windows } };
  return `data: ${JSON.stringify({ choices: [choice] })}\n\n`;
}

interface Task {
  name: string;
  dur?: number;
  tdur?: number;
  pid: number;
  tid: number;
  args: { name?: string };
}

/** The longest task of the page's main thread while `work` runs, in ms: by the clock, and of
 * processor time, which does not depend on what else the machine does. */
async function longest(page: Page, browser: Browser, work: () => Promise<void>) {
  await browser.startTracing(page, { categories: ["toplevel"] });
  await work();
  const { traceEvents } = JSON.parse((await browser.stopTracing()).toString());
  const events: Task[] = traceEvents;
  const place = (one: Task) => `${one.pid} ${one.tid}`;
  const main = new Set(
    events
      .filter((one) => one.name === "thread_name" && one.args.name === "CrRendererMain")
      .map(place),
  );
  const tasks = events.filter((one) => /RunTask$/.test(one.name) && main.has(place(one)));
  expect(tasks.length).toBeGreaterThan(100);
  const most = (times: (number | undefined)[]) => Math.max(...times.map((time) => time ?? 0)) / 1000;
  return { clock: most(tasks.map((one) => one.dur)), work: most(tasks.map((one) => one.tdur)) };
}

test("500 tokens a second keep the page responsive", async ({ page, browser }) => {
  const server = fast().listen(0, "127.0.0.1");
  await once(server, "listening");
  try {
    await page.goto(`http://127.0.0.1:${(server.address() as AddressInfo).port}/`);
    await expect(page.locator("header .model")).toHaveText("fast");
    await messageBox(page).fill("go");
    const task = await longest(page, browser, async () => {
      await page.keyboard.press("Enter");
      await expect(page.getByTestId("count")).toHaveText(String(TOKENS));
      await expect(page.getByRole("button", { name: "Regenerate" })).toBeEnabled();
    });
    const rate = Number(await page.getByTestId("rate").textContent());
    console.log(
      `${rate} tokens/s: longest task ${task.work.toFixed(0)} ms of processor time, ` +
        `${task.clock.toFixed(0)} ms by the clock`,
    );
    expect(rate).toBeGreaterThan(0.9 * RATE);
    expect(task.work).toBeLessThanOrEqual(LONGEST_TASK);
  } finally {
    server.closeAllConnections();
    server.close();
  }
});
