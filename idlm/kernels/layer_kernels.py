"""Which implementation of `idlm.kernels.layer_ops` runs, and whether its kernels give on a device
what their twins give there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from idlm.kernels import layer_ops
from idlm.kernels.gpu import use_triton
from idlm.kernels.layer_ops import Heads, Turn, Update

ROWS, PAGES, RANK = 5, 3, 16
LIMIT = 4
"""The largest difference, in steps of the type relative to the largest number of a row."""


def ops_for(like: Tensor) -> Any:
    """The module with the functions of `layer_ops` for the type and device of `like`."""
    if use_triton(like):
        from idlm.kernels import layer_ops_triton  # Triton is optional

        return layer_ops_triton
    return layer_ops


@torch.no_grad()
def try_layer_ops(like: Tensor, heads: tuple[int, int, int], hidden: int) -> None:
    """Run each kernel once in the type and on the device of `like`, for H, G, E and D.

    Raises:
        RuntimeError: a result differs from the twin's. And whatever a compiler or a driver raises.
    """
    kernels, twins = ops_for(like), layer_ops
    for name, call in _calls(like, heads, hidden).items():
        for one, other in zip(call(kernels), call(twins), strict=True):
            steps = (one.double() - other.double()).abs().amax(-1)
            steps /= other.double().abs().amax(-1) * torch.finfo(like.dtype).eps + 1e-30
            if not bool((steps <= LIMIT).all()):
                raise RuntimeError(f"{name} differs from PyTorch by {float(steps.max()):.3g} steps")


def _calls(
    like: Tensor, heads: tuple[int, int, int], hidden: int
) -> dict[str, Callable[[Any], tuple[Tensor, ...]]]:
    """Each function of a module on random rows; it gives what it computes and what it writes."""
    random = torch.Generator().manual_seed(0)

    def rows(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random).to(like)

    (queries, groups, size), place = heads, like.device
    x, more, weight = rows(ROWS, hidden), rows(ROWS, hidden), rows(hidden)
    both, raw = rows(ROWS, 2 * hidden), rows(ROWS, (queries + 2 * groups) * size)
    turn, norms = Turn(rows(ROWS, size), rows(ROWS, size)), (rows(size), rows(size))
    kinds: tuple[Any, ...] = (queries, groups), (queries, groups, *norms, 1e-6)
    cache_rows = torch.tensor([7, 1, 4], device=place)
    update = Update(
        rows(2 * RANK, hidden),
        rows(2 * hidden, RANK),
        torch.arange(2 * RANK, device=place) % 3 - 1,
        torch.tensor([[0.5, 1.3], [2.0, 0.7]], device=place),
        (hidden, hidden),
    )
    low, adapter = rows(ROWS, 2 * RANK), torch.arange(ROWS, device=place) % 2

    def rotated(ops: Any, kind: tuple[Any, ...]) -> tuple[Tensor, ...]:
        pages = like.new_zeros(2, PAGES, ROWS, groups, size)
        found = ops.rotate(raw, turn, Heads(*kind), pages, cache_rows)
        return *found, pages

    def updated(ops: Any) -> tuple[Tensor, ...]:
        y = both.clone()
        ops.update(y, low, update, adapter)
        return (y,)

    return {
        "the norm": lambda ops: (ops.norm(x, weight, 1e-6),),
        "the norm of a sum": lambda ops: ops.add_norm(x, more, weight, 1e-6),
        "SwiGLU": lambda ops: (ops.swiglu(both),),
        "the rotary embedding": lambda ops: rotated(ops, kinds[0]),
        "the rotary embedding with norms": lambda ops: rotated(ops, kinds[1]),
        "the update by adapters": updated,
    }
