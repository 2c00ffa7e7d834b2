"""`SlowHead`: the draft heads of the oracle, candidate by candidate in float64.

The formulas are those of `idlm.models.heads`, with which this shares no function.

Shapes: D hidden size, E size of an embedding, V logit columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SlowHead:
    """A `Head` of `decoding.reference`, for a forward that gives [logits, hidden state], V + D
    numbers for each row.

    Attributes:
        kind: markov, selector or mlp.
        weights: the head's matrices by name, [out, in].
        embedding: [., E], the embedding of each token.
        output: [V, D], the rows of the LM head.
        top: the number of candidates.
    """

    kind: str
    weights: Mapping[str, Tensor]
    embedding: Tensor
    output: Tensor
    top: int

    def __call__(self, row: Tensor, before: int | None) -> Tensor:
        """Logits [V]: those of the row, and for the likeliest tokens the head's correction."""
        logits, hidden = row[: len(self.output)], row[len(self.output) :]
        if before is None:
            return logits
        scores = logits.clone()
        for token in logits.argsort(descending=True)[: self.top].tolist():
            scores[token] += self.correction(hidden, before, token)
        return scores

    def correction(self, hidden: Tensor, before: int, token: int) -> Tensor:
        """g of one candidate."""
        known = self.weights["before.weight"] @ scaled(self.embedding[before])
        row = self.output[token]
        if self.kind == "markov":
            return row @ (self.weights["up.weight"] @ known)
        known = known + self.weights["hidden.weight"] @ scaled(hidden)
        if self.kind == "mlp":
            return row @ (self.weights["up.weight"] @ silu(known))
        pair = known + self.weights["candidate.weight"] @ scaled(row)
        return (self.weights["out.weight"] @ silu(pair))[0]


def scaled(vector: Tensor) -> Tensor:
    """The vector with root mean square 1; 0 stays 0."""
    return vector / (vector.square().mean() + 1e-9).sqrt()


def silu(x: Tensor) -> Tensor:
    """x / (1 + exp(-x))."""
    return x / (1 + torch.exp(-x))
