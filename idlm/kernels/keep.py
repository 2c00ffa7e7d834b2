"""`idlm.decoding.law.filtered` without a sort of the vocabulary: the same tokens are kept.

Top-p keeps the most likely tokens until those before one have the mass `top_p`. A token with less
than (1 - top_p) / V of the mass is never kept: all such tokens together have less than 1 - top_p,
so those before it have more than `top_p`. So only the others, the candidates, are sorted.

The sort decides by rounded sums, and sums in another order round otherwise. A float64 sum of n
positive numbers, each with a relative error of a few u = 2^-53, has a relative error below
(n + c) u. `filtered` and this file each take two such sums, the mass before a token and that of
all. So they differ by less than 4 (V + c) u of the whole; DOUBT is twice that by column. Where a
mass is nearer to `top_p`, the row is sorted as in `filtered`.

Shapes: B slots, R rows, V logit columns.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from idlm.decoding.law import Chooser, Filter, filtered, past_rank
from idlm.decoding.settings import NEVER, Features, Settings
from idlm.kernels.choose import chooser

SMALL = 16384
"""With fewer columns, sorting all rows at once takes less time than choosing candidates by row."""
DOUBT = 8 * 2.0**-53
"""Sums of masses in different orders differ by less than this for each logit column."""


def rules(device: torch.device) -> tuple[Chooser, Filter]:
    """The implementations of `law.choose` and `law.filtered` for an engine on `device`."""
    return chooser(device), filterer(device)


def filterer(device: torch.device) -> Filter:
    """That of `law.filtered`. All keep the same tokens, but for the doubt above on a GPU."""
    if device.type == "cpu":
        return keep_on_cpu
    if device.type != "cuda" or find_spec("triton") is None:
        return filtered
    from idlm.kernels.keep_triton import keep_rows  # Triton is optional

    return keep_rows


def keep_on_cpu(scores: Tensor, settings: Settings, features: Features) -> Tensor:
    """`law.filtered` on a CPU. Slots without a filter are only copied."""
    if scores.shape[-1] < SMALL or not features.ranked:
        return filtered(scores, settings, features)
    _register()
    kept: Tensor = torch.ops.idlm.keep(
        scores, settings.temperature, settings.top_k, settings.top_p, settings.min_p
    )
    return kept


@cache
def _register() -> torch.library.Library:
    """Make `keep` an operator, so that a recorded step calls it: how much it computes depends on
    the values."""
    library = torch.library.Library("idlm", "FRAGMENT")
    library.define(
        "keep(Tensor scores, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p)"
        " -> Tensor"
    )
    library.impl("keep", keep, "CPU")
    return library


def keep(
    scores: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor
) -> Tensor:
    """The scores [B, R, V], with -inf for the tokens that are dropped; the settings are [B]."""
    kept = scores.clone()
    rows = zip(*(each.tolist() for each in (temperature, top_k, top_p, min_p)), strict=True)
    for slot, (heat, k, p, least) in zip(kept, rows, strict=True):
        ranked = k < scores.shape[-1] or p < 1
        if ranked or least > 0:
            scaled = slot.to(torch.float64) / (heat if heat > 0 else 1.0)
            for row, logits in zip(slot, scaled, strict=True):
                if ranked:
                    dropped = dropped_of(logits, k, p)
                    row.masked_fill_(dropped, NEVER)
                    logits.masked_fill_(dropped, NEVER)
                if least > 0:
                    probabilities = logits.softmax(dim=-1)
                    row.masked_fill_(probabilities < least * probabilities.amax(), NEVER)
    return kept


def dropped_of(scaled: Tensor, k: int, p: float) -> Tensor:
    """The tokens that top-k, then top-p drop of one row `scaled` float64 [V]: bool [V]."""
    top = scaled.amax()
    if not top.isfinite():
        return _by_sort(scaled, k, p)
    below = _below_kth(scaled, k)
    if p >= 1:
        return below
    weights = (scaled - top).exp_().masked_fill_(below, 0)
    total = weights.sum()
    candidates = weights >= (1 - p) * total / len(scaled)
    values = scaled[candidates].sort(descending=True).values
    mass = (values - top).exp_() / total
    after = mass.cumsum(0)
    before, doubt = after - mass, DOUBT * len(scaled)
    if bool(((before - p).abs() <= doubt).any()) or not float(after[-1]) > p + doubt:
        return _by_sort(scaled, k, p)
    return _after(scaled, values, int((before < p).sum()))


def _below_kth(scaled: Tensor, k: int) -> Tensor:
    """The tokens below the k-th largest: those equal to it are kept."""
    if k >= len(scaled):
        return torch.zeros_like(scaled, dtype=torch.bool)
    return scaled < scaled.kthvalue(len(scaled) - k + 1).values


def _after(scaled: Tensor, values: Tensor, count: int) -> Tensor:
    """All tokens but the `count` largest; of equal ones the first are kept. `values` are the
    largest, in order, and all that equal one of them."""
    last = values[count - 1]
    dropped = scaled < last
    kept_equals = count - int((values > last).sum())
    equals = (scaled == last).nonzero()[:, 0]
    dropped[equals[kept_equals:]] = True
    return dropped


def _by_sort(scaled: Tensor, k: int, p: float) -> Tensor:
    """`dropped_of` by the sort of `law.filtered`."""
    top_k, top_p = torch.tensor([k]), torch.tensor([p], dtype=torch.float64)
    return past_rank(scaled[None, None], top_k, top_p)[0, 0]
