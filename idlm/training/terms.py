"""The terms of the loss of rows of logits, and with them the gradient, in one pass over the logits.

With q the law of a MASK row and p that of the clean row that predicts the same token,

    d CE / d logits = q - 1[target]
    d KL / d logits = q - p
    d TV / d logits = q (s - sum q s) / 2,   s = sign(q - p)

TV is one minus the acceptance rate, sum min(p, q).

Shapes: n rows, V logit columns.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

EXCLUDED = -1e30
"""The logit of MASK, which is never emitted; finite, because 0 * infinity is NaN in the soft terms.
"""
BLOCK = 2**17
"""Logits on a CPU that are worked on together: what one pass writes is still in a core's cache for
the next."""


class Laws(NamedTuple):
    """What the terms of n rows compare.

    Attributes:
        target: the token of the text, [n].
        teacher: the logits of the clean rows [n, V]; None for CE alone.
        excluded: the column that has no probability, if there is one.
    """

    target: Tensor
    teacher: Tensor | None
    excluded: int | None

    @property
    def terms(self) -> int:
        """The number of terms: CE, or CE, KL(p || q) and TV."""
        return 1 if self.teacher is None else 3

    def part(self, rows: slice) -> Laws:
        """Those of some rows."""
        teacher = None if self.teacher is None else self.teacher[rows]
        return Laws(self.target[rows], teacher, self.excluded)


def weighted_terms(logits: Tensor, laws: Laws, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The weighted sum of the terms of all rows, and the sum of each without weights or gradient.

    Args:
        logits: of the MASK rows, [n, V], in float32 or more.
        weights: of each term of each row, [n, terms].
    """
    total, sums = _Weighted.apply(logits, laws, weights.to(logits.dtype))
    return total, sums


class _Weighted(torch.autograd.Function):
    """`weighted_terms`. The forward makes the gradient while a block's laws are at hand."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, laws: Laws, weights: Tensor) -> tuple[Tensor, Tensor]:
        wanted = ctx.needs_input_grad[0]
        ctx.gradient = torch.empty_like(logits) if wanted else None
        sums = torch.zeros(laws.terms, dtype=logits.dtype, device=logits.device)
        total = sums.new_zeros(())
        with torch.autocast(logits.device.type, enabled=False):  # of the sums of products
            for rows in _blocks(logits):
                gradient = ctx.gradient[rows] if wanted else None
                terms = _terms(logits[rows], laws.part(rows), weights[rows], gradient)
                sums += terms.sum(0)
                total += (terms * weights[rows]).sum()
        ctx.mark_non_differentiable(sums)
        return total, sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        gradient = ctx.gradient
        del ctx.gradient
        return gradient.mul_(scale), None, None


def _blocks(logits: Tensor) -> list[slice]:
    """Slices of the rows: small ones on a CPU, on a GPU all rows at once."""
    rows, columns = logits.shape
    size = max(BLOCK // columns, 1) if logits.device.type == "cpu" else max(rows, 1)
    return [slice(start, start + size) for start in range(0, rows, size)]


def _terms(logits: Tensor, laws: Laws, weights: Tensor, gradient: Tensor | None) -> Tensor:
    """The terms of a block of rows, [n, terms]; writes the gradient of their weighted sum."""
    target = laws.target[:, None]
    log_q = log_law(logits, laws.excluded)
    ce = -log_q.gather(1, target)[:, 0]
    of_ce = weights[:, :1]
    if laws.teacher is None:
        if gradient is not None:
            torch.mul(log_q.exp_(), of_ce, out=gradient)
            gradient.scatter_add_(1, target, -of_ce)
        return ce[:, None]

    log_p = log_law(laws.teacher, laws.excluded).to(log_q.dtype)
    p = log_p.exp()
    kl = torch.linalg.vecdot(p, log_p.sub_(log_q))
    q = log_q.exp_()
    apart = torch.sub(q, p, out=log_p)
    terms = torch.stack([ce, kl, 0.5 * torch.linalg.vector_norm(apart, 1, dim=-1)], dim=1)
    if gradient is not None:
        of_kl, of_tv = weights[:, 1:2], 0.5 * weights[:, 2:]
        sign = apart.sign_()
        of_q = of_ce + of_kl - of_tv * torch.linalg.vecdot(q, sign)[:, None]
        torch.mul(sign.mul_(of_tv).add_(of_q), q, out=gradient)
        gradient.addcmul_(p, of_kl, value=-1)
        gradient.scatter_add_(1, target, -of_ce)
    return terms


def log_law(logits: Tensor, excluded: int | None) -> Tensor:
    """Log-probabilities [n, V] of rows of logits, in float32 or more, in memory of their own."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
    if excluded is not None:
        wide[:, excluded] = EXCLUDED
    return wide.log_softmax(-1)
