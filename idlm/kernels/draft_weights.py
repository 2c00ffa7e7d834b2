"""`DraftWeights`: the linear layers of MASK rows in int8, with the adapters merged in (csrc/draft_linear.c); on a CPU.

A MASK row only makes a claim, which verification checks: what it rounds costs acceptance and cannot change a byte of
the output. So MASK rows need neither float32 nor the adapter's two further products. Real rows keep both the weights
and the kernel that AR has.

Shapes: A adapters, N columns of a layer, N' = N rounded up to whole vectors, K its inputs, K' = K rounded up to fours,
T rows of which the last M are MASK rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

LANES, FOUR, MOST = 16, 4, 127


class Codes(NamedTuple):
    """One layer: w[a, k, n] = scales[a, n] * code[a, k, n].

    Attributes:
        codes: int8 [A, K' / 4, N', 4]; scales: float32 [A, N']; sums: int32 [A, N'], of a column's codes.
    """

    codes: Tensor
    scales: Tensor
    sums: Tensor

    @classmethod
    def of(cls, weights: Sequence[Tensor]) -> Codes:
        """From each adapter's weight, [N, K]; the largest of a column becomes 127."""
        return cls(*(torch.stack(part) for part in zip(*map(_codes, weights), strict=True)))


def _codes(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    padded = F.pad(weight.detach().float(), (0, -weight.shape[1] % FOUR, 0, -weight.shape[0] % LANES))
    scales = padded.abs().amax(dim=1) / MOST
    codes = (padded / scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None]).round()
    packed = codes.to(torch.int8).unflatten(1, (-1, FOUR)).transpose(0, 1).contiguous()
    return packed, scales, codes.sum(dim=1).to(torch.int32)


def split_linear(x: Tensor, weight: Tensor, codes: Codes, adapter: Tensor) -> Tensor:
    """`x` [.., T, K] times `weight` [N, K], but its last rows, as many as `adapter` int64 [M], by their codes."""
    done: Tensor = torch.ops.idlm.split_linear(x, weight, *codes, adapter)
    return done


class DraftWeights:
    """The codes of a model's layers, by the weight that they stand beside."""

    def __init__(self, layers: Iterable[tuple[Tensor, Sequence[Tensor]]]) -> None:
        self._layers = {id(weight): (weight, Codes.of(merged)) for weight, merged in layers}

    def use(self, adapter: Tensor) -> AbstractContextManager[object]:
        """Run model code whose last rows are MASK rows, `adapter` int64 [M] says whose."""
        return _Split(self._layers, adapter)


class _Split(TorchFunctionMode):
    """Hands products by the known weights to `split_linear`; stock model code needs no change."""

    def __init__(self, layers: Mapping[int, tuple[Tensor, Codes]], adapter: Tensor) -> None:
        super().__init__()
        self.layers, self.adapter = layers, adapter

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is F.linear and id(args[1]) in self.layers:
            return self._linear(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        done = split_linear(x, weight, self.layers[id(weight)][1], self.adapter)
        return done if bias is None else done + bias
