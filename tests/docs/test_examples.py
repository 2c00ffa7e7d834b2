"""The programs in examples/ run on the bundled model and print what they promise."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.cli.test_serve import running
from tests.waiting import HANG_SECONDS

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


def run(name: str, *arguments: str) -> str:
    """The output of a program."""
    path = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=HANG_SECONDS
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_all_have_a_test_and_a_line_in_the_page() -> None:
    page = (EXAMPLES / "README.md").read_text()
    for file in EXAMPLES.glob("*.py"):
        assert f"examples/{file.name}" in page
        assert f'"{file.name}"' in Path(__file__).read_text()


def test_generate() -> None:
    out = run("generate.py")
    assert out.count("TPF") == 2 and "the planner's choice:" in out


def test_stream() -> None:
    text, sources = run("stream.py").strip().rsplit("\n", 1)
    assert "The answer is 41." in text and " accepted" in sources and "1 first" in sources


def test_convert(tmp_path: Path) -> None:
    out = run("convert.py", "--quick", "--folder", str(tmp_path / "lora"))
    assert "the same tokens: True" in out


def test_openai_client() -> None:
    with running("--name", "small") as (_, url):
        out = run("openai_client.py", "--url", url, "--model", "small")
    assert "The answer is 41." in out and "accepted_prediction_tokens" in out
