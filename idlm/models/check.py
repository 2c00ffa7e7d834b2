"""`check_architecture`: whether a model can be expressed here, found by running it."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from idlm.decoding.scores import Scores
from idlm.errors import InputError
from idlm.models import experts
from idlm.models.architecture import layer_windows
from idlm.models.attention import Visible, attend
from idlm.models.idlm_model import Idlm
from idlm.models.quiet import quiet
from idlm.models.rope import fix
from idlm.models.routes import NO_ROUTE, has_route, route_methods, unknown_options
from idlm.models.sources import first_line
from idlm.models.transposed import straighten

PROBE_POSITIONS = (0, 1, 2, 1)
PROBE_VISIBLE = ((1, 0, 0, 0), (1, 1, 0, 0), (1, 1, 1, 0), (1, 0, 0, 1))
"""Four rows of two texts that share row 0: rows 0, 1, 2 and rows 0, 3."""

PROBE_TOLERANCE = {
    torch.float64: 1e-5,
    torch.float32: 1e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 6e-2,
}
"""The relative difference of logits (2-norm) that rounding explains. Eager attention computes the
softmax in float32, even of a float64 model."""


def prepare(model: PreTrainedModel) -> None:
    """Make a model of transformers ready for `Idlm`, in place."""
    route_methods(model)
    fix(model)
    straighten(model)


class _Probe:
    """A cache that stores nothing and records the layers that call it, their shapes and windows."""

    def __init__(self, visible: Visible) -> None:
        self.visible = visible
        self.layers: list[int] = []
        self.windows: list[int | None] = []
        self.shapes: set[tuple[int, int, int]] = set()

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scores: Scores
    ) -> Tensor:
        self.layers.append(layer)
        self.windows.append(scores.window)
        self.shapes.add((query.shape[1], key.shape[1], key.shape[3]))
        return attend(query, key, value, self.visible.within(scores.window), scores)


def check_architecture(idlm: Idlm) -> None:
    """Run four rows through transformers' attention and through ours, and compare the logits.

    This detects features that configs do not name uniformly: ALiBi, attention sinks, layers that
    ignore what their rows may see or share keys.

    Raises:
        InputError: the logits differ, a layer does not write its keys exactly once and in order, or
            the model fails; the message names the model and the reason.
    """
    step = max(1, idlm.vocab_size // 5)
    tokens = torch.tensor([k * step % idlm.vocab_size for k in range(1, 5)], device=idlm.device)
    positions = torch.tensor(PROBE_POSITIONS, device=idlm.device)
    visible = torch.tensor(PROBE_VISIBLE, dtype=torch.bool, device=idlm.device)
    cache = _Probe(Visible(visible[None, None], positions[None], positions[None]))
    what = f"{idlm.name!r}: the architecture {type(idlm.model).__name__} cannot be expressed"
    if not has_route(idlm.model.config):
        raise InputError(f"{what}: {NO_ROUTE}")
    try:
        doing = "transformers itself fails to run it"
        stock = _stock_logits(idlm.model, tokens).double()
        doing = "it fails with rows of several texts"
        with unknown_options() as unknown:
            ours = _our_logits(idlm, tokens, positions, cache).double()
    except Exception as error:  # a model's forward may raise anything
        raise InputError(f"{what}: {doing} ({_kind(error)}); use another model") from error
    _check_finite(idlm, stock)
    difference, size = float((ours - stock).norm()), float(stock.norm())
    wrong = _options(unknown) or _layers(idlm, cache)
    if wrong is None and not difference <= PROBE_TOLERANCE[idlm.dtype] * size:  # also if NaN
        wrong = f"its logits differ from transformers' own by {difference:.2g} of {size:.2g}"
    if wrong is not None:
        raise InputError(f"{what}: {wrong}; use another model")


def _check_finite(idlm: Idlm, logits: Tensor) -> None:
    """Say which weight is NaN or infinite, if one made the logits so."""
    if bool(logits.isfinite().all()):
        return
    for name, weight in idlm.model.named_parameters():
        if not bool(weight.isfinite().all()):
            raise InputError(
                f"{idlm.name!r}: the weight {name} holds NaN or infinity; download it again, "
                "or use a checkpoint from before"
            )


def _kind(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


def _options(unknown: dict[str, object]) -> str | None:
    """What is wrong with the options of its attention."""
    for name, value in unknown.items():
        shown = f"of shape {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
        return f"its attention has the option {name} {shown}, which is not supported"
    return None


def _layers(idlm: Idlm, cache: _Probe) -> str | None:
    """What is wrong with the layers' calls of the cache."""
    if cache.layers != list(range(idlm.model.config.num_hidden_layers)):
        return f"its layers write keys in the order {cache.layers}"
    # they are longer than the probe, so each layer has to say what its config gives it
    if cache.windows != (wanted := layer_windows(idlm.model.config)):
        return f"its sliding windows are {cache.windows}, not {wanted}"
    if len(cache.shapes) > 1:
        shapes = sorted(cache.shapes)
        return f"its layers differ in heads, key/value heads or head size: {shapes}"
    return None


