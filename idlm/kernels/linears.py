"""`Linears`: the products of a model's linear layers by the C kernels, on a CPU, in float32.

Stock model code calls `F.linear`; while a step runs, the calls with a known weight go to the
kernels. Real rows multiply the layer's weights, in the format that the engine was given. MASK rows
only make claims, which verification checks: what they round costs acceptance and cannot change a
byte of the output. So where it is faster they multiply int8 weights with their adapter merged in,
which spares the adapter's two further products.

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
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from idlm.kernels.huge_pages import in_huge_pages
from idlm.kernels.panels import Panels, draft_format, stacked

ALWAYS = -1
"""A choice of panels for any number of rows; bit b stands for 2^(b-1) + 1 to 2^b rows."""

_made = WeakTensorKeyDictionary()
"""The panels of the weights that engines of this process use, by format, and the version of the
weights that they are of."""


def _shared(weights: Iterable[Tensor], format: str) -> list[Panels]:
    """Engines on one model share its panels; weights that were trained on get new ones."""
    weights = list(weights)
    fresh = [weight for weight in weights if _known(weight, format) is None]
    made = [Panels.of(weight, format) for weight in fresh]
    memory = in_huge_pages([one.weights for one in made])
    for weight, panels, place in zip(fresh, made, memory, strict=True):
        _made.setdefault(weight, {})[format] = (_version(weight), panels._replace(weights=place))
    return [_made[weight][format][1] for weight in weights]


def _known(weight: Tensor, format: str) -> Panels | None:
    version, panels = _made.get(weight, {}).get(format, (None, None))
    return panels if version == _version(weight) else None


def _version(weight: Tensor) -> int:
    """Grows with every change in place; tensors made in inference mode do not count them."""
    return -1 if weight.is_inference() else int(weight._version)


@dataclass
class Layer:
    """One linear layer.

    Attributes:
        weight: [N, K], as the model has it.
        panels: the same, or what stands for it.
        drafts: int8 panels for MASK rows and their scales, by adapter; None: as for all rows.
        choice: for which numbers of rows the panels are faster than PyTorch; see `ALWAYS`.
    """

    weight: Tensor
    panels: Panels
    drafts: tuple[Tensor, Tensor] | None = None
    choice: int = ALWAYS

    @property
    def shape(self) -> tuple[int, int]:
        """K and N."""
        return self.panels.inner, self.panels.out

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
        weights: of each layer, [N, K].
        format: "float32", "bfloat16" or "int8".
    """

    def __init__(self, weights: Iterable[Tensor], format: str) -> None:
        self.format = format
        self.layers: dict[int, Layer] = {}
        self._adapter: Tensor | None = None
        self.add(weights)

    @property
    def drafts(self) -> bool:
        """Whether MASK rows have weights of their own."""
        return any(layer.drafts is not None for layer in self.layers.values())

    def add(self, weights: Iterable[Tensor]) -> None:
        """Serve further weights, such as adapters'."""
        weights = list(weights)
        panels = _shared(weights, self.format)
        self.layers |= {id(w): Layer(w, one) for w, one in zip(weights, panels, strict=True)}

    def add_drafts(self, merged: Iterable[tuple[Tensor, Sequence[Tensor]]]) -> None:
        """Give MASK rows int8 weights: of each layer's weight, what each adapter makes of it."""
        format = draft_format()
        made = [(self.layers[id(weight)], *stacked(adapters, format)) for weight, adapters in merged]
        memory = in_huge_pages([codes for _, codes, _ in made])
        for (layer, _, scales), codes in zip(made, memory, strict=True):
            layer.drafts = codes, scales

    @contextmanager
    def use(self) -> Iterator[None]:
        """Run model code on the kernels."""
        with _Products(self):
            yield

    @contextmanager
    def drafting(self, adapter: Tensor) -> Iterator[None]:
        """Inside `use`: the last rows are MASK rows, and `adapter` int64 [M] says whose."""
        self._adapter = adapter
        try:
            yield
        finally:
            self._adapter = None

    def multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """`F.linear` of a known weight."""
        done = self.layers[id(weight)].multiply(x, self._adapter)
        return done if bias is None else done + bias


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
        if func is F.linear and len(args) > 1 and id(args[1]) in self.linears.layers and _is_served(args[0]):
            return self.linears.multiply(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _is_served(x: Tensor) -> bool:
    """Rows in another type are PyTorch's to refuse."""
    return x.dtype == torch.float32
