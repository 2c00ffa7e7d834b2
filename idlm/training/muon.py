"""Muon (Keller Jordan, kellerjordan.github.io/posts/muon) on matrices that may be sharded.

`torch.optim.Muon` on shards computes the products of the iteration in parts, whose sums are rounded
to bfloat16: weights drift from those of one process by 3e-4 in two steps. Here a rank gathers a
matrix and orthogonalises it whole, as one process does. The matrices are dealt out: each is one
rank's work. The momentum stays sharded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from idlm.models.weights import whole

STEPS = 5
A, B, C = 3.4445, -4.7750, 2.0315
"""The iteration X <- A X + (B M + C M M) X with M = X X^T, which brings singular values near 1."""
EPSILON = 1e-7
SIZE = 0.2
"""The root mean square of AdamW's updates (arXiv 2502.16982)."""


class Muon(Optimizer):
    """The steps of `torch.optim.Muon(..., adjust_lr_fn="match_rms_adamw")`.

    Args:
        matrices: sharded over the ranks of one mesh, or all whole.
        momentum: of the gradients, in Nesterov's form.
    """

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        lr: float,
        weight_decay: float,
        momentum: float = 0.95,
    ) -> None:
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Take a step; all ranks call it."""
        for group in self.param_groups:
            matrices = [p for p in group["params"] if p.grad is not None]
            ranks = _ranks(matrices[0]) if matrices else 1
            for at in range(0, len(matrices), ranks):
                dealt = matrices[at : at + ranks]
                updates = [self._smoothed(p, group["momentum"]) for p in dealt]
                for p, update in zip(dealt, orthogonalised(updates), strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update, alpha=-group["lr"] * (SIZE * math.sqrt(max(p.shape))))

    def _smoothed(self, p: nn.Parameter, momentum: float) -> Tensor:
        """The gradient with momentum, in bfloat16."""
        assert p.grad is not None  # noqa: S101
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p.grad)
        buffer = state["momentum_buffer"].lerp_(p.grad, 1 - momentum)
        return p.grad.lerp(buffer, momentum).bfloat16()


def _ranks(matrix: Tensor) -> int:
    """How many ranks hold a part of it."""
    return matrix.device_mesh.size() if isinstance(matrix, DTensor) else 1


def orthogonalised(updates: list[Tensor]) -> list[Tensor]:
    """The orthogonalised matrices, sharded as they were: at most one for each rank, which computes
    it for all."""
    computed: dict[int, Tensor] = {}
    for owner, update in enumerate(updates):
        matrix = whole(update)  # all ranks take part
        if not isinstance(update, DTensor) or update.device_mesh.get_local_rank() == owner:
            computed[owner] = orthogonal(matrix)
    return [_sent(update, computed.get(owner), owner) for owner, update in enumerate(updates)]


def _sent(update: Tensor, computed: Tensor | None, owner: int) -> Tensor:
    """What the rank `owner` computed, sharded as the update was."""
    if not isinstance(update, DTensor):
        assert computed is not None  # noqa: S101
        return computed
    if computed is None:
        computed = torch.empty(update.shape, dtype=update.dtype, device=update.device)
    return distribute_tensor(computed, update.device_mesh, update.placements, src_data_rank=owner)


def orthogonal(matrix: Tensor) -> Tensor:
    """A matrix near U V^T for the singular vectors of `matrix`, by Newton-Schulz in its type."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp(min=EPSILON)
    for _ in range(STEPS):
        m = x @ x.T
        x = torch.addmm(x, torch.addmm(m, m, m, beta=B, alpha=C), x, beta=A)
    return x.T if tall else x
