"""Layers by few kernels give what the model's own layers give, and other layers are left alone."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from idlm import SamplingParams
from idlm.attention.triton import TritonAttention
from idlm.config import EngineConfig
from idlm.engine import build
from idlm.engine import layers as engine_layers
from idlm.engine.build import build_engine
from idlm.engine.engine import Engine
from idlm.engine.layers import layers_for
from idlm.engine.products import Products
from idlm.engine.request import Terms
from idlm.kernels import layer_kernels
from idlm.kernels.merged import Merged
from idlm.kernels.norms import rms_norms
from idlm.models import attention
from idlm.models.idlm_model import Idlm
from idlm.models.standard import NotStandard, standard_layers
from tests.engine.tiny import SIZES, tiny_idlm, with_second_adapter

pytest.importorskip("triton", reason="triton is not installed: layers run operation by operation")
PROMPTS = [[3, 4, 5, 6, 7, 8, 9], [11, 12], [20, 5, 20, 5, 20, 5, 20, 5, 20]]


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU taken for a GPU where kernels are chosen; Triton's interpreter runs them."""
    for module in (engine_layers, layer_kernels):
        monkeypatch.setattr(module, "use_triton", lambda like: True)
    # PyTorch's products, as on a GPU: those of a CPU would be measured, and draft in int8
    monkeypatch.setattr(build, "products_for", lambda *_: Products(None, frozenset()))


def in_float32(family: str, adapters: int) -> Idlm:
    idlm = tiny_idlm(family, adapter=adapters > 0)
    idlm.model.float()
    return with_second_adapter(idlm) if adapters > 1 else idlm


def engine_of(idlm: Idlm, stride: int) -> Engine:
    config = EngineConfig(stride, "all", max_num_seqs=3, kv_memory="1MiB", record=False)
    engine = build_engine(idlm, config)
    engine.runner.model_step.cache.backend = TritonAttention()
    return engine


def decoded(engine: Engine, adapters: int) -> tuple[list[list[int]], list[Tensor]]:
    """The tokens of some requests, and the hidden states of each forward."""
    states, step = [], engine.runner.model_step
    hidden = step._hidden

    def noted(*given: Any) -> Tensor:
        states.append(hidden(*given))
        return states[-1]

    step._hidden = noted  # type: ignore[method-assign]
    if adapters > 1:
        engine.adapters._numbers = {"first": 0, "second": 1}
    params = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)
    for number, prompt in enumerate(PROMPTS):
        adapter = None if adapters < 2 else ("first", "second")[number % 2]
        engine.add(prompt, params, number, Terms(adapter=adapter))
    results = {one.request_id: one.result for one in engine.run() if one.result is not None}
    return [results[name].token_ids for name in sorted(results)], states


@pytest.mark.parametrize(
    "family, adapters", [("qwen3", 0), ("qwen3", 1), ("qwen3", 2), ("llama", 2), ("qwen2", 1)]
)
def test_they_give_what_the_model_gives(family: str, adapters: int, on_gpu: None) -> None:
    """Tokens are equal, and hidden states but for rounding, of prefills and of windows."""
    idlm = in_float32(family, adapters)
    tokens, states = decoded(engine_of(idlm, 3 if adapters else 1), adapters)
    layers = layers_for(idlm, merged := Merged(idlm.same_input()), rms_norms(idlm.model))
    assert layers is not None
    calls, own = list[int](), layers._layer

    def noted(number: int, *given: Any, **options: Any) -> Tensor:
        calls.append(number)
        return own(number, *given, **options)

    layers._layer = noted  # type: ignore[method-assign]
    engine = engine_of(idlm, 3 if adapters else 1)
    engine.runner.model_step.products = Products(None, frozenset(), merged, None, layers)
    found, fused = decoded(engine, adapters)
    assert found == tokens and set(calls) == {0, 1}
    assert len(states) == len(fused)
    for one, other in zip(states, fused, strict=True):
        torch.testing.assert_close(other, one, atol=2e-4, rtol=2e-4)


def usual(idlm: Idlm) -> int:
    idlm.model.float()  # in float64 transformers' norms compute in float32
    return len(standard_layers(idlm, rms_norms(idlm.model)))


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_usual_layers_are_found(family: str) -> None:
    assert usual(tiny_idlm(family)) == 2


OTHERS: dict[str, dict[str, Any]] = {
    "gemma2": {},
    "gemma3_text": {},
    "phi3": {},
    "starcoder2": {},
    "olmo": {"clip_qkv": 8.0},
    "olmo2": {},
    "cohere": {},
    "granite": {"residual_multiplier": 0.5},
    "glm": {"partial_rotary_factor": 0.5},
    "stablelm": {},
    "exaone4": {},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "gpt2": {},
}


@pytest.mark.parametrize("family", OTHERS)
def test_other_layers_are_left_alone(family: str) -> None:
    sizes = SIZES | OTHERS[family]
    if family == "gpt2":
        sizes = {"vocab_size": 24, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 48}
    with pytest.raises(NotStandard):
        usual(random(family, sizes))


def random(family: str, sizes: dict[str, Any]) -> Idlm:
    config = AutoConfig.for_model(family, **sizes)
    options: Any = {"attn_implementation": attention.NAME, "dtype": torch.float32}
    model = AutoModelForCausalLM.from_config(config, **options).eval()
    return Idlm(model, None, 24)


def test_a_peculiar_layer_of_a_usual_family_is_found() -> None:
    with pytest.raises(NotStandard, match="SwiGLU"):
        usual(random("llama", SIZES | {"hidden_act": "gelu"}))
    idlm = tiny_idlm("llama")
    module: Any = idlm.model.get_submodule("model.layers.1.self_attn")
    module.forward = lambda *a, own=module.forward, **k: (2 * own(*a, **k)[0], None)
    with pytest.raises(NotStandard, match="attention's result"):
        usual(idlm)


def test_the_log_says_why_layers_are_left_alone(
    on_gpu: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "idlm")
    idlm = in_float32("qwen3_moe", 0)
    assert layers_for(idlm, Merged(idlm.same_input()), rms_norms(idlm.model)) is None
    assert "operation by operation: an MLP has" in caplog.text

    def broken(*_: object) -> None:
        raise RuntimeError("PTX is too new")

    monkeypatch.setattr(engine_layers, "try_layer_ops", broken)
    idlm = in_float32("llama", 0)
    assert layers_for(idlm, Merged(idlm.same_input()), rms_norms(idlm.model)) is None
    assert "since a kernel failed: PTX is too new" in caplog.text


def test_nothing_is_replaced_where_mask_rows_enter_late(on_gpu: None) -> None:
    idlm = in_float32("llama", 1)
    layers = layers_for(idlm, Merged(idlm.same_input()), rms_norms(idlm.model))
    assert layers is not None and idlm.gate is not None
    modules: list[nn.Module] = [layer.module for layer in layers.layers]
    with layers.use():
        assert all("forward" in module.__dict__ for module in modules)
    assert not any("forward" in module.__dict__ for module in modules)
    idlm.gate.entry = 1
    with layers.use():
        assert not any("forward" in module.__dict__ for module in modules)
