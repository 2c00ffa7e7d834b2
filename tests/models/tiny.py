"""Random checkpoints of every family on disk, with a tokenizer, small enough to load in a few
milliseconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
VOCAB = 40
TARGETS = ["q_proj", "v_proj", "down_proj"]
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def tiny_model(family: str, seed: int = 0, **keys: Any) -> PreTrainedModel:
    """A random model; `keys` overrule the config."""
    own = {"sliding_window": None} if family == "mistral" else {}
    config = AutoConfig.for_model(family, **(SIZES | own | keys))
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def tiny_tokenizer(mask: str | None = None) -> PreTrainedTokenizerFast:
    """Words w0.. ; a `mask` token, if named, is the last id of the vocabulary."""
    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, VOCAB - 1)), mask or "last"]
    inner = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>")
    )
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", mask_token=mask
    )


def write(
    folder: Path, family: str = "llama", seed: int = 0, mask: str | None = None, **keys: Any
) -> Path:
    """Save a random model and its tokenizer."""
    tiny_model(family, seed, **keys).save_pretrained(folder)
    tiny_tokenizer(mask).save_pretrained(folder)
    return folder


def edit(path: Path, **keys: Any) -> None:
    """Change keys of a JSON file; None stays null."""
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def write_sdar(folder: Path) -> Path:
    """A Qwen3 checkpoint in the form published I-DLM checkpoints have; its code, if run, leaves a
    trace and fails."""
    write(folder, "qwen3", tie_word_embeddings=False)
    code = "SDARForCausalLM"
    edit(
        folder / "config.json",
        model_type="sdar",
        architectures=[code],
        auto_map={
            "AutoConfig": "code.SDARConfig",
            "AutoModel": f"code.{code}",
            "AutoModelForCausalLM": f"code.{code}",
        },
        mask_token_id=VOCAB - 3,
        block_size=4,
        fuse_cross_entropy=True,
    )
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["code.SDARTokenizer", None]})
    trace = (
        f"from pathlib import Path\nPath({str(folder / 'ran')!r}).touch()\n"
        "raise RuntimeError('remote code ran')\n"
    )
    (folder / "code.py").write_text(trace)
    return folder


def write_peft(base: Path, folder: Path, rank: int = 4, seed: int = 1, **keys: Any) -> Path:
    """An adapter trained and saved by peft itself; B is random, not zero."""
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(
            **(
                {
                    "r": rank,
                    "lora_alpha": 2 * rank,
                    "target_modules": TARGETS,
                    "task_type": "CAUSAL_LM",
                }
                | keys
            )
        ),
    )
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return folder
