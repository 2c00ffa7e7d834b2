"""GGUF files as checkpoints, loaded by transformers' `gguf_file`, which de-quantises the weights.

transformers silently ignores metadata and tensors that it does not know. This module refuses files
with ignored entries that would change the model.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tokenizers import pre_tokenizers
from transformers import PreTrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from idlm.errors import InputError
from idlm.models.gguf_header import GgufHeader, read_header
from idlm.models.tensor_info import TensorInfo

SAME: dict[str, tuple[str, ...]] = {
    "context_length": ("max_position_embeddings",),
    "attention.head_count": ("num_attention_heads",),
    "attention.head_count_kv": ("num_key_value_heads",),
    "attention.key_length": ("head_dim",),
    "attention.value_length": ("head_dim",),
    "rope.dimension_count": ("head_dim",),
    "rope.freq_base": ("rope_theta",),
    "attention.sliding_window": ("sliding_window",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", "norm_eps"),
    "attention.layer_norm_epsilon": (
        "layer_norm_epsilon",
        "layer_norm_eps",
        "norm_epsilon",
        "norm_eps",
    ),
}
"""Metadata keys, and the names of the same values in a config: they must agree."""

CHECKED_BY_SHAPE = {"block_count", "embedding_length", "feed_forward_length", "vocab_size"}
HARMLESS = {"tensor_data_layout"}
OFF: tuple[Any, ...] = (0, 0.0, False, "", "none", [])

ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
"""End of text, of turn, of message. llama.cpp stops at each; instruct models use any of them."""

SPLITS = {
    # GPT-2's, which is also transformers' default
    *("default", "gpt-2", "phi-2", "mpt", "olmo"),
    *("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "dbrx", "smaug-bpe", "tekken"),
    *("qwen2", "deepseek-r1-qwen", "megrez", "gpt-4o", "llama4"),
}
"""Pre-tokenizers (tokenizer.ggml.pre) that transformers implements as llama.cpp does."""

DIGIT_SPLITS = {"smollm", "starcoder", "refact"}
"""Pre-tokenizers that split digits, then apply GPT-2's. transformers would apply GPT-2's alone,
which splits "  7" differently."""


def gguf_config(path: Path) -> dict[str, Any]:
    """The keys of a transformers config, from the metadata of a GGUF file.

    Raises:
        InputError: the file cannot be read or is one of several parts; transformers does not have
            the architecture; a tensor type cannot be de-quantised; there are experts or rotary
            factors, which transformers would ignore.
    """
    header = read_header(path)
    if reason := _parts(header) or _experts(header) or _rotary(header) or _quantisation(header):
        raise InputError(f"{str(path)!r} ({header.architecture}) {reason}")
    try:
        with origin(path) as (folder, more):
            raw: dict[str, Any] = PreTrainedConfig.get_config_dict(
                folder, gguf_file=more["gguf_file"]
            )[0]
    except Exception as error:  # transformers raises many types for unsupported files
        raise InputError(
            f"{str(path)!r}: transformers reads no GGUF file "
            f"of architecture {header.architecture!r} "
            f"({' '.join(str(error).split())}); use the model's original folder"
        ) from error
    raw.pop("_model_name_or_path", None)  # a title, not a path
    if width := header.metadata.get(f"{header.architecture}.attention.key_length"):
        # transformers reads it for few families; the others would keep their config's default
        raw["head_dim"] = width
    end_ids = (header.metadata.get(f"tokenizer.ggml.{key}") for key in END_KEYS)
    ends = sorted({end for end in end_ids if end is not None})
    return raw | {"eos_token_id": ends[0] if len(ends) == 1 else ends or None}


@contextmanager
def origin(path: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The arguments of `from_pretrained` for a GGUF file: a folder, and keyword arguments.

    The folder is empty, since tokenizers and configs beside the file are not part of it. The path
    of the file is absolute, because transformers also searches the working directory for a relative
    path. stderr is redirected to hide a progress bar that no setting turns off.
    """
    with TemporaryDirectory() as folder, redirect_stderr(io.StringIO()):
        yield Path(folder), {"gguf_file": str(path.absolute())}


def dequantised() -> Any:
    """The `quantization_config` that converts quantised blocks to float weights.

    Raises:
        InputError: transformers is too old.
    """
    try:
        from transformers import GgufConfig
    except ImportError:
        raise InputError(
            "GGUF files need a newer transformers; install it with pip install 'idlm[gguf]'"
        ) from None
    return GgufConfig(dequantize=True)