@torch.inference_mode()
def _our_logits(idlm: Idlm, tokens: Tensor, positions: Tensor, cache: _Probe) -> Tensor:
    """Logits [4, V] of the probe's rows, in a single forward."""
    return idlm.head(idlm.hidden(tokens[None], positions[None], None, cache=cache))[0]


@torch.inference_mode()
def _stock_logits(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Logits [4, V] of the probe's rows by transformers' eager attention and experts, a forward per
    text."""
    implementation = model.config._attn_implementation
    with quiet():  # Falcon warns that it keeps its own
        model.set_attn_implementation("eager")
        model.set_experts_implementation("eager")
        try:
            rows_0_to_2 = model(input_ids=tokens[None, :3], use_cache=False).logits[0]
            row_3 = model(input_ids=tokens[None, [0, 3]], use_cache=False).logits[0, 1:]
        finally:
            model.set_attn_implementation(implementation)
            model.set_experts_implementation(experts.NAME)
    return torch.cat([rows_0_to_2, row_3])


@torch.inference_mode()
def check_adapter(idlm: Idlm, index: int | None = None) -> None:
    """Run four rows with an adapter's gate open for two of them, and once with it shut.

    `index` is that of the adapter; None: the last.

    Raises:
        InputError: the model fails, the adapter changes the rows before its gate, or those in it
            are not finite.
    """
    gate, shut, open_ = idlm.gate, slice(0, 0), slice(2, 4)
    assert gate is not None  # noqa: S101
    last = gate.adapters - 1 if index is None else index
    gate.adapter = torch.full((2,), last, device=idlm.device)
    tokens = torch.tensor([[1, 0, idlm.mask_id, idlm.mask_id]], device=idlm.device)
    positions = torch.arange(4, device=idlm.device)[None]
    visible = torch.ones(4, 4, dtype=torch.bool, device=idlm.device).tril()
    what = f"{idlm.name!r}: the adapter does not fit"
    try:
        base, ours = (
            idlm.hidden(tokens[:, :end], positions[:, :end], visible[:end, :end][None, None], rows)
            for end, rows in ((2, shut), (4, open_))
        )
    except Exception as error:  # a model's forward may raise anything
        raise InputError(
            f"{what} ({_kind(error)}); train it with fewer targets, such as the attention's"
        ) from error
    finally:
        gate.adapter = None
    base, before, masks = base.double(), ours[:, :2].double(), ours[:, 2:]
    if not float((before - base).norm()) <= PROBE_TOLERANCE[idlm.dtype] * float(base.norm()):
        raise InputError(
            f"{what}: it changes rows that are not MASK; "
            "train it with fewer targets, such as the attention's"
        )
    if not bool(masks.isfinite().all()):
        raise InputError(f"{what}: its MASK rows are not finite; train it again")
