"""The commands of docs/tour.md run as they stand; the notebook holds no outputs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from idlm.cli import app
from tests.docs.shell import ROOT, commands

PAGE = (ROOT / "docs" / "tour.md").read_text()
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


def test_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one test: each needs what those before it wrote."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    said = {}
    for words in commands(PAGE, "idlm"):
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, (words, done.output, done.exception)
        said[" ".join(words[:2])] = done.output
    assert "The answer is 8." in said["generate nano"] and "TPF" in said["generate nano"]
    assert all("identical" in said[f"verify {model}"] for model in ("nano", "nano-base"))
    assert (tmp_path / "runs" / "tour" / "final").is_dir()


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.name)
def test_a_notebook_has_no_outputs(file: Path) -> None:
    cells = [cell for cell in json.loads(file.read_text())["cells"] if cell["cell_type"] == "code"]
    assert cells
    for cell in cells:
        assert cell["outputs"] == [] and cell["execution_count"] is None, "".join(cell["source"])
