"""What results record of the machine and of the run."""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from idlm.environment import VECTORS, command, environment


def test_a_result_names_the_cpu_its_vector_instructions_and_the_versions() -> None:
    report = environment()
    json.dumps(report)
    assert report["cpu"] is not None and {"torch", "transformers", "idlm"} <= set(report)
    instructions = report["instructions"]
    assert isinstance(instructions, list) and all(name.startswith(VECTORS) for name in instructions)


def test_a_machine_without_cpuinfo_is_described_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Path, "exists", lambda path: False)
    assert environment()["instructions"] == []


def test_a_result_names_the_command_without_the_folders_of_the_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = ["--out=/a/b/c.json", "/a/model+/b/adapter", "runs/x", "NAME=/a/b", "http://h:1/v1"]
    monkeypatch.setattr("sys.argv", ["/usr/bin/pytest", *arguments])
    monkeypatch.setitem(sys.modules, "__main__", object())  # type: ignore[arg-type]
    assert command() == "pytest --out=c.json model+adapter runs/x NAME=b http://h:1/v1"


def test_a_result_has_the_date_in_utc() -> None:
    report = environment()
    today = datetime.now(UTC).date()
    assert report["date"] in {(today - timedelta(days=late)).isoformat() for late in (0, 1)}
    assert isinstance(report["command"], str) and report["command"]
