"""What is in a checkpoint, from its configs and tensor headers alone: no weights are read."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedConfig

from idlm.errors import InputError
from idlm.models import adapter as adapters
from idlm.models.architecture import mask_token, read_config, read_tokenizer, trained_block_size
from idlm.models.gguf_checkpoint import auto_dtype, quantisation
from idlm.models.gguf_header import is_gguf, read_header
from idlm.models.sources import read_json, resolve
from idlm.models.tensor_info import TensorInfo
from idlm.models.weights import DTYPES, model_tensors


@dataclass(frozen=True)
class Inspection:
    """A checkpoint's facts; None where the checkpoint does not say.

    Attributes:
        name: what was asked for.
        kind: "model", "adapter", or "model with adapter".
        family: transformers' model_type ("qwen3" for published I-DLM checkpoints).
        parameters: elements of the stored tensors, a tied head counted once.
        dtype: of most elements; for a GGUF file what dtype "auto" makes of it.
        quantisation: of a GGUF file: its tensors' types, that of most elements first.
        context: the most positions of a sequence.
        mask_source: "config.json", "tokenizer", "adapter", or "added" (a row after the vocabulary's
            last).
        base_fingerprint: of the base that the adapter was trained on.
        can_decode_isd: whether it was trained to draft and can be loaded; `reason` says why or why
            not.
        max_stride: the largest stride whose drafts were all trained, block size + 1.
    """

    name: str
    kind: str
    family: str | None = None
    parameters: int | None = None
    layers: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    hidden_size: int | None = None
    vocab_size: int | None = None
    dtype: str | None = None
    quantisation: tuple[str, ...] | None = None
    context: int | None = None
    mask_id: int | None = None
    mask_source: str | None = None
    block_size: int | None = None
    adapter_rank: int | None = None
    adapter_alpha: float | None = None
    adapter_targets: tuple[str, ...] | None = None
    adapter_base: str | None = None
    base_fingerprint: str | None = None
    can_decode_isd: bool = False
    reason: str = ""
    max_stride: int | None = None


def inspect_checkpoint(path: str | Path, adapter: str | Path | None = None) -> Inspection:
    """Inspect a model folder, a GGUF file, an adapter folder, a hub id or a bundled name.

    Raises:
        InputError: there is nothing readable at `path`. A model that is refused is no error here:
            `reason` says why.
    """
    folder, bundled = resolve(path)
    extra = bundled if adapter is None else resolve(adapter)[0]
    if (
        extra is None
        and (folder / adapters.CONFIG).exists()
        and not (folder / "config.json").exists()
    ):
        return _adapter(Inspection(str(path), "adapter"), folder)
    found = _model(Inspection(str(path), "model"), folder)
    if extra is None or found.reason.startswith("refused"):
        return found
    return _adapter(replace(found, kind="model with adapter"), extra)


def _model(found: Inspection, folder: Path) -> Inspection:
    family = (
        read_header(folder).architecture
        if is_gguf(folder)
        else read_json(folder / "config.json").get("model_type")
    )
    found = replace(found, family=family)
    try:
        config, tensors = read_config(folder), model_tensors(folder)
        found = _facts(found, config, tensors)
        if is_gguf(folder):
            dtype = str(auto_dtype(tensors)).removeprefix("torch.")
            found = replace(found, quantisation=quantisation(tensors), dtype=dtype)
        mask, source = mask_token(config, read_tokenizer(folder, config))
        found = replace(
            found, mask_id=mask, mask_source=source, block_size=trained_block_size(config)
        )
    except InputError as error:
        return replace(found, reason=f"refused: {error}")
    if found.block_size is None:
        return replace(
            found,
            reason="an AR model, never trained to fill MASK tokens; convert it with idlm train",
        )
    if mask >= config.vocab_size:
        return replace(
            found,
            reason=f"refused: mask_token_id {mask} is outside the vocabulary of {config.vocab_size}",
        )
    return _trained(found, "trained to fill MASK tokens")


def _facts(
    found: Inspection, config: PreTrainedConfig, tensors: dict[str, TensorInfo]
) -> Inspection:
    sizes: Counter[str] = Counter()
    for name, info in tensors.items():
        if not (config.tie_word_embeddings and name == "lm_head.weight"):
            sizes[info.dtype] += info.count
    common = sizes.most_common(1)[0][0] if sizes else ""
    return replace(
        found,
        family=config.model_type,
        parameters=sizes.total(),
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=getattr(config, "num_key_value_heads", config.num_attention_heads),
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        dtype=str(DTYPES[common]).removeprefix("torch.") if common in DTYPES else common or None,
        context=config.max_position_embeddings,
    )


def _adapter(found: Inspection, folder: Path) -> Inspection:
    try:
        info = adapters.read(folder)
    except InputError as error:
        return replace(found, can_decode_isd=False, reason=f"refused: {error}")
    found = replace(
        found,
        adapter_rank=info.spec.rank,
        adapter_alpha=info.spec.alpha,
        adapter_targets=info.spec.targets,
        adapter_base=info.base_name,
        base_fingerprint=info.base_fingerprint,
        block_size=info.block_size,
    )
    if info.ours:
        found = replace(found, mask_id=info.mask_id, mask_source="adapter")
        return _trained(found, "a gated LoRA with its MASK row")
    if found.mask_source == "added":
        return replace(
            found,
            reason="neither the adapter nor the base has a MASK row; set mask_token_id in the base's config.json",
        )
    return _trained(found, "a PEFT adapter, used as a gated LoRA with the base's own MASK row")


def _trained(found: Inspection, why: str) -> Inspection:
    if found.block_size is None:
        return replace(found, can_decode_isd=True, reason=f"{why}; it does not name its block size")
    stride = found.block_size + 1
    return replace(
        found,
        can_decode_isd=True,
        reason=f"{why}; strides up to {stride} were trained",
        max_stride=stride,
    )
