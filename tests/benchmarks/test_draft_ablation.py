"""The ablation of drafts goes on where it was stopped."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.draft_ablation import main

CONFIG = str(Path(__file__).parents[2] / "configs" / "nano-lora.yaml")
SMALL = ["--steps", "1", "--count", "1", "--max-tokens", "4", "--strides", "2", "--seeds", "3"]
SET = ["--set", "data.held_out=2", "batch_size=2", "lora.rank=2"]


def ablation(
    monkeypatch: pytest.MonkeyPatch, file: Path, names: list[str], *more: str
) -> dict[str, Any]:
    arguments = [CONFIG, *SMALL, *SET, *more, "--only", *names, "--out", str(file)]
    monkeypatch.setattr(sys, "argv", ["draft_ablation", *arguments])
    main()
    report: dict[str, Any] = json.loads(file.read_text())
    return report


def test_a_stopped_ablation_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "report.json"
    first = ablation(monkeypatch, file, ["head none"])
    both = ablation(monkeypatch, file, ["head none", "head mlp"])
    assert both["variants"]["head none"] == first["variants"]["head none"]  # CPU times, too
    assert [row["seed"] for row in both["variants"]["head mlp"]] == [3]
    plans = both["variants"]["head mlp"][0]["decoding"]
    assert {"ar", "chain-2", "all-2"} == plans.keys() and plans["ar"]["tpf"] == 1
    with pytest.raises(SystemExit, match="name another --out"):
        ablation(monkeypatch, file, ["head none"], "--steps", "2")
    assert json.loads(file.read_text()) == both
