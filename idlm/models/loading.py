"""`load`: a folder, a GGUF file, a hub id or a bundled name becomes an `Idlm`, with an adapter or
without; and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from logging import ERROR
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from idlm.errors import InputError
from idlm.models import adapter as adapters
from idlm.models.architecture import mask_token, read_config, read_tokenizer, trained_block_size
from idlm.models.attention import NAME, attend
from idlm.models.gguf_checkpoint import auto_dtype, dequantised, origin
from idlm.models.gguf_header import is_gguf
from idlm.models.idlm_model import Idlm
from idlm.models.sources import first_line, resolve
from idlm.models.tensor_info import TensorInfo
from idlm.models.weights import embedding_rows, model_tensors, output_head

FLOATS = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

PROBE_POSITIONS = (0, 1, 2, 1)
PROBE_VISIBLE = ((1, 0, 0, 0), (1, 1, 0, 0), (1, 1, 1, 0), (1, 0, 0, 1))
"""Four rows with two continuations of the first: rows 0, 1, 2 are one text and rows 0, 3 another.
"""

PROBE_TOLERANCE = {
    torch.float64: 1e-5,
    torch.float32: 1e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 6e-2,
}
"""Largest relative difference (2-norm of the logits) due to rounding; eager softmax is float32 even
in float64."""


def load(
    path_or_hub_id: str | Path,
    adapter: str | Path | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
) -> Idlm:
    """Load a model that can be asked for rows.

    Args:
        path_or_hub_id: a folder, a GGUF file, a hub id, or "nano", "nano-base", "nano-full".
        adapter: a gated LoRA's folder or hub id; "nano" brings its own.
        dtype: of the model: "auto", "float64", "float32", "bfloat16", "float16". "auto" is as
            stored; on a CPU, where PyTorch is slow in 16 bits, float32, which holds 16-bit weights
            as they are (an engine's linear layers then hold bfloat16 again: see `weights` of
            `LLM`). A GGUF file's quantised weights become float32.
        device: where to put the weights.

    Raises:
        InputError: whatever cannot be loaded, in one line: what it is and what to do.
    """
    kind, place = _dtype(dtype), _device(device)
    folder, bundled = resolve(path_or_hub_id)
    if bundled is not None and adapter is not None:
        raise InputError(
            f"{path_or_hub_id!r} brings its own adapter; name nano-base to give adapter={str(adapter)!r}"
        )
    extra = bundled if adapter is None else resolve(adapter)[0]
    config = read_config(folder)
    tokenizer = read_tokenizer(folder, config)
    mask_id, source = mask_token(config, tokenizer)
    if extra is None and source == "config.json" and mask_id == config.vocab_size:
        raise InputError(
            f"mask_token_id {mask_id} is outside the vocabulary of {config.vocab_size}; give an adapter with its row"
        )
    model = _read_model(folder, config, kind)
    stored = model.dtype
    if kind == "auto" and place.type == "cpu" and stored in (torch.bfloat16, torch.float16):
        model.float()  # type: ignore[no-untyped-call]
    model.to(place)  # type: ignore[arg-type]  # transformers' decorator hides the signature
    name, block = str(path_or_hub_id), trained_block_size(config)
    idlm = Idlm(model, tokenizer, mask_id, block_size=block, name=name, stored=stored)
    check_architecture(idlm)
    if extra is not None:
        own = mask_id if mask_id < config.vocab_size else None
        idlm.gate, idlm.mask_id, idlm.block_size = adapters.load_into(model, extra, own)
    return idlm


def _dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    if dtype == "auto" or dtype in FLOATS.values():
        return dtype
    if dtype not in FLOATS:
        raise InputError(f"dtype {str(dtype)!r} is unknown; use auto, {', '.join(FLOATS)}")
    return FLOATS[str(dtype)]


def _device(device: str | torch.device) -> torch.device:
    try:
        place = torch.empty(0, device=device).device  # "cuda" gets its number
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(
            f"device {str(device)!r} cannot be used ({first_line(error)}); use cpu, or cuda where there is one"
        ) from None
    return place


def _read_model(
    folder: Path, config: PreTrainedConfig, dtype: str | torch.dtype
) -> PreTrainedModel:
    """transformers' own model with its weights, complete and of the right shapes."""
    tensors = model_tensors(folder)  # refuses pickles and truncated files by name
    if is_gguf(folder) and dtype == "auto":
        dtype = auto_dtype(tensors)
    try:
        with _quiet(), _origin(folder) as (place, more):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                place,
                **more,
                config=config,
                dtype=dtype,
                attn_implementation=NAME,
                trust_remote_code=False,
                local_files_only=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except Exception as error:  # each family has its own kinds of error
        raise InputError(
            f"{str(folder)!r} cannot be loaded as {config.model_type} ({_kind(error)}); use another model"
        ) from error
    model: PreTrainedModel = loaded[0]
    report: dict[str, set[Any]] = loaded[1]
    misshapen = [
        f"{name} {list(stored)} not {list(wanted)}"
        for name, stored, wanted in report["mismatched_keys"]
    ]
    for problem, found in (
        ("misshapen", misshapen),
        ("missing", report["missing_keys"]),
        ("unexpected", report["unexpected_keys"]),
    ):
        if found:
            raise InputError(
                f"{str(folder)!r} has {len(found)} {problem} tensors, {min(found)} first; download it again"
            )
    if is_gguf(folder):
        _check_all_used(folder, model, tensors)
        model.name_or_path = str(folder)
    return model


