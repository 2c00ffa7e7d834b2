"""The commands of docs/converting.md run, from a model to a server."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.docs.shell import PROGRAM, ROOT, commands, run, serves

PAGE = (ROOT / "docs" / "converting.md").read_text()
COMMANDS = [list(words) for words in dict.fromkeys(map(tuple, commands(PAGE, "idlm")))]
"""Each once."""
ONE_STEP = ["--batch_size=2", "--optimizer.warmup=0", "--device=cpu", "--threads=1"]
SHORTER = {
    "distill": ["--num", "12", "--max-tokens", "60", "--threads", "1"],
    "smollm2": ["--stages.0.steps=1", "--data.held_out=2", *ONE_STEP],
    "stories": [
        *("--stages.0.steps=1", "--stages.1.steps=1", "--data.held_out=2", *ONE_STEP),
        *("--data.examples=6", "--data.max_tokens=8", "--data.prompts=nano"),
    ],
    "verify": ["--max-tokens", "8"],
    "generate": ["--max-tokens", "8"],
    "inspect": [],
    "report": [],
}
"""By command, or by config: options that make it quick and change nothing else."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the commands run, one after the other, on the bundled base."""
    place = tmp_path_factory.mktemp("converting")
    (place / "configs").symlink_to(ROOT / "configs")
    lines = (json.dumps({"prompt": f"Mia has {number} apples."}) + "\n" for number in range(20))
    (place / "prompts.jsonl").write_text("".join(lines))
    return place


def shorter(words: list[str]) -> list[str]:
    config = words[1].removeprefix("configs/").partition("-")[0]
    return SHORTER[config if words[0] == "train" else words[0]]


def test_a_model_becomes_a_server(folder: Path) -> None:
    """In one test: each command needs what those before it wrote."""
    for words in COMMANDS:
        command = [word.replace("MODEL", "nano-base") for word in words]
        if words[0] == "serve":
            serves(command, folder, "nano-base")
            continue
        if words[0] == "report" and not (folder / "runs" / "other").exists():
            (folder / "runs" / "other").symlink_to("mine")
        done = run([*PROGRAM, *command, *shorter(words)], folder)
        assert done.returncode == 0, (words, done.stderr)
        if words[0] == "verify":
            assert "0 differ" in done.stdout or "identical" in done.stdout, done.stdout


def test_all_steps_are_shown_in_order() -> None:
    first = PAGE.split("```sh\n")[1].split("```")[0]
    steps = [words[0] for words in commands(f"```sh\n{first}```", "idlm")]
    assert steps == ["inspect", "distill", "train", "inspect", "verify", "serve"]
