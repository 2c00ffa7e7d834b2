"""`Merged`: layers with the same input as one product, on a GPU, where a launch costs time.

The weights of such layers become slices of one matrix, so they take no more memory. The first layer
of a group that is called computes the outputs of all; the others take theirs.

Shapes: T rows, K inputs, N outputs of a group together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from idlm.kernels.forwards import replaced_forwards


@dataclass
class _Group:
    """Layers whose weights are slices of `weight` [N, K], and whose biases are those of `bias`.

    Attributes:
        given: the last input; kept: the outputs of layers that were not called since.
    """

    layers: Sequence[nn.Linear]
    weight: Tensor
    bias: Tensor | None
    given: Tensor | None = None
    kept: dict[int, Tensor] = field(default_factory=dict)

    @classmethod
    @torch.no_grad()
    def of(cls, layers: Sequence[nn.Linear]) -> _Group:
        weight = _merge([layer.weight for layer in layers])
        biases = [layer.bias for layer in layers if layer.bias is not None]
        return cls(layers, weight, _merge(biases) if biases else None)

    def output(self, number: int, x: Tensor) -> Tensor:
        """The output [..., T, N of the layer] of a layer for rows x [..., T, K]."""
        if self.given is not x or number not in self.kept:
            widths = [layer.out_features for layer in self.layers]
            self.given = x
            self.kept = dict(enumerate(F.linear(x, self.weight, self.bias).split(widths, dim=-1)))
        return self.kept.pop(number)

    def forget(self) -> None:
        self.given, self.kept = None, {}


class Merged:
    """Computes each group of `groups` by one product. A group must have biases in all layers or in
    none; others are left as they are."""

    def __init__(self, groups: Iterable[Sequence[nn.Linear]]) -> None:
        self.groups = [_Group.of(layers) for layers in groups if _fit(layers)]

    @contextmanager
    def use(self) -> Iterator[None]:
        """Run model code inside with merged products."""
        outputs = [
            (layer, partial(group.output, number))
            for group in self.groups
            for number, layer in enumerate(group.layers)
        ]
        try:
            with replaced_forwards(outputs):
                yield
        finally:
            for group in self.groups:
                group.forget()


def _fit(layers: Sequence[nn.Linear]) -> bool:
    biased = {layer.bias is not None for layer in layers}
    kinds = {(layer.weight.dtype, layer.weight.device) for layer in layers}
    return len(layers) > 1 and len(biased) == len(kinds) == 1


def _merge(parts: Sequence[Tensor]) -> Tensor:
    """The parameters as slices of one tensor."""
    whole = torch.cat([part.detach() for part in parts])
    for part, rows in zip(parts, whole.split([len(part) for part in parts]), strict=True):
        part.data = rows
    return whole
