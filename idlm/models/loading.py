"""`load` makes an `Idlm` of a folder, GGUF file, hub id or bundled name; `save_full` writes one."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from idlm.errors import InputError
from idlm.models import experts
from idlm.models.architecture import mask_token, read_config, read_tokenizer, trained_block_size
from idlm.models.check import check_adapter, check_architecture, prepare
from idlm.models.generation import check_generation_config
from idlm.models.gguf_checkpoint import auto_dtype, dequantised, origin
from idlm.models.gguf_header import is_gguf
from idlm.models.heads import head_tensors, load_head, model_head, save_head
from idlm.models.idlm_model import Idlm
from idlm.models.more_adapters import load_first
from idlm.models.parallel import distribution, localise
from idlm.models.placement import device_of, named_dtype
from idlm.models.quiet import quiet
from idlm.models.routes import implementation
from idlm.models.sources import first_line, resolve
from idlm.models.tensor_info import TensorInfo
from idlm.models.transposed import stored_layout
from idlm.models.weights import embedding_rows, model_tensors, output_head

BUFFER = re.compile(
    r"(^|\.)(inv_freq|cos_cached|sin_cached|masked_bias|position_ids|freqs_cis|rope\.freqs)$"
)
"""Tensors that old exports stored and that models now compute from their config: rotary tables,
positions, and the value that stood for "masked"."""

FIXES = {
    "misshapen": "its config.json is of other weights; use the one that belongs to them",
    "missing": "download it again",
    "unexpected": "its config.json has no place for them; use the one that belongs to them",
}


def load(
    path_or_hub_id: str | Path,
    adapter: str | Path | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    max_model_len: int | None = None,
    ranks: int = 1,
) -> Idlm:
    """Load a model, and an adapter if there is one.

    Args:
        path_or_hub_id: a folder, a GGUF file, a hub id, or "nano", "nano-base", "nano-full".
        adapter: the folder or hub id of a gated LoRA; "nano" includes one.
        dtype: "auto", "float64", "float32", "bfloat16" or "float16". "auto" is the type of the
            checkpoint; but float32 on a CPU for 16-bit weights, which it represents exactly, since
            PyTorch is slow in 16 bits there (the linear layers of an engine then use bfloat16
            again: see `weights` of `LLM`). Quantised weights of a GGUF file become float32.
        device: the device of the weights.
        max_model_len: the context, at most the model's own.
        ranks: the processes that load a part of the model each, and call this together; see
            `idlm.models.parallel`.

    Raises:
        InputError: the model cannot be loaded; the message says why and what to do.
    """
    wanted, target = named_dtype(dtype), device_of(device)
    folder, bundled = resolve(path_or_hub_id)
    if bundled is not None and adapter is not None:
        raise InputError(
            f"{path_or_hub_id!r} brings its own adapter; "
            f"name nano-base to give adapter={str(adapter)!r}"
        )
    extra = bundled if adapter is None else resolve(adapter)[0]
    config = read_config(folder, max_model_len)
    tokenizer = read_tokenizer(folder, config)
    mask_id, source = mask_token(config, tokenizer)
    if extra is None and source == "config.json" and mask_id == config.vocab_size:
        raise InputError(
            f"mask_token_id {mask_id} is outside the vocabulary of {config.vocab_size}; "
            "give an adapter with its row"
        )
    model = _read_model(folder, config, wanted, ranks)
    stored = model.dtype
    if wanted == "auto" and target.type == "cpu" and stored in (torch.bfloat16, torch.float16):
        model.float()  # type: ignore[no-untyped-call]
    model.to(target)  # type: ignore[arg-type]  # transformers' decorator hides the signature
    idlm = Idlm(
        model,
        tokenizer,
        mask_id,
        block_size=trained_block_size(config),
        name=str(path_or_hub_id),
        stored=stored,
        max_model_len=max_model_len,
    )
    check_architecture(idlm)
    if extra is not None:
        base_mask = mask_id if mask_id < config.vocab_size else None
        load_first(idlm, extra, base_mask)
        check_adapter(idlm)
    elif (head := load_head(model, model_head(config, folder), folder)) is not None:
        idlm.draft_heads = {0: head}
    return idlm


def _read_model(
    folder: Path, config: PreTrainedConfig, dtype: str | torch.dtype, ranks: int
) -> PreTrainedModel:
    """Load the model with transformers, and check that all weights are there with their shapes."""
    tensors = model_tensors(folder)  # raises for pickles and truncated files
    with quiet():
        check_generation_config(folder)
    if is_gguf(folder) and dtype == "auto":
        dtype = auto_dtype(tensors)
    parts = {} if ranks == 1 else distribution(config, ranks, str(folder))
    try:
        with quiet(), _origin(folder) as (source, options):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source,
                **options,
                config=config,
                dtype=dtype,
                attn_implementation=implementation(config),
                experts_implementation=experts.NAME,
                trust_remote_code=False,
                local_files_only=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **parts,
            )
    except Exception as error:  # model families raise many types
        raise InputError(
            f"{str(folder)!r} cannot be loaded as {config.model_type} ({_kind(error)}); "
            "use another model"
        ) from error
    model: PreTrainedModel = loaded[0]
    report: dict[str, set[Any]] = loaded[1]
    misshapen = [
        f"{name} {list(stored)} not {list(wanted)}"
        for name, stored, wanted in report["mismatched_keys"]
    ]
    for problem, names in (
        ("misshapen", misshapen),
        ("missing", report["missing_keys"]),
        ("unexpected", [key for key in report["unexpected_keys"] if not _is_buffer(key, tensors)]),
    ):
        if names:
            raise InputError(
                f"{str(folder)!r} has {len(names)} {problem} tensors, {min(names)} first; "
                f"{FIXES[problem]}"
            )
    if is_gguf(folder):
        _check_all_used(folder, model, tensors)
    model.name_or_path = str(folder.absolute())
    if parts:
        localise(model)
    prepare(model)
    return model


def _is_buffer(key: str, tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether a tensor that the model has no place for is none of its weights.

    GPT-2's and GPT-NeoX's causal masks are called "bias" and have the shape [1, 1, n, n].
    """
    if BUFFER.search(key):
        return True
    shape = next((info.shape for name, info in tensors.items() if name.endswith(key)), ())
    return (
        key.endswith(".bias") and len(shape) == 4 and shape[:2] == (1, 1) and shape[2] == shape[3]
    )


