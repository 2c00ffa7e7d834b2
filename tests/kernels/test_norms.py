from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from idlm.kernels import norms
from idlm.kernels.norms import norms as on_kernels
from tests.attention.oracle import DEVICE
from tests.engine.tiny import tiny_model

kernel = pytest.importorskip("idlm.kernels.rms_norm_triton", reason="triton is not installed")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 7), (3, 5, 128), (2, 3000), (0, 16)])
@torch.inference_mode()
def test_the_kernel_is_transformers_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    norm = Qwen3RMSNorm(shape[-1], 1e-5).to(DEVICE, dtype)
    nn.init.normal_(norm.weight)
    x = (5 * torch.randn(shape)).to(DEVICE, dtype)
    error = 2 * torch.finfo(dtype).eps
    found = kernel.rms_norm(x.mT.contiguous().mT, norm.weight, 1e-5)
    torch.testing.assert_close(found, norm(x), rtol=error, atol=error)


class Centred(Qwen3RMSNorm):
    """As Gemma's: the weight is what is added to 1."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states) * (1 + self.weight) / self.weight


@torch.inference_mode()
def test_plain_norms_run_on_the_kernel_and_only_within(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norms, "use_triton", lambda like: True)
    calls, rms_norm = [], kernel.rms_norm
    monkeypatch.setattr(
        kernel, "rms_norm", lambda x, weight, eps: calls.append(x) or rms_norm(x, weight, eps)
    )
    model = tiny_model("qwen3").float()
    model.strange = Centred(8).to(DEVICE)
    text = torch.tensor([[3, 4, 5]], device=DEVICE)
    swapped = on_kernels(model)
    calls.clear()
    seen = torch.ones(3, 3, device=DEVICE).tril() > 0
    stock = model(text, visible=seen).logits
    assert not calls
    with swapped():
        torch.testing.assert_close(model(text, visible=seen).logits, stock, rtol=1e-4, atol=1e-5)
        model.strange(torch.ones(8, device=DEVICE))
    assert len(calls) == 2 * 4 + 1  # two layers' norms, those of their queries and keys; the last
    assert torch.equal(model(text, visible=seen).logits, stock) and len(calls) == 9


def test_without_a_gpu_all_stays_as_it_is() -> None:
    assert on_kernels(tiny_model("qwen3").double()) is nullcontext
