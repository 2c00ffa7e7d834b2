"""`train`: a whole run, from the data to the exported model."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, ProjectConfiguration

from idlm.errors import InputError
from idlm.models.adapter import fingerprint
from idlm.training import length, setup
from idlm.training.checkpoint import Prepared, prepare_folder, written_whole
from idlm.training.config import TrainConfig
from idlm.training.corpus import Corpus, check_source, corpus
from idlm.training.data import SOURCES
from idlm.training.loop import Trainer
from idlm.training.record import record
from idlm.training.track import TENSORBOARD, check_packages, tracked


def processes(config: TrainConfig) -> Accelerator:
    """Join the other processes of the run, if a launcher started several.

    Raises:
        InputError: several GPUs are visible to a single process; or `eval_decode` is asked for and
            no process has the whole model.
    """
    accelerator = Accelerator(
        cpu=config.device == "cpu" or not torch.cuda.is_available(),
        mixed_precision="no",
        log_with=list(config.report_to) or None,
        project_config=ProjectConfiguration(logging_dir=str(Path(config.output_dir) / TENSORBOARD)),
    )
    gpus = torch.cuda.device_count() if accelerator.device.type == "cuda" else 0
    if gpus > 1 and accelerator.num_processes == 1:
        raise InputError(
            f"{gpus} GPUs for one process; start with torchrun, or set CUDA_VISIBLE_DEVICES"
        )
    if config.eval_decode and accelerator.distributed_type == DistributedType.FSDP:
        raise InputError(
            f"eval_decode is {config.eval_decode}, and FSDP splits the model; set it to 0"
        )
    return accelerator


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
    with accelerator.main_process_first():
        prepared = prepare_folder(config)
    with tracked(accelerator, config, prepared.resume):
        trainer = _trainer(config, accelerator, prepared)
        measured = trainer.run(prepared.resume)
        if accelerator.is_main_process:
            with written_whole(folder / "final") as final:
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
    batch = config.batch_size * config.accumulation * accelerator.num_processes
    with accelerator.main_process_first():
        idlm = setup.base_model(config.model)
        data = corpus(config.data, idlm, config.steps * batch, Path(config.output_dir))
    if length.needs_texts(config):
        sizes = length.step_sizes([e.length for e in data.training], batch, config.seed)
        config = length.in_steps(config, len(data.training), sizes)
    student = setup.trainee(config, idlm)
    if accelerator.is_main_process:
        base = student.fingerprint or fingerprint(idlm.model)
        record(config, base, accelerator.num_processes, prepared.resume)
    if config.warm_start is not None and prepared.resume is None:
        setup.warm_start(student, Path(config.warm_start).expanduser())
    trainer = Trainer(config, accelerator, student, data)
    for message in _messages(config, data, prepared):
        trainer.log.message(message)
    return trainer


def _messages(config: TrainConfig, data: Corpus, prepared: Prepared) -> Iterator[str]:
    """What the log says before the first step."""
    yield f"the run is {length.shown(config)}"
    if prepared.longer is not None:
        yield (
            f"{prepared.longer}: the {config.optimizer.schedule} schedule and the weights of the "
            "loss are laid over the new length, so this is not the run that would have been"
        )
    if data.cut:
        yield f"{data.cut} of {len(data.training)} responses were cut at the length limit"
    if data.bad:
        yield f"{data.bad} bad rows were left out"
