"""Late entry: MASK rows begin at a layer L0, with a learned hidden state.

All MASK rows start from the same vector, so the lower layers have little to do for them. With late
entry those layers run on the other rows alone, and the MASK rows join them before layer L0. There
the adapter's MASK row is their hidden state, and its matrices are in the layers from L0 on.

The model's own loop over its layers stays as it is; each layer's `forward` gets the rows that it
shall have. So the layers must be a plain list: each has the hidden states of the one before, and
for the positions of its rows nothing but rotary embeddings.

Shapes: B batch, Q rows of a forward, M MASK rows, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from idlm.errors import InputError
from idlm.models.gate import Gate
from idlm.models.routes import without_rows

POSITIONS = ("position_ids", "position_embeddings")
"""Arguments of a layer that have a value for each row: [B, Q, ...], or several of this shape."""
IGNORED = ("attention_mask", "causal_mask", "cache_position")
"""Arguments of a layer that our attention does not use."""
PROBE = (2, 3)
"""B and Q of the forward that finds out what layers are given."""


def decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The list of the model's layers, and its name with a dot behind.

    Raises:
        InputError: there is none.
    """
    count = model.config.num_hidden_layers
    backbone: nn.Module = model.base_model
    for name, module in model.named_modules():
        inside = name.startswith(f"{model.base_model_prefix}.") or backbone is model
        if inside and isinstance(module, nn.ModuleList) and len(module) == count:
            return f"{name}.", module
    raise InputError(_refused(model, f"it has no list of its {count} layers"))


def below_entry(model: PreTrainedModel, entry: int) -> Callable[[str], bool]:
    """Whether a module, by its name, is no part of the layers from `entry` on; with entry 0 none
    is.

    Raises:
        InputError: the model has no such layer.
    """
    if not entry:
        return lambda name: False
    start, layers = decoder_layers(model)
    if not 0 < entry < len(layers):
        raise InputError(
            f"lora.entry {entry} is no layer of this model; give 0 to {len(layers) - 1}"
        )
    inside = tuple(f"{start}{index}." for index in range(entry, len(layers)))
    return lambda name: not name.startswith(inside)


def enter_late(model: PreTrainedModel, gate: Gate, entry: int) -> None:
    """Let MASK rows enter at layer `entry`, above 0, in place. After an error nothing is changed.

    Raises:
        InputError: its layers are no plain list.
    """
    _, layers = decoder_layers(model)
    _check(model, layers)
    gate.entry = entry
    for index, layer in enumerate(layers):
        layer.forward = partial(_run, layer.forward, index, gate)


def _run(
    forward: Callable[..., Tensor], index: int, gate: Gate, hidden: Tensor, **options: Any
) -> Tensor:
    """A layer's forward, [B, ., D] -> [B, ., D], on the rows that this layer has."""
    rows, entry = gate.rows, gate.entry
    if not entry or gate.shut or index > entry:
        return forward(hidden, **options)
    only_masks = rows.stop - rows.start == gate.shape[1]
    if index == entry:
        assert gate.entering is not None  # noqa: S101
        parts = [hidden[:, : rows.start], gate.entering, hidden[:, rows.start :]]
        return forward(gate.entering if only_masks else torch.cat(parts, dim=1), **options)
    if only_masks:
        return hidden
    options |= {name: _without(options[name], rows) for name in POSITIONS if name in options}
    with without_rows(rows):
        return forward(_without(hidden, rows) if index == 0 else hidden, **options)


def _without(values: Any, rows: slice) -> Any:
    """Values [B, Q, ...] of all rows but `rows`."""
    if isinstance(values, Tensor):
        before, after = values[:, : rows.start], values[:, rows.stop :]
        return torch.cat([before, after], dim=1) if after.shape[1] else before
    if isinstance(values, (tuple, list)):
        return type(values)(_without(each, rows) for each in values)
    return values


@torch.no_grad()
def _check(model: PreTrainedModel, layers: nn.ModuleList) -> None:
    """Run a few rows, and look at what each layer gets and gives."""
    wrong: list[str | None] = []
    last: list[Tensor] = []

    def seen(layer: nn.Module, given: tuple[Any, ...], options: dict[str, Any], out: Any) -> None:
        wrong.append(_arguments(given, options) or _chain(given[0], last, out))
        last[:] = [out]

    hooks = [layer.register_forward_hook(seen, with_kwargs=True) for layer in layers]
    try:
        tokens = torch.zeros(PROBE, dtype=torch.int64, device=model.device)
        model.base_model(input_ids=tokens, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    found = next((each for each in wrong if each), None)
    if found is None and len(wrong) != len(layers):
        found = f"it runs {len(wrong)} of its {len(layers)} layers"
    if found is not None:
        raise InputError(_refused(model, found))


def _arguments(given: tuple[Any, ...], options: dict[str, Any]) -> str | None:
    """What is wrong with a layer's arguments."""
    if len(given) != 1:
        return f"its layers have {len(given)} arguments without names, not the hidden states alone"
    if options.get("position_embeddings") is None:
        return "its layers have no rotary embeddings"
    for name, value in options.items():
        tensors = _tensors(value)
        if name in POSITIONS and any(each.shape[1] != PROBE[1] for each in tensors):
            return f"its layers have {name} of shape {list(tensors[0].shape)}"
        if tensors and name not in POSITIONS + IGNORED:
            return f"its layers have {name} beside the hidden states"
    return None


def _chain(hidden: Any, last: list[Tensor], out: Any) -> str | None:
    """What is wrong with a layer's hidden states and its output `out`; `last` is the output of the
    layer before."""
    if not isinstance(out, Tensor) or out.dim() != 3:
        return "its layers give more than hidden states"
    if last and last[0] is not hidden:
        return "it changes hidden states between its layers"
    return None


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    found = [_tensors(each) for each in value] if isinstance(value, (tuple, list)) else []
    return [tensor for each in found for tensor in each]


def _refused(model: PreTrainedModel, reason: str) -> str:
    kind = model.config.model_type
    return f"lora.entry above 0 is not supported for {kind}: {reason}; set lora.entry: 0"
