"""Random models of every family, in memory, small enough to recompute from scratch at each step.

They are float64 on the CPU; IDLM_TEST_DEVICE and IDLM_TEST_DTYPE say otherwise. Triton attends in
float32 and below.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from idlm.engine.engine import Engine
from idlm.engine.lookup import Lookup
from idlm.models import attention, experts
from idlm.models.gated_lora import LoraSpec, adapter_parameters, all_linear, attach, attach_more
from idlm.models.idlm_model import Idlm

CLASSES = {
    "llama": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True}),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": None}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"tie_word_embeddings": True}),
    "qwen3_moe": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig,
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ),
}
SLIDING: dict[str, dict[str, Any]] = {
    "mistral": {},
    "phi3": {},
    "starcoder2": {},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 1},
    "gemma2": {
        "final_logit_softcapping": None,
        "attn_logit_softcapping": 1.5,
        "query_pre_attn_scalar": 8,
    },
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"]},
    "cohere2": {
        "logit_scale": 1.0,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "olmo3": {"layer_types": ["full_attention", "sliding_attention"]},
    "exaone4": {"layer_types": ["sliding_attention", "full_attention"]},
    "gpt_oss": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
}
"""Families with sliding windows, soft caps and sinks, and more keys of their configs."""
SIZES = {
    "vocab_size": 24,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 48,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
VOCAB = 24
DEVICE = os.environ.get("IDLM_TEST_DEVICE", "cpu")
DTYPE: torch.dtype = getattr(torch, os.environ.get("IDLM_TEST_DTYPE", "float64"))
ROUNDING = 1e-10 if DTYPE.itemsize == 8 else 1e-4
"""Largest difference of two log-probabilities that are equal but for rounding."""


def tiny_model(family: str) -> PreTrainedModel:
    """A random model whose laws are neither flat nor sharp."""
    model_class, config_class, extra = CLASSES[family]
    config = config_class(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=48,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
        attn_implementation=attention.NAME,
        experts_implementation=experts.NAME,
        **extra,
    )
    torch.manual_seed(0)
    return model_class(config).to(DEVICE, DTYPE).eval()


def tiny_idlm(family: str, adapter: bool = True, entry: int = 0) -> Idlm:
    """The model with a random gated LoRA and a virtual MASK, or bare and without a MASK row. MASK
    rows enter at layer `entry` of two."""
    model = tiny_model(family)
    if not adapter:
        return Idlm(model, None, VOCAB, name=family)
    there = all_linear(model)  # experts have no linear layers
    targets = tuple(name for name in ("q_proj", "v_proj", "down_proj") if name in there)
    gate = attach(model, LoraSpec(4, 8.0, targets, entry=entry), VOCAB)
    for parameter in adapter_parameters(model).values():
        torch.nn.init.normal_(parameter, std=0.3)
    return Idlm(model, None, VOCAB, gate, block_size=3, name=family)


def sliding_idlm(family: str, window: int, entry: int = 0) -> Idlm:
    """A random model of `SLIDING` with a random gated LoRA on its attention."""
    config = AutoConfig.for_model(family, **SIZES, **SLIDING[family], sliding_window=window)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        config,
        attn_implementation=attention.NAME,
        experts_implementation=experts.NAME,
        dtype=DTYPE,
    )
    model = model.to(DEVICE).eval()
    for name, sinks in model.named_parameters():
        if name.endswith("sinks"):
            torch.nn.init.normal_(sinks)
    targets = ("qkv_proj", "o_proj") if family == "phi3" else ("q_proj", "v_proj", "o_proj")
    gate = attach(model, LoraSpec(4, 8.0, targets, entry=entry), VOCAB)
    for parameter in adapter_parameters(model).values():
        torch.nn.init.normal_(parameter, std=0.3)
    return Idlm(model, None, VOCAB, gate, block_size=7, name=f"{family} {window}")


def with_second_adapter(idlm: Idlm) -> Idlm:
    """Another random adapter beside the first: of another rank, on other modules."""
    assert idlm.gate is not None
    generator = torch.Generator().manual_seed(7)
    tensors = {}
    for layer in range(idlm.entry, 2):
        for name, shape in (("self_attn.k_proj", (32, 16)), ("mlp.down_proj", (48, 32))):
            module = f"model.layers.{layer}.{name}"
            tensors[module, "lora_A"] = (
                torch.randn(3, shape[0], generator=generator, dtype=torch.float64) * 0.3
            )
            tensors[module, "lora_B"] = (
                torch.randn(shape[1], 3, generator=generator, dtype=torch.float64) * 0.3
            )
    row = torch.randn(32, generator=generator, dtype=torch.float64) * 0.3
    spec = LoraSpec(3, 6.0, ("k_proj", "down_proj"), entry=idlm.entry)
    attach_more(idlm.model, idlm.gate, spec, tensors, row)
    return idlm


def with_lookups(engine: Engine) -> Engine:
    """The engine, with lookup drafts beside its one plan of MASK rows, as engines with a planner
    have them."""
    runner = engine.runner
    lookup = Lookup(runner.slots, engine.config.page_size)
    runner.lookup = runner.model_step.lookup = lookup
    return engine
