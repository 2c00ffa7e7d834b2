"""`train`: a whole run, from the data to the exported model."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from idlm.models.adapter import fingerprint
from idlm.training import length, setup
from idlm.training.checkpoint import Prepared, prepare_folder, written_whole
from idlm.training.config import TrainConfig
from idlm.training.corpus import Corpus, check_drafts, check_source, corpus
from idlm.training.data import SOURCES
from idlm.training.loop import Trainer
from idlm.training.processes import alone, placement, processes
from idlm.training.record import record
from idlm.training.track import check_packages, tracked


def train(config: TrainConfig) -> dict[str, Any]:
    """Run a config to its end and export the result to `output_dir/final`.

    Returns:
        the object of `idlm train --json`: folder, steps, seconds, last loss, and held-out
            measurements.

    Raises:
        InputError: bad config or data. NotFinite: the loss or gradient is NaN or infinite.
    """
    began = time.monotonic()
    check_packages(config)
    check_source(config.data)
    length.refuse_endless(config, endless=config.data.source in SOURCES)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    accelerator = processes(config)
    folder = Path(config.output_dir)
    with alone(folder, accelerator):
        with accelerator.main_process_first():
            prepared = prepare_folder(config)
        with tracked(accelerator, config, prepared.resume):
            trainer = _trainer(config, accelerator, prepared)
            measured = trainer.run()
            with written_whole(folder / "final", accelerator) as final:
                trainer.export(final)
    losses = [entry["loss"] for entry in trainer.log.entries if "loss" in entry]
    return {
        "output": str(folder / "final"),
        "steps": trainer.state.step,
        "seconds": round(time.monotonic() - began, 1),
        "loss": losses[-1] if losses else None,
        **measured,
    }


def _trainer(config: TrainConfig, accelerator: Accelerator, prepared: Prepared) -> Trainer:
    """Load the model and the data, and say in the log and in environment.json what they are."""
    torch.manual_seed(config.seed)
    with accelerator.main_process_first():
        idlm = setup.base_model(config.model, *placement(accelerator))
    folder, resumed = Path(config.output_dir), prepared.resume is not None
    data = corpus(config.data, idlm, _draws(config, accelerator), folder, resumed)
    if config.objective == "idlm":
        check_drafts(data)
    if length.needs_texts(config):
        plan = data.plan(config, config.accumulation * accelerator.num_processes)
        config = length.in_steps(config, len(data.training), plan)
    student = setup.trainee(config, idlm)
    main, base = accelerator.is_main_process, student.fingerprint
    if main and not base:
        base = fingerprint(idlm.model)  # before other weights come
    if config.warm_start is not None and not resumed:
        setup.warm_start(student, Path(config.warm_start).expanduser())
    trainer = Trainer(config, accelerator, student, data)
    if prepared.resume is not None:
        trainer.load(prepared.resume)
    if main:
        record(config, base, accelerator.num_processes, prepared.resume, data.files)
    for message in _messages(config, data, prepared):
        trainer.log.message(message)
    return trainer


def _draws(config: TrainConfig, accelerator: Accelerator) -> int | None:
    """How many documents the run takes; None where the batches or the texts decide."""
    if config.batch_rows is None or config.batch_tokens is not None or config.packing:
        return None
    if length.needs_texts(config):
        return None
    return config.steps * config.batch_rows * config.accumulation * accelerator.num_processes


def _messages(config: TrainConfig, data: Corpus, prepared: Prepared) -> Iterator[str]:
    """What the log says before the first step."""
    yield f"the run is {length.shown(config)}"
    if prepared.longer is not None:
        yield (
            f"{prepared.longer}: the {config.optimizer.schedule} schedule and the weights of the "
            "loss are laid over the new length, so this is not the run that would have been"
        )
    yield from data.tally.notes
