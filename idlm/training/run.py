"""`train`: a whole run, from the data to the exported model."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from idlm.training.checkpoint import prepare_folder, written_whole
from idlm.training.config import TrainConfig
from idlm.training.corpus import check_source, corpus
from idlm.training.loop import Trainer
from idlm.training.processes import alone, placement, processes
from idlm.training.setup import base_model, trainee


def train(config: TrainConfig) -> dict[str, Any]:
    """Run a config to its end and export the result to `output_dir/final`.

    Returns:
        the object of `idlm train --json`: folder, steps, seconds, last loss, and held-out
            measurements.

    Raises:
        InputError: bad config or data. NotFinite: the loss or gradient is NaN or infinite.
    """
    began = time.monotonic()
    check_source(config.data)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    accelerator = processes(config)
    folder = Path(config.output_dir)
    with alone(folder, accelerator):
        torch.manual_seed(config.seed)
        with accelerator.main_process_first():
            resume = prepare_folder(config)
            idlm = base_model(config.model, *placement(accelerator))
            batch = config.batch_size * config.accumulation * accelerator.num_processes
            data = corpus(config.data, idlm, config.steps * batch, folder)
        trainer = Trainer(config, accelerator, trainee(config, idlm), data)
        if data.cut:
            cut = f"{data.cut} of {len(data.training)} responses were cut at the length limit"
            trainer.log.message(cut)
        if data.bad:
            trainer.log.message(f"{data.bad} bad rows were left out")
        measured = trainer.run(resume)
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
