"""`Products`: the kernels that multiply by a model's weights, chosen when an engine is built."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import psutil
import torch

from idlm.config import EngineConfig
from idlm.engine.layers import Layers, layers_for
from idlm.engine.shapes import Shape
from idlm.engine.threads import choose_threads, free_cores
from idlm.errors import InputError
from idlm.kernels import native
from idlm.kernels.choice import choose_linears, drafts_pay
from idlm.kernels.fused import OPERATORS, faster_operators
from idlm.kernels.huge_pages import give_back
from idlm.kernels.linears import Linears
from idlm.kernels.merged import Merged
from idlm.kernels.norms import Norms, rms_norms
from idlm.kernels.prefetch import choose_prefetch
from idlm.models.idlm_model import Idlm

log = logging.getLogger("idlm")

PANELS_SHARE, DRAFT_SHARE = 0.5, 0.25
"""Shares of the free memory: the most for the kernels' copy of the weights, and the most for the
int8 weights of MASK rows."""


@dataclass(frozen=True)
class Products:
    """The kernels that an engine's steps use.

    Attributes:
        linears: the linear layers as C kernels with a copy of the weights; None: PyTorch's.
        merged: layers with the same input as one product of PyTorch's; norms: RMS norms as one
            operator of PyTorch's. Both on a GPU alone.
        layers: whole layers by few kernels, on a GPU, if the model's are of the usual kind.
        fused: the operators for which recorded steps use C kernels.
    """

    linears: Linears | None = None
    fused: frozenset[str] = OPERATORS
    merged: Merged | None = None
    norms: Norms | None = None
    layers: Layers | None = None

    @contextmanager
    def use(self) -> Iterator[None]:
        """Run model code inside on these kernels."""
        chosen: tuple[Linears | Merged | Norms | Layers | None, ...]
        chosen = self.linears, self.merged, self.norms, self.layers
        with ExitStack() as stack:
            for kernels in chosen:
                if kernels is not None:
                    stack.enter_context(kernels.use())
            yield


def products_for(
    idlm: Idlm, config: EngineConfig, shapes: Sequence[Shape], drafting: bool
) -> Products:
    """Choose the fastest kernels by measurement, and set the number of threads. The log gives the
    reasons.

    `drafting`: MASK rows may have weights of their own, and adapters kernels.

    Raises:
        InputError: `config.weights` cannot be used with this model or on this machine.
    """
    if config.tensor_parallel_size > 1 and idlm.device.type == "cpu":
        # nothing is measured: what ranks compute alike must be the same bits
        share = max(1, free_cores() // config.tensor_parallel_size)
        torch.set_num_threads(config.threads or share)
        return Products(fused=frozenset())
    linears = _linears(idlm, config.weights, config.deterministic)
    multiply_in_float32(idlm.device)
    if idlm.device.type == "cpu":
        choose_threads(idlm, linears, config.threads)
    if linears is not None:
        choose_prefetch(linears)
        choose_linears(linears)
        if drafting:
            _add_drafts(idlm, linears)
    floats = idlm.device.type == "cpu" and idlm.dtype == torch.float32
    fused = _fused(idlm, shapes[0]) if floats else frozenset()
    if idlm.device.type == "cpu" or config.deterministic:
        return Products(linears, fused)
    merged, norms = Merged(idlm.same_input()), rms_norms(idlm.model)
    return Products(linears, fused, merged, Norms(norms), layers_for(idlm, merged, norms))


def multiply_in_float32(device: torch.device) -> None:
    """Let a GPU multiply float32 as float32. PyTorch's default does; an environment variable of
    NVIDIA's images (TORCH_ALLOW_TF32_CUBLAS_OVERRIDE) makes it TF32, with 10 bits."""
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = False


def free_weights(idlm: Idlm, linears: Linears) -> None:
    """Free the weights that the kernels have a copy of, and the checkpoint's mapped file."""
    linears.take(layer for _, layer in idlm.linear_layers())
    idlm.leave_file()
    give_back()


def _linears(idlm: Idlm, weights: str, deterministic: bool) -> Linears | None:
    """The linear layers as C kernels, if they can be used and their copy of the weights fits."""
    check_weights(weights, idlm.device, idlm.dtype, deterministic)
    if _no_kernels(idlm.device, idlm.dtype, deterministic) is not None:
        return None
    format = weights
    if weights == "auto":
        format = "bfloat16" if idlm.stored == torch.bfloat16 else "float32"
        size, free = 4 * _multiplied(idlm), psutil.virtual_memory().available
        if format == "float32" and size > PANELS_SHARE * free:
            log.info(
                "PyTorch multiplies: a copy of the weights for the C kernels would take %.0f MiB, "
                "over half of what is free; weights='bfloat16' or 'int8' need less",
                size / 2**20,
            )
            return None
    return Linears(idlm.linear_groups(), format)


def _multiplied(idlm: Idlm) -> int:
    """The number of weights that the kernels would copy; not those of experts and embeddings."""
    return sum(weight.numel() for group in idlm.linear_groups() for weight in group)


def check_weights(
    weights: str, device: torch.device, dtype: torch.dtype, deterministic: bool
) -> None:
    """Check that the C kernels can be used if `weights` asks for them.

    Raises:
        InputError: they cannot.
    """
    reason = _no_kernels(device, dtype, deterministic)
    if reason is not None and weights != "auto":
        raise InputError(f"weights={weights!r} {reason}; leave it out")


def _no_kernels(device: torch.device, dtype: torch.dtype, deterministic: bool) -> str | None:
    """Why this engine cannot use the C kernels; None if it can."""
    if device.type != "cpu":
        return f"is for a CPU, and the model is on {device}"
    if deterministic:
        return "does not go with deterministic=True, which has kernels of its own"
    if dtype != torch.float32:
        kind = str(dtype).removeprefix("torch.")
        return f"needs float32 activations, and the model is {kind} (dtype='float32' makes it that)"
    return (
        None if native.loaded() else "needs the C kernels, which are not there (the log says why)"
    )


def _add_drafts(idlm: Idlm, linears: Linears) -> None:
    """Add int8 weights for MASK rows if they fit and make steps faster on this machine."""
    adapters = 1 if idlm.gate is None else idlm.gate.adapters
    lower = idlm.weights_below_entry()
    used = [w for layer in linears.layers for w in layer.group if id(w) not in lower]
    size = adapters * sum(weight.numel() for weight in used)
    free, beside = psutil.virtual_memory().available, idlm.adapter_weights()
    ranks = {id(weight): 0 for weight in used}
    ranks |= {id(weight): sum(m.shape[0] for m in low[::2]) for weight, low in beside}
    if size > DRAFT_SHARE * free:
        why = "int8 weights of their own would take %.0f MiB, over a quarter of what is free"
        log.info(f"MASK rows: the model's weights and the adapter; {why}", size / 2**20)
    elif drafts_pay(linears, ranks):
        linears.add_drafts(idlm.mask_weights())
        return
    if linears.format == "float32":
        linears.add([matrix] for _, low in beside for matrix in low)


def _fused(idlm: Idlm, shape: Shape) -> frozenset[str]:
    """The operators that recordings of steps use the C kernels for."""
    heads, _, size = shape
    config = idlm.model.config
    hidden = int(config.hidden_size)
    return faster_operators(
        hidden, int(getattr(config, "intermediate_size", None) or 4 * hidden), heads, size
    )
