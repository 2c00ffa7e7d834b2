"""The weights of the loss, and its sum in chunks of rows of hidden states.

The gradient of a chunk is computed with its loss, and its logits are gone before the next chunk: so
memory grows neither with rows x vocabulary, nor is anything computed twice.

Shapes: n rows, D hidden size, V logit columns, b the block size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

CHUNK = {"cpu": 2**23}
"""Logits in a chunk, by device. On a GPU a chunk has more, because each reads the whole head."""
CHUNK_ELSEWHERE = 2**26

ChunkLoss = Callable[[Tensor, slice], tuple[Tensor, Tensor]]
"""From hidden states [k, D] and the rows that they are, to the loss and the sums of its terms."""


@dataclass(frozen=True)
class RowWeights:
    """The weights of the terms of a MASK row, and of a row by its draft depth k = 1..b.

    `exponential` is exp(-(k-1) / gamma), as in DFlash. `dpace` is D-PACE (arXiv 2605.18810,
    equations 7 to 9): the sum over j >= k of the chance that all drafts up to j are accepted, where
    the chance at depth i is (1 - alpha) q_i + alpha, q_i the probability of the text's token.
    """

    ce: float = 1.0
    kl: float = 0.0
    tv: float = 0.0
    depth: Literal["uniform", "exponential", "dpace"] = "uniform"
    gamma: float = 4.0
    alpha: float = 0.5


def continuation(accepted: Tensor, depth: Tensor, block_size: int) -> Tensor:
    """The expected number of drafts accepted from each row on, to the end of its block: [n].

    `accepted` [n] is each row's chance, given that all before it in the block are accepted. Rows of
    a block are side by side, and `depth` [n] counts them from 0.
    """
    block = (depth == 0).cumsum(0) - 1
    blocks = accepted.new_zeros(int((depth == 0).sum()), block_size)
    blocks[block, depth] = accepted
    return blocks.cumprod(1).flip(1).cumsum(1).flip(1)[block, depth]


def chunks(rows: int, columns: int, device: torch.device) -> list[slice]:
    """Slices of `rows` rows whose logits have `columns` columns; one empty slice if there are
    none."""
    size = max(CHUNK.get(device.type, CHUNK_ELSEWHERE) // columns, 1)
    return [slice(start, start + size) for start in range(0, max(rows, 1), size)]


def sum_in_chunks(
    loss: ChunkLoss, hidden: Tensor, parts: list[slice], trained: Iterable[nn.Parameter]
) -> tuple[Tensor, Tensor]:
    """The sums of `loss` over all rows of `hidden` [n, D]; the loss has gradients, its terms none.

    `trained` are the parameters that `loss` itself uses, those of the output head.
    """
    inputs = (hidden, *trained)
    if torch.is_grad_enabled() and any(each.requires_grad for each in inputs):
        total, terms = _SumInChunks.apply(loss, parts, *inputs)
        return total, terms
    with torch.no_grad():
        totals = [loss(hidden[part], part) for part in parts]
    return torch.stack([t for t, _ in totals]).sum(), torch.stack([s for _, s in totals]).sum(0)


class _SumInChunks(torch.autograd.Function):
    """`sum_in_chunks` with gradients, which `forward` computes and `backward` gives away, so that
    the head's exists once."""

    @staticmethod
    def forward(
        ctx: Any, loss: ChunkLoss, parts: list[slice], hidden: Tensor, *trained: nn.Parameter
    ) -> tuple[Tensor, Tensor]:
        # what FSDP gathered in bfloat16 has a gradient in it, but a sum of many would lose digits
        sums_of = [torch.promote_types(each.dtype, torch.float32) for each in trained]
        ctx.gradients = [
            torch.zeros_like(each, dtype=dtype)
            for each, dtype in zip((hidden, *trained), (hidden.dtype, *sums_of), strict=True)
        ]
        of_rows, *of_trained = ctx.gradients
        totals = []
        for part in parts:
            with torch.enable_grad(), _InPlace(trained, of_trained):
                rows = hidden[part].detach().requires_grad_()
                total, terms = loss(rows, part)
            of_rows[part], *found = torch.autograd.grad(total, (rows, *trained), allow_unused=True)
            for gradient, more in zip(of_trained, found, strict=True):
                if more is not None:
                    gradient += more
            totals.append((total.detach(), terms.detach()))
        sums = torch.stack([terms for _, terms in totals]).sum(0)
        ctx.mark_non_differentiable(sums)
        return torch.stack([total for total, _ in totals]).sum(), sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.gradients
        del ctx.gradients
        return (None, None, *(gradient.mul_(scale) for gradient in gradients))


class _InPlace(TorchFunctionMode):
    """Linear layers add the gradients of their weights to given tensors."""

    def __init__(self, weights: Sequence[Tensor], gradients: list[Tensor]) -> None:
        super().__init__()
        self._gradients = {
            id(each): gradient for each, gradient in zip(weights, gradients, strict=True)
        }

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is F.linear and not kwargs and id(args[1]) in self._gradients:
            rows, weight, *bias = args
            gradient = self._gradients[id(weight)]
            # autocast casts a leaf once for all chunks; rows without a gradient have no backward
            plain = rows.dtype == weight.dtype == gradient.dtype and rows.requires_grad
            if plain and not torch.is_autocast_enabled(rows.device.type):
                product = _Linear.apply(rows, weight.detach(), gradient)
                return product if not bias or bias[0] is None else product + bias[0]
        return func(*args, **(kwargs or {}))


class _Linear(torch.autograd.Function):
    """A linear layer whose backward adds the gradient of the weight [N, K] to `gradient`."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weight)
        ctx.gradient = gradient
        return F.linear(rows, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, back: Tensor) -> tuple[Tensor, None, None]:
        rows, weight = ctx.saved_tensors
        ctx.gradient.addmm_(back.flatten(0, -2).mT, rows.flatten(0, -2))
        return back @ weight, None, None
