"""`report_to`: what TensorBoard, W&B and MLflow hold of a run, without a network."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from idlm.errors import InputError
from idlm.training.run import train
from tests.training import tiny
from tests.waiting import wait_until


def needs(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(find_spec(package) is None, reason=f"{package} is not installed")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model and its data, which is also the working directory."""
    tiny.model("full", torch.float32).model.save_pretrained(tmp_path / "model")
    tiny.write_jsonl(tmp_path / "data.jsonl", tiny.examples())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(folder: Path, **changes: Any) -> dict[int, dict[str, Any]]:
    """The reports of a run's steps, by step."""
    tree = {"stages": [{"steps": 3, "block_size": 2}], "save_steps": 1}
    train(tiny.config(folder, **tree | changes))
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return {entry["step"]: entry for entry in map(json.loads, lines) if "loss" in entry}


def longer(folder: Path, **changes: Any) -> dict[int, dict[str, Any]]:
    return run(folder, stages=[{"steps": 5, "block_size": 2}], resume=True, **changes)


@needs("tensorboard")
def test_tensorboard_has_every_figure_once(folder: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(folder, report_to=["tensorboard"])
    reports = longer(folder, report_to=["tensorboard"])
    events = EventAccumulator(str(folder / "run" / "tensorboard" / "idlm")).Reload()
    assert {"loss", "grad_norm", "tokens_per_second", "acceptance/1", "acceptance/2", "tpf"} <= set(
        events.Tags()["scalars"]
    )
    losses = {event.step: event.value for event in events.Scalars("loss")}
    assert len(events.Scalars("loss")) == len(losses) == 5
    for step, value in losses.items():
        assert value == pytest.approx(reports[step]["loss"], rel=1e-6)


@needs("wandb")
def test_wandb_writes_its_folder_offline(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run(folder, report_to=["wandb"])
    (offline,) = (folder / "run" / "wandb").glob("offline-run-*")
    (file,) = offline.glob("run-*.wandb")
    wait_until(lambda: b"acceptance/1" in file.read_bytes())  # its own process writes
    assert b"optimizer/lr" in file.read_bytes()
    ids = json.loads((folder / "run" / "trackers.json").read_text())
    assert file.name == f"run-{ids['wandb']}.wandb"
    longer(folder, report_to=["wandb"])
    assert json.loads((folder / "run" / "trackers.json").read_text()) == ids
    runs = [file.name for file in (folder / "run" / "wandb").glob("offline-run-*/*.wandb")]
    assert len(runs) == 2 and len(set(runs)) == 1  # one run there, in two parts


@needs("mlflow")
def test_mlflow_goes_on_with_its_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
    mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
    run(folder, report_to=["mlflow"])
    reports = longer(folder, report_to=["mlflow"])
    experiment = mlflow.get_experiment_by_name("idlm")
    (one,) = mlflow.search_runs([experiment.experiment_id], output_format="list")
    assert one.info.run_name == "run" and one.info.status == "FINISHED"
    assert one.data.params["optimizer/lr"] == "0.01"
    history = mlflow.MlflowClient().get_metric_history(one.info.run_id, "loss")
    assert {m.step: m.value for m in history} == {s: r["loss"] for s, r in reports.items()}
    assert len(history) == 5 and "acceptance/2" in one.data.metrics


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_a_missing_package_is_one_error_before_anything_is_made(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("idlm.extras.find_spec", lambda module: None)
    config = tiny.config(folder, report_to=[name], model={"path": str(folder / "nowhere")})
    with pytest.raises(InputError) as caught:
        train(config)
    assert str(caught.value) == (
        f"report_to: {name} needs the package {name}; install it with pip install 'idlm[{name}]'"
    )
    assert not (folder / "run").exists()


@needs("mlflow")
def test_a_service_that_cannot_start_is_one_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    mlflow.set_tracking_uri("nonsense://nowhere")
    with pytest.raises(InputError, match="report_to: mlflow cannot start .*leave it out"):
        run(folder, report_to=["mlflow"])
    assert list((folder / "run").glob("checkpoint-*")) == []


@needs("tensorboard")
def test_a_service_that_fails_does_not_end_the_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The writer's folder cannot take more: the run says so once and goes on."""
    from torch.utils.tensorboard import SummaryWriter

    original = SummaryWriter.add_scalar

    def full(self: Any, *args: Any, global_step: int, **kwargs: Any) -> None:
        if global_step > 1:
            raise OSError("[Errno 28] No space left on device")
        original(self, *args, global_step=global_step, **kwargs)

    monkeypatch.setattr(SummaryWriter, "add_scalar", full)
    assert len(run(folder, report_to=["tensorboard"])) == 3
    assert capsys.readouterr().err.count("tensorboard failed and gets no more figures") == 1
