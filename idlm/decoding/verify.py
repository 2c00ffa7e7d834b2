"""`coupled`, `ratio`, `relaxed`: which drafts stand, and what replaces the first that does not.

Shapes: K drafts, V tokens. Row k of `log_p` is the law of the token that draft k claims; row K is the bonus token's.
All rules run without a look at the result, so they need no host synchronisation.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Verdict(NamedTuple):
    """The outcome of one window.

    Attributes:
        accepted: int64 scalar j, the drafts that stand, 0..K.
        token: int64 scalar, the token after them: the correction of draft j, or the bonus where all stand.
    """

    accepted: Tensor
    token: Tensor


def _leading(accept: Tensor) -> Tensor:
    """The length of the run of True at the start of `accept` [K]."""
    return accept.to(torch.int64).cumprod(dim=0).sum()


def coupled(log_p: Tensor, drafts: Tensor, noise: Tensor) -> Verdict:
    """Accept a draft where it equals the AR token argmax(log p + noise); the output is AR's own, whatever the drafts.

    Args:
        log_p: [K + 1, V], the law of each row.
        drafts: int64 [K].
        noise: [K + 1, V], the noise at the rows' positions; zeros when greedy.
    """
    tokens = (log_p + noise).argmax(dim=-1)
    accepted = _leading(tokens[:-1] == drafts)
    return Verdict(accepted, tokens[accepted])


def relaxed(log_p: Tensor, drafts: Tensor, noise: Tensor, tau: float) -> Verdict:
    """APPROXIMATE: as `coupled`, and accept also a draft whose probability is at least `tau` times the largest.

    The output is not the model's own law, except with tau = 1 when greedy and no two tokens tie.
    """
    tokens = (log_p + noise).argmax(dim=-1)
    likely = log_p[:-1].gather(1, drafts[:, None])[:, 0] >= log_p[:-1].amax(dim=-1) + torch.tensor(tau).log()
    accepted = _leading((tokens[:-1] == drafts) | likely)
    return Verdict(accepted, tokens[accepted])


def ratio(log_p: Tensor, drafts: Tensor, log_q: Tensor, uniform: Tensor, noise: Tensor) -> Verdict:
    """Accept a draft with probability min(1, p / q); replace it by a sample of normalise(max(0, p - q)).

    The rule of speculative sampling (Leviathan et al. 2023, arXiv 2211.17192): it gives exactly p if each draft is a
    sample of q, and q is the law that was sampled, filters included.

    Args:
        log_p: [K + 1, V].
        drafts: int64 [K], sampled from `log_q`.
        log_q: [K, V].
        uniform: [K] in (0, 1).
        noise: [K + 1, V] Gumbel noise, independent of what drew the drafts.
    """
    chosen = drafts[:, None]
    log_ratio = (log_p[:-1].gather(1, chosen) - log_q.gather(1, chosen))[:, 0]
    accepted = _leading(uniform.log() < log_ratio)
    return Verdict(accepted, (residual(log_p, log_q)[accepted] + noise[accepted]).argmax(dim=-1))


def residual(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Log of max(0, p - q), not normalised, [K + 1, V]; the bonus row, which has no q, stays p.

    A row where rounding leaves nothing (p = q up to an ulp, so that a rejection has probability 0 but for rounding)
    falls back to p.
    """
    left = (log_p[:-1].exp() - log_q.exp()).clamp(min=0)
    rest = torch.where(left.sum(dim=-1, keepdim=True) > 0, left.log(), log_p[:-1])
    return torch.cat([rest, log_p[-1:]])
