"""`Linears`: a model's linear layers computed by the C kernels, on a CPU, in float32.

Stock model code calls `F.linear`. While a step runs, calls with a known weight go to the kernels.
Real rows use the weights in the format that the engine was given. MASK rows only make drafts, which
are verified: their rounding may cost acceptance but cannot change the output. So, if it is faster,
they use int8 weights with the adapter merged in, which saves the two products of the adapter.

Layers with the same input, such as q, k and v, are a group and one product. The first layer of a
group that is called computes all; the results of the others are kept until their calls.

Shapes: A adapters; M MASK rows, the last rows of a forward; others as in `idlm.kernels.panels`.
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
"""A `Layer.choice` of panels for any number of rows. Bit b of a choice is for 2^(b-1) + 1 to 2^b
rows."""

Group = Sequence[Tensor]
"""Weights [., K] of layers with the same input: one product, whose outputs are concatenated."""

_cache = WeakTensorKeyDictionary()
"""The panels of this process: for each weight, by format, the versions of the weights of its group
and the group's panels."""


def _shared(groups: Sequence[Group], format: str) -> list[Panels]:
    """The panels of each group. Engines on one model share them; changed weights get new ones."""
    cached = [_cached(group, format) for group in groups]
    missing = [group for group, panels in zip(groups, cached, strict=True) if panels is None]
    built = [Panels.of(_concatenated(group), format) for group in missing]
    memory = in_huge_pages([panels.weights for panels in built])
    moved = [
        panels._replace(weights=weights) for panels, weights in zip(built, memory, strict=True)
    ]
    for group, panels in zip(missing, moved, strict=True):
        for weight in group:
            _cache.setdefault(weight, {})[format] = (_versions(group), panels)
    new = iter(moved)
    return [next(new) if panels is None else panels for panels in cached]


def _cached(group: Group, format: str) -> Panels | None:
    """The panels of exactly this group, if no weight of it has changed since."""
    versions, panels = _cache.get(group[0], {}).get(format, (None, None))
    same = all(_cache.get(weight, {}).get(format, (None, None))[1] is panels for weight in group)
    return panels if same and versions == _versions(group) else None


def _concatenated(group: Group) -> Tensor:
    return group[0] if len(group) == 1 else torch.cat(list(group))


def _versions(group: Group) -> list[int]:
    return [_version(weight) for weight in group]


def _version(weight: Tensor) -> int:
    """A counter of in-place changes; -1 for tensors of inference mode, which have none."""
    return -1 if weight.is_inference() else int(weight._version)


@dataclass
class Layer:
    """A group of linear layers with the same input, often a single layer.

    Attributes:
        weight: [N, K], the concatenated weights for PyTorch's product; empty if `choice` is ALWAYS.
        panels: the same weights for the kernels, possibly in another format.
        drafts: panels and scales of the MASK rows' weights, by adapter; None: MASK rows use
            `panels`.
        choice: a bit for each range of row counts, set if the panels are used; see `ALWAYS`.
        group: the weights of the layers.
        widths: the outputs of each layer; they add up to N.
    """

    weight: Tensor
    panels: Panels
    drafts: tuple[Tensor, Tensor] | None = None
    choice: int = ALWAYS
    group: Group = ()
    widths: Sequence[int] = ()

    @property
    def shape(self) -> tuple[int, int]:
        """K and N: the inputs, and the outputs of the group together."""
        return self.panels.inner, self.panels.out

    def choose(self, choice: int) -> None:
        """Set `choice`, and `weight` if PyTorch's product needs it."""
        self.choice = choice
        if choice == ALWAYS:
            self.weight = self.weight.new_empty(0)
        elif not self.weight.numel():
            self.weight = _concatenated(self.group)

    def multiply(self, x: Tensor, adapter: Tensor | None) -> Tensor:
        """Multiply rows [.., T, K] by the weights: [.., T, N].

        The last M rows are MASK rows, of the adapters `adapter` int64 [M]; they use `drafts`.
        """
        weights, scales, out, _ = self.panels
        ops, choice = torch.ops.idlm, self.choice
        x = x if x.stride(-1) == 1 else x.contiguous()  # the kernels need dense rows
        y: Tensor
        if adapter is None or self.drafts is None:
            y = ops.linear(x, self.weight, weights, scales, out, choice)
        else:
            codes = self.drafts
            y = ops.split_linear(x, self.weight, weights, scales, *codes, adapter, out, choice)
        return y


