"""GPT-2's `Conv1D` is a linear layer whose weight is stored as [in, out].

`straighten` makes it an `nn.Linear` when a model is loaded, so that the adapter and the kernels see
one kind of layer. `stored_layout` gives the weights back as a checkpoint has them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D


class TransposedLinear(nn.Linear):
    """A linear layer that its checkpoint stores as [in, out]."""


@torch.no_grad()
def straighten(model: PreTrainedModel) -> None:
    """Replace each `Conv1D` of the model by an equal `TransposedLinear`."""
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, Conv1D):
                setattr(parent, name, _linear(layer))


def _linear(layer: Conv1D) -> TransposedLinear:
    linear = TransposedLinear(layer.nx, layer.nf, device="meta")
    linear.weight = nn.Parameter(layer.weight.T.contiguous(), layer.weight.requires_grad)
    linear.bias = layer.bias
    return linear.train(layer.training)


def has_transposed(model: PreTrainedModel) -> bool:
    """Whether the checkpoint of the model has layers that are stored as [in, out]."""
    return any(isinstance(module, TransposedLinear) for module in model.modules())


def stored_layout(model: PreTrainedModel, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of the model by name, each as its checkpoint stores it."""
    turned = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, TransposedLinear)}
    return {n: t.detach().T.contiguous() if n in turned else t for n, t in state.items()}
