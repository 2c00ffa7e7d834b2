"""Attention over ranges of keys with FlexAttention, which skips blocks that no row sees: the way
of a GPU. No mask is made; a kernel asks for one in the blocks that are seen in part.

Shapes: B batch, H query heads, G key/value heads, Q query rows, S keys of all parts, E head size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from idlm.decoding.scores import Scores
from idlm.training.layout import Seen

BLOCK = 128
"""Rows and columns of a block."""

SMALLEST = 16
"""The smallest E that the kernels take. They do not take float64 either."""


def block_mask(seen: list[Seen], keys: list[int]) -> BlockMask:
    """What rows see of the parts of keys, one after the other.

    Args:
        seen: of each part, [B, Q] each.
        keys: how many each part has.
    """
    starts = [sum(keys[:part]) for part in range(len(keys))]
    ranges = [
        (each.first + start, each.stop + start) for each, start in zip(seen, starts, strict=True)
    ]
    edge = torch.arange(-(-sum(keys) // BLOCK), device=seen[0].first.device) * BLOCK
    parts = [_blocks(first, stop, edge) for first, stop in ranges]
    some, every = (torch.stack(each).any(0)[:, None] for each in zip(*parts, strict=True))

    def sees(b: Tensor, _: Tensor, row: Tensor, key: Tensor) -> Tensor:
        found = [(key >= first[b, row]) & (key < stop[b, row]) for first, stop in ranges]
        return found[0] if len(found) == 1 else found[0] | found[1]

    return BlockMask.from_kv_blocks(
        *_ordered(some & ~every),
        *_ordered(every),
        BLOCK_SIZE=BLOCK,
        mask_mod=sees,
        seq_lengths=(seen[0].first.shape[1], sum(keys)),
    )


def attend_in_blocks(
    query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scores: Scores
) -> Tensor:
    """Attention of query [B, H, Q, E] to keys and values [B, G, S, E]: [B, Q, H, E].

    `mask` has the window in it.
    """
    mixed, more = _flex(query.device.type)(
        query,
        key,
        value,
        score_mod=None if scores.softcap is None else _capped(scores.softcap),
        block_mask=mask,
        scale=scores.scale,
        enable_gqa=query.shape[1] != key.shape[1],
        return_aux=AuxRequest(lse=scores.sinks is not None),
    )
    if scores.sinks is not None:  # it takes its part of the sum of exponentials
        sinks = scores.sinks[:, None]
        mixed = mixed * (more.lse - sinks).sigmoid()[..., None].to(mixed.dtype)
    return mixed.transpose(1, 2)


def _capped(cap: float) -> Callable[..., Tensor]:
    def capped(score: Tensor, *_: Tensor) -> Tensor:
        return cap * (score / cap).tanh()

    return capped


@cache
def _flex(device: str) -> Any:
    """Compiled, which is what makes it skip blocks; on a CPU, for tests, it is not."""
    return flex_attention if device == "cpu" else torch.compile(flex_attention)


def _blocks(first: Tensor, stop: Tensor, edge: Tensor) -> tuple[Tensor, Tensor]:
    """Of which blocks of keys from `edge` on the rows of each block may see some, and of which all
    see all: bool [B, blocks of rows, blocks of keys] each."""
    # the last row again changes no minimum or maximum; PyTorch repeats only floating point
    rest = -first.shape[1] % BLOCK
    first, stop = (
        F.pad(each[:, None].float(), (0, rest), mode="replicate")[:, 0].unflatten(1, (-1, BLOCK))
        for each in (first, stop)
    )
    some = (first.amin(2)[..., None] < edge + BLOCK) & (stop.amax(2)[..., None] > edge)
    every = (first.amax(2)[..., None] <= edge) & (stop.amin(2)[..., None] >= edge + BLOCK)
    return some, every


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of keys each block of rows has, and which come first: int32."""
    order = blocks.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1).int(), order.int()
