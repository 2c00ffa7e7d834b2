"""The choice of an attention back-end: once, when an engine starts."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from idlm.attention.base import Backend
from idlm.attention.cpu import CpuAttention, faster_here
from idlm.attention.invariant import InvariantAttention, InvariantTritonAttention
from idlm.attention.torch import TorchAttention
from idlm.attention.triton import TritonAttention
from idlm.kernels.gpu import use_triton


def choose(pages: Tensor, heads: int, deterministic: bool = False) -> Backend[Any]:
    """Choose the back-end for a model with `heads` query heads; timings go to the log.

    `pages` [2, N, page, G, E] may be any layer's: only shape, type and device are used. With
    `deterministic` the result of a row does not depend on the rows beside it.
    """
    if use_triton(pages):
        return InvariantTritonAttention() if deterministic else TritonAttention()
    if deterministic:
        return InvariantAttention(pages)
    return CpuAttention() if faster_here(pages, heads) else TorchAttention(pages, heads)