def _parts(header: GgufHeader) -> str | None:
    count = header.metadata.get("split.count", 1)
    if count > 1:
        return (
            f"is one of {count} parts; merge them with llama-gguf-split --merge and give the result"
        )
    return None


def _experts(header: GgufHeader) -> str | None:
    key = f"{header.architecture}.expert_count"
    if header.metadata.get(key, 0) > 1:
        return (
            f"is a mixture of experts ({key} {header.metadata[key]}); "
            "which GGUF files are not read for; use the model's original folder"
        )
    return None


def _rotary(header: GgufHeader) -> str | None:
    for name in ROPE_TENSORS:
        if name in header.tensors:
            return (
                f"scales its rotary frequencies ({name}), which transformers does not read; "
                "use the original folder"
            )
    return None


def _quantisation(header: GgufHeader) -> str | None:
    import numpy as np
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    for name in quantisation(header.tensors):
        kind = GGMLQuantizationType[name]
        try:
            dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except NotImplementedError:
            return (
                f"has tensors of type {name}, which cannot be de-quantised; "
                "use another quantisation, such as Q8_0"
            )
    return None


def passed_over(path: Path, config: PreTrainedConfig) -> str | None:
    """The reason to refuse a file with metadata that its config does not have, else None."""
    header = read_header(path)
    prefix = f"{header.architecture}."
    for key, value in header.metadata.items():
        name = key.removeprefix(prefix)
        if not key.startswith(prefix) or name in CHECKED_BY_SHAPE | HARMLESS:
            continue
        if name.endswith("sliding_window") and value >= config.max_position_embeddings:
            continue  # it never hides a token
        if (name in SAME and not _same(value, config, SAME[name])) or (
            name not in SAME and value not in OFF
        ):
            return (
                f"has {key} {value}, which transformers does not read from GGUF; "
                "use the model's original folder"
            )
    return None


def _same(value: Any, config: PreTrainedConfig, names: tuple[str, ...]) -> bool:
    """Whether the config has `value` under any of `names`. The file's floats have 32 bits."""
    rope = getattr(config, "rope_parameters", None) or {}
    stored = [rope[name] if name in rope else getattr(config, name, None) for name in names]
    if names == ("head_dim",) and stored == [None]:
        stored = [config.hidden_size // config.num_attention_heads]
    return any(other is not None and abs(other - value) <= 1e-6 * abs(value) for other in stored)


def gguf_tokenizer(path: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a GGUF file, with its chat template; None if the file has none.

    Raises:
        InputError: the pre-tokenizer is unknown, so the tokens could differ from those of training.
    """
    metadata = read_header(path).metadata
    if metadata.get("tokenizer.ggml.model", "none") in ("none", "no_vocab"):
        return None
    split = metadata.get("tokenizer.ggml.pre", "default")
    if metadata["tokenizer.ggml.model"] == "gpt2" and split not in SPLITS | DIGIT_SPLITS:
        raise InputError(
            f"{str(path)!r} splits text by {split!r} (tokenizer.ggml.pre), which is unknown; "
            "use a folder"
        )
    with origin(path) as (folder, more):
        tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(
            folder, local_files_only=True, **more
        )
    tokenizer.name_or_path = str(path)
    if metadata["tokenizer.ggml.model"] == "gpt2" and split in DIGIT_SPLITS:
        digits = pre_tokenizers.Digits(individual_digits=True)
        gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, gpt2])
    return tokenizer


def quantisation(tensors: dict[str, TensorInfo]) -> tuple[str, ...]:
    """The types of the tensors, by falling number of elements."""
    sizes: Counter[str] = Counter()
    for info in tensors.values():
        sizes[info.dtype] += info.count
    return tuple(name for name, _ in sizes.most_common())


def auto_dtype(tensors: dict[str, TensorInfo]) -> torch.dtype:
    """The type that dtype "auto" loads: float32, unless all matrices are BF16, or all are F16.

    Vectors (norms, biases) do not count: converters store them as F32 whatever the model has.
    """
    dtypes = {info.dtype for info in tensors.values() if len(info.shape) > 1}
    if dtypes == {"BF16"}:
        return torch.bfloat16
    return torch.float16 if dtypes == {"F16"} else torch.float32
