"""The processes of a run: Accelerate starts them, shards the model (FSDP2) or copies it (DDP), and
reduces over ranks."""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import (
    DistributedType,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    gather_object,
)
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.fsdp import MixedPrecisionPolicy, register_fsdp_forward_method
from torch.optim import Optimizer
from transformers.modeling_layers import GradientCheckpointingLayer

from idlm.errors import InputError
from idlm.models.sources import first_line
from idlm.training.config import TrainConfig

PATIENCE = timedelta(days=30)
"""How long a rank waits for the others: the first one prepares the data, and may generate it.
Launchers stop all ranks when one ends."""

UNREAD = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM")
"""Switches of `accelerate launch` that would change the run behind the back of its config."""

TENSORBOARD = "tensorboard"
"""The folder of event files in the run's."""

WRITE_ERRORS = (OSError, SafetensorError, CheckpointException)


def processes(config: TrainConfig) -> Accelerator:
    """Join the other processes of the run, if a launcher started several.

    Raises:
        InputError: several GPUs are visible to a single process, the launcher has settings that
            contradict the config, or `eval_decode` is asked for and no process has the whole
            model.
    """
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    for name in UNREAD:
        if several and os.environ.get(name, "false").lower() == "true":
            raise InputError(
                f"the launcher sets {name}, which a run does not read; turn it off there, and set "
                "parallel: fsdp in the run's config to shard the model"
            )
    plugin = _fsdp(config) if several and config.parallel == "fsdp" else None
    accelerator = Accelerator(
        cpu=config.device == "cpu" or not torch.cuda.is_available(),
        mixed_precision="no",
        fsdp_plugin=plugin,
        log_with=list(config.report_to) or None,
        project_config=ProjectConfiguration(logging_dir=str(Path(config.output_dir) / TENSORBOARD)),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )
    if several:
        # its threads must end before the interpreter does, or the process may abort at its end
        atexit.register(accelerator.state.destroy_process_group)
    if plugin is not None and accelerator.distributed_type == DistributedType.MULTI_CPU:
        if torch.cuda.is_available():
            raise InputError(
                "parallel is 'fsdp' and device 'cpu', but there are GPUs, which FSDP would use; "
                "set CUDA_VISIBLE_DEVICES to nothing"
            )
        # Accelerate turns FSDP on for GPUs only; PyTorch's also runs on CPUs
        for state in (PartialState(), accelerator.state):
            state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin
    if config.eval_decode and is_sharded(accelerator):
        raise InputError(
            f"eval_decode is {config.eval_decode}, and FSDP splits the model; set it to 0"
        )
    gpus = torch.cuda.device_count() if accelerator.device.type == "cuda" else 0
    if gpus > 1 and accelerator.num_processes == 1:
        raise InputError(
            f"{gpus} GPUs for one process; start with torchrun, or set CUDA_VISIBLE_DEVICES"
        )
    return accelerator


def _fsdp(config: TrainConfig) -> FullyShardedDataParallelPlugin:
    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        mixed_precision_policy=gathered_types(config),
        reshard_after_forward=True,
        auto_wrap_policy="transformer_based_wrap",
        cpu_ram_efficient_loading=False,  # each rank maps the files and keeps its part
        cpu_offload=False,
        activation_checkpointing=False,
    )


def gathered_types(config: TrainConfig) -> MixedPrecisionPolicy:
    """What FSDP gathers and computes in, whatever type a rank holds its part in: bfloat16 with
    `bf16`, else `model.dtype`. A float32 base whose files have 16 bits is held so and widened layer
    by layer. Gradients are summed over ranks in float32 or more."""
    held = {"float32": torch.float32, "float64": torch.float64}
    computed = torch.bfloat16 if config.bf16 else held.get(config.model.dtype)
    summed = None if computed is None else torch.promote_types(computed, torch.float32)
    return MixedPrecisionPolicy(param_dtype=computed, reduce_dtype=summed)


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether each rank holds a part of every weight."""
    return bool(accelerator.is_fsdp2)


def placement(accelerator: Accelerator) -> tuple[torch.device, bool]:
    """Where a rank loads the base, and whether it stays in 16 bits: what will be sharded stays in
    its files, mapped, until each rank has taken its part."""
    if is_sharded(accelerator):
        return torch.device("cpu"), True
    return torch.device(accelerator.device), False


def prepare(
    accelerator: Accelerator, model: nn.Module, optimizers: list[Optimizer]
) -> tuple[nn.Module, list[AcceleratedOptimizer]]:
    """Wrap a model for data parallelism, with its optimizers.

    FSDP gathers the weights of one decoder layer at a time, in `forward`, `measure` and `walk`.
    Trained weights in 16 bits become float32; each rank widens its part.
    """
    if is_sharded(accelerator):
        layers = {type(m).__name__ for m in model.modules() if _is_layer(m)}
        accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = sorted(layers)
    wrapped, *rest = accelerator.prepare(model, *optimizers)
    if is_sharded(accelerator):
        for method in ("measure", "walk"):
            register_fsdp_forward_method(wrapped, method)
        if any(p.requires_grad and p.itemsize < 4 for p in wrapped.parameters()):
            wrapped.float()
    return wrapped, rest


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, GradientCheckpointingLayer)


@contextmanager
def together(accelerator: Accelerator, what: str) -> Iterator[None]:
    """Write files on all ranks: an error of one is raised on all, so that none waits for it.

    The body must not communicate.

    Args:
        what: the file or folder, for the message.

    Raises:
        InputError: a rank could not write; or an InputError of a rank.
    """
    problem = None
    try:
        yield
    except InputError as error:
        problem = str(error)
    except WRITE_ERRORS as error:
        problem = cannot_write(what, error)
    problems = [each for each in gather_object([problem]) if each is not None]
    if problems:
        raise InputError(problems[0])


@contextmanager
def writing(what: str | Path) -> Iterator[None]:
    """Write a file on one rank; its launcher stops the others.

    Raises:
        InputError: it cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise InputError(cannot_write(str(what), error)) from None


def cannot_write(what: str, error: BaseException) -> str:
    """The message for a file that cannot be written."""
    if isinstance(error, CheckpointException):  # of all ranks that failed
        error = next(iter(error.failures.values()))[0]
    why = (isinstance(error, OSError) and error.strerror) or first_line(Exception(str(error)))
    full = any(words in why for words in ("space", "quota", "too large"))  # libraries have no errno
    fix = "make room" if full else "check its folder"
    return f"cannot write {what!r} ({why}); {fix}, then continue with resume: true"


@contextmanager
def alone(folder: Path, accelerator: Accelerator) -> Iterator[None]:
    """Hold the lock of the output folder, which is made: no other run writes to it meanwhile.

    The system gives the lock back when the process ends, however it ends.

    Raises:
        InputError: another run has it, or the folder cannot be made.
    """
    lock = FileLock(folder / ".lock", timeout=0)
    with together(accelerator, str(folder)):
        if accelerator.is_main_process:
            _take(lock, folder)
    try:
        yield
    finally:
        lock.release()


def _take(lock: FileLock, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise InputError(
            f"another run writes to output_dir {str(folder)!r}; wait for it or name another folder"
        ) from None
    except OSError as error:
        raise InputError(
            f"output_dir {str(folder)!r} cannot be made: {error}; name another folder"
        ) from None
