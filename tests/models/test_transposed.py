"""GPT-2, whose checkpoints have weights as [in, out]: there and back, and with peft's adapters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

import idlm
from idlm.models import weights
from idlm.models.gated_lora import LoraSpec, attach
from idlm.models.loading import save_full
from tests.models import tiny


@pytest.fixture
def gpt2(tmp_path: Path) -> Path:
    return tiny.write(tmp_path / "gpt2", "gpt2", mask_token_id=3)


def test_every_layer_is_linear_and_computes_the_same(gpt2: Path) -> None:
    model, tokens = idlm.load(gpt2, dtype="float64"), torch.tensor([5, 7, 9, 30])
    assert len(model.linear_layers()) == 2 * 4
    assert all(isinstance(layer, nn.Linear) for _, layer in model.linear_layers())
    stock = AutoModelForCausalLM.from_pretrained(gpt2, dtype=torch.float64)
    ours = model.forward(tokens, torch.arange(4), torch.ones(4, 4, dtype=torch.bool).tril())
    torch.testing.assert_close(ours, stock(tokens[None]).logits[0].detach())


def test_a_saved_model_has_the_tensors_it_was_loaded_from(gpt2: Path, tmp_path: Path) -> None:
    model = idlm.load(gpt2, dtype="float32")
    save_full(model, tmp_path / "full", block_size=3)
    stored, saved = (load_file(f / "model.safetensors") for f in (gpt2, tmp_path / "full"))
    assert stored.keys() == saved.keys()
    assert all(torch.equal(stored[name], saved[name]) for name in stored)
    assert idlm.load(tmp_path / "full").block_size == 3


def test_fingerprint_in_memory_is_the_one_on_disk(gpt2: Path) -> None:
    model = idlm.load(gpt2, dtype="float32").model
    model.name_or_path = ""
    attach(model, LoraSpec(2, 4.0, ("c_attn",)), 3)
    assert weights.fingerprint(model) == weights.folder_fingerprint(gpt2)


def test_an_adapter_of_peft_does_to_mask_rows_what_peft_does(gpt2: Path, tmp_path: Path) -> None:
    targets = ["c_attn", "c_proj", "c_fc"]
    folder = tiny.write_peft(gpt2, tmp_path / "lora", target_modules=targets, fan_in_fan_out=True)
    model = idlm.load(gpt2, adapter=folder, dtype="float64")
    stock = AutoModelForCausalLM.from_pretrained(gpt2, dtype=torch.float64)
    masks = torch.full((4,), 3)
    ours = model.forward(masks, torch.arange(4), torch.ones(4, 4, dtype=torch.bool).tril())
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(stock, folder)(masks[None]).logits[0]
    torch.testing.assert_close(ours, theirs)
