"""Finds models whose layers are of the usual kind, so that an engine can compute them by itself.

    x -> x + o(attention(q, k, v of norm(x))) -> y + down(silu(gate) * up) of norm(y)

with rotary embeddings over whole heads, and norms of the heads or none. Names say that a layer may
be of this kind, and a forward says that it is. In that forward the linear layers give random rows,
so that what the layer computes between them is compared.

Shapes: T rows, D hidden size, H query heads, G key/value heads, E head size, I inner size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from idlm.decoding.scores import Scores
from idlm.errors import InputError
from idlm.models.entry import decoder_layers
from idlm.models.gated_lora import GatedLinear
from idlm.models.idlm_model import Idlm
from idlm.models.routes import routed

LAYER = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
HEAD_NORMS = {"q_norm", "k_norm"}
MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}
SCALES = 0.01, 0.3, 1.0, 3.0, 100.0
"""Of the rows of the forward: a clamp would show in the large ones."""


@dataclass(frozen=True)
class StandardLayer:
    """A layer of the usual kind: its module, and the constants of its attention."""

    module: Any
    scores: Scores

    @property
    def products(self) -> tuple[list[nn.Module], ...]:
        """Its linear layers, with those of the same input together: q, k, v; o; gate, up; down.
        Adapters replace them, so they are looked up each time."""
        attention, mlp = self.module.self_attn, self.module.mlp
        return (
            [attention.q_proj, attention.k_proj, attention.v_proj],
            [attention.o_proj],
            [mlp.gate_proj, mlp.up_proj],
            [mlp.down_proj],
        )

    @property
    def heads(self) -> tuple[int, int, int]:
        """Query heads H, KV heads G and their size E."""
        attention = self.module.self_attn
        size = attention.head_dim
        return _outputs(attention.q_proj) // size, _outputs(attention.k_proj) // size, size


class NotStandard(Exception):
    """Why a model's layers are not of the usual kind."""


@torch.no_grad()
def standard_layers(idlm: Idlm, plain_norms: Sequence[nn.Module]) -> list[StandardLayer]:
    """All layers of the model; `plain_norms` are its RMS norms without a peculiarity.

    Raises:
        NotStandard: one of them is not of the usual kind.
    """
    try:
        _, layers = decoder_layers(idlm.model)
    except InputError as error:
        raise NotStandard(str(error)) from None
    plain = {id(norm) for norm in plain_norms}
    found = []
    for number, module in enumerate(layers):
        _check_names(module, plain)
        found.append(StandardLayer(module, _attention(idlm, module.self_attn, number)))
        _check_mlp(module.mlp, idlm)
        _check_layer(module, idlm)
    return found


def _check_names(layer: Any, plain: set[int]) -> None:
    names = _children(layer)
    _must(names == LAYER, f"a layer has {sorted(names)}")
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    names = _children(layer.self_attn)
    _must(names in (ATTENTION, ATTENTION | HEAD_NORMS), f"attention has {sorted(names)}")
    if names >= HEAD_NORMS:
        norms += [layer.self_attn.q_norm, layer.self_attn.k_norm]
        size = layer.self_attn.head_dim
        _must(all(len(norm.weight) == size for norm in norms[2:]), "norms of several heads at once")
        _must(len({_epsilon(norm) for norm in norms[2:]}) == 1, "norms of heads differ")
    _must(all(id(norm) in plain for norm in norms), "its norms are not plain RMS norms")
    names = _children(layer.mlp)
    _must(names == MLP, f"an MLP has {sorted(names)}")
    linear = [layer.self_attn.get_submodule(name) for name in ATTENTION]
    linear += [layer.mlp.get_submodule(name) for name in MLP - {"act_fn"}]
    _must(all(isinstance(each, (nn.Linear, GatedLinear)) for each in linear), "no linear layers")


def _children(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_children()}


def _must(holds: bool, why: str) -> None:
    if not holds:
        raise NotStandard(why)


class _Attended:
    """A cache that notes what a layer's attention is given."""

    def __init__(self) -> None:
        self.given: list[Tensor] = []
        self.layer, self.scores = -1, Scores(1.0)
        self.mixed = torch.empty(0)

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scores: Scores
    ) -> Tensor:
        self.layer, self.given, self.scores = layer, [query, key, value], scores
        self.mixed = query.transpose(1, 2).flip(-1).contiguous()
        return self.mixed


