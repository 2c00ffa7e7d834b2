"""The attention shapes of a model and the memory of its largest forward, found by running it."""

from __future__ import annotations

import torch
from torch import Tensor

from idlm.decoding.scores import Scores
from idlm.models.idlm_model import Idlm

Shape = tuple[int, int, int]
"""Of a layer's attention: query heads, key/value heads, head size."""


class _Shapes:
    """A cache that stores no keys and records the shape and sliding window of each layer."""

    def __init__(self) -> None:
        self.found: list[Shape] = []
        self.windows: list[int | None] = []

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scores: Scores
    ) -> Tensor:
        self.found.append((query.shape[1], key.shape[1], key.shape[3]))
        self.windows.append(scores.window)
        return query.transpose(1, 2)


@torch.inference_mode()
def working_memory(idlm: Idlm, rows: int, logits: int) -> int:
    """The bytes that a forward of `rows` rows and `logits` rows of logits takes on a GPU, apart
    from weights and pages."""
    torch.cuda.reset_peak_memory_stats(idlm.device)
    before = torch.cuda.memory_allocated(idlm.device)
    tokens = torch.zeros(1, rows, dtype=torch.int64, device=idlm.device)
    hidden = idlm.hidden(tokens, tokens, None, cache=_Shapes())
    idlm.head(hidden[0, :1].expand(logits, -1))
    peak = torch.cuda.max_memory_allocated(idlm.device)
    torch.cuda.empty_cache()
    return peak - before


@torch.inference_mode()
def attention_shapes(idlm: Idlm) -> tuple[list[Shape], int | None]:
    """The shape of each layer, and the largest sliding window if all layers have one, else None;
    found by a forward of one row."""
    cache = _Shapes()
    one = torch.zeros(1, 1, dtype=torch.int64, device=idlm.device)
    idlm.hidden(one, one, None, cache=cache)
    windows = [window for window in cache.windows if window is not None]
    return cache.found, max(windows) if len(windows) == len(cache.windows) else None
