"""What a run's folder says about how it came to be, and the display of its figures."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from idlm.models.adapter import fingerprint
from idlm.models.loading import load
from idlm.training.log import Log, figures, flat, read_entries
from idlm.training.read_config import load_config
from idlm.training.record import digest, revision, starts
from idlm.training.run import train
from tests.training import tiny


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a model and its data."""
    tiny.model("full", torch.float32).model.save_pretrained(tmp_path / "model")
    tiny.write_jsonl(tmp_path / "data.jsonl", tiny.examples())
    return tmp_path


@pytest.mark.parametrize("method", ["full", "lora"])
def test_every_start_is_recorded(folder: Path, method: str) -> None:
    lora = {"method": method, "lora": {"rank": 2}, "save_steps": 2}
    config = tiny.config(folder, **lora)
    train(config)
    run = folder / "run"
    (first,) = starts(run)
    data = str(folder / "data.jsonl")
    content = (folder / "data.jsonl").read_bytes()
    assert first["data"] == {
        data: {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    }
    assert first["fingerprint"] == fingerprint(load(folder / "model", dtype=torch.float32).model)
    assert first["steps"] == [3] and first["ranks"] == 1 and first["resumed_from"] is None
    assert {"python", "torch", "transformers", "accelerate", "idlm", "cpu", "cores", "git"} <= set(
        first
    )
    assert first["command"].split()  # the test's own
    assert load_config(run / "config.yaml") == config
    shutil.rmtree(run / "checkpoint-3")
    train(tiny.config(folder, resume=True, **lora))
    again = starts(run)
    assert again[0] == first and [one["resumed_from"] for one in again] == [None, "checkpoint-2"]


def test_a_revision_knows_changed_files(tmp_path: Path) -> None:
    assert revision(tmp_path) is None
    (tmp_path / "file").write_text("one")
    who = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    for words in (("init",), ("add", "file"), (*who, "commit", "-m", "one")):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True, capture_output=True)
    clean = revision(tmp_path)
    assert clean is not None and len(clean["commit"]) == 40 and clean["dirty"] is False
    (tmp_path / "file").write_text("two")
    assert revision(tmp_path) == clean | {"dirty": True}


def test_a_dataset_of_the_hub_has_no_digest() -> None:
    assert digest(None) is None


def test_figures_are_flat_and_short() -> None:
    entry = {"step": 3, "acceptance": [0.5, 0.25], "loss": 1.23456, "optimizer": {"betas": [1]}}
    assert flat(entry) == {
        "step": 3,
        "acceptance/1": 0.5,
        "acceptance/2": 0.25,
        "loss": 1.23456,
        "optimizer/betas/1": 1,
    }
    latest = entry | {"tpf": 1.6, "tokens_per_second": 12345.6, "memory_gib": 1.04}
    assert figures(latest) == (
        "loss 1.235  TPF 1.600  acceptance [0.5 0.25]  12,346 tokens/s  1.0 GiB"
    )


def test_without_a_terminal_each_report_is_a_line_with_the_time_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = Log(tmp_path, main=True)
    with log.running(0, 4) as show:
        show(2)
        log.write({"step": 2, "loss": 0.5, "tokens_per_second": 10.0})
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "step 2  loss 0.5  tokens_per_second 10  left 0:00:00"


def test_on_a_terminal_the_display_has_the_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "160")
    log = Log(tmp_path, main=True)
    with log.running(0, 4) as show:
        show(2)
        log.write({"step": 2, "loss": 0.5, "tpf": 1.5, "acceptance": [0.5], "memory_gib": 2.0})
    shown = capsys.readouterr().err
    for words in ("2/4", "loss 0.5", "TPF 1.500", "acceptance [0.5]", "2.0 GiB", "0:00:00"):
        assert words in shown


def test_only_the_main_process_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = Log(tmp_path, main=False)
    with log.running(0, 4) as show:
        show(1)
        log.write({"step": 1, "loss": 0.5})
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr().err == ""
    assert log.entries == [{"step": 1, "loss": 0.5}]


@pytest.mark.parametrize("cut", [b"", b'{"step": 2, "lo', b'{"step": 2}\n{"step": 3}\n', b"[1]\n"])
def test_what_a_kill_left_is_cut_back(tmp_path: Path, cut: bytes) -> None:
    one: dict[str, Any] = {"step": 1, "loss": 0.5}
    (tmp_path / "metrics.jsonl").write_bytes(json.dumps(one).encode() + b"\n" + cut)
    with Log(tmp_path, main=True).running(1, 4):
        pass
    assert read_entries(tmp_path / "metrics.jsonl") == [one]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
