"""What clients of the APIs do with a server: `make clients`, after `make models`.

    python -m benchmarks.clients [--only SCRIPT ...] [--folder MODEL] [--seconds 900] [--out FILE]

A real `idlm serve` has a small chat model with a template for tools. Each client runs its script,
in an environment of its own under build/clients with pinned versions, and says which features
pass, which are refused, and with what sentence. `--only` renews the rows of some scripts. The model
is too small to choose a tool by itself, so calls and forms are forced, as the clients can. Exit
status 1 if a feature fails.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.harness.process import ServerProcess, idlm_serve
from benchmarks.harness.results import RESULTS, report

HERE = Path(__file__).parent
BUILD = Path("build/clients")
NODE = "node"
REQUIREMENTS = HERE / "requirements"
SCRIPTS: dict[str, tuple[str, ...]] = {
    "openai_chat": ("agents",),
    "openai_responses": ("agents",),
    "anthropic_messages": ("agents",),
    "agents_sdk": ("agents",),
    "pydantic_ai_agents": ("agents",),
    "langchain_chat": ("apps",),
    "llama_index_llm": ("apps",),
    "instructor_modes": ("apps",),
    "outlines_models": ("apps",),
    "guidance_models": ("apps",),
    "litellm_library": ("litellm",),
    "litellm_proxy": ("litellm",),
    "dspy_programs": ("litellm",),
    "guidellm_load": ("tools",),
    "lm_eval_remote": ("tools",),
    "sglang-router": ("routers", "routers"),
    "vllm-router": ("routers", "routers"),
    "smg": ("routers", "routers"),
    "openai_node": (NODE,),
    "vercel": (NODE,),
}
"""The environment of a script, and the script's file if it has another name and takes this one."""
NAME = "smol"


def chat_model(folder: Path) -> Path:
    """The model with the chat template of this folder, greedy if a request does not say."""
    made = BUILD / "model"
    made.mkdir(parents=True, exist_ok=True)
    for file in folder.iterdir():
        if not (made / file.name).exists():
            (made / file.name).symlink_to(file.resolve())
    for name in ("chat_template.jinja", "generation_config.json"):
        (made / name).unlink(missing_ok=True)
    shutil.copy(HERE / "chat_template.jinja", made)
    settings = json.loads((folder / "generation_config.json").read_text())
    (made / "generation_config.json").write_text(json.dumps(settings | {"do_sample": False}))
    return made


def environment(name: str) -> Path:
    """Make an environment unless it is there with the same pins; its folder."""
    folder = BUILD / name
    pins = HERE / NODE / "package.json" if name == NODE else REQUIREMENTS / f"{name}.txt"
    made = folder / ".made"
    if made.exists() and made.read_text() == pins.read_text():
        return folder
    if name == NODE:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(pins, folder)
        subprocess.run(["npm", "install", "--no-audit", "--no-fund"], cwd=folder, check=True)
    else:
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, "-r", str(pins)], check=True)
    made.write_text(pins.read_text())
    return folder


def command(script: str) -> list[str]:
    """How to run a script, in its environment."""
    where, *other = SCRIPTS[script]
    folder = environment(where)
    if where == NODE:  # modules are looked for beside the file
        for file in (HERE / NODE).glob("*.mjs"):
            shutil.copy(file, folder)
        return ["node", f"{script}.mjs"]
    file = HERE / "scripts" / f"{other[0] if other else script}.py"
    return [str((folder / "bin" / "python").absolute()), str(file), *([script] if other else [])]


def ask(script: str, host: str, seconds: float) -> list[dict[str, str]]:
    """The rows that a script prints; one more if it did not come to its end."""
    program = command(script)
    settings = {"SERVER": host, "MODEL": NAME, "FOLDER": str((BUILD / "model").absolute())}
    settings |= {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "HF_HUB_OFFLINE": "1"}
    outside = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    log = (BUILD / f"{script}.log").open("w+")
    output = (BUILD / f"{script}.jsonl").open("w+")
    with log, output:
        where = BUILD / NODE if program[0] == NODE else None
        process = subprocess.Popen(
            program, stdout=output, stderr=log, env=outside | settings, cwd=where
        )
        try:
            status: int | str = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.terminate()
            process.wait()
            status = f"more than {seconds:g} s"
        output.seek(0)
        rows = [json.loads(line) for line in output if line.startswith('{"client"')]
        if status != 0:
            log.seek(0)
            verdict = f"fails: it ended with {status}: {log.read()[-500:]}"
            rows.append({"client": script, "version": "", "feature": "", "verdict": verdict})
    for row in rows:
        print(f"{row['client']:28} {row['version']:9} {row['feature']:70.70} {row['verdict']:.100}")
    return rows


def main() -> int:
    """Exit status 1 if a feature fails."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=SCRIPTS, default=list(SCRIPTS))
    parser.add_argument("--folder", type=Path, default=Path("build/models/SmolLM2-135M-Instruct"))
    parser.add_argument("--seconds", type=float, default=900.0, help="of a script")
    parser.add_argument("--out", type=Path, default=RESULTS / "clients.json")
    options = parser.parse_args()
    for script in options.only:
        environment(SCRIPTS[script][0])
    model = chat_model(options.folder)
    serve = idlm_serve(
        *(str(model), "--name", NAME, "--max-model-len", "4096", "--max-num-seqs", "16")
    )
    features: dict[str, Any] = {}
    if options.out.exists():
        features = json.loads(options.out.read_text())["features"]
    with ServerProcess(serve) as server:
        for script in options.only:
            features[script] = ask(script, f"http://127.0.0.1:{server.port}", options.seconds)
    rows = [row for script in SCRIPTS for row in features.get(script, [])]
    verdicts = Counter(row["verdict"].partition(":")[0] for row in rows)
    report({"verdicts": verdicts, "features": features}, options.out)
    return 1 if verdicts["fails"] else 0


if __name__ == "__main__":
    sys.exit(main())
