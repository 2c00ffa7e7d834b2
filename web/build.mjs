// Builds the page into idlm/ui/page: app.js and app.css for the server, and explorer.html, one file
// that also works from file://. `source.sha256` says which sources they are made of; a Python test
// compares it with the sources that are there.
import { createHash } from "node:crypto";
import { cp, mkdir, readFile, readdir, rm, writeFile } from "node:fs/promises";
import { gzipSync } from "node:zlib";
import { join, relative, sep } from "node:path";
import { svelte } from "@sveltejs/vite-plugin-svelte";
import { build } from "vite";

const HERE = import.meta.dirname;
const OUT = join(HERE, "..", "idlm", "ui", "page");
const LIMIT = 250_000; // bytes of compressed JavaScript

async function bundle(entry) {
  const result = await build({
    root: HERE,
    configFile: false,
    logLevel: "warn",
    plugins: [svelte()],
    publicDir: false,
    build: {
      write: false,
      target: "es2022",
      cssCodeSplit: false,
      modulePreload: false,
      lib: { entry: join(HERE, "src", entry), formats: ["iife"], name: "idlm" },
    },
  });
  const files = [result].flat().flatMap((one) => one.output);
  const script = files.find((file) => file.type === "chunk").code;
  const style = String(files.find((file) => file.fileName.endsWith(".css")).source);
  return { script: script.trim() + "\n", style: style.trim() + "\n" };
}

async function sources(folder = HERE) {
  const found = [];
  for (const entry of await readdir(folder, { withFileTypes: true })) {
    const path = join(folder, entry.name);
    if (entry.isDirectory()) {
      if (["src", "public"].includes(relative(HERE, path).split(sep)[0]))
        found.push(...(await sources(path)));
    } else if (folder !== HERE || /\.(html|mjs|json)$/.test(entry.name)) found.push(path);
  }
  return found;
}

async function digest() {
  const paths = await sources();
  const names = paths.map((path) => [relative(HERE, path).split(sep).join("/"), path]);
  names.sort(([a], [b]) => (a < b ? -1 : 1));
  const whole = createHash("sha256");
  for (const [name, path] of names) {
    const one = createHash("sha256").update(await readFile(path)).digest("hex");
    whole.update(`${one}  ${name}\n`);
  }
  return whole.digest("hex") + "\n";
}

const hash = (text) => `'sha256-${createHash("sha256").update(text).digest("base64")}'`;

function inlined({ script, style }) {
  const code = script.replaceAll("</script", "<\\/script");
  const policy =
    `default-src 'none'; script-src ${hash(code)}; style-src ${hash(style)}; ` +
    "img-src data:; base-uri 'none'; form-action 'none'";
  return `<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="${policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>idlm explorer</title>
<style>${style}</style>
</head>
<body>
<div id="app"></div>
<script>${code}</script>
</body>
</html>
`;
}

// Measured runs that the explorer shows beside its curves, out of benchmarks/results.
const RESULTS = join(HERE, "..", "benchmarks", "results");
async function measured() {
  const decode = JSON.parse(await readFile(join(RESULTS, "decode.json"), "utf8"));
  const runs = Object.entries(decode.results).filter(([, run]) => run.acceptance.length);
  const found = runs.map(([name, run]) => ({
    label: `${decode.model}, ${name}, ${decode.cpu}`,
    tpf: run.tpf,
    speedup: run.speedup,
    acceptance: run.acceptance,
  }));
  await writeFile(join(HERE, "src", "lib", "measured.json"), `${JSON.stringify(found, null, 1)}\n`);
}

await measured();
const app = await bundle("main.ts");
const explorer = await bundle("explorer.ts");
await rm(OUT, { recursive: true, force: true });
await mkdir(OUT, { recursive: true });
await cp(join(HERE, "public"), OUT, { recursive: true });
await writeFile(join(OUT, "index.html"), await readFile(join(HERE, "index.html")));
await writeFile(join(OUT, "app.js"), app.script);
await writeFile(join(OUT, "app.css"), app.style);
await writeFile(join(OUT, "explorer.html"), inlined(explorer));
await writeFile(join(OUT, "source.sha256"), await digest());
const size = gzipSync(app.script).length;
console.log(`app.js: ${app.script.length} bytes, ${size} compressed (limit ${LIMIT})`);
if (size > LIMIT) process.exit(1);
