"""`Scores`: what makes attention weights of the products of queries and keys.

Shapes: H query heads, Q query rows, S key rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Scores(NamedTuple):
    """The constants of a layer's attention.

    A row has a score s_j = scale * (q . k_j) for each key j that it sees; with a soft cap c it is
    c * tanh(s_j / c). Its weights are exp(s_j) / (exp(sink) + sum of exp(s_j)). The sink is the
    score of a key that is always seen and has no value; without sinks exp(sink) is 0.

    Attributes:
        window: a row at position p sees only keys at positions > p - window; None: all.
        softcap: c; None: scores are not capped.
        sinks: [H], the sink of each query head; None: no sinks.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None

    @property
    def plain(self) -> bool:
        """Whether the weights are a softmax of scaled products, which libraries compute fast."""
        return self.softcap is None and self.sinks is None

    def weights(self, products: Tensor, bias: Tensor, sinks: Tensor | None) -> Tensor:
        """The weights [..., Q, S] of `products` [..., Q, S], in float32 or more.

        They are 0 for a row that sees nothing.

        Args:
            bias: broadcastable to the products; 0 where a row sees a key, else -inf.
            sinks: those of the rows' heads, broadcastable to [..., Q, 1].
        """
        scores = self.scale * products.to(torch.promote_types(products.dtype, torch.float32))
        if self.softcap is not None:
            scores = self.softcap * (scores / self.softcap).tanh()
        scores = scores + bias
        top = scores.detach().amax(-1, keepdim=True)
        if sinks is not None:
            top = torch.maximum(top, sinks.detach())
        top = top.clamp(min=torch.finfo(top.dtype).min)  # -inf for a row that sees nothing
        weights = (scores - top).exp()
        total = weights.sum(-1, keepdim=True)
        if sinks is not None:
            total = total + (sinks - top).exp()
        return weights / total.clamp(min=1)  # below 1 only if the row sees nothing
