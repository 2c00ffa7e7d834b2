"""Families by what they need: another route to our attention, another head, a shorter context. All
of them are tried by `python -m benchmarks.families`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import idlm
from benchmarks import families
from idlm import LLM, SamplingParams
from idlm.errors import InputError
from idlm.models import trial
from idlm.models.check import check_architecture, prepare
from idlm.models.checkpoint import inspect_checkpoint
from idlm.models.idlm_model import Idlm
from idlm.models.routes import implementation
from tests.models import tiny

ROPE = {"rope_theta": 1e4, "factor": 4.0}
FACTORS = {"short_factor": [1.0, 1.5, 2.0, 3.0], "long_factor": [9.0, 7.0, 5.0, 4.0]}
LONGROPE = {
    "rope_parameters": ROPE | FACTORS | {"rope_type": "longrope"},
    "original_max_position_embeddings": 16,
}


@pytest.mark.parametrize(
    "family",
    [
        "granite",  # scales its logits
        "nanochat",  # caps them
        "bert",  # has three layers in its head
        "nemotron",  # drops the arguments that it does not know
        "gptj",  # computes attention in a method
        "falcon",  # calls PyTorch's attention
        "youtu",  # has values of another size than its keys
    ],
)
def test_isd_is_ar_is_transformers(family: str) -> None:
    row = families.tried(family)
    assert row["loads"], row
    assert row["tokens"] == families.CONTEXT - len(families.PROMPT)
    assert not families.wrong(row), row


def stock(family: str, **keys: Any) -> PreTrainedModel:
    config = AutoConfig.for_model(family, **(tiny.SIZES | keys))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation=implementation(config), dtype=torch.float64
    )
    return model.eval()


@pytest.mark.parametrize("family", ["gptj", "nemotron", "bert"])
def test_rows_see_what_visible_says(family: str) -> None:
    """Two texts in one forward, side by side."""
    model = stock(family, rotary_dim=4, is_decoder=True)
    texts = torch.tensor([[5, 9, 3, 11], [7, 7, 2, 30]])
    with torch.inference_mode():
        expected = model(input_ids=texts, use_cache=False).logits
    prepare(model)
    causal = torch.ones(4, 4, dtype=torch.bool).tril()
    visible = torch.block_diag(causal, causal).bool()
    rows = Idlm(model, None, 39).forward(texts.flatten(), torch.arange(4).repeat(2), visible)
    torch.testing.assert_close(rows, expected.flatten(0, 1), rtol=1e-5, atol=1e-5)
    with torch.inference_mode():  # a model that is routed is still transformers' own
        torch.testing.assert_close(model(input_ids=texts, use_cache=False).logits, expected)


def test_an_option_that_our_attention_does_not_understand_is_no_model_of_ours() -> None:
    model = stock("llama")
    prepare(model)
    check_architecture(Idlm(model, None, 39, name="mine"))
    layer = model.model.layers[1].self_attn
    layer.register_forward_pre_hook(
        lambda _, args, kwargs: (args, kwargs | {"mystery": 3}), with_kwargs=True
    )
    with pytest.raises(InputError, match="'mine'.*LlamaForCausalLM.* option mystery 3"):
        check_architecture(Idlm(model, None, 39, name="mine"))


def test_rope_that_changes_with_the_length_is_exact_below_it(tmp_path: Path) -> None:
    tiny.write(tmp_path, "phi3", **LONGROPE, sliding_window=None)
    with pytest.raises(InputError, match="longrope.* 16 .*max_model_len=16"):
        idlm.load(tmp_path)
    assert "max_model_len=16" in inspect_checkpoint(tmp_path).reason
    model = idlm.load(tmp_path, dtype="float64", max_model_len=16)
    assert model.context == inspect_checkpoint(tmp_path, max_model_len=16).context == 16
    ours = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    tokens, causal = torch.arange(3, 19), torch.ones(16, 16, dtype=torch.bool).tril()
    with torch.inference_mode():
        ours(input_ids=torch.arange(3, 33)[None])  # past the length: it changes its frequencies
        expected = ours(input_ids=tokens[None]).logits[0]
    # MASK rows and drafts past the end, which are never committed, change nothing
    for positions in (torch.arange(16), torch.tensor([*range(15), 40])):
        rows = model.forward(tokens, positions, causal)
        torch.testing.assert_close(rows[:15], expected[:15], rtol=1e-5, atol=1e-5)


def test_dynamic_rope_is_plain_in_its_context(tmp_path: Path) -> None:
    tiny.write(tmp_path / "plain", "llama", rope_parameters=ROPE | {"rope_type": "default"})
    tiny.write(tmp_path / "dynamic", "llama", rope_parameters=ROPE | {"rope_type": "dynamic"})
    prompt, params = [4, 8, 15], SamplingParams(temperature=0, max_tokens=61, ignore_eos=True)
    plain, dynamic = (
        LLM(str(tmp_path / name), dtype="float64", stride=1, record=False)
        .generate([prompt], params)[0]
        .token_ids
        for name in ("plain", "dynamic")
    )
    assert len(plain) == 61
    assert plain == dynamic


def test_max_model_len_is_the_context(llama: Path) -> None:
    loaded = idlm.load(llama, dtype="float64")
    for llm in (
        LLM(str(llama), dtype="float64", stride=1, max_model_len=10),
        LLM(loaded, stride=1, max_model_len=10),
    ):
        params = SamplingParams(max_tokens=60, ignore_eos=True)
        assert len(llm.generate([[5, 6, 7]], params)[0].token_ids) == 7
        with pytest.raises(InputError, match="maximum context length is 10 tokens"):
            llm.generate([[5] * 10])
    assert loaded.context == 64
    for model in (str(llama), loaded):
        with pytest.raises(InputError, match="context of 64, below max_model_len 65"):
            LLM(model, max_model_len=65)
    for wrong in (0, -1, 2.5, True):
        with pytest.raises(InputError, match="max_model_len"):
            LLM(loaded, max_model_len=wrong)


def test_a_model_without_a_context_of_its_own_is_given_one(llama: Path) -> None:
    tiny.edit(llama / "config.json", max_position_embeddings=0)
    with pytest.raises(InputError, match="no max_position_embeddings .*--max-model-len"):
        idlm.load(llama)
    assert idlm.load(llama, max_model_len=32).context == 32
    assert inspect_checkpoint(llama, max_model_len=32).context == 32


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "xglm": (
        {"attention_heads": 4, "num_layers": 2, "d_model": 32, "ffn_dim": 48},
        "XGLMForCausalLM .* computes attention by itself",
    ),
    "diffllama": ({}, "DiffLlamaForCausalLM .* layers write keys in the order"),
    "doge": ({"is_moe": False}, "DogeForCausalLM .* logits differ from transformers' own"),
    "bloom": (
        {"n_layer": 2, "n_head": 4, "max_position_embeddings": None},
        "bloom.* cannot be expressed: its class computes attention by itself",
    ),
    "ministral": (
        {"sliding_window": None, "layer_types": ["full_attention", "sliding_attention"]},
        "sliding_attention layers .*but no sliding_window",
    ),
}


@pytest.mark.parametrize("family", REFUSED)
def test_inspect_says_what_load_does(tmp_path: Path, family: str) -> None:
    keys, message = REFUSED[family]
    config = AutoConfig.for_model(family, **(tiny.SIZES | keys))
    if family != "ministral":  # transformers cannot make it
        families.write_checkpoint(config, tmp_path)
    else:
        tiny.write(tmp_path, "llama")
        config.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=message) as refused:
        idlm.load(tmp_path)
    assert "\n" not in str(refused.value)
    says = inspect_checkpoint(tmp_path).reason
    assert says.startswith("refused: ")
    digits = str.maketrans("", "", "0123456789.e-")
    assert says.removeprefix("refused: ").translate(digits) == str(refused.value).translate(digits)


@pytest.mark.parametrize("family", ["llama", "codegen"])
def test_a_large_model_is_tried_as_a_small_one(family: str) -> None:
    """CodeGen cannot have fewer than four heads."""
    sizes = {"hidden_size": 4096, "num_attention_heads": 32, "n_embd": 4096, "n_head": 32}
    config = AutoConfig.for_model(family, **sizes, num_hidden_layers=4, n_layer=4)
    smaller = next(iter(trial._smaller(config)))
    with torch.device("meta"):
        assert trial._model(smaller).num_parameters() < 20_000_000
    assert trial.try_config(config, "large") is None
