"""A gated LoRA on every kind of linear layer: trained by default, decoded, given to peft."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from idlm import LLM, SamplingParams, load
from idlm.models.checkpoint import inspect_checkpoint
from idlm.models.gated_lora import all_linear
from idlm.models.idlm_model import Idlm
from idlm.training.run import train
from tests.training import tiny

SIZES: dict[str, Any] = tiny.KEYS | {"initializer_range": 0.5, "tie_word_embeddings": False}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
SWIGLU = {"gate_proj", "up_proj", "down_proj"}
FAMILIES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "llama": ({}, ATTENTION | SWIGLU),
    "gpt2": ({}, {"c_attn", "c_proj", "c_fc"}),
    "opt": (
        {"ffn_dim": 24, "word_embed_proj_dim": 16},
        {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"},
    ),
    "roc_bert": (  # its head has a "dense" too, its config no end token
        {"is_decoder": True, "shape_vocab_size": tiny.VOCAB, "pronunciation_vocab_size": 23},
        {"query", "key", "value", "dense", "map_inputs_layer"},
    ),
    "phi": ({}, {"q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"}),
    "phi3": ({"sliding_window": None}, {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}),
    "gpt_neox": ({}, {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}),
    "glm4": ({"head_dim": 4}, ATTENTION | {"gate_up_proj", "down_proj"}),
    "qwen3_moe": (EXPERTS | {"head_dim": 4}, ATTENTION),
    "qwen2_moe": (EXPERTS | {"shared_expert_intermediate_size": 8}, ATTENTION | SWIGLU),
    "olmoe": ({"num_experts": 4, "num_experts_per_tok": 2}, ATTENTION),
    "mixtral": (
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
        ATTENTION,
    ),
    "phimoe": (
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
        ATTENTION,
    ),
}


@dataclass
class Trained:
    """A model's folder, its adapter's, and both loaded in float64."""

    family: str
    folder: Path
    adapter: Path
    base: Idlm
    adapted: Idlm


def write(family: str, folder: Path) -> Path:
    """A random model, and texts beside it."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(SIZES | FAMILIES[family][0]))
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():  # some start as zeros, and would hide what they do
            weight.add_(torch.randn_like(weight), alpha=0.1)
    model.save_pretrained(folder / "model")
    tiny.write_jsonl(folder / "data.jsonl", tiny.examples())
    return folder / "model"


def stock(folder: Path) -> PreTrainedModel:
    """transformers' own model, whose experts in float64 are called one by one."""
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, experts_implementation="eager"
    )


def stock_tokens(folder: Path) -> list[int]:
    """What transformers generates after 5, 7, 9, without MASK."""
    tokens = stock(folder).generate(
        torch.tensor([[5, 7, 9]]),
        max_new_tokens=16,
        do_sample=False,
        eos_token_id=None,
        suppress_tokens=[tiny.VOCAB],
    )
    return tokens[0, 3:].tolist()


@pytest.fixture(scope="module", params=FAMILIES)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A random model of each family after two steps of training."""
    place = tmp_path_factory.mktemp(request.param)
    folder = write(request.param, place)
    adapter = tiny.trained_adapter(folder, place)
    base = load(folder, dtype="float64")
    adapted = load(folder, adapter=adapter, dtype="float64")
    return Trained(request.param, folder, adapter, base, adapted)


@pytest.mark.parametrize("family", ["gpt2", "qwen3_moe"])
def test_a_full_fine_tune_is_an_ordinary_checkpoint(family: str, tmp_path: Path) -> None:
    folder = write(family, tmp_path)
    model = {"path": str(folder), "dtype": "float64"}
    train(tiny.config(tmp_path, model=model, stages=[{"steps": 2, "block_size": 2}]))
    tuned = load(tmp_path / "run" / "final", dtype="float64")
    params = SamplingParams(max_tokens=16, temperature=0, ignore_eos=True)
    ar, isd = (
        LLM(tuned, stride=stride, branches="all").generate([[5, 7, 9]], params)[0].token_ids
        for stride in (1, 3)
    )
    assert isd == ar == stock_tokens(tmp_path / "run" / "final")


def test_default_targets_are_all_linear_layers_but_head_and_routers(trained: Trained) -> None:
    found = set(inspect_checkpoint(trained.adapter).adapter_targets or ())
    assert found == FAMILIES[trained.family][1]
    tensors = load_file(trained.adapter / "adapter_model.safetensors")
    assert all(bool(tensor.any()) for tensor in tensors.values()), "each layer was trained"


def test_layers_with_numbers_for_names_and_mixers_of_streams_are_no_targets() -> None:
    keys = {"layer_types": ["full_attention"] * 2, "activation_sparsity_pattern": [0.0] * 2}
    keys |= {"num_kv_shared_layers": 0, "vocab_size_per_layer_input": tiny.VOCAB}
    config = AutoConfig.for_model("gemma3n_text", **(SIZES | keys))
    with torch.device("meta"):
        found = set(all_linear(AutoModelForCausalLM.from_config(config)))
    layer = {"linear_left", "linear_right", "per_layer_input_gate", "per_layer_projection"}
    assert found == ATTENTION | SWIGLU | layer | {"per_layer_model_projection"}


def test_isd_is_ar_is_the_base_is_transformers(trained: Trained) -> None:
    prompts = [[5, 7, 9], [3]]
    params = [
        SamplingParams(max_tokens=16, temperature=temperature, seed=3, ignore_eos=True)
        for temperature in (0, 1)
    ]
    base, ar = (
        LLM(model, stride=1).generate(prompts, params) for model in (trained.base, trained.adapted)
    )
    isd = LLM(trained.adapted, stride=3, branches="all").generate(prompts, params)
    expected = [one.token_ids for one in base]
    assert [one.token_ids for one in ar] == expected
    assert [one.token_ids for one in isd] == expected
    assert stock_tokens(trained.folder) == expected[0]


def test_peft_does_to_all_rows_what_we_do_to_mask_rows(trained: Trained) -> None:
    theirs = PeftModel.from_pretrained(stock(trained.folder), trained.adapter)
    row = load_file(trained.adapter / "mask_row.safetensors")["mask_row"]
    masks = torch.full((4,), trained.adapted.mask_id)
    ours = trained.adapted.forward(
        masks, torch.arange(4), torch.ones(4, 4, dtype=torch.bool).tril()
    )
    with torch.no_grad():
        logits = theirs(inputs_embeds=row.expand(1, 4, -1)).logits[0]
    torch.testing.assert_close(ours, logits, rtol=1e-6, atol=1e-6)
