"""What all tests share: one thread each, and a random checkpoint on disk with the bundled model's
tokenizer."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from transformers import PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM

from idlm.models import adapter, attention
from idlm.models.gated_lora import LoraSpec, adapter_parameters, attach
from idlm.models.weights import folder_fingerprint
from idlm.nano.tokenizer import train_tokenizer

torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # a shell's background job ignores ctrl-C, and so would the programs that tests start
    signal.signal(signal.SIGINT, signal.default_int_handler)
# a busy machine is not a failure
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")
SPEC = LoraSpec(4, 8.0, ("q_proj", "v_proj", "down_proj"))


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer(vocab_size=400, problems=300)


@pytest.fixture(scope="session")
def checkpoint(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase
) -> Path:
    """A random Qwen3 in `base`, and a random gated LoRA for it in `lora`."""
    folder = tmp_path_factory.mktemp("checkpoint")
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=160,
        initializer_range=0.15,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        attn_implementation=attention.NAME,
    )
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config)
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    attach(model, SPEC, tokenizer.mask_token_id)
    for parameter in adapter_parameters(model).values():
        torch.nn.init.normal_(parameter, std=0.1)
    base = folder_fingerprint(folder / "base")
    adapter.save(model, SPEC, folder / "lora", base, tokenizer.mask_token_id, block_size=3)
    return folder
