"""The blocks of commands and programs in a page, and how tests run them."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from tests.waiting import HANG_SECONDS

ROOT = Path(__file__).parents[2]
PROGRAM = [sys.executable, "-c", "from idlm.cli import app; app(prog_name='idlm')"]
SHELL = ("sh", "bash", "console")
BLOCK = re.compile(
    r"(?:^<!-- not run: (?P<reason>\S[^\n]*?) -->\n)?^```(?P<language>\w+)\n(?P<text>.*?)^```",
    re.MULTILINE | re.DOTALL,
)


class Block(NamedTuple):
    """A block, and the reason in the comment above it why no test runs it."""

    reason: str | None
    language: str
    text: str

    @property
    def commands(self) -> list[list[str]]:
        """The words of each command of a shell block, comments left out."""
        lines = self.text.replace("\\\n", " ").splitlines()
        if self.language == "console":  # the other lines are output
            lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        return [words for line in lines if (words := shlex.split(line, comments=True))]


def all_blocks(page: str) -> list[Block]:
    """The blocks of a page that hold commands or Python."""
    found = [Block(*match.group(*Block._fields)) for match in BLOCK.finditer(page)]
    return [block for block in found if block.language in (*SHELL, "python")]


def blocks(page: str, language: str) -> list[str]:
    """The blocks of a language that a test has to run."""
    return [
        block.text for block in all_blocks(page) if block.language == language and not block.reason
    ]


def commands(page: str, program: str) -> list[list[str]]:
    """The words of each command of a program that a test has to run."""
    shown = (block for block in all_blocks(page) if block.language in SHELL and not block.reason)
    return [words[1:] for block in shown for words in block.commands if words[0] == program]


def run(command: list[str], folder: Path, text: str = "") -> subprocess.CompletedProcess[str]:
    """Run a command in a folder, with `text` as its input."""
    path = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command,
        cwd=folder,
        input=text,
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        env=environment,
    )


def serves(command: list[str], folder: Path, model: str) -> None:
    """The server starts and announces its URL."""
    small = ["--port", "0", "--threads", "1", "--max-num-seqs", "2", "--kv-memory", "32MiB"]
    with subprocess.Popen(
        [*PROGRAM, *command, *small], cwd=folder, stdout=subprocess.PIPE, text=True
    ) as server:
        try:
            assert server.stdout is not None
            said = f"idlm serves {model} at http://127.0.0.1:"
            assert any(line.startswith(said) for line in server.stdout)
        finally:
            server.kill()
