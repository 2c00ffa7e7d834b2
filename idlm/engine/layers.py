"""`Layers`: a model's layers in ten launches each on a GPU, and two more for each product of an
adapter.

    1 norm (or sum and norm)    2 q, k, v    3 norms of heads, rotary embedding, write to the pages
    4 attention, 5 its join     6 o          7 sum and norm   8 gate, up   9 SwiGLU   10 down

Only models whose layers are of the usual kind (`idlm.models.standard`) get it, and only if the
kernels give on this device what PyTorch gives. The log says so. The last sum of a layer is in the
first launch of the next one.

Shapes: T rows, D hidden size, N outputs of layers together.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from idlm.attention.triton import Products
from idlm.engine.kv_cache import KVCache
from idlm.engine.low_rank import stacked
from idlm.kernels.forwards import replaced_forwards
from idlm.kernels.gpu import current, use_triton
from idlm.kernels.layer_kernels import ops_for, try_layer_ops
from idlm.kernels.layer_ops import Heads, Turn, Update
from idlm.kernels.merged import Merged
from idlm.kernels.norms import epsilon_of
from idlm.models.gated_lora import GatedLinear
from idlm.models.idlm_model import Idlm
from idlm.models.routes import running_cache
from idlm.models.standard import NotStandard, StandardLayer, standard_layers

log = logging.getLogger("idlm")


class Layers:
    """Computes the `layers` of a model. `last` is the norm behind them, if there is one.

    `merged` has the products of layers with the same input.
    """

    def __init__(
        self, idlm: Idlm, layers: Sequence[StandardLayer], merged: Merged, last: nn.Module | None
    ) -> None:
        self.idlm, self.layers, self.last = idlm, layers, last
        self._ops = ops_for(layers[0].module.input_layernorm.weight)
        self.groups = {id(each): group for group in merged.groups for each in group.layers}
        modules = [layer.module for layer in layers]
        self._norms: list[Any] = [module.input_layernorm for module in modules] + [last]
        self._heads = [_heads(layer) for layer in layers]
        self._ahead: tuple[Tensor, Tensor] | None = None  # hidden states, and their next norm
        self._updates: dict[int, tuple[tuple[int, ...], Update]] = {}

    @contextmanager
    def use(self) -> Iterator[None]:
        """Run model code inside with these layers; without them where MASK rows enter late."""
        if self.idlm.entry:
            yield
            return
        forwards: list[tuple[nn.Module, Any]] = [
            (layer.module, partial(self._layer, number)) for number, layer in enumerate(self.layers)
        ]
        if self.last is not None:
            forwards.append((self.last, partial(self._last, self.last.forward)))
        try:
            with replaced_forwards(forwards):
                yield
        finally:
            self._ahead = None

    def _layer(self, number: int, hidden_states: Tensor, **options: Any) -> Tensor:
        """A layer's forward, [1, T, D] -> [1, T, D]; its class's own without an engine's cache."""
        layer, cache = self.layers[number], running_cache()
        if not isinstance(cache, KVCache) or self.idlm.entry:
            own: Tensor = type(layer.module).forward(layer.module, hidden_states, **options)
            return own
        qkv, out, inner, down = layer.products
        before = hidden_states[0]
        cosine, sine = options["position_embeddings"]
        rows = self._product(qkv, self._normed(number, hidden_states))
        products = Products(rows, Turn(cosine[0], sine[0]), self._heads[number])
        mixed = cache.attend_products(number, products, layer.scores).flatten(1)
        norm = layer.module.post_attention_layernorm
        between, normed = self._ops.add_norm(
            before, self._product(out, mixed), norm.weight, epsilon_of(norm)
        )
        made = self._product(down, self._ops.swiglu(self._product(inner, normed)))
        following = self._norms[number + 1]
        if following is None:
            return (between + made)[None]
        hidden, ahead = self._ops.add_norm(between, made, following.weight, epsilon_of(following))
        hidden = hidden[None]
        self._ahead = hidden, ahead
        return hidden

    def _normed(self, number: int, hidden: Tensor) -> Tensor:
        """The norm [T, D] of the hidden states [1, T, D] that a layer is given."""
        if self._ahead is not None and self._ahead[0] is hidden:
            return self._ahead[1]
        norm = self._norms[number]
        return self._ops.norm(hidden[0], norm.weight, epsilon_of(norm))

    def _last(self, forward: Any, hidden: Tensor) -> Tensor:
        if self._ahead is not None and self._ahead[0] is hidden:
            return self._ahead[1][None]
        result: Tensor = forward(hidden)
        return result

    def _product(self, layers: Sequence[nn.Module], x: Tensor) -> Tensor:
        """The outputs [T, N] of layers with the input x [T, .], with the adapters' updates."""
        bases: list[Any] = [each.base if isinstance(each, GatedLinear) else each for each in layers]
        whole = self.groups.get(id(bases[0]), bases[0])
        y = F.linear(x, whole.weight, whole.bias)
        gate = self.idlm.gate
        if gate is None or gate.shut or all(map(_is_base, layers)):
            return y
        assert gate.adapter is not None  # noqa: S101
        update = self._update(layers, gate.adapters)
        self._ops.update(y[gate.rows], F.linear(x[gate.rows], update.a), update, gate.adapter)
        return y

    def _update(self, layers: Sequence[nn.Module], adapters: int) -> Update:
        """The stacked updates of these layers; made anew when adapters have come or gone."""
        key = id(getattr(layers[0], "base", layers[0]))
        kept = self._updates.get(key)
        if kept is None or kept[0] != _made_of(layers, adapters):
            update = stacked(layers, adapters)
            kept = self._updates[key] = _made_of(layers, adapters), update
        return kept[1]


