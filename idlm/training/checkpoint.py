"""The output folder of a run.

config.yaml                   the config with all defaults, which a resumed run must match
environment.json              what the run depends on besides it: `training.record`
metrics.jsonl                 its figures: `training.log`
best, last                    links to checkpoints: `training.keep`
final/                        the result
checkpoint-N/                 the adapter or the whole model after N steps, loadable as it is
    optimizer.safetensors     <parameter>.<key>: the state of the optimizers
    state.json                the rest: `state.State`
.writing/                     a folder being written; it is renamed when it is complete
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from idlm.errors import InputError
from idlm.training.config import TrainConfig, as_tree
from idlm.training.length import extended, of_old_length

STAGING = ".writing"
PREFIX = "checkpoint-"
OPTIMIZER, STATE = "optimizer.safetensors", "state.json"

FREE_KEYS = (
    *("resume", "device", "threads", "log_steps", "eval_steps", "save_steps"),
    *("eval_decode", "keep_checkpoints", "report_to"),
)
"""Keys that a resumed run may change: they do not affect the weights (threads may, by rounding)."""


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """A folder to write into, which is renamed to `folder` at the end: a kill leaves no partial
    folder."""
    staging = folder.parent / STAGING / folder.name
    shutil.rmtree(staging.parent, ignore_errors=True)
    staging.mkdir(parents=True)
    yield staging
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(staging, folder)
    staging.parent.rmdir()


def save_optimizers(model: nn.Module, optimizers: Iterable[Optimizer], folder: Path) -> None:
    """Write the optimizers' tensors under the names of their parameters."""
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    states = [(names[p], state) for each in optimizers for p, state in each.state.items()]
    tensors = {
        f"{name}.{key}": t.contiguous() for name, state in states for key, t in state.items()
    }
    save_file(tensors, folder / OPTIMIZER)


def load_optimizers(model: nn.Module, optimizers: Iterable[Optimizer], folder: Path) -> None:
    """Restore the optimizers from what `save_optimizers` wrote."""
    parameters = dict(model.named_parameters())
    owner = {p: each for each in optimizers for group in each.param_groups for p in group["params"]}
    for name, tensor in load_file(folder / OPTIMIZER).items():
        parameter, _, key = name.rpartition(".")
        p = parameters[parameter]
        owner[p].state[p][key] = tensor.to(p.device)


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
    """Make the output folder and write the config into it.

    Raises:
        InputError: the folder holds a run and `resume` is not set, or that run had another config.
    """
    folder = Path(config.output_dir)
    newest = next(reversed(checkpoints(folder)), None)
    if newest is not None and not config.resume:
        held = f"output_dir {config.output_dir!r} holds {newest.name}"
        raise InputError(f"{held}; set resume: true or name another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"output_dir {config.output_dir!r} cannot be made: {error}; name another folder"
        ) from None
    longer = _keep_config(config, folder / "config.yaml", resumes=newest is not None)
    return Prepared(newest, longer)


def _keep_config(config: TrainConfig, file: Path, resumes: bool) -> str | None:
    """Write the config unless it is there: several processes may do this at once."""
    written = file.read_text(encoding="utf-8") if file.exists() else None
    new, longer = as_tree(config), None
    if resumes and written is not None:
        old = yaml.safe_load(written)
        longer = extended(old, new)
        _same_config(old, of_old_length(old, new), "")
    text = yaml.safe_dump(new, sort_keys=False)
    if text != written:
        replace_text(file, text)
    return longer


def replace_text(file: Path, text: str) -> None:
    """Write a file whole: a kill leaves the one before."""
    staging = file.with_name(f".{file.name}.{os.getpid()}")
    staging.write_text(text, encoding="utf-8")
    os.replace(staging, file)


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
