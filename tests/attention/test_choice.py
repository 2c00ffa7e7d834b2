from __future__ import annotations

import pytest
import torch

from idlm.attention import cpu
from idlm.attention.choice import choose
from idlm.attention.cpu import CpuAttention
from idlm.attention.invariant import InvariantAttention, InvariantTritonAttention
from idlm.attention.torch import TorchAttention
from idlm.attention.triton import TritonAttention
from idlm.kernels import native
from idlm.kernels.gpu import use_triton
from tests.attention.oracle import DEVICE


def pages(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.zeros(2, 3, 4, 1, 32, dtype=dtype, device=device)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_triton_serves_where_there_is_a_gpu_and_a_type_it_has(dtype: torch.dtype) -> None:
    layer = pages(dtype, DEVICE)
    triton = layer.is_cuda and dtype != torch.float64 and use_triton(layer.float())
    assert isinstance(choose(layer, 2), TritonAttention) == triton
    assert isinstance(choose(layer, 2, deterministic=True), InvariantTritonAttention) == triton
    assert isinstance(choose(layer, 2, deterministic=True), InvariantAttention) != triton


@pytest.mark.parametrize("faster", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_on_a_cpu_the_faster_serves(
    faster: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "faster", lambda *calls: faster)
    chosen = choose(pages(dtype, torch.device("cpu")), 2)
    assert isinstance(chosen, CpuAttention if faster and native.loaded() else TorchAttention)


def test_the_log_says_what_was_timed(caplog: pytest.LogCaptureFixture) -> None:
    if not native.loaded():
        pytest.skip("no C compiler: nothing is timed")
    with caplog.at_level("INFO", "idlm"):
        chosen = choose(pages(torch.float32, torch.device("cpu")), 2)
    winner = "C" if isinstance(chosen, CpuAttention) else "torch"
    assert f"window attention 2x32: {winner}; C " in caplog.text
    caplog.clear()
    for other in (
        pages(torch.bfloat16, torch.device("cpu")),
        pages(torch.float16, torch.device("cpu")),
    ):
        assert isinstance(choose(other, 2), TorchAttention)
    assert "window attention" not in caplog.text
