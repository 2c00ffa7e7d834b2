"""`preflight`: checks what an engine is asked for before any weight is read, which can take
minutes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, PreTrainedConfig

from idlm.config import EngineConfig
from idlm.engine.memory import check_kv_memory
from idlm.engine.products import check_weights
from idlm.engine.shapes import attention_shapes
from idlm.errors import InputError
from idlm.models import adapter as adapters
from idlm.models.architecture import mask_token, read_config, read_tokenizer, trained_block_size
from idlm.models.check import prepare
from idlm.models.gguf_header import is_gguf
from idlm.models.idlm_model import Idlm
from idlm.models.parallel import check_split
from idlm.models.placement import named_dtype, usable_device
from idlm.models.quiet import quiet
from idlm.models.routes import implementation
from idlm.models.sources import resolve

HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Wanted:
    """What an engine is asked for; the fields are the arguments of `LLM`."""

    model: str
    adapters: Iterable[str | Path] = ()
    dtype: str | torch.dtype = "auto"
    device: str = "cpu"


@dataclass(frozen=True)
class Drafting:
    """Whether a model has a MASK row to draft with, and whether it was trained to."""

    possible: bool
    trained: bool


def preflight(wanted: Wanted, config: EngineConfig) -> Drafting:
    """Check the arguments; returns what the model's files say about drafts.

    Loading checks the same again, and what only the weights tell.

    Raises:
        InputError: an argument cannot be used; the message says why and what to do.
    """
    dtype, device = named_dtype(wanted.dtype), torch.device(usable_device(wanted.device))
    given = [resolve(folder)[0] for folder in wanted.adapters]
    infos = [adapters.read(folder) for folder in given]
    folder, bundled = resolve(wanted.model)
    hf = read_config(folder, config.max_model_len)
    mask_id, _ = mask_token(hf, read_tokenizer(folder, hf))
    dtype = _loaded(hf, dtype, device)
    check_weights(config.weights, device, dtype, config.deterministic)
    ranks = config.tensor_parallel_size
    if ranks > 1:
        if (reason := _no_ranks(config, device, folder)) is not None:
            raise InputError(f"tensor_parallel_size={ranks} {reason}")
        check_split(hf, ranks, wanted.model)
    empty = _empty(hf, dtype, wanted.model)
    if empty is not None:
        base_mask = mask_id if mask_id < hf.vocab_size else None
        for info in infos:
            adapters.check_fit(empty.model, info, base_mask)
        shapes = _shapes(empty)
        if shapes is not None:
            parts = [(heads // ranks, groups // ranks, size) for heads, groups, size in shapes]
            check_kv_memory(config, parts, dtype)
    adapted = bool(given) or bundled is not None
    trained = adapted or trained_block_size(hf) is not None
    return Drafting(adapted or mask_id < hf.vocab_size, trained)


def _no_ranks(config: EngineConfig, device: torch.device, folder: Path) -> str | None:
    """Why this machine or these options allow no split of the model; None if they do."""
    ranks, gpus = config.tensor_parallel_size, torch.cuda.device_count()
    kind, backend = device.type, {"cpu": "gloo", "cuda": "nccl"}.get(device.type)
    if is_gguf(folder):
        return f"does not go with the GGUF file {folder.name!r}; give the model's original folder"
    if config.weights != "auto":
        return f"does not go with weights={config.weights!r}; leave one of them out"
    if config.deterministic:
        return "does not go with deterministic=True; leave one of them out"
    if backend is None or device.index is not None:
        return f"does not go with device {str(device)!r}; use 'cuda' (rank k has GPU k) or 'cpu'"
    if kind == "cuda" and gpus < ranks:
        return f"needs {ranks} GPUs, and there are {gpus}; use at most as many as there are"
    if kind == "cpu" and gpus:
        return "with device 'cpu' would use the GPUs; set CUDA_VISIBLE_DEVICES to nothing"
    if not dist.is_available() or not dist.is_backend_available(backend):
        return f"needs PyTorch's {backend}, which this build has not; install another build"
    if dist.is_initialized():
        return "needs a process of its own, and this one is in a group already; close the other LLM"
    if find_spec("accelerate") is None:
        return "needs the package accelerate; install it with pip install accelerate"
    return None


def _loaded(
    config: PreTrainedConfig, dtype: str | torch.dtype, device: torch.device
) -> torch.dtype:
    """The type that `load` would give the weights, as far as the config tells."""
    if isinstance(dtype, torch.dtype):
        return dtype
    stored = getattr(config, "dtype", None)
    if not isinstance(stored, torch.dtype):
        return torch.float32
    return torch.float32 if device.type == "cpu" and stored in HALVES else stored


def _empty(config: PreTrainedConfig, dtype: torch.dtype, name: str) -> Idlm | None:
    """The model without memory for its weights; None if its code cannot do without."""
    try:
        with quiet(), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=implementation(config)
            )
        prepare(model)
    except Exception:  # model families raise many types; `load` says what is wrong
        return None
    model.name_or_path = name
    return Idlm(model, None, 0, name=name)


def _shapes(empty: Idlm) -> list[tuple[int, int, int]] | None:
    try:
        return attention_shapes(empty)[0]
    except InputError:
        raise
    except Exception:  # as above
        return None
