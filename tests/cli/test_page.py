"""`idlm ui` and `idlm explore`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

import httpx2 as httpx
import pytest
from typer.testing import CliRunner

from idlm.cli import app
from tests.waiting import HANG_SECONDS

PROGRAM = [sys.executable, "-c", "from idlm.cli import app; app(prog_name='idlm')"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "idlm ui nano"),
        (["nano", "--url", "http://host:1"], "--url"),
        (["--url", "host:1"], "'host:1'"),
        (["nano", "--port", "70000"], "70000"),
        (["no/where/at-all"], "no/where/at-all"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], named: str) -> None:
    result = CliRunner().invoke(app, ["ui", "--no-browser", *arguments])
    assert result.exit_code == 2 and named in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_the_explorer_is_one_file() -> None:
    result = CliRunner().invoke(app, ["explore", "--no-browser"])
    assert result.exit_code == 0
    path = Path(url2pathname(urlsplit(result.stdout.strip()).path))
    assert path.name == "explorer.html" and "<script>" in path.read_text()


def test_the_page_for_another_server_needs_no_node() -> None:
    """Nor anything else on the path."""
    command = [*PROGRAM, "ui", "--url", "http://127.0.0.1:9", "--no-browser"]
    environment = os.environ | {"PATH": ""}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            address = line.split()[-1]
            with httpx.Client(base_url=address, timeout=HANG_SECONDS) as http:
                assert "ui/app.js" in http.get("/").text
                assert http.get("/v1/models").status_code == 502
        finally:
            process.terminate()
        process.communicate(timeout=HANG_SECONDS)
