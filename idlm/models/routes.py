"""The ways from a model's layers to `idlm.models.attention`.

    interface   the layer asks transformers' `AttentionInterface` for a function
    _attn       the layer computes attention in its method `_attn` (GPT-J, CodeGen, GPT-Neo)
    SDPA        the layer calls PyTorch's function (Falcon)

What the rows of a forward see does not pass through the model, since many classes drop arguments
that they do not know. It is held here while the forward runs.

Shapes as in `idlm.models.attention`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from idlm.models.attention import NAME, Cache, Options, Visible, attention


@dataclass
class _Route:
    """What the rows of the forward that runs see, and its next layer that calls PyTorch's function;
    None if layers do not."""

    visible: Visible | None
    cache: Cache | None
    sdpa_layer: int | None = None


_route: ContextVar[_Route | None] = ContextVar("_route", default=None)
"""That of the forward that runs; None outside of `Idlm.hidden`."""

_unknown: ContextVar[dict[str, Any] | None] = ContextVar("_unknown", default=None)

NO_ROUTE = (
    "its class computes attention by itself, without transformers' attention interface; "
    "use another model"
)
UNDERSTOOD = frozenset(Options.__annotations__)
WITHOUT_MEANING = frozenset(
    ("position_ids", "position_embeddings", "cache_position", "past_key_values", "layer_past")
    + ("use_cache", "output_attentions", "output_hidden_states", "return_dict", "head_mask")
)
"""Arguments of an attention function that do not change what it computes for a causal model."""


def implementation(config: PreTrainedConfig) -> str:
    """The `attn_implementation` with which a model's attention can be routed."""
    family: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if hasattr(sys.modules[family.__module__], "ALL_ATTENTION_FUNCTIONS"):
        return NAME
    return "sdpa" if family._supports_sdpa else "eager"


def has_route(config: PreTrainedConfig) -> bool:
    """Whether the attention of a model can be routed."""
    family: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if implementation(config) != "eager":
        return True
    # OpenAI GPT's `_attn` takes transposed keys
    return config.model_type != "openai-gpt" and any(
        hasattr(layer, "_attn") for layer in vars(sys.modules[family.__module__]).values()
    )


def route_methods(model: PreTrainedModel) -> None:
    """Route the layers that compute attention in a method `_attn`, in place."""
    layers = [layer for layer in model.modules() if callable(getattr(layer, "_attn", None))]
    for index, layer in enumerate(layers):
        layer._attn = partial(_method, layer, index)  # type: ignore[assignment]


@contextmanager
def routed(model: PreTrainedModel, visible: Visible | None, cache: Cache | None) -> Iterator[None]:
    """Run a forward of `model` whose rows see what `visible` or `cache` of `attention` says."""
    first = 0 if model.config._attn_implementation == "sdpa" else None
    with _on(_Route(visible, cache, first)):
        yield


def running_cache() -> Cache | None:
    """The cache of the forward that runs; None if it has none, or outside of `routed`."""
    route = _route.get()
    return None if route is None else route.cache


def same_route() -> AbstractContextManager[None]:
    """The route of the running forward from its current layer on, for a later recomputation."""
    route = _route.get()
    return nullcontext() if route is None else _on(replace(route))


@contextmanager
def without_rows(rows: slice) -> Iterator[None]:
    """Inside `routed`: run a layer on the forward's rows but `rows`. A cache has to know it."""
    route = _route.get()
    if route is None or route.visible is None:
        yield
        return
    with _on(replace(route, visible=route.visible.without(rows))):
        yield


@contextmanager
def _on(route: _Route) -> Iterator[None]:
    token = _route.set(route)
    calls: AbstractContextManager[object] = nullcontext()
    if route.sdpa_layer is not None:
        calls = _CallsOfSdpa(route)
    try:
        with calls:
            yield
    finally:
        _route.reset(token)


def _interface(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """`attention` of a forward's rows; the function that is registered with transformers.

    Keys and values may differ in size (multi-head latent attention), which the cache and its
    kernels do not know: the smaller are padded with zeros.
    """
    if (found := _unknown.get()) is not None:
        _note(found, options)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    inner, outer = query.shape[-1], value.shape[-1]
    if inner != outer:
        size = max(inner, outer)
        query, key, value = (
            F.pad(rows, (0, size - rows.shape[-1])) for rows in (query, key, value)
        )
    options |= {"attention_mask": attention_mask, "scaling": scale}
    if (route := _route.get()) is not None:
        options |= {"visible": route.visible, "cache": route.cache}
    mixed, _ = attention(module, query, key, value, **options)
    return mixed[..., :outer] if inner > outer else mixed, None


def _method(
    layer: Any, index: int, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """`layer._attn`: [B, H, Q, E]. The class's own outside of `routed`."""
    if _route.get() is None:
        own: tuple[Tensor, Tensor | None] = type(layer)._attn(layer, query, key, value, mask)
        return own
    # GPT-Neo does not scale, and its local layers have a window
    scale = getattr(layer, "scale_attn", getattr(layer, "norm_factor", 1.0))
    local = getattr(layer, "attention_type", None) == "local"
    options = {"sliding_window": layer.config.window_size} if local else {}
    at = SimpleNamespace(layer_idx=index, config=getattr(layer, "config", None))
    mixed, _ = _interface(at, query, key, value, None, 1 / scale, **options)  # type: ignore[arg-type]
    return mixed.transpose(1, 2), None


class _CallsOfSdpa(TorchFunctionMode):
    """Routes the calls of PyTorch's attention function: one a layer, in their order."""

    def __init__(self, route: _Route) -> None:
        super().__init__()
        self._route = route

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        assert self._route.sdpa_layer is not None  # noqa: S101
        at = SimpleNamespace(layer_idx=self._route.sdpa_layer)
        self._route.sdpa_layer += 1
        query, key, value = args[:3]
        scale = (kwargs or {}).get("scale")
        mixed, _ = _interface(at, query, key, value, None, scale)  # type: ignore[arg-type]
        return mixed.transpose(1, 2)


@contextmanager
def unknown_options() -> Iterator[dict[str, Any]]:
    """Yields the options that a model gives our attention and that it does not understand.

    Some of them change the result too little for a comparison of logits.
    """
    found: dict[str, Any] = {}
    token = _unknown.set(found)
    try:
        yield found
    finally:
        _unknown.reset(token)


def _note(found: dict[str, Any], options: Mapping[str, Any]) -> None:
    for name, value in options.items():
        causal = name == "is_causal" and value
        if value is not None and not causal and name not in UNDERSTOOD | WITHOUT_MEANING:
            found[name] = value


AttentionInterface.register(NAME, _interface)
