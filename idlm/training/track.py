"""`report_to`: TensorBoard, Weights & Biases and MLflow, through Accelerate's trackers.

    tensorboard    event files in output_dir/tensorboard
    wandb          the project "idlm"; files in output_dir/wandb. WANDB_* are its own settings
    mlflow         the experiment "idlm", or MLFLOW_EXPERIMENT_NAME; MLFLOW_TRACKING_URI is where

A run that goes on is the same run there: trackers.json keeps the ids.
"""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from idlm.errors import InputError
from idlm.extras import need
from idlm.models.sources import first_line
from idlm.training.checkpoint import replace_text, step_of
from idlm.training.config import TrainConfig
from idlm.training.log import flat
from idlm.training.processes import writing
from idlm.training.strict import as_tree

log = logging.getLogger("idlm")

PROJECT = "idlm"
IDS = "trackers.json"


def check_packages(config: TrainConfig) -> None:
    """Refuse a service whose package is missing, before anything is made or loaded."""
    for name in config.report_to:
        need(name, f"report_to: {name}")


@contextmanager
def tracked(accelerator: Accelerator, config: TrainConfig, resume: Path | None) -> Iterator[None]:
    """Run with `accelerator.trackers` of the services in `report_to`, on the main process only.

    Args:
        accelerator: made with `log_with` and a logging folder.
        resume: the checkpoint that the run goes on from.

    Raises:
        InputError: a service cannot be started, or the ids cannot be written.
    """
    if config.report_to and accelerator.is_main_process:
        _start(accelerator, config, resume)
    try:
        yield
    finally:
        for tracker in accelerator.trackers:
            try:
                tracker.finish()
            except Exception as error:  # each service raises errors of its own
                log.warning("%s did not end well: %s", tracker.name, first_line(error))
        accelerator.trackers.clear()


def _start(accelerator: Accelerator, config: TrainConfig, resume: Path | None) -> None:
    folder = Path(config.output_dir)
    ids, known = _ids(folder)
    options = {
        "tensorboard": {"purge_step": 0 if resume is None else step_of(resume) + 1},
        "wandb": {"name": folder.name, "dir": config.output_dir, "id": ids["wandb"]},
        "mlflow": {"run_name": folder.name, "run_id": ids.get("mlflow")},
    }
    options["wandb"]["resume"] = "allow"
    # a run of MLflow takes no other values later: those of the first start stay
    settings = None if known else flat(as_tree(config))
    try:
        accelerator.init_trackers(PROJECT, settings, options)
        for tracker in accelerator.trackers:
            if tracker.name == "mlflow":
                replace_text(
                    folder / IDS, json.dumps(ids | {"mlflow": tracker.tracker.info.run_id})
                )
    except Exception as error:  # each service raises errors of its own
        names = ", ".join(config.report_to)
        raise InputError(
            f"report_to: {names} cannot start ({first_line(error)}); set it up or leave it out"
        ) from error


def _ids(folder: Path) -> tuple[dict[str, Any], bool]:
    """The ids of the run in the services, and whether it had them before."""
    file = folder / IDS
    known = file.exists()
    ids = json.loads(file.read_text(encoding="utf-8")) if known else {}
    ids.setdefault("wandb", secrets.token_hex(4))
    with writing(file):
        replace_text(file, json.dumps(ids))
    return ids, known
