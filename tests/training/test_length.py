"""Runs by steps, epochs and tokens; runs that are made longer."""

from __future__ import annotations

import json
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import idlm.nano.source  # noqa: F401  # registers `source: nano`
from idlm.errors import InputError
from idlm.training.config import TrainConfig
from idlm.training.length import in_steps, shown
from idlm.training.plan import Bounds, Plan, Share
from idlm.training.read_config import load_config
from idlm.training.run import train
from idlm.training.strict import as_tree
from tests.training import tiny

LENGTHS = [e.length for e in tiny.examples()[:-4]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and its data."""
    path = tmp_path_factory.mktemp("length")
    tiny.model("full", torch.float32).model.save_pretrained(path / "model")
    tiny.write_jsonl(path / "data.jsonl", tiny.examples())
    return path


def run(folder: Path, output: Path, **changes: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The result of a run and its reports of steps."""
    result = train(tiny.config(folder, output_dir=str(output), **changes))
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return result, [entry for entry in map(json.loads, lines) if "loss" in entry]


def plan() -> Plan:
    """Steps of 4 texts."""
    return Plan(torch.tensor(LENGTHS), (Share(0, len(LENGTHS)),), Bounds(4), seed=0)


def stages(config: TrainConfig) -> list[int | None]:
    return [stage.steps for stage in in_steps(config, len(LENGTHS), plan()).stages]


def test_lengths_become_steps(tmp_path: Path) -> None:
    takes = list(accumulate(step.tokens for step in islice(plan(), 60)))
    assert len(LENGTHS) == 36  # an epoch is 9 steps of 4
    lengths = [{"steps": 2}, {"epochs": 1.5}, {"tokens": takes[19] - takes[15]}, {"tokens": 1}]
    config = tiny.config(tmp_path, stages=lengths)
    assert stages(config) == [2, 14, 4, 1]
    more = [*lengths[:2], {"tokens": takes[19] - takes[15] + 1}]
    assert stages(tiny.config(tmp_path, stages=more)) == [2, 14, 5]


def test_an_epoch_takes_as_many_texts_as_there_are(folder: Path, tmp_path: Path) -> None:
    result, reports = run(folder, tmp_path / "run", stages=[{"epochs": 1}])
    assert result["steps"] == 9
    assert reports[-1]["tokens"] == sum(step.tokens for step in islice(plan(), 9))
    result, reports = run(folder, tmp_path / "half", stages=[{"epochs": 0.5}])
    assert result["steps"] == 5 and reports[-1]["tokens"] < sum(LENGTHS)


def test_a_run_of_tokens_ends_with_the_step_that_reaches_them(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, reports = run(folder, tmp_path / "run", stages=[{"tokens": 150}])
    assert reports[-2]["tokens"] < 150 <= reports[-1]["tokens"]
    assert (
        f"the run is {len(reports)} steps: {len(reports)} (150 tokens)" in capsys.readouterr().err
    )


def test_the_length_is_shown_by_stage(tmp_path: Path) -> None:
    assert shown(tiny.config(tmp_path, stages=[{"steps": 3}])) == "3 steps"
    assert shown(tiny.config(tmp_path, stages=[{"steps": 3}, {"steps": 4}])) == "7 steps: 3 + 4"


@pytest.mark.parametrize("unit", ["steps", "epochs", "tokens"])
def test_a_finished_run_is_made_longer(
    folder: Path, tmp_path: Path, unit: str, capsys: pytest.CaptureFixture[str]
) -> None:
    short, long = {"steps": (3, 6), "epochs": (0.25, 0.75), "tokens": (80, 160)}[unit]
    rate = {"optimizer": {"lr": 1e-2, "warmup": 0, "schedule": "linear"}}
    first, _ = run(folder, tmp_path / "run", stages=[{unit: short}], save_steps=1, **rate)
    before = (tmp_path / "run" / "final" / "model.safetensors").read_bytes()
    again = {"stages": [{unit: long}], "resume": True, "save_steps": 1, **rate}
    second, reports = run(folder, tmp_path / "run", **again)
    assert second["steps"] > first["steps"] > 0
    assert [entry["step"] for entry in reports] == list(range(1, second["steps"] + 1))
    assert (tmp_path / "run" / "final" / "model.safetensors").read_bytes() != before
    rates, steps = [entry["learning_rate"] for entry in reports], second["steps"]
    for step in range(first["steps"], steps):
        assert rates[step] == pytest.approx(1e-2 * (steps - step) / steps)
    assert rates[first["steps"] - 1] == pytest.approx(1e-2 / first["steps"])
    assert f"stages.0.{unit} was {short}, now it is {long}: the linear schedule" in (
        capsys.readouterr().err
    )
    assert (
        load_config(tmp_path / "run" / "config.yaml").stages[0]
        == tiny.config(folder, stages=[{unit: long}]).stages[0]
    )


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ([{"steps": 2}, {"steps": 1}], "stages.1 had steps: 2, now it has steps: 1"),
        ([{"steps": 2}, {"epochs": 5}], "stages.1 had steps: 2, now it has epochs: 5"),
        ([{"steps": 3}, {"steps": 9}], "stages was"),
        ([{"steps": 2}, {"steps": 9, "block_size": 3}], "stages was"),
        ([{"steps": 2}], "stages was"),
    ],
)
def test_nothing_else_changes_when_a_run_goes_on(
    folder: Path, tmp_path: Path, changed: list[dict[str, Any]], words: str
) -> None:
    first = tiny.config(folder, output_dir=str(tmp_path), stages=[{"steps": 2}, {"steps": 2}])
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(as_tree(first)))
    with pytest.raises(InputError, match=f"cannot resume: {words}"):
        run(folder, tmp_path, stages=changed, resume=True)
    assert (tmp_path / "config.yaml").read_text() == yaml.safe_dump(as_tree(first))


def test_a_source_without_an_end_has_no_epochs(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="data.examples is missing.* nano has no end"):
        run(folder, tmp_path / "run", stages=[{"epochs": 1}], data={"source": "nano"})
    assert not (tmp_path / "run").exists()
