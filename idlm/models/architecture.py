"""Reads a checkpoint's config: its architecture, which is refused if a window cannot express it,
and its MASK token."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
)

from idlm.errors import InputError
from idlm.models.gguf_checkpoint import gguf_config, gguf_tokenizer, passed_over
from idlm.models.gguf_header import is_gguf
from idlm.models.rope import fixed_until
from idlm.models.routes import NO_ROUTE, has_route
from idlm.models.sources import first_line, read_json

SDAR = "sdar"
"""The model_type of published I-DLM checkpoints. It is Qwen3 under another name, so the code in the
checkpoints is not needed."""

SLIDING = "sliding_attention"
FULL_ATTENTION = {"full_attention", "attention", "global", "local"}
"""GPT-Neo's local layers have a window under a name of their own."""
LAYER_KEYS = ("layer_types", "layers_block_type", "block_types", "attention_layers")
OTHER_TASK = re.compile(r"For(?!CausalLM)[A-Z]\w*$")
"""Class names of models with another head, such as LlamaForSequenceClassification."""
EXPERTS = re.compile(r"num_(\w+_)?experts|n_routed_experts|moe_num_experts")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def read_config(folder: Path, max_model_len: int | None = None) -> PreTrainedConfig:
    """The transformers config of a model folder or GGUF file. No code from the folder is run.

    `max_model_len` limits the context, which makes some architectures exact.

    Raises:
        InputError: there is no valid config.json, or the architecture is refused; the message says
            why.
    """
    if (folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
        raise InputError(
            f"{str(folder)!r} is an adapter; "
            "give its base as the model and this folder as the adapter"
        )
    if (folder / "adapter_config.json").exists():  # transformers, with peft, would merge the two
        raise InputError(
            f"{str(folder)!r} holds a model and an adapter (adapter_config.json); "
            "move the adapter into a folder of its own, and give it as the adapter"
        )
    where = folder if is_gguf(folder) else folder / "config.json"
    raw = gguf_config(where) if is_gguf(where) else read_json(where)
    if raw.get("model_type") == SDAR:
        raw |= {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}
    if _was_gguf(raw):
        del raw["quantization_config"]
    _refuse_family(raw, folder)
    code = {"auto_map", "model_type", "attn_implementation", "_attn_implementation"}
    try:
        # infinity and the like, which transformers writes as {"__float__": "Infinity"}
        plain = PreTrainedConfig._decode_special_floats(raw)
        keys = {k: v for k, v in plain.items() if k not in code}
        config: PreTrainedConfig = CONFIG_MAPPING[raw["model_type"]].from_dict(keys)
        reason = (
            _experts(config)
            or _heads(config)
            or _layers(config)
            or _positions(config, max_model_len)
            or _attention(config)
        )
    except Exception as error:  # config classes raise many types
        text = " ".join(str(error).split())
        raise InputError(
            f"{str(where)!r} is not a valid {raw['model_type']} config: {text}"
        ) from error
    if reason is None and is_gguf(folder):
        reason = passed_over(folder, config)
    if reason is not None:
        raise InputError(f"{str(folder)!r} ({config.model_type}) {reason}")
    return config


def _was_gguf(raw: dict[str, Any]) -> bool:
    """Whether the folder was saved from a model that transformers had loaded from a GGUF file.

    Its config.json may say that it is quantised, but its tensors are floats. Quantised ones would
    have other shapes, which are refused when they are loaded.
    """
    quantised = raw.get("quantization_config")
    return isinstance(quantised, dict) and quantised.get("quant_method") == "gguf"


def _refuse_family(raw: dict[str, Any], folder: Path) -> None:
    """Raise InputError if transformers has no decoder-only model of this family."""
    family, classes = str(raw.get("model_type")), raw.get("architectures") or []
    where = f"{str(folder)!r} (model_type {family!r})"
    if family not in CONFIG_MAPPING:
        if "auto_map" in raw:
            raise InputError(
                f"{where} needs its own code, which is never run; use a model that transformers has"
            )
        raise InputError(
            f"{where} is unknown to this transformers; upgrade transformers or use another model"
        )
    if raw.get("is_encoder_decoder", getattr(CONFIG_MAPPING[family], "is_encoder_decoder", False)):
        raise InputError(f"{where} is an encoder-decoder model; use a decoder-only one")
    causal_lm = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(family)
    # exports and forks have class names of their own, such as LLaMAForCausalLM
    other_task = classes and all(OTHER_TASK.search(str(name)) for name in classes)
    if causal_lm is None or (other_task and causal_lm not in classes):
        raise InputError(
            f"{where}, architecture {classes}, is no causal language model; use a decoder-only one"
        )


def experts(keys: Mapping[Any, Any]) -> dict[str, int]:
    """The keys of a config that name a number of experts; families differ, and some nest them."""
    if keys.get("is_moe") is False:  # Doge names a number of experts, and this key turns them on
        return {}
    found = {
        str(key): value
        for key, value in keys.items()
        if EXPERTS.fullmatch(str(key)) and isinstance(value, int) and value > 1
    }
    nested = [experts(value) for value in keys.values() if isinstance(value, dict)]
    return {key: value for part in (found, *nested) for key, value in part.items()}


def _experts(config: PreTrainedConfig) -> str | None:
    """The reason to refuse a mixture of experts, else None.

    Its class must call its experts through transformers' interface; see `idlm.models.experts`.
    """
    found = experts(config.to_dict())
    if not found:
        return None
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if model_class._can_set_experts_implementation():
        return None
    key, value = next(iter(found.items()))
    return (
        f"is a mixture of experts ({key} {value}) of a kind that is not supported; "
        "use one such as qwen3_moe, mixtral or olmoe"
    )


def _heads(config: PreTrainedConfig) -> str | None:
    """The reason to refuse a model without attention of its own, else None."""
    for key in ("text_config", "vision_config", "audio_config"):
        if isinstance(getattr(config, key, None), PreTrainedConfig):
            return f"is a model of several media ({key}); use a model of text alone"
    if not isinstance(getattr(config, "num_attention_heads", None), int):
        return (
            "has no attention heads (a linear-attention or state-space model); "
            "use a model with full attention"
        )
    return None


def _layers(config: PreTrainedConfig) -> str | None:
    """The reason to refuse layers without full attention, else None."""
    window = getattr(config, "sliding_window", None)
    if window is not None and (not isinstance(window, int) or window < 1):
        return f"has sliding_window {window}, which hides every token; correct the config"
    allowed = FULL_ATTENTION if window is None else FULL_ATTENTION | {SLIDING}
    for key in LAYER_KEYS:
        for kind in getattr(config, key, None) or []:
            if kind == "sliding_attention" and window is None:
                return (
                    f"has {kind} layers ({key}), but no sliding_window; "
                    "correct config.json, or use another model"
                )
            if kind not in allowed:
                return (
                    f"has {kind} layers ({key}), which are not supported yet; "
                    "use a model with full attention"
                )
    return None


def layer_windows(config: PreTrainedConfig) -> list[int | None]:
    """The sliding window of each layer by its config; None if it hides no token of the context."""
    local = getattr(config, "attention_layers", None)  # GPT-Neo's names
    window = getattr(config, "window_size" if local else "sliding_window", None)
    if not window or not getattr(config, "use_sliding_window", True):
        return [None] * config.num_hidden_layers
    kinds = local or getattr(config, "layer_types", None) or [SLIDING] * config.num_hidden_layers
    hides = window < _context(config)
    return [window if kind in (SLIDING, "local") and hides else None for kind in kinds]


def _attention(config: PreTrainedConfig) -> str | None:
    """The reason to refuse the kind of attention or weights, else None."""
    if getattr(config, "alibi", False):
        return "adds ALiBi biases to attention, which is not supported; use a model without them"
    if getattr(config, "quantization_config", None) is not None:
        return "is quantised (quantization_config); use the unquantised weights"
    return None


def _positions(config: PreTrainedConfig, max_model_len: int | None) -> str | None:
    """The reason to refuse the positions of a context, else None."""
    most = _context(config)
    if not most and not has_route(config):  # the advice below would not help
        return f"cannot be expressed: {NO_ROUTE}"
    if max_model_len is None and not most:
        return (
            "has no max_position_embeddings in its config; "
            "give its context as max_model_len (--max-model-len)"
        )
    if max_model_len is not None and most and max_model_len > most:
        return f"has a context of {most}, below max_model_len {max_model_len}; give at most {most}"
    moving = fixed_until(config)
    if moving is not None and context_length(config, max_model_len) > moving[1]:
        kind, limit = moving
        return (
            f"has rope_type {kind}, which changes what was computed when a text outgrows {limit} "
            f"tokens; limit the context to them: max_model_len={limit} (--max-model-len {limit})"
        )
    return None


def _context(config: PreTrainedConfig) -> int:
    return int(getattr(config, "max_position_embeddings", None) or 0)


def context_length(config: PreTrainedConfig, max_model_len: int | None = None) -> int:
    """The most positions of a sequence, prompt and output together."""
    return int(max_model_len or config.max_position_embeddings)


def read_tokenizer(folder: Path, config: PreTrainedConfig) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a folder or GGUF file; None if it has none. No code from the folder is run.

    Raises:
        InputError: the tokenizer's files cannot be read.
    """
    if not is_gguf(folder) and not any((folder / name).exists() for name in TOKENIZER_FILES):
        return None
    try:
        if is_gguf(folder):
            return gguf_tokenizer(folder)
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, config=config, trust_remote_code=False, local_files_only=True
        )
    except InputError:
        raise
    except Exception as error:  # the tokenizers library raises bare Exception
        raise InputError(
            f"the tokenizer in {str(folder)!r} cannot be read: {first_line(error)}"
        ) from error
    return tokenizer


def mask_token(
    config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[int, str]:
    """The MASK id and its source: "config.json", "tokenizer", or "added" (id V, a new row).

    Raises:
        InputError: the id is not in 0 to V.
    """
    rows = int(config.vocab_size)
    mask, source = getattr(config, "mask_token_id", None), "config.json"
    if mask is None and tokenizer is not None:
        mask, source = tokenizer.mask_token_id, "tokenizer"
    if mask is None:
        return rows, "added"
    if isinstance(mask, bool) or not isinstance(mask, int) or not 0 <= mask <= rows:
        raise InputError(
            f"mask_token_id {mask!r} ({source}) is outside the vocabulary of {rows}; "
            "name one of its rows"
        )
    return mask, source


def trained_block_size(config: PreTrainedConfig) -> int | None:
    """The block size in the config of a fully fine-tuned I-DLM; None for an AR model.

    `mask_token_id` must be there too, since some AR configs use `block_size` for their context.

    Raises:
        InputError: it is not a positive integer.
    """
    block = getattr(config, "block_size", None)
    if block is None or getattr(config, "mask_token_id", None) is None:
        return None
    if isinstance(block, bool) or not isinstance(block, int) or block < 1:
        raise InputError(
            f"block_size {block!r} in config.json is not a positive integer; correct it"
        )
    return block