@contextmanager
def _origin(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The folder and the keyword arguments of `from_pretrained`."""
    if is_gguf(folder):
        with origin(folder) as (empty, options):
            yield empty, options | {"quantization_config": dequantised()}
    else:
        yield folder, {"use_safetensors": True}


def _check_all_used(path: Path, model: PreTrainedModel, tensors: Mapping[str, TensorInfo]) -> None:
    """Check that the model has as many weights as the GGUF file.

    transformers silently ignores tensors that the model has no parameter for, such as biases or
    rotary scales.
    """
    stored = sum(info.count for info in tensors.values())
    loaded = sum(p.numel() for p in model.parameters())
    if stored != loaded:
        raise InputError(
            f"{str(path)!r} holds {stored} weights, but a {model.config.model_type} "
            f"of its sizes has {loaded}; use the model's original folder"
        )


def _kind(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


@torch.no_grad()
def ensure_mask_row(idlm: Idlm) -> None:
    """Add a MASK row to the embedding and the head, if they have none: the mean of the other rows.

    Full fine-tuning needs it.

    Raises:
        InputError: the model has an adapter.
    """
    if idlm.gate is not None:
        raise InputError(
            f"{idlm.name!r} has an adapter, which holds its own MASK row; load the base without it"
        )
    model, rows = idlm.model, embedding_rows(idlm.model).shape[0]
    if idlm.mask_id >= rows:
        model.resize_token_embeddings(idlm.mask_id + 1, mean_resizing=False)
        for weight in (embedding_rows(model), output_head(model).weight):
            weight[rows:] = weight[:rows].mean(dim=0)
    model.config.mask_token_id = idlm.mask_id


def save_full(
    idlm: Idlm,
    folder: str | Path,
    block_size: int | None,
    state: dict[str, Tensor] | None = None,
) -> None:
    """Write a fully fine-tuned model, its tokenizer and its draft head. MASK id, block size and the
    spec of the head are in the config.

    `state` is written instead of all weights of the model.

    Raises:
        InputError: the model has an adapter, or a block size without a MASK row.
    """
    if idlm.gate is not None:
        raise InputError(f"{idlm.name!r} has an adapter; save it with idlm.models.adapter.save")
    rows = embedding_rows(idlm.model).shape[0]
    if block_size is not None and idlm.mask_id >= rows:
        raise InputError(
            f"mask_token_id {idlm.mask_id} has no row in an embedding of {rows}; "
            "call ensure_mask_row first"
        )
    config = idlm.model.config
    if idlm.mask_id < rows:
        config.mask_token_id = idlm.mask_id
    config.block_size = block_size
    if (head := idlm.draft_heads.get(0)) is not None:
        save_head(head_tensors(head), Path(folder))
        config.draft_head = head.spec.to_json()
    elif hasattr(config, "draft_head"):
        del config.draft_head
    if state is None:
        state = stored_layout(idlm.model, idlm.model.state_dict())
    with quiet():
        idlm.model.save_pretrained(folder, state_dict=state)
    if idlm.tokenizer is not None:
        idlm.tokenizer.save_pretrained(folder)
