import { defineConfig } from "@playwright/test";

const IDLM = process.env.IDLM ?? "../.venv/bin/idlm";
const SERVE = `${IDLM} serve nano --ui --branches all --threads 1`;
// REUSE=1: servers that already run there
const STARTED = {
  timeout: 300_000,
  stderr: "ignore" as const,
  reuseExistingServer: Boolean(process.env.REUSE),
};
export const OPEN = "http://127.0.0.1:8791";
export const KEYED = "http://127.0.0.1:8792";
export const KEY = "a-key";

export default defineConfig({
  testDir: "tests",
  outputDir: "../build/ui-test",
  workers: 1,
  timeout: 120_000,
  expect: { timeout: 60_000 },
  reporter: [["list"]],
  use: {
    baseURL: OPEN,
    colorScheme: "light",
    viewport: { width: 1200, height: 800 },
    permissions: ["clipboard-read", "clipboard-write"],
    launchOptions: {
      executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
      args: [
        "--no-sandbox",
        "--disable-background-networking",
        "--disable-component-update",
        "--no-first-run",
      ],
    },
  },
  webServer: [
    { command: `${SERVE} --port 8791`, url: `${OPEN}/ready`, ...STARTED },
    { command: `${SERVE} --port 8792 --api-key ${KEY}`, url: `${KEYED}/health`, ...STARTED },
  ],
});
