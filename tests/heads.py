"""Random draft heads, and the oracle's view of them."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from idlm.decoding import reference
from idlm.decoding.reference_heads import SlowHead
from idlm.models.heads import DraftHead, HeadSpec, new_head
from idlm.models.idlm_model import Idlm
from idlm.models.weights import embedding_rows, output_head


def random_head(model: PreTrainedModel, spec: HeadSpec, seed: int = 5) -> DraftHead:
    """A head that changes the scores by a few units."""
    head = new_head(model, spec).requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for parameter in head.parameters():
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.copy_(values * (0.4 if spec.kind == "selector" else 0.5))
    return head


def slow_head(idlm: Idlm, adapter: int = 0) -> reference.Head:
    """The oracle's head of an adapter, which takes [logits, hidden state] of a row."""
    head = idlm.draft_heads[adapter]
    return SlowHead(
        head.spec.kind,
        {name: weight.double().cpu() for name, weight in head.named_parameters()},
        embedding_rows(idlm.model).double().cpu(),
        output_head(idlm.model).weight.double().cpu(),
        head.spec.top,
    )


def forward_of(idlm: Idlm) -> reference.Forward:
    """The oracle's forward for a model with a head: [logits, hidden state] of each row."""

    def forward(tokens: Tensor, positions: Tensor, visible: Tensor) -> Tensor:
        hidden = idlm.states(tokens, positions, visible)
        return torch.cat([idlm.head(hidden), hidden], dim=1).to(tokens.device)

    return forward
