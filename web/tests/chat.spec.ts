import { expect, test } from "@playwright/test";
import { KEY, KEYED } from "../playwright.config";
import { QUESTION, ask, errors, listen, messageBox, picture, setting } from "./page";

test.beforeEach(({ page }) => listen(page));

const COLOURS = ["first", "accepted", "corrected", "bonus"];

test("streams an answer, coloured as the API traces it", async ({ page }) => {
  const found = errors(page);
  await page.goto("/");
  await setting(page, "Temperature", "0");
  const answer = await ask(page, QUESTION);
  expect(answer.trace.length).toBeGreaterThan(20);
  expect(new Set(answer.trace.map((one) => one.source)).size).toBeGreaterThan(2);

  const box = page.locator(".tokens");
  expect(await box.textContent()).toBe(answer.text);
  const shown = await box.locator(".t").evaluateAll((spans) =>
    spans.map((span) => [span.className.replace("t ", ""), span.textContent]),
  );
  const traced = answer.trace.filter((one) => answer.text.includes(one.token) && one.token);
  const visible = traced.slice(0, shown.length).map((one) => [one.source, one.token]);
  expect(shown).toEqual(visible);
  const backs = await box.evaluate((one, names) =>
    names.map((name) => {
      const span = one.querySelector(`.${name}`);
      return span ? getComputedStyle(span).backgroundColor : name;
    }), COLOURS);
  expect(new Set(backs).size).toBe(COLOURS.length);

  await expect(page.getByTestId("count")).toHaveText(String(answer.trace.length));
  await expect(page.getByTestId("tpf")).toHaveText(answer.tpf.toFixed(2));
  await expect(page.getByTestId("rate")).toHaveText(/\d/);
  await expect(page.getByTestId("ttft")).toHaveText(/\d+(\.\d+)? m?s/);
  expect(found).toEqual([]);
});

test("tells of a token under the pointer and under the keyboard", async ({ page }) => {
  await page.goto("/");
  await setting(page, "Temperature", "0");
  const answer = await ask(page, QUESTION);
  const detail = page.getByTestId("detail");
  const entry = answer.trace[5];
  await page.locator(".tokens .t").nth(5).hover();
  await expect(detail).toContainText(`${entry?.source}, forward ${entry?.forward}`);
  await expect(detail).toContainText("probability");
  await expect(detail.locator("tr")).toHaveCount(5);
  await page.locator(".tokens .t").nth(9).hover();
  await picture(page, "chat");
  await page.mouse.move(0, 0);
  await expect(detail).toBeHidden();

  await page.locator(".tokens").focus();
  for (let step = 0; step < 3; step++) await page.keyboard.press("ArrowRight");
  const reached = answer.trace[3];
  await expect(detail).toContainText(`${reached?.source}, forward ${reached?.forward}`);
  await page.keyboard.press("Escape");
  await expect(detail).toBeHidden();
});

test("stops, regenerates, edits and copies", async ({ page }) => {
  await page.goto("/");
  await setting(page, "Most tokens", "400");
  await setting(page, "Temperature", "1.5");
  // an answer that does not end by itself
  await page.route("**/chat/completions", (route) =>
    route.continue({ postData: JSON.stringify({ ...route.request().postDataJSON(), ignore_eos: true }) }),
  );
  await messageBox(page).fill(QUESTION);
  await page.keyboard.press("Enter");
  await expect(page.locator(".tokens .t").nth(5)).toBeVisible();
  await page.getByRole("button", { name: "Stop" }).click();
  await expect(page.getByText("stopped", { exact: true })).toBeVisible();
  const length = await page.locator(".tokens .t").count();
  expect(length).toBeLessThan(400);
  await page.unroute("**/chat/completions");

  await setting(page, "Most tokens", "30");
  await page.getByRole("button", { name: "Regenerate" }).click();
  await expect(page.getByTestId("rate")).toHaveText(/\d/);
  await expect(page.getByRole("button", { name: "Regenerate" })).toBeEnabled();
  await expect(page.locator(".tokens")).toHaveCount(1);

  await page.getByRole("button", { name: "Copy" }).last().click();
  const copied = await page.evaluate(() => navigator.clipboard.readText());
  expect(copied).toBe(await page.locator(".tokens").textContent());

  await page.getByRole("button", { name: "Edit" }).click();
  await page.locator("article textarea").fill("Leo has 45 apples. He loses 2 of them.");
  await page.locator("article").getByRole("button", { name: "Send" }).click();
  await expect(page.getByRole("button", { name: "Regenerate" })).toBeEnabled();
  await expect(page.locator("article.user")).toHaveCount(1);
  await expect(page.locator("article.user")).toContainText("Leo has 45 apples");
});

test("keeps conversations over a reload, and nothing of the key", async ({ page }) => {
  await page.goto("/");
  await setting(page, "Temperature", "0");
  await setting(page, "Most tokens", "40");
  const answer = await ask(page, QUESTION);
  await page.reload();
  await expect(page.locator(".tokens")).toHaveText(answer.text);
  await expect(page.getByTestId("conversations").locator("li")).toHaveCount(1);
  await page.locator(".tokens .t").nth(2).hover();
  await expect(page.getByTestId("detail")).toContainText("forward");
  await page.getByRole("button", { name: "New conversation" }).click();
  await expect(page.locator("article")).toHaveCount(0);
  await expect(page.getByTestId("conversations").locator("li")).toHaveCount(2);
});

test("asks for the key and keeps it for the tab alone", async ({ page }) => {
  await page.goto(KEYED);
  const key = page.getByLabel("Key", { exact: true });
  await key.fill("wrong");
  await page.getByRole("button", { name: "Use it" }).click();
  await expect(key).toHaveValue("");
  await key.fill(KEY);
  await page.getByRole("button", { name: "Use it" }).click();
  await expect(page.locator("header .model")).toHaveText("nano");
  await setting(page, "Most tokens", "10");
  const answer = await ask(page, QUESTION);
  expect(answer.text).not.toBe("");
  const kept = await page.evaluate(() => [JSON.stringify(localStorage), JSON.stringify(sessionStorage)]);
  expect(kept[0]).not.toContain(KEY);
  expect(kept[1]).toContain(KEY);
});

test("a model's text is text", async ({ page }) => {
  const text = '<img src=x onerror="window.broken=1"><script>window.broken=1</script>';
  await page.route("**/chat/completions", (route) =>
    route.continue({
      postData: JSON.stringify({ ...route.request().postDataJSON(), guided_choice: [text] }),
    }),
  );
  await page.goto("/");
  const answer = await ask(page, `Say ${text}`);
  expect(answer.text).toBe(text);
  expect(await page.locator(".tokens").textContent()).toBe(text);
  await page.locator(".tokens .t").nth(1).hover();
  await page.getByRole("button", { name: "Step by step" }).click();
  await expect(page.getByTestId("committed")).toBeVisible();
  expect(await page.locator("article img, main img, main script").count()).toBe(0);
  expect(await page.evaluate(() => "broken" in window)).toBe(false);
});
