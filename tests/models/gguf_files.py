"""Small GGUF files as llama.cpp's converter writes them: a random Llama or Qwen3 with a byte-level
tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, get_tensor_name_map, quantize
from gguf.constants import MODEL_ARCH
from transformers import PreTrainedModel
from transformers.convert_slow_tokenizer import bytes_to_unicode

from tests.models.tiny import tiny_model

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "<|im_start|>"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|eot|>"]
LETTERS = list(bytes_to_unicode().values())
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "Ġ Ġ"]
TOKENS = [*SPECIAL, *LETTERS, *(merge.replace(" ", "") for merge in MERGES)]
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "vocab_size": len(TOKENS),
    "tie_word_embeddings": True,
}
ARCHITECTURES = {"llama": MODEL_ARCH.LLAMA, "qwen3": MODEL_ARCH.QWEN3}
METADATA: dict[str, Any] = {
    "context_length": 64,
    "embedding_length": 32,
    "block_count": 2,
    "feed_forward_length": 64,
    "rope.dimension_count": 8,
    "rope.freq_base": 10000.0,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-6,
}


def source(family: str = "llama", seed: int = 0, **keys: Any) -> PreTrainedModel:
    """The model that the files are made of."""
    return tiny_model(family, seed, **(SIZES | {"bos_token_id": 1, "eos_token_id": 2} | keys))


def write(
    path: Path,
    kind: str = "F32",
    model: PreTrainedModel | None = None,
    metadata: Mapping[str, Any] | None = None,
    tokenizer: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray] | None = None,
) -> Path:
    """Write `model` (a Llama) with its matrices stored as `kind`; the mappings add to the file, or
    overrule it.

    Keys of `metadata` are the family's, but for those that begin with "split."; an empty
    `tokenizer` writes none.
    """
    model = model or source()
    family = model.config.model_type
    writer = GGUFWriter(path, family)
    _metadata(writer, family, METADATA | {"vocab_size": len(TOKENS)} | dict(metadata or {}))
    if tokenizer is None or tokenizer:
        _tokenizer(writer, dict(tokenizer or {}))
    for name, array in (_tensors(family, model) | dict(tensors or {})).items():
        stored = GGMLQuantizationType[kind if array.ndim > 1 else "F32"]
        writer.add_tensor(name, quantize(array, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _metadata(writer: GGUFWriter, family: str, metadata: dict[str, Any]) -> None:
    for key, value in metadata.items():
        name = key if key.startswith("split.") else f"{family}.{key}"
        if isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        else:
            writer.add_uint32(name, value)


def _tokenizer(writer: GGUFWriter, changes: dict[str, Any]) -> None:
    writer.add_tokenizer_model(changes.get("model", "gpt2"))
    writer.add_tokenizer_pre(changes.get("pre", "smollm"))
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    if "eot" in changes:
        writer.add_eot_token_id(changes["eot"])
    writer.add_chat_template(CHAT)
    writer.add_add_bos_token(False)


def _tensors(family: str, model: PreTrainedModel) -> dict[str, np.ndarray]:
    """The model's weights by GGUF's names; Llama's rotated rows are interleaved there."""
    names = get_tensor_name_map(ARCHITECTURES[family], model.config.num_hidden_layers)
    found = {}
    for name, parameter in model.named_parameters():
        stem, suffix = name.rsplit(".", 1)
        weight = parameter.detach()
        if family == "llama" and stem.endswith(("q_proj", "k_proj")):
            weight = weight.reshape(-1, 2, model.config.head_dim // 2, weight.shape[1]).transpose(
                1, 2
            )
        weight = weight.reshape(parameter.shape).to(torch.float32)
        found[f"{names.get_name(stem)}.{suffix}"] = weight.contiguous().numpy()
    return found
