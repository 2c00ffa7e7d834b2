from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from idlm.errors import InputError
from idlm.models import attention
from idlm.models.check import check_adapter
from idlm.models.gate import Gate
from idlm.models.gated_lora import GatedLinear, LoraSpec, LowRank, adapter_parameters, attach
from idlm.models.idlm_model import Idlm
from tests.models import tiny

SPEC = LoraSpec(
    4, 8.0, ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
)


def pair(family: str, dtype: torch.dtype = torch.float32) -> tuple[Idlm, Idlm]:
    """A base model, and a copy of it with a random adapter."""
    model = tiny.tiny_model(family).to(dtype)
    model.set_attn_implementation(attention.NAME)
    base, adapted = Idlm(model, None, tiny.VOCAB), Idlm(copy.deepcopy(model), None, tiny.VOCAB)
    adapted.gate = attach(adapted.model, SPEC, tiny.VOCAB)
    for parameter in adapter_parameters(adapted.model).values():
        nn.init.normal_(parameter, std=0.3)
    return base, adapted


def rows(model: Idlm, tokens: Tensor, visible: Tensor, mask_rows: slice) -> Tensor:
    with torch.inference_mode():
        return model.hidden(
            tokens[None], torch.arange(len(tokens))[None], visible[None, None], mask_rows
        )[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_rows_with_the_gate_shut_are_bit_equal_to_the_base(family: str, dtype: torch.dtype) -> None:
    base, adapted = pair(family, dtype)
    tokens = torch.tensor([5, 7, 9, 30, tiny.VOCAB, tiny.VOCAB, tiny.VOCAB])
    plain = tokens.masked_fill(tokens == tiny.VOCAB, 11)
    visible = torch.ones(7, 7, dtype=torch.bool).tril()
    theirs, ours = (
        rows(base, plain, visible, slice(0, 0)),
        rows(adapted, tokens, visible, slice(4, 7)),
    )
    assert torch.equal(ours[:4], theirs[:4])
    assert not torch.isclose(ours[4:], theirs[4:], rtol=0.1).all(dim=-1).any()


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_text_without_masks_is_bit_equal_to_the_base(family: str) -> None:
    base, adapted = pair(family)
    tokens, visible = torch.tensor([5, 7, 9, 30]), torch.ones(4, 4, dtype=torch.bool).tril()
    assert torch.equal(
        rows(adapted, tokens, visible, slice(0, 0)), rows(base, tokens, visible, slice(0, 0))
    )


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.tuples(*[st.integers(1, 6)] * 4),
    ends=st.tuples(st.integers(0, 6), st.integers(0, 6)),
    alpha=st.floats(0.25, 16.0),
    seed=st.integers(0, 2**20),
)
def test_gated_linear_is_its_formula(
    sizes: tuple[int, int, int, int], ends: tuple[int, int], alpha: float, seed: int
) -> None:
    """y = W x + b + g (alpha / r) B A x, row by row."""
    torch.manual_seed(seed)
    inputs, outputs, rank, count = sizes
    gate, base = Gate(), nn.Linear(inputs, outputs).double()
    layer = GatedLinear(base, LoraSpec(rank, alpha, ("x",)), gate)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(2, count, inputs, dtype=torch.float64)
    first, last = min(ends), max(ends)
    with torch.no_grad(), gate.open(slice(first, last)):
        y = layer(x)
    for b in range(2):
        for i in range(count):
            g = 1.0 if first <= i < last else 0.0
            expected = (
                base.weight @ x[b, i]
                + base.bias
                + g * alpha / rank * layer.lora_B @ layer.lora_A @ x[b, i]
            )
            torch.testing.assert_close(y[b, i], expected)


def test_flattened_rows_are_the_same_rows() -> None:
    """OPT's MLP sees [B Q, D]."""
    gate, x = Gate(), torch.randn(2, 5, 6, dtype=torch.float64)
    layer = GatedLinear(nn.Linear(6, 4).double(), LoraSpec(2, 4.0, ("x",)), gate)
    nn.init.normal_(layer.lora_B)
    with torch.no_grad(), gate.open(slice(1, 3), x.shape[:2]):
        expected = layer(x)
        assert not torch.equal(expected, layer.base(x))
        assert torch.equal(layer(x.flatten(0, 1)), expected.flatten(0, 1))
        with pytest.raises(RuntimeError):
            layer(x.flatten(0, 1)[:4])


def test_a_new_adapter_changes_nothing_but_the_mask_row() -> None:
    model = tiny.tiny_model("qwen3")
    base = Idlm(copy.deepcopy(model), None, tiny.VOCAB)
    base.model.set_attn_implementation(attention.NAME)
    model.set_attn_implementation(attention.NAME)
    fresh = Idlm(model, None, tiny.VOCAB, attach(model, SPEC, tiny.VOCAB))
    tokens, visible = torch.tensor([5, 7, 9]), torch.ones(3, 3, dtype=torch.bool).tril()
    torch.testing.assert_close(
        rows(fresh, tokens, visible, slice(1, 3)), rows(base, tokens, visible, slice(0, 0))
    )


