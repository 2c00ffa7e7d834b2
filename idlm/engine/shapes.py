"""Shapes of a model's attention, and the memory of its largest forward, as the model itself has
them."""

from __future__ import annotations

import torch
from torch import Tensor

from idlm.models.idlm_model import Idlm


class _Shapes:
    """A cache that keeps nothing and notes each layer's shape."""

    def __init__(self) -> None:
        self.found: list[tuple[int, int, int]] = []

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        self.found.append((query.shape[1], key.shape[1], key.shape[3]))
        return query.transpose(1, 2)


@torch.inference_mode()
def working_memory(idlm: Idlm, rows: int, logits: int) -> int:
    """Bytes that a GPU's largest forward takes beside weights and pages: of so many rows, with
    logits of some."""
    torch.cuda.reset_peak_memory_stats(idlm.device)
    before = torch.cuda.memory_allocated(idlm.device)
    tokens = torch.zeros(1, rows, dtype=torch.int64, device=idlm.device)
    hidden = idlm.hidden(tokens, tokens, None, cache=_Shapes())
    idlm.head(hidden[0, :1].expand(logits, -1))
    peak = torch.cuda.max_memory_allocated(idlm.device)
    torch.cuda.empty_cache()
    return peak - before


@torch.inference_mode()
def attention_shapes(idlm: Idlm) -> list[tuple[int, int, int]]:
    """Query heads, key/value heads and head size of each layer, as the model computes them."""
    cache = _Shapes()
    one = torch.zeros(1, 1, dtype=torch.int64, device=idlm.device)
    idlm.hidden(one, one, None, cache=cache)
    return cache.found
