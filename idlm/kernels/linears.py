"""`Linears`: the products of a model's linear layers by the C kernels, on a CPU, in float32.

Stock model code calls `F.linear`; while a step runs, the calls with a known weight go to the
kernels. Real rows multiply the layer's weights, in the format that the engine was given. MASK rows
only make claims, which verification checks: what they round costs acceptance and cannot change a
byte of the output. So where it is faster they multiply int8 weights with their adapter merged in,
which spares the adapter's two further products.

Layers that multiply the same rows, such as q, k and v, are one product here: the first of them that
is called brings the others' results, which are kept until they are asked for.

Shapes: A adapters, M MASK rows, which are the last rows of a forward; others as in
`idlm.kernels.panels`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from idlm.kernels.huge_pages import in_huge_pages
from idlm.kernels.panels import Panels, draft_format, stacked

ALWAYS = -1
"""A choice of panels for any number of rows; bit b stands for 2^(b-1) + 1 to 2^b rows."""

Group = Sequence[Tensor]
"""Weights [., K] of layers that multiply the same rows: one product, with their outputs side by
side."""

_made = WeakTensorKeyDictionary()
"""The panels that engines of this process use, by format, for each weight in them, and the versions
of the weights that they are of."""


def _shared(groups: Sequence[Group], format: str) -> list[Panels]:
    """Engines on one model share its panels; weights that were trained on get new ones."""
    found = [_known(group, format) for group in groups]
    fresh = [group for group, panels in zip(groups, found, strict=True) if panels is None]
    made = [Panels.of(_whole(group), format) for group in fresh]
    memory = in_huge_pages([one.weights for one in made])
    placed = [one._replace(weights=place) for one, place in zip(made, memory, strict=True)]
    for group, panels in zip(fresh, placed, strict=True):
        for weight in group:
            _made.setdefault(weight, {})[format] = (_versions(group), panels)
    rest = iter(placed)
    return [next(rest) if panels is None else panels for panels in found]


def _known(group: Group, format: str) -> Panels | None:
    """The panels of this very group as it is now."""
    versions, panels = _made.get(group[0], {}).get(format, (None, None))
    same = all(_made.get(weight, {}).get(format, (None, None))[1] is panels for weight in group)
    return panels if same and versions == _versions(group) else None


def _whole(group: Group) -> Tensor:
    return group[0] if len(group) == 1 else torch.cat(list(group))


def _versions(group: Group) -> list[int]:
    return [_version(weight) for weight in group]


def _version(weight: Tensor) -> int:
    """Grows with every change in place; tensors made in inference mode do not count them."""
    return -1 if weight.is_inference() else int(weight._version)


@dataclass
class Layer:
    """One linear layer, or several that multiply the same rows.

    Attributes:
        weight: [N, K], for PyTorch's product; anything where `choice` never takes that.
        panels: the same, or what stands for it.
        drafts: int8 panels for MASK rows and their scales, by adapter; None: as for all rows.
        choice: for which numbers of rows the panels are faster than PyTorch; see `ALWAYS`.
        group: the layers' own weights; widths: their outputs, which lie side by side in N.
    """

    weight: Tensor
    panels: Panels
    drafts: tuple[Tensor, Tensor] | None = None
    choice: int = ALWAYS
    group: Group = ()
    widths: Sequence[int] = ()

    @property
    def shape(self) -> tuple[int, int]:
        """K and N."""
        return self.panels.inner, self.panels.out

    def choose(self, choice: int) -> None:
        """Set the choice, and hold the group's weight for PyTorch's product only where it is taken."""
        self.choice = choice
        if choice == ALWAYS:
            self.weight = self.weight.new_empty(0)
        elif not self.weight.numel():
            self.weight = _whole(self.group)

    def multiply(self, x: Tensor, adapter: Tensor | None) -> Tensor:
        """Rows [.., T, K] by the weights: [.., T, N].

        The last rows, as many as `adapter` int64 [M] has, by its drafts' weights, if there are any.
        """
        weights, scales, out, _ = self.panels
        ops, choice = torch.ops.idlm, self.choice
        x = x if x.stride(-1) == 1 else x.contiguous()  # the kernels read rows from end to end
        found: Tensor
        if adapter is None or self.drafts is None:
            found = ops.linear(x, self.weight, weights, scales, out, choice)
        else:
            codes = self.drafts
            found = ops.split_linear(x, self.weight, weights, scales, *codes, adapter, out, choice)
        return found


class Linears:
    """The linear layers of a model that the kernels serve.

    Args:
        groups: the weights of each layer, or of several that multiply the same rows.
        format: "float32", "bfloat16" or "int8".
    """

    def __init__(self, groups: Iterable[Group], format: str) -> None:
        self.format = format
        self.layers: list[Layer] = []
        self._by_weight: dict[int, Layer] = {}
        self._adapter: Tensor | None = None
        self._kept: tuple[Tensor | None, dict[int, Tensor]] = None, {}
        self.add(groups)

    @property
    def drafts(self) -> bool:
        """Whether MASK rows have weights of their own."""
        return any(layer.drafts is not None for layer in self.layers)

    def add(self, groups: Iterable[Group]) -> None:
        """Serve further weights, such as adapters'."""
        groups = list(groups)
        for group, panels in zip(groups, _shared(groups, self.format), strict=True):
            layer = Layer(
                panels.scales.new_empty(0), panels, group=group, widths=[len(one) for one in group]
            )
            self.layers.append(layer)
            self._by_weight |= {id(weight): layer for weight in group}

    def add_drafts(self, merged: Callable[[Tensor], Sequence[Tensor]]) -> None:
        """Give MASK rows int8 weights: `merged` says what each adapter makes of a layer's weight."""
        format = draft_format()
        made = [
            stacked(_side_by_side([merged(weight) for weight in layer.group]), format)
            for layer in self.layers
        ]
        memory = in_huge_pages([codes for codes, _ in made])
        for layer, codes, (_, scales) in zip(self.layers, memory, made, strict=True):
            layer.drafts = codes, scales

    @contextmanager
    def use(self) -> Iterator[None]:
        """Run model code on the kernels."""
        try:
            with _Products(self):
                yield
        finally:
            self._kept = None, {}

    @contextmanager
    def drafting(self, adapter: Tensor) -> Iterator[None]:
        """Inside `use`: the last rows are MASK rows, and `adapter` int64 [M] says whose."""
        self._adapter = adapter
        try:
            yield
        finally:
            self._adapter = None

    def take(self, layers: Iterable[nn.Linear]) -> None:
        """Free the layers' own weights. What is left in their place has no numbers: only `use`
        multiplies by it, and whoever else tries gets an error.
        """
        for one in layers:
            if (layer := self._by_weight.pop(id(one.weight), None)) is not None:
                left = nn.Parameter(one.weight.new_empty(0, 0), requires_grad=False)
                layer.group = [left if weight is one.weight else weight for weight in layer.group]
                self._by_weight[id(left)] = layer
                one.weight = left

    def serves(self, weight: object) -> bool:
        """Whether it is a known weight."""
        return id(weight) in self._by_weight

    def multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """`F.linear` of a known weight."""
        layer = self._by_weight[id(weight)]
        one = len(layer.group) == 1
        done = layer.multiply(x, self._adapter) if one else self._part(layer, x, weight)
        return done if bias is None else done + bias

    def _part(self, layer: Layer, x: Tensor, weight: Tensor) -> Tensor:
        """One weight's part of a product by several, which the first that asks for its part brings."""
        rows, parts = self._kept
        if rows is not x or id(weight) not in parts:
            whole = layer.multiply(x, self._adapter).split(layer.widths, dim=-1)
            parts = dict(zip(map(id, layer.group), whole, strict=True))
            self._kept = x, parts
        return parts.pop(id(weight))


def _side_by_side(weights: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """By adapter [N, K], from the weights of each layer by adapter; a layer that none changes has
    one."""
    adapters = max(map(len, weights))
    return [torch.cat([one[number % len(one)] for one in weights]) for number in range(adapters)]


class _Products(TorchFunctionMode):
    """Hands products by known weights to the kernels; stock model code needs no change."""

    def __init__(self, linears: Linears) -> None:
        super().__init__()
        self.linears = linears

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if (
            func is F.linear
            and len(args) > 1
            and self.linears.serves(args[1])
            and _is_served(args[0])
        ):
            return self.linears.multiply(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _is_served(x: Tensor) -> bool:
    """Rows in another type are PyTorch's to refuse."""
    return x.dtype == torch.float32
