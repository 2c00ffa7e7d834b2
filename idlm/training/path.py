"""The forwards that greedy decoding takes along held-out texts, drafts and all.

A draft is accepted if its argmax is that of the clean row which predicts the same token, and it is
reached if all drafts of its block before it are accepted. Where a block begins depends on how many
drafts of the block before were accepted. So the mean over all places says too much: decoding spends
its forwards where drafts fail. With each row as the beginning of a block, the path itself can be
walked. It is exact where the texts are what the model writes greedily; elsewhere the walk goes on
along the text.

Shapes: n MASK rows of a batch, b the block size.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from idlm.training.layout import Texts


def draft_runs(texts: Texts, agree: Tensor, depth: Tensor) -> tuple[Tensor, Tensor]:
    """For a block that begins at each MASK row: how many of its drafts agree before the first that
    does not, and how many drafts it has up to the end of the answer; int64 [n] each.

    Args:
        agree: bool [b, n], the MASK rows of the phases 0 .. b - 1 on top of the texts' own.
        depth: int64 [b, n], counted from 0.
    """
    block_size, rows = agree.shape
    step = torch.arange(block_size, device=agree.device)
    place = (texts.position + texts.phase)[texts.masked]
    phase = (-place % block_size)[:, None]  # in which a block begins there
    row = torch.arange(rows, device=agree.device)[:, None] + step
    inside, row = row < rows, row.clamp(max=max(rows - 1, 0))
    inside &= depth[phase, row] == step  # else the block has ended
    return (agree[phase, row] & inside).cumprod(1).sum(1), inside.sum(1)


def walked(texts: Texts, accepted: Tensor, drafts: Tensor, block_size: int) -> Tensor:
    """Sums over all answers of two and more tokens, int64 [3 + 2 b] on the CPU: tokens, forwards
    with drafts for all outcomes, and forwards of the chain; drafts reached and drafts accepted by
    depth, for all outcomes.

    `accepted` and `drafts` are those of `draft_runs`.
    """
    sums, depth = torch.zeros(3 + 2 * block_size, dtype=torch.int64), torch.arange(block_size)
    for runs, most in _answers(texts, accepted, drafts):
        visited = list(_all_outcomes(runs))
        tokens = torch.tensor([len(runs) + 1, 1 + len(visited), 1 + _chain(runs, most)])
        took, had = (torch.tensor([each[at] for at in visited])[:, None] for each in (runs, most))
        reached, kept = depth < torch.minimum(took + 1, had), depth < took
        sums += torch.cat([tokens, reached.sum(0), kept.sum(0)])
    return sums


def _all_outcomes(runs: list[int]) -> Iterator[int]:
    """The rows at which the windows of an answer begin, after the forward of its first token."""
    at = 0
    while at < len(runs):
        yield at
        at += runs[at] + 1


def _chain(runs: list[int], most: list[int]) -> int:
    """The forwards of an answer after the first: after a rejection the next has no drafts."""
    at = forwards = 0
    while at < len(runs):
        forwards += 1
        rejected = runs[at] < most[at]
        at += runs[at] + 1
        if rejected and at < len(runs):
            forwards += 1
            at += 1
    return forwards


def _answers(texts: Texts, *columns: Tensor) -> Iterator[tuple[list[int], ...]]:
    """The values of the MASK rows of each answer."""
    row = torch.arange(len(texts.tokens), device=texts.tokens.device)[:, None]
    answer = (row * texts.tokens.shape[1] + texts.answer)[texts.masked]
    counts = answer.unique_consecutive(return_counts=True)[1].tolist()
    parts = (column.cpu().split(counts) for column in columns)
    yield from (tuple(part.tolist() for part in parts) for parts in zip(*parts, strict=True))
