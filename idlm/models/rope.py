"""Rotary embeddings whose frequencies change with the length of a forward.

They would change with the drafts. Up to a length they are fixed, so a context of that length makes
them exact: `longrope` has its short factors up to the original length, `dynamic` is plain up to
`max_position_embeddings`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

MOVING = ("dynamic", "longrope")


def fixed_until(config: PreTrainedConfig) -> tuple[str, int] | None:
    """The rope_type of a moving rotary embedding, and the most tokens for which it is fixed; None
    if there is none."""
    for parameters in _parameters(config):
        kind = parameters.get("rope_type")
        if kind == "longrope":
            return kind, int(parameters["original_max_position_embeddings"])
        if kind == "dynamic":
            return kind, int(config.max_position_embeddings)
    return None


def _parameters(config: PreTrainedConfig) -> Iterator[dict[str, Any]]:
    """The rotary parameters, of each kind of layer if they differ."""
    found = getattr(config, "rope_parameters", None) or {}
    yield from [found, *(value for value in found.values() if isinstance(value, dict))]


def fix(model: PreTrainedModel) -> None:
    """Let no forward change the frequencies, in place: a recording could not follow it."""
    module: Any
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        if isinstance(kinds, dict):
            module.rope_type = {layers: _still(kind) for layers, kind in kinds.items()}
        elif kinds is not None:
            module.rope_type = _still(kinds)


def _still(kind: Any) -> Any:
    return "default" if kind in MOVING else kind