def _attention(idlm: Idlm, module: Any, number: int) -> Scores:
    """Check a layer's attention; returns the constants of its scores."""
    attended, size = _Attended(), module.head_dim
    x = _rows(idlm, _inputs(module.q_proj))
    rows = [_rows(idlm, _outputs(each)) for each in (module.q_proj, module.k_proj, module.v_proj)]
    mixed = _rows(idlm, _outputs(module.o_proj))
    turn = _rows(idlm, size), _rows(idlm, size)
    seen: list[Tensor] = []
    stubs = [
        (module.q_proj, _giving(rows[0], seen)),
        (module.k_proj, _giving(rows[1], seen)),
        (module.v_proj, _giving(rows[2], seen)),
        (module.o_proj, _giving(mixed, seen)),
    ]
    with _replaced(stubs), routed(idlm.model, None, attended):
        out = module(hidden_states=x, position_embeddings=turn, attention_mask=None)
    _must(isinstance(out, tuple) and out[0] is mixed and len(seen) == 4, "attention's result")
    _must(all(given is x for given in seen[:3]), "attention's products have different inputs")
    _must(attended.layer == number, "its layers are numbered otherwise")
    _must(_alike(seen[3], attended.mixed.flatten(2)), "attention changes what it mixes")
    norms = getattr(module, "q_norm", None), getattr(module, "k_norm", None), None
    for given, row, norm, place in zip(attended.given, rows, norms, range(3), strict=True):
        heads = row.view(*row.shape[:2], -1, size)
        heads = heads if norm is None else norm(heads)
        expected = (heads if place == 2 else _turned(heads, *turn)).transpose(1, 2)
        _must(_alike(given, expected), "another rotary embedding, or attention's own arithmetic")
    return attended.scores


def _turned(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Heads x [1, T, ., E] by the rotary embedding, as transformers writes it."""
    half = x.shape[-1] // 2
    crossed = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cosine[:, :, None] + crossed * sine[:, :, None]


def _check_mlp(mlp: Any, idlm: Idlm) -> None:
    x, inner = _rows(idlm, _inputs(mlp.gate_proj)), _outputs(mlp.gate_proj)
    gate, up, out = _rows(idlm, inner), _rows(idlm, inner), _rows(idlm, x.shape[-1])
    seen: list[Tensor] = []
    stubs = [
        (mlp.gate_proj, _giving(gate, seen)),
        (mlp.up_proj, _giving(up, seen)),
        (mlp.down_proj, _giving(out, seen)),
    ]
    with _replaced(stubs):
        found = mlp(x)
    _must(found is out and len(seen) == 3, "an MLP's result")
    _must(all(given is x for given in seen[:2]), "an MLP's products have different inputs")
    _must(_alike(seen[2], F.silu(gate) * up), "an MLP without SwiGLU")


def _check_layer(layer: Any, idlm: Idlm) -> None:
    size = _inputs(layer.self_attn.q_proj)
    x, mixed, made = (_rows(idlm, size) for _ in range(3))
    seen: list[Tensor] = []

    def attend(hidden_states: Tensor, **_: object) -> tuple[Tensor, None]:
        seen.append(hidden_states)
        return mixed, None

    with _replaced([(layer.self_attn, attend), (layer.mlp, _giving(made, seen))]):
        out = layer(x, attention_mask=None, position_embeddings=None)
    _must(isinstance(out, Tensor) and len(seen) == 2, "a layer's result")
    normed = layer.input_layernorm(x), layer.post_attention_layernorm(x + mixed)
    same = all(_alike(given, expected) for given, expected in zip(seen, normed, strict=True))
    _must(same and _alike(out, x + mixed + made), "a layer's sums or norms")


def _giving(result: Tensor, seen: list[Tensor]) -> Callable[..., Tensor]:
    """Stands in for a module: notes what it is given, and returns `result`."""

    def forward(x: Tensor) -> Tensor:
        seen.append(x)
        return result

    return forward


@contextmanager
def _replaced(stubs: Sequence[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    own = [module.__dict__.get("forward") for module, _ in stubs]
    for module, stub in stubs:
        module.__dict__["forward"] = stub
    try:
        yield
    finally:
        for (module, _), forward in zip(stubs, own, strict=True):
            del module.__dict__["forward"]
            if forward is not None:
                module.__dict__["forward"] = forward


def _rows(idlm: Idlm, size: int) -> Tensor:
    """Random rows [1, T, size] of different magnitudes."""
    generator = torch.Generator().manual_seed(size)
    rows = torch.randn(1, len(SCALES), size, generator=generator)
    rows = rows * torch.tensor(SCALES)[:, None]
    return rows.to(idlm.device, idlm.dtype)


def _alike(given: Tensor, expected: Tensor) -> bool:
    """Equal but for the rounding of a few operations."""
    step = 4 * torch.finfo(expected.dtype).eps
    return given.shape == expected.shape and torch.allclose(given, expected, rtol=step, atol=step)


def _epsilon(norm: Any) -> Any:
    return getattr(norm, "variance_epsilon", getattr(norm, "eps", None))


def _outputs(layer: Any) -> int:
    base = layer.base if isinstance(layer, GatedLinear) else layer
    return int(base.out_features)


def _inputs(layer: Any) -> int:
    base = layer.base if isinstance(layer, GatedLinear) else layer
    return int(base.in_features)
