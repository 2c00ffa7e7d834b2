"""A GPU multiplies float32 as float32, and the laws of a prompt come in parts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from idlm import SamplingParams
from idlm.config import EngineConfig
from idlm.engine import logprobs
from idlm.engine.build import build_engine
from idlm.engine.products import multiply_in_float32
from idlm.models.idlm_model import Idlm
from tests.engine.tiny import tiny_idlm

PROMPT = [3, 9, 4, 20, 11, 5, 6, 7, 3, 21, 8]


def test_an_engine_on_a_gpu_sets_the_precision() -> None:
    products = torch.backends.cuda.matmul
    before = products.allow_tf32
    try:
        products.allow_tf32 = True
        multiply_in_float32(torch.device("cpu"))
        assert products.allow_tf32
        multiply_in_float32(torch.device("cuda", 1))
        assert not products.allow_tf32
    finally:
        products.allow_tf32 = before


def test_prompt_logprobs_come_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    idlm, head, rows = tiny_idlm("llama", adapter=False), Idlm.head, list[int]()

    def noted(self: Idlm, hidden: Tensor) -> Tensor:
        rows.append(hidden.shape[-2])
        return head(self, hidden)

    def entries() -> list[dict[int, tuple[float, int]]]:
        engine = build_engine(idlm, EngineConfig(1, kv_memory="1MiB", record=False))
        params = SamplingParams(temperature=0.7, top_k=9, max_tokens=1, prompt_logprobs=2)
        engine.add(PROMPT, params, seed=0)
        results = [one.result for one in engine.run() if one.result is not None]
        found = results[0].prompt_logprobs
        assert found is not None
        return [
            {token: (one.logprob, one.rank) for token, one in (entry or {}).items()}
            for entry in found
        ]

    expected = entries()
    monkeypatch.setattr(logprobs, "PROMPT_ROWS", 3)
    monkeypatch.setattr(Idlm, "head", noted)
    found = entries()
    assert max(rows) <= 3 and sum(rows) >= len(PROMPT) - 1
    assert [list(entry) for entry in found] == [list(entry) for entry in expected]
    for one, other in zip(found, expected, strict=True):
        assert all(one[token] == pytest.approx(other[token], abs=1e-9) for token in one)
