"""Layers with the same input as one product."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from idlm.kernels.merged import Merged
from tests.engine.tiny import tiny_idlm


@pytest.mark.parametrize("biased", [False, True])
def test_a_group_is_one_product_and_takes_no_more_memory(
    biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = [nn.Linear(6, out, bias=biased, dtype=torch.float64) for out in (4, 2, 3)]
    x, other = (torch.randn(1, 5, 6, dtype=torch.float64) for _ in range(2))
    expected = [[layer(rows) for layer in layers] for rows in (x, other)]
    merged, products = Merged([layers]), []
    assert len({layer.weight.untyped_storage().data_ptr() for layer in layers}) == 1
    linear = F.linear
    monkeypatch.setattr(F, "linear", lambda *of: products.append(1) or linear(*of))
    with torch.no_grad(), merged.use():
        for rows, outputs in zip((x, other, x), [*expected, expected[0]], strict=True):
            for layer, output in zip(layers, outputs, strict=True):
                assert torch.allclose(layer(rows), output, atol=1e-12)
    assert len(products) == 3
    assert torch.allclose(layers[1](x), expected[0][1], atol=1e-12) and len(products) == 4
    assert not merged.groups[0].kept and merged.groups[0].given is None


def test_layers_that_do_not_fit_are_left() -> None:
    odd = [nn.Linear(2, 2), nn.Linear(2, 2, bias=False)]
    assert not Merged([odd, [nn.Linear(2, 2)], [nn.Linear(2, 2), nn.Linear(2, 2).double()]]).groups


@pytest.mark.parametrize("family", ["qwen3", "qwen2"])
def test_a_model_computes_the_same_and_its_weights_stay(family: str) -> None:
    idlm = tiny_idlm(family)
    tokens, before = torch.arange(3, 9)[None], [p.clone() for p in idlm.model.parameters()]
    causal = torch.ones(6, 6).tril().bool()
    with torch.no_grad():
        expected = idlm.hidden(tokens, torch.arange(6)[None], causal)
        merged = Merged(idlm.same_input())
        assert len(merged.groups) == 2 * idlm.model.config.num_hidden_layers
        with merged.use():
            assert torch.allclose(
                idlm.hidden(tokens, torch.arange(6)[None], causal), expected, atol=1e-12
            )
    assert all(map(torch.equal, before, idlm.model.parameters()))
