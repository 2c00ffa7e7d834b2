"""What a layer computes between its products.

Each function is the PyTorch twin of one kernel of `idlm.kernels.layer_ops_triton`. Both round where
transformers rounds, and a row's result does not depend on the rows beside it.

Shapes: T rows, D hidden size, I inner size, H query heads, G key/value heads, E head size; M rows
of an update, N outputs of S layers together, R the largest rank of an update, all adapters of a
layer together.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Turn(NamedTuple):
    """The rotary embedding: cosine and sine [T, E] of each row."""

    cosine: Tensor
    sine: Tensor


class Heads(NamedTuple):
    """H, G, and the weights [E] of the RMS norms of each query and key head, if there are any."""

    queries: int
    groups: int
    query_norm: Tensor | None = None
    key_norm: Tensor | None = None
    epsilon: float = 0.0


class Update(NamedTuple):
    """The low-rank updates of layers with the same input by all adapters.

    Attributes:
        a: [S R, in], the matrices A layer by layer, padded with rows of 0 to R each.
        b: [N, R], the matrices B below each other, padded with columns of 0.
        owners: int64 [S R], the adapter of each row of `a`; -1 for padding.
        scales: float32 [S, adapters].
        widths: the outputs of each layer.
    """

    a: Tensor
    b: Tensor
    owners: Tensor
    scales: Tensor
    widths: tuple[int, ...]


def norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """RMS norm [T, D] of rows x [T, D]."""
    return weight * F.rms_norm(x, (len(weight),), None, epsilon)


def add_norm(x: Tensor, more: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """The sum of x and `more` [T, D], and its RMS norm."""
    total = x + more
    return total, norm(total, weight, epsilon)


def swiglu(x: Tensor) -> Tensor:
    """silu(gate) * up [T, I] of x [T, 2 I], gate then up."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def rotate(
    rows: Tensor, turn: Turn, heads: Heads, pages: Tensor, cache_rows: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [T, H, E], keys and values [T, G, E] of `rows` [T, (H + 2 G) E], normed and rotated.

    The keys and values of the first rows are also written to the pages, [2, N, page, G, E], at
    `cache_rows` int64 [at most T].
    """
    of, groups = heads.queries, heads.groups
    query, key, value = rows.unflatten(1, (of + 2 * groups, -1)).split([of, groups, groups], dim=1)
    query = _turned(query, heads.query_norm, heads, turn)
    key = _turned(key, heads.key_norm, heads, turn)
    for side, written in zip(pages.flatten(1, 2), (key, value), strict=True):
        side.index_copy_(0, cache_rows, written[: len(cache_rows)])
    return query, key, value


def _turned(x: Tensor, weight: Tensor | None, heads: Heads, turn: Turn) -> Tensor:
    """Heads x [T, ., E], normed and rotated."""
    if weight is not None:
        x = norm(x, weight, heads.epsilon)
    half = x.shape[-1] // 2
    crossed = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * turn.cosine[:, None] + crossed * turn.sine[:, None]


def update(y: Tensor, low: Tensor, of: Update, adapter: Tensor) -> None:
    """Add to y [M, N] the update of each row's adapter, in place. `low` [M, S R] is the product of
    the rows' inputs with `of.a`; `adapter` is int64 [M]."""
    own = low * (of.owners == adapter[:, None])
    parts = zip(
        own.split(of.b.shape[1], dim=1),
        of.b.split(of.widths),
        of.scales.index_select(1, adapter),
        y.split(of.widths, dim=1),
        strict=True,
    )
    wide = torch.promote_types(y.dtype, torch.float32)
    for part, b, scale, out in parts:
        change = F.linear(part.to(wide), b.to(wide)) * scale[:, None].to(wide)
        out.copy_(out.to(wide) + change)
