"""RMS norms by PyTorch's operator: those that it computes, and no others."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from idlm.kernels.norms import Norms, rms_norms


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_norms_are_found_and_computed_alike(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    plain, other = Qwen3RMSNorm(48, eps=1e-6).to(dtype), Gemma2RMSNorm(48).to(dtype)
    nn.init.normal_(plain.weight)
    found = rms_norms(nn.ModuleList([plain, other, nn.LayerNorm(48, dtype=dtype)]))
    assert found == [plain], "Gemma's adds 1 to the weight"
    x = torch.randn(2, 5, 48).to(dtype)
    expected = plain(x)
    with torch.no_grad(), Norms(found).use():
        fused = plain(x)
        assert "forward" in plain.__dict__ and fused.dtype == dtype
    step = 4 * torch.finfo(dtype).eps
    assert torch.allclose(fused, expected, rtol=step, atol=step)
    assert "forward" not in plain.__dict__
