"""Random models of given shapes, for costs that do not depend on the weights."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from idlm.models import attention
from idlm.models.idlm_model import Idlm

SHAPES: dict[str, dict[str, Any]] = {
    "narrow": {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 640,
    },
    "0.1B": {
        "hidden_size": 640,
        "intermediate_size": 1792,
        "num_hidden_layers": 16,
        "num_attention_heads": 10,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": 32_000,
    },
    "0.6B": {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151_936,
    },
    "8B": {
        "hidden_size": 4096,
        "intermediate_size": 12_288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151_936,
    },
}
"""nano's layers, heads and vocabulary with next to no weights; about 0.1 B parameters; and the
shapes of Qwen3-0.6B and Qwen3-8B."""


def random_model(shape: str, dtype: torch.dtype, device: str = "cpu", context: int = 2048) -> Idlm:
    """A Qwen3 of a shape, made on the device; its MASK is the last row of the embedding.

    The weights are small and random, so its drafts are hardly ever accepted.
    """
    sizes = SHAPES[shape]
    extra: dict[str, Any] = {"attn_implementation": attention.NAME, "dtype": dtype}
    config = Qwen3Config(
        **sizes,
        max_position_embeddings=context,
        tie_word_embeddings=shape != "8B",
        bos_token_id=None,
        eos_token_id=0,
        **extra,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = Qwen3ForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return Idlm(
        model.eval().requires_grad_(False), None, sizes["vocab_size"] - 1, name=f"random {shape}"
    )
