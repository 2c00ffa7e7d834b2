"""The output head of a model: what its own forward makes of hidden states.

Families scale logits, cap them, or have more layers there than one; so the head is the model's
forward itself, with a stand-in for the backbone.

Shapes as in `idlm.models.idlm_model`.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel


def head_of(model: PreTrainedModel) -> PreTrainedModel:
    """A model with the layers of `model`, but for the backbone: it maps `inputs_embeds` to
    logits."""
    head = copy.copy(model)
    stand_in = _StandIn({name for name, _ in model.base_model.named_children()})
    head._modules = model._modules | {model.base_model_prefix: stand_in}
    return head


class _StandIn(nn.Module):
    """A backbone whose hidden states are its `inputs_embeds`. So are those of its `parts`: OPT
    calls the decoder in its backbone."""

    def __init__(self, parts: set[str]) -> None:
        super().__init__()
        self._parts = parts

    def __getattr__(self, name: str) -> Any:
        if name != "_parts" and name in self._parts:
            return self
        return super().__getattr__(name)

    def forward(self, *_: object, inputs_embeds: Tensor, **__: object) -> _Output:
        return _Output(inputs_embeds)


class _Output:
    """The output of a backbone that computed nothing besides hidden states."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: Any) -> Any:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        return None