@contextmanager
def _origin(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Where transformers is to look for weights, and the arguments that this needs."""
    if is_gguf(folder):
        with origin(folder) as (empty, more):
            yield empty, more | {"quantization_config": dequantised()}
    else:
        yield folder, {"use_safetensors": True}


def _check_all_used(path: Path, model: PreTrainedModel, tensors: Mapping[str, TensorInfo]) -> None:
    """transformers passes over tensors of a GGUF file that it has no place for: biases, say, or
    scales of rotations."""
    stored, loaded = (
        sum(info.count for info in tensors.values()),
        sum(p.numel() for p in model.parameters()),
    )
    if stored != loaded:
        raise InputError(
            f"{str(path)!r} holds {stored} weights, but a {model.config.model_type} of its sizes has {loaded}; "
            "use the model's original folder"
        )


class _Probe:
    """A cache that keeps nothing and notes which layers asked it."""

    def __init__(self, visible: Tensor) -> None:
        self.visible = visible
        self.layers: list[int] = []

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        self.layers.append(layer)
        return attend(query, key, value, self.visible, scale)


def _kind(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' bar and its multi-line warnings away: what they warn of becomes one error
    here."""
    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(ERROR)
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def check_architecture(idlm: Idlm) -> None:
    """Run four rows through the model's stock path and through ours; they must agree, and each
    layer must write once.

    This finds what configs have no common word for: scaled logits, ALiBi, attention sinks, layers
    that drop `visible` or share their keys.

    Raises:
        InputError: they disagree, or the model cannot run this way at all.
    """
    step = max(1, idlm.vocab_size // 5)
    tokens = torch.tensor([k * step % idlm.vocab_size for k in range(1, 5)], device=idlm.device)
    positions = torch.tensor(PROBE_POSITIONS, device=idlm.device)
    visible = torch.tensor(PROBE_VISIBLE, dtype=torch.bool, device=idlm.device)
    cache = _Probe(visible[None, None])
    what = f"{idlm.name!r}: the architecture {type(idlm.model).__name__} cannot be expressed"
    try:
        ours = _our_logits(idlm, tokens, positions, cache).double()
        stock = _stock_logits(idlm.model, tokens).double()
    except Exception as error:  # whatever a foreign forward raises
        raise InputError(f"{what} ({_kind(error)}); use another model") from error
    if cache.layers != list(range(idlm.model.config.num_hidden_layers)):
        raise InputError(
            f"{what}: its layers write keys in the order {cache.layers}; use another model"
        )
    apart, size = float((ours - stock).norm()), float(stock.norm())
    if not apart <= PROBE_TOLERANCE[idlm.dtype] * size:
        raise InputError(
            f"{what}: its logits differ from transformers' own by {apart:.2g} of {size:.2g}; use another model"
        )


@torch.inference_mode()
def _our_logits(idlm: Idlm, tokens: Tensor, positions: Tensor, cache: _Probe) -> Tensor:
    """Logits [4, V] of the probe's rows in one forward."""
    return idlm.head(idlm.hidden(tokens[None], positions[None], None, cache=cache))[0]


@torch.inference_mode()
def _stock_logits(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Logits [4, V] of the probe's rows by transformers' eager attention, one text at a time."""
    model.set_attn_implementation("eager")
    try:
        first = model(input_ids=tokens[None, :3], use_cache=False).logits[0]
        other = model(input_ids=tokens[None, [0, 3]], use_cache=False).logits[0, 1:]
    finally:
        model.set_attn_implementation(NAME)
    return torch.cat([first, other])


@torch.no_grad()
def ensure_mask_row(idlm: Idlm) -> None:
    """Give the embedding (and the head) a row for MASK where it has none: the mean of the others.
    For full fine-tuning.

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


def save_full(idlm: Idlm, folder: str | Path, block_size: int | None) -> None:
    """Write a fully trained model with its tokenizer; its config names the MASK id and the block
    size.

    Raises:
        InputError: the model has an adapter, or no MASK row although it was trained to draft.
    """
    if idlm.gate is not None:
        raise InputError(f"{idlm.name!r} has an adapter; save it with idlm.models.adapter.save")
    rows = embedding_rows(idlm.model).shape[0]
    if block_size is not None and idlm.mask_id >= rows:
        raise InputError(
            f"mask_token_id {idlm.mask_id} has no row in an embedding of {rows}; call ensure_mask_row first"
        )
    config = idlm.model.config
    if idlm.mask_id < rows:
        config.mask_token_id = idlm.mask_id
    config.block_size = block_size
    with _quiet():
        idlm.model.save_pretrained(folder)
    if idlm.tokenizer is not None:
        idlm.tokenizer.save_pretrained(folder)
