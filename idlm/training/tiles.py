"""Attention over ranges of keys, a tile of rows and columns at a time.

The softmaxes of a row's tiles are merged as they come (online softmax), and computed again for the
gradient. So memory grows with rows plus keys and not with their product, for a layer with a sliding
window, soft cap or sinks too. This is the way of long texts on a CPU.

Shapes: B batch, H query heads, G key/value heads, n = H / G, Q query rows, S key rows, E head size;
q and k are the rows and columns of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from idlm.decoding.scores import Scores
from idlm.training.layout import Seen

ROWS, COLUMNS = 128, 1024
"""The most rows and columns of a tile."""


class Part(NamedTuple):
    """Keys and values [B, G, S, E], and which of them each query row sees: [B, Q] each."""

    key: Tensor
    value: Tensor
    seen: Seen


def attend_in_tiles(query: Tensor, parts: list[Part], scores: Scores) -> Tensor:
    """Attention of query [B, H, Q, E] to the keys of all parts: [B, Q, H, E].

    Every row must see a key.
    """
    tensors = [each for part in parts for each in (part.key, part.value)]
    seen = [part.seen.within(scores.window) for part in parts]
    mixed: Tensor = _Tiled.apply(scores._replace(sinks=None), seen, scores.sinks, query, *tensors)
    return mixed.transpose(1, 2)


class _Tile(NamedTuple):
    """Columns of a part, and what the rows see of them [B, 1, 1, q, k]; None: everything."""

    part: int
    columns: slice
    mask: Tensor | None


def _tiles(seen: list[Seen], rows: slice) -> Iterator[_Tile]:
    """The tiles in which some of the rows see something."""
    for part, each in enumerate(seen):
        first, stop = each.first[:, rows], each.stop[:, rows]
        everywhere = range(int(first.max()), int(stop.min()))
        end = int(stop.max())
        for start in range(int(first.min()), end, COLUMNS):
            columns = range(start, min(start + COLUMNS, end))
            mask = None
            if not (columns[0] in everywhere and columns[-1] in everywhere):
                column = torch.arange(columns.start, columns.stop, device=first.device)
                mask = (column >= first[..., None]) & (column < stop[..., None])
                mask = mask[:, None, None]
            yield _Tile(part, slice(columns.start, columns.stop), mask)


def _scores(
    query: Tensor, key: Tensor, mask: Tensor | None, scores: Scores
) -> tuple[Tensor, Tensor | None]:
    """The scores [B, G, n, q, k] of a tile, in float32 or more, and the derivative of their cap.

    query [B, G, n, q, E], key [B, G, k, E].
    """
    size = query.shape[2:4]
    products = (query.flatten(2, 3) @ key.mT).unflatten(2, size)
    found = scores.scale * products.to(torch.promote_types(products.dtype, torch.float32))
    slope = None
    if scores.softcap is not None:
        share = (found / scores.softcap).tanh()
        found, slope = scores.softcap * share, 1 - share.square()
    return found if mask is None else found.masked_fill(~mask, -torch.inf), slope


class _Tiled(torch.autograd.Function):
    """`attend_in_tiles`. The gradient follows from the output and each row's log of the sum of
    exponentials, as in FlashAttention (arXiv 2205.14135)."""

    @staticmethod
    def forward(
        ctx: Any, scores: Scores, seen: list[Seen], sinks: Tensor | None, query: Tensor, *kv: Tensor
    ) -> Tensor:
        grouped = query.unflatten(1, (kv[0].shape[1], -1))
        outputs, sums = [], []
        for rows in _chunks(query.shape[2]):
            q = grouped[..., rows, :]
            top, total = _start(q, sinks)
            mixed = torch.zeros_like(q, dtype=top.dtype)
            for tile in _tiles(seen, rows):
                key, value = (
                    each[:, :, tile.columns] for each in kv[2 * tile.part : 2 * tile.part + 2]
                )
                found, _ = _scores(q, key, tile.mask, scores)
                new = torch.maximum(top, found.amax(-1, keepdim=True))
                weights = found.sub_(new).exp_()
                keep = (top - new).exp()
                top, total = new, total * keep + weights.sum(-1, keepdim=True)
                mixed = mixed * keep + _times(weights.to(value.dtype), value)
            outputs.append((mixed / total).to(query.dtype))
            sums.append(top + total.log())
        output, logs = (torch.cat(each, dim=3) for each in (outputs, sums))
        ctx.save_for_backward(sinks, query, output, logs, *kv)
        ctx.scores, ctx.seen = scores, seen
        return output.flatten(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        sinks, query, output, logs, *kv = ctx.saved_tensors
        groups = (kv[0].shape[1], -1)
        grouped, gradient = query.unflatten(1, groups), gradient.unflatten(1, groups)
        total = (gradient * output).to(logs.dtype).sum(-1, keepdim=True)
        of_query = torch.zeros_like(grouped)
        of_kv = [torch.zeros_like(each) for each in kv]
        for rows in _chunks(query.shape[2]):
            q, back = grouped[..., rows, :], gradient[..., rows, :]
            for tile in _tiles(ctx.seen, rows):
                at = slice(2 * tile.part, 2 * tile.part + 2)
                key, value = (each[:, :, tile.columns] for each in kv[at])
                of_key, of_value = (each[:, :, tile.columns] for each in of_kv[at])
                found, slope = _scores(q, key, tile.mask, ctx.scores)
                weights = found.sub_(logs[..., rows, :]).exp_()
                of_value += weights.to(back.dtype).flatten(2, 3).mT @ back.flatten(2, 3)
                of_scores = weights * (_times(back, value.mT) - total[..., rows, :])
                if slope is not None:
                    of_scores *= slope
                of_scores = (of_scores * ctx.scores.scale).to(q.dtype)
                of_query[..., rows, :] += _times(of_scores, key)
                of_key += of_scores.flatten(2, 3).mT @ q.flatten(2, 3)
        of_sinks = None
        if sinks is not None:  # a sink has a weight and no value
            weight = (sinks.view(*groups, 1, 1) - logs).exp()
            of_sinks = -(weight * total).sum((0, 3, 4)).flatten().to(sinks.dtype)
        return None, None, of_sinks, of_query.flatten(1, 2), *of_kv


def _start(query: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """The largest score and the sum before the first tile: [B, G, n, q, 1] each."""
    shape = (*query.shape[:-1], 1)
    dtype = torch.promote_types(query.dtype, torch.float32)
    if sinks is not None:
        top = sinks.to(dtype).view(*query.shape[1:3], 1, 1).expand(shape)
        return top, torch.ones(shape, dtype=dtype, device=query.device)
    top = torch.full(shape, torch.finfo(dtype).min, dtype=dtype, device=query.device)
    return top, torch.zeros_like(top)


def _times(rows: Tensor, matrix: Tensor) -> Tensor:
    """The product of rows [B, G, n, q, x] with the matrix [B, G, x, y] of their group."""
    return (rows.flatten(2, 3) @ matrix).unflatten(2, rows.shape[2:4])


def _chunks(count: int) -> list[slice]:
    return [slice(start, min(start + ROWS, count)) for start in range(0, count, ROWS)]
