from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from idlm.kernels.batch_invariant import batch_invariant, linear
from tests.attention.oracle import DEVICE


@settings(max_examples=30)
@given(
    rows=st.integers(0, 40),
    shape=st.sampled_from([(192, 512), (33, 77), (512, 192), (8, 640)]),
    bias=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_linear_does_not_see_the_rows_beside(
    rows: int, shape: tuple[int, int], bias: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    weight, add = (
        torch.randn(shape[1], shape[0]).to(DEVICE),
        torch.randn(shape[1]).to(DEVICE) if bias else None,
    )
    x = torch.randn(rows, shape[0]).to(DEVICE)
    y = linear(x, weight, add)
    torch.testing.assert_close(y, F.linear(x, weight, add), atol=1e-3, rtol=1e-4)
    for row in range(rows):
        assert torch.equal(linear(x[row], weight, add), y[row])


def test_triton_linear_is_the_twin_and_does_not_see_the_rows_beside() -> None:
    pytest.importorskip(
        "triton", reason="triton is not installed: only the PyTorch twin can be tested"
    )
    from idlm.kernels.batch_invariant_triton import linear as triton_linear

    torch.manual_seed(0)
    x, weight, bias = (torch.randn(*shape).to(DEVICE) for shape in ((2, 19, 70), (90, 70), (90,)))
    y = triton_linear(x, weight, bias)
    torch.testing.assert_close(y, F.linear(x, weight, bias), atol=1e-4, rtol=1e-4)
    for row in (0, 15, 16, 18):
        assert torch.equal(triton_linear(x[1, row], weight, bias), y[1, row])
    assert triton_linear(x[:, :0], weight).shape == (2, 0, 90)


@pytest.mark.parametrize("size", [33, 512])
def test_activations_and_norms_do_not_see_the_rows_beside(size: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(70, size).to(DEVICE)
    functions = [
        F.silu,
        F.gelu,
        torch.tanh,
        torch.sigmoid,
        lambda x: x.mean(-1, keepdim=True),
        lambda x: x.softmax(-1),
    ]
    for function in [*functions, lambda x: F.layer_norm(x, (size,))]:
        with batch_invariant():
            y = function(x)
            for row in (0, 1, 35, 69):
                assert torch.equal(function(x[row : row + 1]), y[row : row + 1])
        torch.testing.assert_close(y, function(x))


def test_the_mode_ends_with_its_block() -> None:
    x, weight = torch.randn(3, 192), torch.randn(640, 192)
    plain = F.linear(x, weight)
    with batch_invariant():
        assert torch.equal(F.linear(x, weight), linear(x, weight))
    assert torch.equal(F.linear(x, weight), plain)


@pytest.mark.parametrize("keepdim", [True, False])
def test_other_reductions_are_left_alone(keepdim: bool) -> None:
    x = torch.randn(3, 4, 5)
    with batch_invariant():
        assert torch.equal(x.mean(0, keepdim), x.transpose(0, 2).transpose(0, 2).mean(0, keepdim))
        torch.testing.assert_close(x.mean(-1, keepdim), x.sum(-1, keepdim) / 5)
        torch.testing.assert_close(x.mean(), x.sum() / 60)
        torch.testing.assert_close(x.softmax(1).sum(1), torch.ones(3, 5))