class Linears:
    """The linear layers of a model that the kernels compute.

    Args:
        groups: the weights of each group of layers with the same input.
        format: "float32", "bfloat16" or "int8".
    """

    def __init__(self, groups: Iterable[Group], format: str) -> None:
        self.format = format
        self.layers: list[Layer] = []
        self._by_weight: dict[int, Layer] = {}
        self._adapter: Tensor | None = None
        # results of a group's other layers: the input, and the outputs by id of the weight
        self._kept: tuple[Tensor | None, dict[int, Tensor]] = None, {}
        self.add(groups)

    @property
    def drafts(self) -> bool:
        """Whether MASK rows have separate weights."""
        return any(layer.drafts is not None for layer in self.layers)

    def add(self, groups: Iterable[Group]) -> None:
        """Compute further layers too, such as those of adapters."""
        groups = list(groups)
        for group, panels in zip(groups, _shared(groups, self.format), strict=True):
            no_weight, widths = panels.scales.new_empty(0), [len(weight) for weight in group]
            layer = Layer(no_weight, panels, group=group, widths=widths)
            self.layers.append(layer)
            self._by_weight |= {id(weight): layer for weight in group}

    def add_drafts(self, merged: Callable[[Tensor], Sequence[Tensor]]) -> None:
        """Give MASK rows int8 weights; `merged(weight)` is the weight of each adapter, merged; none
        if no MASK row is multiplied by it."""
        format = draft_format()
        weights = [[merged(weight) for weight in layer.group] for layer in self.layers]
        given = [(layer, each) for layer, each in zip(self.layers, weights, strict=True) if each[0]]
        built = [stacked(_by_adapter(each), format) for _, each in given]
        memory = in_huge_pages([codes for codes, _ in built])
        for (layer, _), codes, (_, scales) in zip(given, memory, built, strict=True):
            layer.drafts = codes, scales

    @contextmanager
    def use(self) -> Iterator[None]:
        """Run model code inside on the kernels."""
        try:
            with _Products(self):
                yield
        finally:
            self._kept = None, {}

    @contextmanager
    def drafting(self, adapter: Tensor) -> Iterator[None]:
        """Inside `use`: the last M rows are MASK rows of the adapters `adapter` int64 [M]."""
        self._adapter = adapter
        try:
            yield
        finally:
            self._adapter = None

    def take(self, layers: Iterable[nn.Linear]) -> None:
        """Free the weights of `layers`: the panels hold them. An empty parameter takes the place of
        each, so a product outside `use` fails."""
        for module in layers:
            if (layer := self._by_weight.pop(id(module.weight), None)) is not None:
                empty = nn.Parameter(module.weight.new_empty(0, 0), requires_grad=False)
                layer.group = [
                    empty if weight is module.weight else weight for weight in layer.group
                ]
                self._by_weight[id(empty)] = layer
                module.weight = empty

    def serves(self, weight: object) -> bool:
        """Whether `weight` is in a group here."""
        return id(weight) in self._by_weight

    def multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """`F.linear` for a weight that `serves` knows."""
        layer = self._by_weight[id(weight)]
        single = len(layer.group) == 1
        y = layer.multiply(x, self._adapter) if single else self._part(layer, x, weight)
        return y if bias is None else y + bias

    def _part(self, layer: Layer, x: Tensor, weight: Tensor) -> Tensor:
        """The output of one weight of a group. The first call of a group computes all outputs."""
        kept_x, outputs = self._kept
        if kept_x is not x or id(weight) not in outputs:
            parts = layer.multiply(x, self._adapter).split(layer.widths, dim=-1)
            outputs = dict(zip(map(id, layer.group), parts, strict=True))
            self._kept = x, outputs
        return outputs.pop(id(weight))


def _by_adapter(weights: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """A group's weight [N, K] for each adapter. `weights` has, for each layer of the group, a
    weight by adapter; a single one if no adapter changes the layer."""
    adapters = max(map(len, weights))
    return [
        torch.cat([merged[adapter % len(merged)] for merged in weights])
        for adapter in range(adapters)
    ]


class _Products(TorchFunctionMode):
    """Sends `F.linear` with known weights to the kernels, without a change to model code."""

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
    """Whether the kernels take `x`; PyTorch raises for rows of another type than the weights."""
    return x.dtype == torch.float32