class OfOther(nn.Module):
    """A layer that a model calls on something else than its rows."""

    def __init__(self, rows: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.rows, self.back = rows, back
        self.inner_proj = nn.Linear(32, 32).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.back(self.inner_proj(self.rows(x)))


@pytest.mark.parametrize(
    ("rows", "back", "message"),
    [
        (lambda x: x[0, ::2], lambda y: y.repeat(2, 1)[None], "the adapter does not fit .RuntimeE"),
        (
            lambda x: torch.stack([x, x, x, x], dim=1),
            lambda y: y.sum(dim=1),
            "the adapter does not fit: it changes rows that are not MASK",
        ),
    ],
    ids=["some rows", "rows in dimension 2"],
)
def test_an_adapter_on_a_layer_that_does_not_see_the_rows_is_refused(
    rows: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor], message: str
) -> None:
    _, adapted = pair("llama", torch.float64)
    check_adapter(adapted)
    base = Idlm(tiny.tiny_model("llama").double(), None, tiny.VOCAB, name="tiny")
    base.model.set_attn_implementation(attention.NAME)
    base.model.model.layers[1].mlp = OfOther(rows, back)
    base.gate = attach(base.model, LoraSpec(4, 8.0, ("inner_proj",)), tiny.VOCAB)
    for parameter in adapter_parameters(base.model).values():
        nn.init.normal_(parameter, std=0.3)
    with pytest.raises(InputError, match=message):
        check_adapter(base)


def test_gate_shuts_after_an_error() -> None:
    gate = Gate()
    with pytest.raises(RuntimeError), gate.open(slice(1, 3)):
        raise RuntimeError
    assert gate.rows == slice(0, 0)


def test_only_the_adapter_is_trained() -> None:
    _, adapted = pair("llama")
    trained = {name for name, p in adapted.model.named_parameters() if p.requires_grad}
    assert trained == set(adapter_parameters(adapted.model))
    assert len(trained) == 2 * 7 * 2 + 1


@pytest.mark.parametrize(
    ("spec", "mask_id", "message"),
    [
        ((0, 8.0, ("q_proj",)), 3, "rank 0"),
        ((4, 8.0, ()), 3, "targets are empty"),
        ((4, 8.0, ("qkv",)), 3, "'qkv' names no linear layer"),
        ((4, 8.0, ("q_proj",)), tiny.VOCAB + 1, "mask_token_id 41"),
        ((4, 8.0, ("q_proj",)), -1, "mask_token_id -1"),
    ],
)
def test_bad_specs_are_refused(
    spec: tuple[int, float, tuple[str, ...]], mask_id: int, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        attach(tiny.tiny_model("llama"), LoraSpec(*spec), mask_id)


def test_a_second_adapter_is_refused() -> None:
    _, adapted = pair("llama")
    with pytest.raises(InputError, match="has an adapter already"):
        attach(adapted.model, SPEC, tiny.VOCAB)


@pytest.mark.parametrize("adapters", [1, 3])
def test_the_way_of_few_launches_adds_the_same(
    adapters: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a GPU runs: the updates of all adapters by stacked matrices."""
    torch.manual_seed(0)
    gate = Gate()
    layer = GatedLinear(nn.Linear(6, 5, dtype=torch.float64), LoraSpec(2, 3.0, ("x",)), gate)
    nn.init.normal_(layer.lora_B)
    for number, rank in enumerate([3, 1][: adapters - 1], start=1):
        matrices = torch.randn(rank, 6).double(), torch.randn(5, rank).double()
        layer.more.append(LowRank(number, *matrices, 0.5 * number))
    gate.adapters, gate.adapter = adapters, torch.arange(4) % adapters
    x = torch.randn(1, 7, 6, dtype=torch.float64)
    with torch.no_grad(), gate.open(slice(3, 7), (1, 7)):
        expected, weights = layer(x), layer.merged()
        monkeypatch.setattr(GatedLinear, "_launches_few", lambda *_: True)
        assert torch.allclose(layer(x), expected, atol=1e-12)
        assert torch.equal(layer(x)[:, :3], expected[:, :3])
        assert torch.allclose(layer(x), expected, atol=1e-12), "and again, from the slices"
        assert all(map(torch.equal, layer.merged(), weights))
        if adapters > 1:  # another adapter in the same place
            matrices = torch.randn(4, 6).double(), torch.randn(5, 4).double()
            layer.more[0] = LowRank(1, *matrices, 2.0)
            few = layer(x)
            monkeypatch.undo()
            assert torch.allclose(few, layer(x), atol=1e-12) and not torch.equal(few, expected)
