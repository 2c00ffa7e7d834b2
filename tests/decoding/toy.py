"""A tiny deterministic model for the laws: every row's logits depend on all it sees, and on nothing
else."""

from __future__ import annotations

import torch
from torch import Tensor


class Toy:
    """Logits [T, V] from what each row sees; token V is MASK. `sharpness` scales the logits."""

    def __init__(self, vocab_size: int, seed: int = 0, sharpness: float = 2.0) -> None:
        random = torch.Generator().manual_seed(seed)
        self.vocab_size = self.mask_id = vocab_size
        self.embedding = torch.randn(vocab_size + 1, 8, generator=random, dtype=torch.float64)
        self.mix = torch.randn(8, 8, generator=random, dtype=torch.float64)
        self.out = torch.randn(8, vocab_size, generator=random, dtype=torch.float64) * sharpness

    def __call__(self, tokens: Tensor, positions: Tensor, visible: Tensor) -> Tensor:
        """The form `decoding.reference` asks for."""
        distance = (positions[:, None] - positions[None, :]).abs().to(torch.float64)
        weights = visible.to(torch.float64) * torch.exp(-distance / 2) * torch.cos(distance)
        rows = self.embedding[tokens] + weights @ self.embedding[tokens] @ self.mix
        return torch.tanh(rows) @ self.out
