"""The output folder of a run.

config.yaml                   the config with all defaults, which a resumed run must match
environment.json              what the run depends on besides it: `training.record`
metrics.jsonl                 its figures: `training.log`
best, last                    links to checkpoints: `training.keep`
final/                        the result
checkpoint-N/                 the adapter or the whole model after N steps, loadable as it is
    optimizer/                <parameter>.<key>: the state of the optimizers, a file for each rank
    state.json                the rest: `state.State`
.writing/                     a folder being written; it is renamed when it is complete
.lock                         held by the run that writes

PyTorch's distributed checkpoints write the optimizers' tensors as they are, whole or sharded, and
read them into tensors that are sharded otherwise. So the number of ranks may change.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import yaml
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.optim import Optimizer

from idlm.errors import InputError
from idlm.training.config import TrainConfig
from idlm.training.length import extended, of_old_length
from idlm.training.processes import cannot_write, together
from idlm.training.strict import as_tree, read_yaml

STAGING = ".writing"
PREFIX = "checkpoint-"
OPTIMIZER, STATE = "optimizer", "state.json"

FREE_KEYS = (
    *("resume", "device", "threads", "parallel", "activation_checkpointing"),
    *("batch_size", "accumulation", "log_steps", "eval_steps", "eval_decode", "save_steps"),
    *("keep_checkpoints", "report_to"),
)
"""Keys that a resumed run may change: they do not affect the weights, but for rounding. The texts
of a step must stay: `Trainer.load` checks them."""


@contextmanager
def written_whole(folder: Path, accelerator: Accelerator) -> Iterator[Path]:
    """A folder for all ranks to write into, which is renamed to `folder` at the end: neither a kill
    nor an error leaves a partial folder.

    Raises:
        InputError: it cannot be written.
    """
    staging, main = folder.parent / STAGING / folder.name, accelerator.is_main_process
    with together(accelerator, str(folder)):
        if main:
            shutil.rmtree(staging.parent, ignore_errors=True)
            staging.mkdir(parents=True)
    try:
        yield staging
    except InputError:  # all ranks have it
        if main:
            shutil.rmtree(staging.parent, ignore_errors=True)
        raise
    with together(accelerator, str(folder)):
        if main:
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(staging, folder)
            staging.parent.rmdir()


def save_optimizers(model: nn.Module, optimizers: Iterable[Optimizer], folder: Path) -> None:
    """Write the optimizers' tensors under the names of their parameters; all ranks call it.

    Raises:
        InputError: a rank cannot write.
    """
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    states = [(names[p], state) for each in optimizers for p, state in each.state.items()]
    tensors = {f"{name}.{key}": t for name, state in states for key, t in state.items()}
    writer = HuggingFaceStorageWriter(str(folder / OPTIMIZER), save_distributed=True)
    try:
        with _one_process_is_fine():
            dcp.save(tensors, storage_writer=writer, no_dist=not dist.is_initialized())
    except CheckpointException as error:  # all ranks have it
        raise InputError(cannot_write(str(folder.name), error)) from None


def load_optimizers(model: nn.Module, optimizers: Iterable[Optimizer], folder: Path) -> None:
    """Restore the optimizers from what `save_optimizers` wrote, on any number of ranks."""
    reader = HuggingFaceStorageReader(str(folder / OPTIMIZER))
    stored = reader.read_metadata().state_dict_metadata
    parameters = dict(model.named_parameters())
    tensors = {
        name: _room(parameters[name.rpartition(".")[0]], about)
        for name, about in stored.items()
        if isinstance(about, TensorStorageMetadata)
    }
    with _one_process_is_fine():
        dcp.load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())
    owner = {p: each for each in optimizers for group in each.param_groups for p in group["params"]}
    for name, tensor in tensors.items():
        parameter, _, key = name.rpartition(".")
        p = parameters[parameter]
        owner[p].state[p][key] = tensor


@contextmanager
def _one_process_is_fine() -> Iterator[None]:
    """Without DCP's warning that a run has one process only."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


def _room(parameter: nn.Parameter, about: TensorStorageMetadata) -> Tensor:
    """An empty tensor for a stored one: sharded as the parameter is, if it has its shape."""
    dtype = about.properties.dtype
    if about.size == parameter.shape:
        return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
    return torch.empty(about.size, dtype=dtype, device=parameter.device)


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoint folders, oldest first; incomplete ones have another name."""
    folders = [p for p in folder.glob(f"{PREFIX}*") if p.name.removeprefix(PREFIX).isdecimal()]
    return sorted(folders, key=step_of)


def checkpoint_of(folder: Path, step: int) -> Path:
    """The checkpoint of a run after `step` steps."""
    return folder / f"{PREFIX}{step}"


def step_of(checkpoint: Path) -> int:
    """The step of a checkpoint folder."""
    return int(checkpoint.name.removeprefix(PREFIX))


class Prepared(NamedTuple):
    """The checkpoint to resume from, if any; and what is longer than before, if anything."""

    resume: Path | None
    longer: str | None


def prepare_folder(config: TrainConfig) -> Prepared:
    """Write the config into the output folder.

    Raises:
        InputError: the folder holds a run and `resume` is not set, or that run had another config.
    """
    folder = Path(config.output_dir)
    newest = next(reversed(checkpoints(folder)), None)
    if newest is not None and not config.resume:
        held = f"output_dir {config.output_dir!r} holds {newest.name}"
        raise InputError(f"{held}; set resume: true or name another folder")
    if newest is None and (folder / "final").exists():
        raise InputError(
            f"output_dir {config.output_dir!r} holds 'final' without a checkpoint; "
            "name another folder"
        )
    try:
        longer = _keep_config(config, folder / "config.yaml", resumes=newest is not None)
    except OSError as error:
        raise InputError(
            f"output_dir {config.output_dir!r} cannot be written: {error}; name another folder"
        ) from None
    return Prepared(newest, longer)


def _keep_config(config: TrainConfig, file: Path, resumes: bool) -> str | None:
    """Write the config unless it is there: several processes may do this at once."""
    written = file.read_text(encoding="utf-8") if file.exists() else None
    new, longer = as_tree(config), None
    if resumes and written is not None:
        old = read_yaml(written, str(file))
        longer = extended(old, new)
        _same_config(old, of_old_length(old, new), "")
    text = yaml.safe_dump(new, sort_keys=False)
    if text != written:
        replace_text(file, text)
    return longer


def replace_text(file: Path, text: str) -> None:
    """Write a file whole: a kill or an error leaves the one before."""
    staging = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        staging.write_text(text, encoding="utf-8")
        os.replace(staging, file)
    except OSError:
        staging.unlink(missing_ok=True)
        raise


def _same_config(old: Any, new: Any, where: str) -> None:
    """Raise InputError if a key differs, other than `FREE_KEYS`."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            if where or key not in FREE_KEYS:
                _same_config(old.get(key), new.get(key), f"{where}.{key}" if where else key)
    elif old != new:
        raise InputError(
            f"cannot resume: {where} was {old!r}, now it is {new!r}; "
            "restore it or name another output_dir"
        )
