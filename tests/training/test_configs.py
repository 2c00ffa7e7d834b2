"""The configs of well-known models fit the models; their steps run on small ones."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from idlm.models.check import prepare
from idlm.models.gated_lora import LoraSpec, adapter_parameters, all_linear, attach
from idlm.training.config import TrainConfig
from idlm.training.read_config import load_config
from idlm.training.run import train

CONFIGS = Path(__file__).parents[2] / "configs"
HEADS = {"num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096}
QWEN = {"model_type": "qwen3", "vocab_size": 151936, "head_dim": 128}
QWEN_8B = QWEN | HEADS | {"num_hidden_layers": 36, "intermediate_size": 12288}
TIED = {"tie_word_embeddings": True}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "smollm2-135m-lora": TIED
    | {"model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "num_hidden_layers": 30}
    | {"intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3},
    "qwen3-0.6b-lora": QWEN
    | TIED
    | {"hidden_size": 1024, "num_hidden_layers": 28, "intermediate_size": 3072}
    | {"num_attention_heads": 16, "num_key_value_heads": 8},
    "qwen3-8b-lora": QWEN_8B,
    "qwen3-8b-full-curriculum": QWEN_8B,
    "llama3-8b-lora": HEADS
    | {"model_type": "llama", "vocab_size": 128256, "num_hidden_layers": 32}
    | {"intermediate_size": 14336},
}
"""What their publishers' config.json say."""
PARAMETERS = {
    "smollm2-135m-lora": 134_515_008,
    "qwen3-0.6b-lora": 596_049_920,
    "qwen3-8b-lora": 8_190_735_360,
    "qwen3-8b-full-curriculum": 8_190_735_360,
    "llama3-8b-lora": 8_030_261_248,
}
LAYERS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
}
TRAINED_BYTES, FROZEN_BYTES = 16, {"float32": 4, "bfloat16": 2}
"""Of a parameter: itself, its gradient and two moments in float32; or itself alone."""


def published(name: str) -> PreTrainedModel:
    """The model of a config, without memory for its weights."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**ARCHITECTURES[name]))
    prepare(model)
    return model


def adapted(model: PreTrainedModel, config: TrainConfig) -> None:
    """Attach the adapter that a run of the config would train."""
    assert config.lora.targets == "all-linear"
    targets = all_linear(model)
    assert set(targets) == LAYERS
    attach(model, LoraSpec(config.lora.rank, config.lora.alpha, targets), model.config.vocab_size)


def size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_it_fits_the_published_model(name: str) -> None:
    model, config = published(name), load_config(CONFIGS / f"{name}.yaml")
    base = size(model)
    assert base == PARAMETERS[name]
    trained = base
    if config.method == "lora":
        adapted(model, config)
        layers = [layer for layer in model.modules() if hasattr(layer, "lora_A")]
        assert len(layers) == 7 * model.config.num_hidden_layers
        trained = sum(p.numel() for p in adapter_parameters(model).values())
        assert size(model) == base + trained
        ends = [layer.lora_A.shape[1] + layer.lora_B.shape[0] for layer in layers]
        assert trained == config.lora.rank * sum(ends) + model.config.hidden_size
        assert trained < base / 2
    text = (CONFIGS / f"{name}.yaml").read_text()
    said = re.findall(r"optimizer take about ([\d.]+) GB", text)
    frozen = base if config.method == "lora" else 0
    needed = TRAINED_BYTES * trained + FROZEN_BYTES[config.model.dtype] * frozen
    assert said == [f"{needed / 1e9:.{len(said[0].partition('.')[2])}f}"]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_its_stages_run_on_a_small_model_of_the_family(
    name: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    keys = ARCHITECTURES[name] | SMALL | {"vocab_size": len(tokenizer)}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**keys))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [
        {"prompt": f"Mia has {at}", "response": f" apples, and {at} pears."} for at in range(40)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = CONFIGS / f"{name}.yaml"
    stages = range(len(load_config(path).stages))
    small = {"model.path": tmp_path / "model", "data.path": tmp_path / "rows.jsonl"}
    small |= {"output_dir": tmp_path / "run", "threads": 1, "device": "cpu", "data.held_out": 4}
    small |= {f"stages.{number}.steps": 1 for number in stages}
    small |= {"optimizer.warmup": 0, "accumulation": 1}
    result = train(load_config(path, [f"--{key}={value}" for key, value in small.items()]))
    assert result["steps"] == len(stages)
    found = {file.name for file in (tmp_path / "run" / "final").iterdir()}
    assert ("adapter_config.json" in found) == ("lora" in name)


@pytest.mark.parametrize("name", ["nano-lora", *ARCHITECTURES])
def test_each_key_has_a_comment(name: str) -> None:
    lines = (CONFIGS / f"{name}.yaml").read_text().splitlines()
    for before, line in zip(["", *lines], lines, strict=False):
        if re.match(r" *[\w-]", line) and not line.lstrip().startswith("- "):
            assert "  # " in line or " # " in line, line
        elif line.lstrip().startswith("- "):
            assert before.lstrip().startswith(("#", "- ")), line
