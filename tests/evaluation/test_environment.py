"""What results say of the machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from idlm.evaluation.environment import VECTORS, environment


def test_a_result_names_the_cpu_its_vector_instructions_and_the_versions() -> None:
    found = environment()
    json.dumps(found)
    assert found["cpu"] is not None and {"torch", "transformers", "idlm"} <= set(found)
    instructions = found["instructions"]
    assert isinstance(instructions, list) and all(name.startswith(VECTORS) for name in instructions)


def test_a_machine_without_cpuinfo_is_described_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Path, "exists", lambda path: False)
    assert environment()["instructions"] == []
