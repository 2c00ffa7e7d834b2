"""Describes a checkpoint from its configs and tensor headers, without reading weights."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedConfig

from idlm.errors import InputError
from idlm.models import adapter as adapters
from idlm.models.architecture import (
    context_length,
    experts,
    mask_token,
    read_config,
    read_tokenizer,
    trained_block_size,
)
from idlm.models.gguf_checkpoint import auto_dtype, quantisation
from idlm.models.gguf_header import is_gguf, read_header
from idlm.models.heads import model_head
from idlm.models.sources import read_json, resolve
from idlm.models.tensor_info import TensorInfo
from idlm.models.trial import try_config
from idlm.models.weights import DTYPES, model_tensors


@dataclass(frozen=True)
class Inspection:
    """The description of a checkpoint; None for what it does not say.

    Attributes:
        name: the path, hub id or bundled name that was given.
        kind: "model", "adapter", or "model with adapter".
        family: the model_type of transformers ("qwen3" for published I-DLM checkpoints).
        parameters: elements of the stored tensors; a tied head counts once.
        active_parameters: those that a token uses in a mixture of experts.
        experts: the experts of a layer; experts_per_token: those that a token uses.
        dtype: the type of most elements; for a GGUF file the type that "auto" loads it in.
        quantisation: GGUF only: the types of the tensors, by falling number of elements.
        context: the most positions of a sequence.
        mask_source: "config.json", "tokenizer", "adapter", or "added" (a new row after the last).
        adapter_entry: the layer that its MASK rows enter at, if not the first.
        draft_head: the kind of the draft head that the adapter or the model has.
        base_fingerprint: the fingerprint of the base that the adapter was trained on.
        can_decode_isd: whether it was trained to draft and can be loaded.
        reason: why it can decode ISD or not.
        max_stride: the largest trained stride, block size + 1.
    """

    name: str
    kind: str
    family: str | None = None
    parameters: int | None = None
    active_parameters: int | None = None
    experts: int | None = None
    experts_per_token: int | None = None
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
    adapter_rslora: bool | None = None
    adapter_targets: tuple[str, ...] | None = None
    adapter_entry: int | None = None
    adapter_base: str | None = None
    draft_head: str | None = None
    base_fingerprint: str | None = None
    can_decode_isd: bool = False
    reason: str = ""
    max_stride: int | None = None


def inspect_checkpoint(
    path: str | Path, adapter: str | Path | None = None, max_model_len: int | None = None
) -> Inspection:
    """Inspect a model folder, a GGUF file, an adapter folder, a hub id or a bundled name.

    `max_model_len` is that of `load`.

    Raises:
        InputError: there is nothing readable at `path`. A model that is refused is not an error;
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
    inspection = _model(Inspection(str(path), "model"), folder, max_model_len)
    if extra is None or inspection.reason.startswith("refused"):
        return inspection
    return _adapter(replace(inspection, kind="model with adapter"), extra)


def _model(inspection: Inspection, folder: Path, max_model_len: int | None) -> Inspection:
    family = (
        read_header(folder).architecture
        if is_gguf(folder)
        else read_json(folder / "config.json").get("model_type")
    )
    inspection = replace(inspection, family=family)
    try:
        config, tensors = read_config(folder, max_model_len), model_tensors(folder)
        inspection = _facts(inspection, config, tensors)
        inspection = replace(inspection, context=context_length(config, max_model_len))
        if is_gguf(folder):
            dtype = str(auto_dtype(tensors)).removeprefix("torch.")
            inspection = replace(inspection, quantisation=quantisation(tensors), dtype=dtype)
        mask, source = mask_token(config, read_tokenizer(folder, config))
        inspection = replace(
            inspection, mask_id=mask, mask_source=source, block_size=trained_block_size(config)
        )
        if (head := model_head(config, folder)) is not None:
            inspection = replace(inspection, draft_head=head.kind)
        untried = try_config(config, inspection.name, max_model_len)
    except InputError as error:
        return replace(inspection, reason=f"refused: {error}")
    inspection = _verdict(inspection, config)
    if untried is None:
        return inspection
    doubt = (
        f"; whether it loads is open, since no small model of its config could be run ({untried})"
    )
    return replace(inspection, reason=inspection.reason + doubt)


def _verdict(inspection: Inspection, config: PreTrainedConfig) -> Inspection:
    """Whether a model that loads can decode with ISD."""
    mask = inspection.mask_id
    if inspection.block_size is None:
        return replace(
            inspection,
            reason="an AR model, never trained to fill MASK tokens; convert it with idlm train",
        )
    if mask is not None and mask >= config.vocab_size:
        return replace(
            inspection,
            reason=f"refused: mask_token_id {mask} is outside "
            f"the vocabulary of {config.vocab_size}",
        )
    return _trained(inspection, "trained to fill MASK tokens")


def _facts(
    inspection: Inspection, config: PreTrainedConfig, tensors: dict[str, TensorInfo]
) -> Inspection:
    sizes: Counter[str] = Counter()
    for name, info in tensors.items():
        if not (config.tie_word_embeddings and name == "lm_head.weight"):
            sizes[info.dtype] += info.count
    common = sizes.most_common(1)[0][0] if sizes else ""
    return replace(
        _mixture(inspection, config, tensors, sizes.total()),
        family=config.model_type,
        parameters=sizes.total(),
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=getattr(config, "num_key_value_heads", config.num_attention_heads),
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        dtype=str(DTYPES[common]).removeprefix("torch.") if common in DTYPES else common or None,
    )


def _mixture(
    inspection: Inspection,
    config: PreTrainedConfig,
    tensors: dict[str, TensorInfo],
    parameters: int,
) -> Inspection:
    """The experts, and the active parameters if the names of tensors tell which are experts'."""
    count = max(experts(config.to_dict()).values(), default=None)
    used = getattr(config, "num_experts_per_tok", None)
    inactive = sum(info.count for name, info in tensors.items() if ".experts." in name)
    if count is None or not isinstance(used, int):
        return replace(inspection, experts=count)
    active = parameters - inactive * (count - used) // count if inactive else None
    return replace(inspection, experts=count, experts_per_token=used, active_parameters=active)


def _adapter(inspection: Inspection, folder: Path) -> Inspection:
    try:
        info = adapters.read(folder)
    except InputError as error:
        return replace(inspection, can_decode_isd=False, reason=f"refused: {error}")
    inspection = replace(
        inspection,
        adapter_rank=info.spec.rank,
        adapter_alpha=info.spec.alpha,
        adapter_rslora=info.spec.rslora,
        adapter_targets=info.spec.targets,
        adapter_entry=info.spec.entry or None,
        adapter_base=info.base_name,
        draft_head=None if info.head is None else info.head.kind,
        base_fingerprint=info.base_fingerprint,
        block_size=info.block_size,
    )
    if info.ours:
        inspection = replace(inspection, mask_id=info.mask_id, mask_source="adapter")
        return _trained(inspection, "a gated LoRA with its MASK row")
    if inspection.mask_source == "added":
        return replace(
            inspection,
            reason="neither the adapter nor the base has a MASK row; "
            "set mask_token_id in the base's config.json",
        )
    return _trained(inspection, "a PEFT adapter, used as a gated LoRA with the base's own MASK row")


def _trained(inspection: Inspection, why: str) -> Inspection:
    if inspection.block_size is None:
        return replace(
            inspection, can_decode_isd=True, reason=f"{why}; it does not name its block size"
        )
    stride = inspection.block_size + 1
    return replace(
        inspection,
        can_decode_isd=True,
        reason=f"{why}; strides up to {stride} were trained",
        max_stride=stride,
    )