def _made_of(layers: Sequence[nn.Module], adapters: int) -> tuple[int, ...]:
    """What changes when an adapter comes or goes."""
    gated = (each for each in layers if isinstance(each, GatedLinear))
    return adapters, *(part for each in gated for part in each.parts())


def _is_base(layer: nn.Module) -> bool:
    return not isinstance(layer, GatedLinear)


def _heads(layer: StandardLayer) -> Heads:
    attention = layer.module.self_attn
    queries, groups, _ = layer.heads
    if not hasattr(attention, "q_norm"):
        return Heads(queries, groups)
    norms = attention.q_norm, attention.k_norm
    return Heads(queries, groups, norms[0].weight, norms[1].weight, epsilon_of(norms[0]))


def layers_for(idlm: Idlm, merged: Merged, norms: Sequence[nn.Module]) -> Layers | None:
    """The layers of a model on a GPU by few kernels; None, and a line in the log, if they are not
    of the usual kind or the kernels fail on this device. `norms` are the model's plain RMS norms.
    """
    if not use_triton(next(iter(idlm.model.parameters()))):
        return None
    try:
        layers = standard_layers(idlm, norms)
        _check_groups(layers, merged)
        like = torch.empty(0, dtype=idlm.dtype, device=idlm.device)
        with current(idlm.device):
            try_layer_ops(like, layers[0].heads, idlm.model.config.hidden_size)
    except NotStandard as reason:
        log.info("layers run operation by operation: %s", reason)
        return None
    except Exception as error:  # whatever a compiler or a driver raises
        log.warning("layers run operation by operation, since a kernel failed: %s", error)
        return None
    log.info("layers run in ten launches each")
    last = getattr(idlm.model.base_model, "norm", None)
    return Layers(idlm, layers, merged, last if any(last is norm for norm in norms) else None)


def _check_groups(layers: Sequence[StandardLayer], merged: Merged) -> None:
    """Whether q, k and v, and gate and up, are merged in this order."""
    groups = [[id(each) for each in group.layers] for group in merged.groups]
    for layer in layers:
        for modules in layer.products[::2]:
            bases = [id(getattr(each, "base", each)) for each in modules]
            if bases not in groups:
                raise NotStandard("its products are not merged")
