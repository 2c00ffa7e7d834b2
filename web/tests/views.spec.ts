import { AxeBuilder } from "@axe-core/playwright";
import { type Page, expect, test } from "@playwright/test";
import { QUESTION, ask, errors, listen, picture, setting } from "./page";

test.beforeEach(({ page }) => listen(page));

const visible = (text: string) => text.replaceAll(" ", "␣").replaceAll("\n", "↵");

async function asked(page: Page) {
  await page.goto("/");
  await setting(page, "Temperature", "0");
  return ask(page, QUESTION);
}

test("the step view shows the windows of the trace", async ({ page }) => {
  const answer = await asked(page);
  expect(answer.windows.length).toBe(Math.max(...answer.trace.map((one) => one.forward)));
  await page.getByRole("button", { name: "Step by step" }).click();
  for (const [index, window] of answer.windows.entries()) {
    await expect(page.getByTestId("forward")).toHaveText(String(window.forward));
    await expect(page.getByTestId("plan")).toHaveText(window.plan);
    await expect(page.getByTestId("accepted")).toHaveText(String(window.accepted));
    await expect(page.getByTestId("pending")).toHaveText(visible(window.pending.token));
    expect(await page.getByTestId("draft").locator("code").allTextContents()).toEqual(
      window.drafts.map((one) => visible(one.token)),
    );
    const committed = answer.trace.filter((one) => one.forward === window.forward);
    expect(await page.getByTestId("committed").locator("code").allTextContents()).toEqual(
      committed.map((one) => visible(one.token) || "∅"),
    );
    expect(await page.getByTestId("branch").count()).toBe(window.outcomes.length);
    const next = answer.windows[index + 1];
    if (next) expect(next.pending.token).toBe(committed.at(-1)?.token);
    // accepted drafts are what was committed
    const kept = window.drafts.slice(0, window.accepted).slice(0, committed.length);
    expect(committed.slice(0, kept.length).map((one) => one.token)).toEqual(
      kept.map((one) => one.token),
    );
    if (index === 2) await picture(page, "steps");
    await page.keyboard.press("ArrowRight");
  }
  await page.keyboard.press("Home");
  await expect(page.getByTestId("forward")).toHaveText("1");
  await page.keyboard.press("ArrowLeft");
  await expect(page.getByTestId("forward")).toHaveText("1");
});

for (const together of [false, true])
  test(`a race ends with equal bytes${together ? ", at once" : ""}`, async ({ page }) => {
    const found = errors(page);
    await page.goto("/#race");
    if (together) await page.getByLabel("At once").check();
    await page.getByRole("button", { name: "Start" }).click();
    await expect(page.getByTestId("result")).toBeVisible();
    const lanes = page.getByTestId("lane");
    await expect(lanes).toHaveCount(2);
    const [isd, ar] = await lanes.locator(".text").allTextContents();
    expect(isd).not.toBe("");
    expect(ar).toBe(isd);
    await expect(page.getByTestId("bytes")).toHaveText(`same bytes as ISD: ${isd?.length}`);
    await expect(page.getByTestId("finish")).toHaveCount(2);
    const counts = await page.getByTestId("tokens").allTextContents();
    expect(counts[0]).toBe(counts[1]);
    if (!together) await picture(page, "race");
    expect(found).toEqual([]);
  });

test("a lane that cannot be reached says so, and the others finish", async ({ page }) => {
  await page.goto("/#race");
  await page.getByRole("button", { name: "Add another server" }).click();
  await page.getByLabel("URL").fill("http://127.0.0.1:9");
  await page.getByRole("button", { name: "Start" }).click();
  await expect(page.getByRole("alert")).toContainText("http://127.0.0.1:9");
  await expect(page.getByTestId("finish")).toHaveCount(2);
});

test("the explorer's settings live in the URL", async ({ page }) => {
  await page.goto("/#explorer");
  await expect(page.getByTestId("x-tpf")).toHaveText("3.44"); // 1 + .9 + .81 + .729
  await picture(page, "explorer");
  await page.getByLabel("Branches").selectOption("chain");
  await expect(page.getByTestId("x-tpf")).toHaveText("2.92"); // as published
  await page.getByLabel("Acceptance, by depth").fill("0.95, 0.9");
  const [tpf, url] = [await page.getByTestId("x-tpf").textContent(), page.url()];
  expect(url).toContain("branches=chain");
  await page.goto("about:blank");
  await page.goto(url);
  await expect(page.getByTestId("x-tpf")).toHaveText(tpf as string);
  await page.getByText("Measured runs of your own").click();
  await page.getByLabel("JSON of").fill('{"mine": {"tpf": 2.5, "speedup": 2, "acceptance": [0.8]}}');
  await page.getByRole("button", { name: "Show" }).click();
  await page.getByLabel("Measured model").selectOption({ label: "mine" });
  await expect(page.getByLabel("Acceptance, by depth")).toHaveValue("0.800");
});

test("the explorer works from a file", async ({ page }) => {
  const found = errors(page);
  const requests: string[] = [];
  page.on("request", (request) => requests.push(request.url()));
  const file = new URL("../../idlm/ui/page/explorer.html", import.meta.url).href;
  await page.goto(file);
  await expect(page.getByTestId("x-tpf")).toHaveText("3.44");
  await page.getByLabel("Stride N").fill("8");
  await expect(page.getByTestId("x-tpf")).toHaveText("5.70");
  expect(page.url()).toContain("stride=8");
  await page.reload();
  await expect(page.getByTestId("x-tpf")).toHaveText("5.70");
  expect(requests.filter((url) => !url.startsWith(file))).toEqual([]);
  expect(found).toEqual([]);
});

const VIEWS = ["chat", "race", "steps", "explorer"];

test("375 pixels are enough", async ({ page }) => {
  await page.setViewportSize({ width: 375, height: 740 });
  await asked(page);
  for (const view of VIEWS) {
    await page.goto(`/#${view}`);
    await expect(page.locator("main section").first()).toBeVisible();
    const [inner, outer] = await page.evaluate(() => [
      document.documentElement.scrollWidth,
      document.documentElement.clientWidth,
    ]);
    expect(inner, view).toBe(outer);
  }
});

for (const scheme of ["light", "dark"] as const)
  test(`axe finds no serious fault, ${scheme}`, async ({ page }) => {
    await page.emulateMedia({ colorScheme: scheme, reducedMotion: "reduce" });
    await asked(page);
    for (const view of VIEWS) {
      await page.goto(`/#${view}`);
      await expect(page.locator("main section").first()).toBeVisible();
      const { violations } = await new AxeBuilder({ page }).analyze();
      const serious = violations.filter((one) => ["serious", "critical"].includes(one.impact ?? ""));
      expect(serious.map((one) => [one.id, one.nodes.map((node) => node.html)]), view).toEqual([]);
    }
  });

test("everything can be reached with the keyboard", async ({ page }) => {
  await asked(page);
  const reached = new Set<string>();
  for (let step = 0; step < 40; step++) {
    await page.keyboard.press("Tab");
    reached.add(
      await page.evaluate(() => {
        const one = document.activeElement as HTMLElement;
        return one.getAttribute("aria-label") ?? one.textContent?.trim().slice(0, 20) ?? "";
      }),
    );
  }
  for (const name of ["Race", "New conversation", "Copy", "Regenerate", "Step by step", "Message"])
    expect([...reached]).toContain(name);
});
