"""The products of mixtures of experts.

transformers offers several, and none fits every type of weights. `grouped_mm` multiplies the rows
of all experts in one call, and no Python depends on the routing, so that a recorded step is right
for every routing; PyTorch has it up to float32. The model's own code calls one expert after the
other and takes float64 too. In both a row's experts and their sum depend on that row alone.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

NAME = "idlm"
"""The `experts_implementation` of the function in transformers."""


def experts(module: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """The sum of each row's experts: hidden [T, D], index [T, k], weights [T, k] -> [T, D]."""
    y: Tensor
    if hidden.dtype == torch.float64:
        y = type(module).forward.__wrapped__(module, hidden, index, weights)  # type: ignore[attr-defined]
    else:
        y = ALL_EXPERTS_FUNCTIONS["grouped_mm"](module, hidden, index, weights)
    return y


def has_experts(model: PreTrainedModel) -> bool:
    """Whether a layer of the model is a mixture of experts."""
    return any(hasattr(module, "_apply_gate") for module in model.modules())


def unrecordable(model: PreTrainedModel, deterministic: bool) -> str | None:
    """Why no recording of a step would be right: the host reads the routing, or may. None if it
    does not."""
    if not has_experts(model):
        return None
    if deterministic:
        return "batch-invariant experts run one after the other"
    if model.dtype == torch.float64:
        return "experts in float64 run one after the other"
    if model.device.type == "cuda":  # the host is not asked for some types on some devices only
        return "experts on a GPU may ask the host for their rows"
    return None


ALL_EXPERTS_FUNCTIONS.register(NAME, experts)
