"""Everything that must not load, from checkpoints that transformers and peft themselves wrote, then
damaged."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.utils import logging

import idlm
from idlm.errors import InputError
from idlm.models.checkpoint import inspect_checkpoint
from tests.models import tiny

UP = "model.layers.0.mlp.up_proj.weight"


def retensor(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    file = next(folder.glob("*model.safetensors"))
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def truncated(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def other(family: str, **keys: Any) -> Callable[[Path], None]:
    """Replace the checkpoint by one of another family."""

    def replace(folder: Path) -> None:
        config = AutoConfig.for_model(family, **(tiny.SIZES | keys))
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)

    return replace


def config(**keys: Any) -> Callable[[Path], None]:
    return lambda folder: tiny.edit(folder / "config.json", **keys)


def t5(folder: Path) -> None:
    T5ForConditionalGeneration(
        T5Config(vocab_size=40, d_model=16, d_ff=16, num_layers=1, num_heads=2)
    ).save_pretrained(folder)


def bert(folder: Path) -> None:
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    BertForMaskedLM(BertConfig(vocab_size=40, **sizes)).save_pretrained(folder)


def missing_shard(folder: Path) -> None:
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink()  # transformers would load it, and no shard
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


MODELS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "pickle weights": (pickled, "pickle weights only .*pytorch_model.bin"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no model.safetensors"),
    "truncated weights": (truncated, "bytes, not the .* its header names"),
    "weights cut in the header": (
        lambda f: (f / "model.safetensors").write_bytes(b"\x40"),
        "truncated or no safetensors",
    ),
    "weights of another format": (
        lambda f: (f / "model.safetensors").write_bytes(b"\x80\x02" * 99),
        "no safetensors file",
    ),
    "missing shard": (missing_shard, "no model-00002-of-.*safetensors"),
    "missing tensor": (lambda f: retensor(f, lambda t: t.pop(UP)), f"1 missing tensors, {UP}"),
    "unexpected tensor": (
        lambda f: retensor(f, lambda t: t.update(more=torch.ones(2))),
        "1 unexpected tensors, more",
    ),
    "misshapen tensor": (
        lambda f: retensor(f, lambda t: t.update({UP: torch.ones(5, 32)})),
        r"misshapen .*\[5, 32\] not \[48, 32\]",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "JSON list"),
    "config of wrong types": (config(hidden_size="many"), "not a valid llama config"),
    "remote code": (
        config(model_type="mine", auto_map={"AutoConfig": "code.C"}),
        "needs its own code",
    ),
    "unknown family": (config(model_type="mine"), "'mine'.* unknown to this transformers"),
    "no family": (config(model_type=None), "'None'.* unknown"),
    "T5": (t5, "encoder-decoder"),
    "BERT": (bert, "no causal language model"),
    "another head": (
        config(architectures=["LlamaForSequenceClassification"]),
        "LlamaForSequenceClassification.* no causal language model",
    ),
    "a model and an adapter": (
        lambda f: (f / "adapter_config.json").write_text("{}"),
        "a model and an adapter .*move the adapter",
    ),
    "a bias that is no mask": (
        lambda f: retensor(f, lambda t: t.update({UP.replace("weight", "bias"): torch.ones(48)})),
        "1 unexpected tensors, .*up_proj.bias first; its config.json has no place",
    ),
    "named weights elsewhere": (
        config(transformers_weights="../model.safetensors"),
        "transformers_weights '../model.safetensors'; name a file of its folder",
    ),
    "named weights not there": (
        config(transformers_weights="other.safetensors"),
        "no other.safetensors",
    ),
    "no sliding window": (
        other("mistral", sliding_window=0),
        "sliding_window 0, which hides every token",
    ),
    "a sliding window that attention is not told": (
        other("doge", sliding_window=16),
        r"sliding windows are \[None, None\], not \[16, 16\]; use another model",
    ),
    "linear layers": (
        config(layer_types=["full_attention", "linear_attention"]),
        "linear_attention layers",
    ),
    "Mamba": (other("mamba", state_size=4), "linear_attention|no attention heads"),
    "experts": (
        other("jetmoe", num_local_experts=2),
        r"mixture of experts \(num_local_experts 2\)",
    ),
    "ALiBi": (
        other("bloom", n_layer=2, n_head=4),
        "max_position_embeddings|BloomForCausalLM cannot be expressed",
    ),
    "two attentions per layer": (
        other("diffllama"),
        "DiffLlamaForCausalLM cannot be expressed: its layers write",
    ),
    "quantised": (config(quantization_config={"quant_method": "gptq", "bits": 4}), "quantised"),
    "MASK after the vocabulary": (
        config(mask_token_id=tiny.VOCAB),
        "mask_token_id 40 is outside the vocabulary of 40",
    ),
    "MASK far outside": (
        config(mask_token_id=151669),
        "mask_token_id 151669 .* outside the vocabulary of 40",
    ),
    "MASK negative": (config(mask_token_id=-1), "mask_token_id -1"),
    "MASK no number": (config(mask_token_id="<mask>"), "mask_token_id '<mask>'"),
    "block size": (config(mask_token_id=3, block_size=0), "block_size 0"),
    "broken tokenizer": (
        lambda f: (f / "tokenizer.json").write_text("{}"),
        "tokenizer .* cannot be read",
    ),
    "an adapter": (
        lambda f: (f / "config.json").rename(f / "adapter_config.json"),
        "is an adapter; give its base",
    ),
}


def refusal(call: Callable[[], Any], capfd: pytest.CaptureFixture[str]) -> str:
    """The error of `call`, a single line; transformers must not write to the terminal."""
    capfd.readouterr()
    with pytest.raises(InputError) as caught:
        call()
    assert "\n" not in str(caught.value)
    assert "LOAD REPORT" not in capfd.readouterr().err
    return str(caught.value)


@pytest.mark.parametrize("case", MODELS)
def test_model_is_refused(case: str, llama: Path, capfd: pytest.CaptureFixture[str]) -> None:
    damage, message = MODELS[case]
    idlm.load(llama)
    damage(llama)
    level = logging.get_verbosity()
    text = refusal(lambda: idlm.load(llama), capfd)
    assert logging.get_verbosity() == level
    assert re.search(message, text), text


@pytest.mark.parametrize(
    "case", ["no sliding window", "experts", "remote code", "truncated weights", "pickle weights"]
)
def test_inspect_reports_a_refusal_instead(case: str, llama: Path) -> None:
    MODELS[case][0](llama)
    found = inspect_checkpoint(llama)
    assert not found.can_decode_isd
    assert found.reason.startswith("refused: ")


ARGUMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "dtype": ({"dtype": "int8"}, "dtype 'int8' is unknown; use auto, float64"),
    "torch dtype": ({"dtype": torch.int8}, "dtype 'torch.int8' is unknown"),
    "device": ({"device": "tpu"}, "device 'tpu' cannot be used"),
    "device number": ({"device": "cuda:99"}, "device 'cuda:99' cannot be used"),
    "adapter": ({"adapter": "/no/such/adapter"}, "no folder '/no/such/adapter'"),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_argument_is_refused(case: str, llama: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments, message = ARGUMENTS[case]
    assert message in refusal(lambda: idlm.load(llama, **arguments), capfd)


def test_path_is_refused(llama: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert "no folder" in refusal(lambda: idlm.load(llama / "deeper"), capfd)
    assert "no folder './gone'" in refusal(lambda: idlm.load("./gone"), capfd)
    assert "is a file" in refusal(lambda: idlm.load(llama / "config.json"), capfd)
    assert "no folder" in refusal(lambda: inspect_checkpoint(llama / "deeper"), capfd)


FEATURES: dict[str, tuple[dict[str, Any], str]] = {
    "DoRA": ({"use_dora": True}, "use_dora True"),
    "bias": ({"bias": "all"}, "bias 'all'"),
    "trained bias": (
        {"lora_bias": True, "target_modules": ["q_proj"]},
        "lora_bias True|unexpected tensor",
    ),
    "modules to save": ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "rank pattern": ({"rank_pattern": {"q_proj": 2}}, "rank_pattern {'q_proj': 2}"),
    "alpha pattern": ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern"),
    "some layers": ({"layers_to_transform": [0]}, r"layers_to_transform \[0\]"),
    "an embedding": ({"target_modules": ["embed_tokens"]}, "unexpected tensor .*embed_tokens"),
    "the head": ({"target_modules": ["lm_head"]}, "unexpected tensor .*lm_head"),
    "some layers by expression": (
        {"target_modules": r".*layers\.0.*q_proj"},
        "lacks 2 tensors, model.layers.1.self_attn.q_proj",
    ),
}


@pytest.mark.parametrize("case", FEATURES)
@pytest.mark.filterwarnings("ignore")
def test_peft_feature_is_refused(
    case: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    keys, message = FEATURES[case]
    base = tiny.write(
        tmp_path / "base", mask_token_id=3, tie_word_embeddings=False, attention_bias=True
    )
    adapter = tiny.write_peft(base, tmp_path / "adapter", **keys)
    text = refusal(lambda: idlm.load(base, adapter=adapter), capfd)
    assert re.search(message, text), text


def drop(name: str) -> Callable[[Path], Any]:
    return lambda f: retensor(f, lambda t: t.pop(name))


Q = "base_model.model.model.layers.1.self_attn.q_proj.lora_{}.weight"
ADAPTERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "no adapter_config.json"),
    "config is no JSON": (lambda f: (f / "adapter_config.json").write_text("{"), "not valid JSON"),
    "another method": (
        lambda f: tiny.edit(f / "adapter_config.json", peft_type="IA3"),
        "peft_type 'IA3'",
    ),
    "PiSSA": (
        lambda f: tiny.edit(f / "adapter_config.json", init_lora_weights="pissa"),
        "init_lora_weights 'pissa'",
    ),
    "an unknown key": (
        lambda f: tiny.edit(f / "adapter_config.json", use_novelty=3),
        "use_novelty 3",
    ),
    "rank zero": (lambda f: tiny.edit(f / "adapter_config.json", r=0), "r 0"),
    "another rank": (
        lambda f: tiny.edit(f / "adapter_config.json", r=8),
        r"shape \[4, 48\], not \[8, 48\]",
    ),
    "pickle tensors": (
        lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"),
        "pickle is never read",
    ),
    "truncated": (lambda f: (f / "adapter_model.safetensors").write_bytes(b"\x40"), "truncated"),
    "missing tensor": (
        drop(Q.format("B")),
        "lacks 1 tensors, model.layers.1.self_attn.q_proj.lora_B",
    ),
    "misshapen tensor": (
        lambda f: retensor(f, lambda t: t.update({Q.format("B"): torch.ones(7, 4)})),
        r"q_proj.lora_B has shape \[7, 4\], not \[32, 4\]",
    ),
    "unexpected tensor": (
        lambda f: retensor(f, lambda t: t.update(more=torch.ones(2))),
        "unexpected tensor 'more'",
    ),
    "unknown target": (
        lambda f: retensor(
            f, lambda t: t.update({Q.format("A").replace("q_proj", "qkv"): torch.ones(4, 32)})
        ),
        "targets 'model.layers.1.self_attn.qkv', no linear layer",
    ),
    "the output head": (
        lambda f: retensor(
            f, lambda t: t.update({"base_model.model.lm_head.lora_A.weight": torch.ones(4, 32)})
        ),
        "targets the output head 'lm_head'",
    ),
    "no tensors": (lambda f: retensor(f, lambda t: t.clear()), "holds no tensors"),
    "tensors that are not finite": (
        lambda f: retensor(f, lambda t: t[Q.format("B")].fill_(float("nan"))),
        "the adapter does not fit: its MASK rows are not finite",
    ),
}


@pytest.mark.parametrize("case", ADAPTERS)
def test_damaged_adapter_is_refused(
    case: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    damage, message = ADAPTERS[case]
    base = tiny.write(tmp_path / "base", mask_token_id=3)
    adapter = tiny.write_peft(base, tmp_path / "adapter")
    idlm.load(base, adapter=adapter)
    damage(adapter)
    text = refusal(lambda: idlm.load(base, adapter=adapter), capfd)
    assert re.search(message, text), text


def test_foreign_adapter_needs_a_base_with_a_mask_row(
    llama: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    adapter = tiny.write_peft(llama, tmp_path / "adapter")
    assert "set mask_token_id in the base's config.json" in refusal(
        lambda: idlm.load(llama, adapter=adapter), capfd
    )
    found = inspect_checkpoint(llama, adapter)
    assert not found.can_decode_isd and "MASK row" in found.reason
