"""`Norms`: RMS norms by PyTorch's fused operator, on a GPU, where a launch costs time.

Transformers writes an RMS norm as eight operations. `F.rms_norm` is a single kernel in PyTorch from
2.9 on. The weight is multiplied afterwards, so the result is rounded where transformers rounds it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from idlm.kernels.forwards import replaced_forwards


class Norms:
    """Computes the norms `modules`; see `rms_norms`."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.modules: list[Any] = list(modules)

    @contextmanager
    def use(self) -> Iterator[None]:
        """Run model code inside with fused norms."""
        norms = [(each, partial(_norm, each.weight, _epsilon(each))) for each in self.modules]
        with replaced_forwards(norms):
            yield


@torch.no_grad()
def rms_norms(model: nn.Module) -> list[nn.Module]:
    """The modules of the model that compute weight * x / rms(x). Their names say that they may, and
    a few rows that they do: some families add 1 to the weight, and in float64 transformers computes
    in float32."""
    return [
        module
        for module in model.modules()
        if type(module).__name__.endswith("RMSNorm") and _is_plain(module)
    ]


def _is_plain(module: Any) -> bool:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 1 or _epsilon(module) is None:
        return False
    rows = torch.randn(4, len(weight), generator=torch.Generator().manual_seed(0))
    rows = rows.to(weight)
    step = 4 * torch.finfo(weight.dtype).eps
    return torch.allclose(module(rows), _norm(weight, _epsilon(module), rows), rtol=step, atol=step)


def _norm(weight: Tensor, epsilon: float | None, x: Tensor) -> Tensor:
    return weight * F.rms_norm(x, (len(weight),), None, epsilon)


def epsilon_of(module: Any) -> float:
    """What a norm of `rms_norms` adds to the mean of the squares."""
    epsilon = _epsilon(module)
    assert epsilon is not None  # noqa: S101
    return epsilon


def _epsilon(module: Any) -> float | None:
    given = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return given if isinstance(given, float) else None
