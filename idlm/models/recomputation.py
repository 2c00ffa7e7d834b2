"""Activation checkpointing: a layer keeps its input and computes the rest again for the gradient.

transformers does it. Here the recomputation gets the surroundings of the forward that it repeats:
what the rows see, and which are MASK rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial

from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from idlm.errors import InputError
from idlm.models.gate import Gate
from idlm.models.idlm_model import Idlm
from idlm.models.routes import same_route


def recompute_layers(idlm: Idlm) -> None:
    """Recompute the layers of a model in training mode, in place.

    Raises:
        InputError: the family does not support it.
    """
    layers = [each for each in idlm.model.modules() if isinstance(each, GradientCheckpointingLayer)]
    if not layers:
        kind = idlm.model.config.model_type
        raise InputError(
            f"{kind} has no activation checkpointing; set activation_checkpointing: false"
        )
    surroundings = partial(_surroundings, idlm.gate or Gate())
    for layer in layers:
        layer.gradient_checkpointing = True
        compute = partial(checkpoint, use_reentrant=False, context_fn=surroundings)
        layer._gradient_checkpointing_func = compute  # type: ignore[assignment]


def _surroundings(
    gate: Gate,
) -> tuple[AbstractContextManager[object], AbstractContextManager[object]]:
    """Contexts for a layer's forward, which has what it needs, and for its recomputation."""
    return nullcontext(), _again(same_route(), gate.open(gate.rows, gate.shape, gate.entering))


@contextmanager
def _again(*contexts: AbstractContextManager[None]) -> Iterator[None]:
    with ExitStack() as stack:
        for each in contexts:
            stack.enter_context(each)
        yield
