"""The remasking rules of SDAR, LLaDA and LLaDA-2.1: which tokens of a block a step commits.

Shapes: B blocks, b tokens of a block.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Strategy = Literal["sequential", "static", "dynamic", "entropy"]


class Step(NamedTuple):
    """What a forward says about a block; [B, b] each.

    Attributes:
        masked: bool, the tokens that are not committed yet.
        drawn: the token drawn for each place.
        probability: of that token.
        entropy: of the law of each place, in nats.
    """

    masked: Tensor
    drawn: Tensor
    probability: Tensor
    entropy: Tensor


def transfer_counts(tokens: int, steps: int) -> list[int]:
    """How many of `tokens` each of `steps` steps commits: as equal as can be, the more first."""
    least, more = divmod(tokens, steps)
    return [least + (step < more) for step in range(steps)]


def most(value: Tensor, among: Tensor, count: Tensor) -> Tensor:
    """The `count` [B] largest of `value` `among` [B, b]; the first of equal ones: bool [B, b]."""
    order = value.masked_fill(~among, -torch.inf).argsort(dim=1, descending=True, stable=True)
    rank = torch.zeros_like(order).scatter(1, order, torch.arange(order.shape[1]).expand_as(order))
    return (rank < count[:, None]) & among


def committed(step: Step, count: Tensor, strategy: Strategy, threshold: float) -> Tensor:
    """The tokens to commit, bool [B, b]: SDAR's strategies, which keep at least `count` [B].

    sequential  the first `count`
    static      the `count` most probable (low confidence is masked again)
    dynamic     all that are more probable than `threshold`; if these are fewer, as static
    entropy     those of least entropy, as long as their entropies add up to at most `threshold`;
                at least one

    """
    masked = step.masked
    if strategy == "sequential":
        order = torch.arange(masked.shape[1], 0, -1.0)
        return most(order.expand(masked.shape), masked, count)
    if strategy == "entropy":
        ordered, _ = step.entropy.masked_fill(~masked, torch.inf).sort(dim=1, stable=True)
        within = (ordered.cumsum(1) <= threshold).sum(1).clamp(min=1)
        return most(-step.entropy, masked, within)
    static = most(step.probability, masked, count)
    if strategy == "static":
        return static
    confident = masked & (step.probability > threshold)
    enough = confident.sum(1) >= torch.minimum(count, masked.sum(1))
    return torch.where(enough[:, None], confident, static)


def edited(
    step: Step, tokens: Tensor, editable: Tensor, unmask: float, edit: float
) -> tuple[Tensor, Tensor]:
    """LLaDA-2.1's two thresholds: the tokens to unmask and those to replace, bool [B, b] each.

    A MASK becomes its token if that is more probable than `unmask`, and the most probable one in
    any case. A committed token that is `editable` is replaced by another one that is more probable
    than `edit`.
    """
    one = torch.ones(len(tokens), dtype=torch.int64)
    unmasked = committed(step, one, "dynamic", unmask)
    other = editable & ~step.masked & (step.drawn != tokens)
    return unmasked, other & (step.probability > edit)
