"""The commands of the README run, and it stays short."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests.docs.shell import PROGRAM, ROOT, blocks, commands, run, serves

README = (ROOT / "README.md").read_text()
MOST_WORDS = 700
SHORTER = {
    "generate": ["--max-tokens", "20"],
    "verify": ["--max-tokens", "8"],
    "train": [
        *("--stages.0.steps=1", "--stages.1.steps=1", "--batch_size=2", "--optimizer.warmup=0"),
        *("--data.examples=6", "--data.held_out=2", "--data.max_tokens=8", "--data.prompts=nano"),
    ],
}
"""By command: options that make it quick and change nothing else."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where commands run: some read what an earlier one wrote."""
    place = tmp_path_factory.mktemp("readme")
    (place / "configs").symlink_to(ROOT / "configs")
    return place


def test_it_is_short() -> None:
    assert len(README.split()) <= MOST_WORDS


@pytest.mark.parametrize("block", blocks(README, "python"), ids=lambda block: block.split("\n")[0])
def test_python_runs(block: str, folder: Path) -> None:
    done = run([sys.executable, "-c", block], folder)
    assert done.returncode == 0, done.stderr
    assert "The answer is 41." in done.stdout  # 12 - 4 + 33


@pytest.mark.parametrize("words", commands(README, "idlm"), ids=" ".join)
def test_commands_run(words: list[str], folder: Path) -> None:
    command = [
        "nano-base" if word == "MODEL" else word.replace("=MODEL", "=nano-base") for word in words
    ]
    if words[0] == "serve":
        return serves(command, folder, "nano")
    done = run([*PROGRAM, *command, *SHORTER.get(words[0], [])], folder, text="Hello\n")
    assert done.returncode == 0, done.stderr


def test_it_shows_what_the_program_can_do() -> None:
    shown = {words[0] for words in commands(README, "idlm")}
    assert shown >= {"generate", "verify", "serve", "train", "chat"}


def test_targets_of_make_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    asked = {words[0] for words in commands(README, "make")} | set(
        re.findall(r"`make ([\w-]+)", README)
    )
    assert {"demo", "test"} <= asked <= targets


def test_the_programs_and_files_named_are_there() -> None:
    for words in commands(README, "pip"):
        assert words[0] == "install"
    for picture in re.findall(r"!\[[^]]+\]\(([^)]+)\)", README):
        assert (ROOT / picture).stat().st_size > 0
