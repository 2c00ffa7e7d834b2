"""`replaced_forwards`: run model code with other implementations of some of its modules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn


@contextmanager
def replaced_forwards(
    replacements: Iterable[tuple[nn.Module, Callable[..., Tensor]]],
) -> Iterator[None]:
    """Inside, each module is called by its replacement; its weights and hooks stay. A module that
    got another forward meanwhile keeps that."""
    replaced = []
    for module, forward in replacements:
        module.__dict__["forward"] = forward  # `nn.Module` takes long to set an attribute
        replaced.append((module, forward))
    try:
        yield
    finally:
        for module, forward in replaced:
            if module.__dict__.get("forward") is forward:
                del module.__dict__["forward"]
