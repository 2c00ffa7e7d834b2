"""The shell blocks of a page, and how tests run their commands."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from tests.waiting import HANG_SECONDS

ROOT = Path(__file__).parents[2]
PROGRAM = [sys.executable, "-c", "from idlm.cli import app; app(prog_name='idlm')"]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: str, language: str) -> list[str]:
    """The blocks of a language."""
    return [text for found, text in BLOCK.findall(page) if found == language]


def commands(page: str, program: str) -> list[list[str]]:
    """The words of each command of a program in the shell blocks, comments left out."""
    lines = [line for block in blocks(page, "sh") for line in block.splitlines()]
    return [
        words[1:]
        for words in (shlex.split(line, comments=True) for line in lines)
        if words[:1] == [program]
    ]


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
