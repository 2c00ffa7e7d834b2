"""The tensors of a checkpoint, from headers alone, and the fingerprint of a model's weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from idlm.errors import InputError
from idlm.models.gated_lora import GatedLinear, MaskEmbedding, adapter_parameters
from idlm.models.gguf_header import is_gguf, read_header
from idlm.models.sources import read_json
from idlm.models.tensor_info import TensorInfo
from idlm.models.transposed import TransposedLinear

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
CHUNK = 4 << 20
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def model_tensors(folder: Path) -> dict[str, TensorInfo]:
    """The tensors of a model folder or GGUF file, by name.

    Raises:
        InputError: there are no safetensors weights (pickles are never read), a shard is missing,
            or a file is truncated.
    """
    if is_gguf(folder):
        return read_header(folder).tensors
    return {
        name: info for file in _weight_files(folder) for name, info in file_tensors(file).items()
    }


def _weight_files(folder: Path) -> list[Path]:
    """The files that transformers loads, and no others: a single file comes before an index, which
    may be left over from an earlier save, and a name in config.json before both."""
    config = folder / "config.json"
    named = read_json(config).get("transformers_weights") if config.exists() else None
    if named is not None and Path(str(named)).name != named:
        raise InputError(
            f"{str(config)!r} has transformers_weights {named!r}; name a file of its folder"
        )
    for name in [SINGLE, INDEX] if named is None else [named]:
        path = folder / name
        if path.exists():
            return _shards(path) if name.endswith(".index.json") else [path]
    if named is not None:
        raise InputError(
            f"no {named} in {str(folder)!r}, which its config.json names; download it again"
        )
    pickles = sorted(
        p.name for pattern in PICKLES for p in folder.glob(pattern) if p.name != "training_args.bin"
    )
    if pickles:
        raise InputError(
            f"{str(folder)!r} has pickle weights only ({pickles[0]}); save it as safetensors first"
        )
    raise InputError(f"no {SINGLE} in {str(folder)!r}; give a folder with safetensors weights")


def _shards(index: Path) -> list[Path]:
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise InputError(f"{str(index)!r} has no weight_map; download it again")
    return [index.parent / Path(str(name)).name for name in sorted(set(shards.values()))]


def file_tensors(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file, from its header.

    The format is: n as 8 bytes, n bytes of JSON, the bytes of the tensors.

    Raises:
        InputError: there is no such file, or its size is not the one that its header implies.
    """
    if not path.exists():
        raise InputError(f"no {path.name} in {str(path.parent)!r}; download it again")
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(length, size)))
        header.pop("__metadata__", None)
        tensors = {name: _info(path, entry, 8 + length) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(
            f"{str(path)!r} is truncated or no safetensors file; download it again"
        ) from None
    expected = max((info.stop for info in tensors.values()), default=8 + length)
    if size != expected:
        raise InputError(
            f"{str(path)!r} has {size} bytes, not the {expected} its header names; "
            "download it again"
        )
    return tensors


def _info(path: Path, entry: dict[str, list[int]], data: int) -> TensorInfo:
    start, stop = entry["data_offsets"]
    return TensorInfo(path, str(entry["dtype"]), tuple(entry["shape"]), data + start, data + stop)


_known: WeakKeyDictionary[PreTrainedModel, str] = WeakKeyDictionary()
"""The fingerprints of models that came from files: a server that loads adapters while it runs must
not hash its base again."""


def fingerprint(model: PreTrainedModel) -> str:
    """sha256 of a model's base weights. It does not depend on an adapter or on the loaded dtype.

    It covers the name, dtype, shape and bytes of each tensor as stored in the model's folder or
    GGUF file, so a GGUF file and a folder that was made from it are different bases. A model
    without either is hashed in memory. Tensors are hashed in parallel: about a second per GB on two
    cores.
    """
    folder = Path(model.name_or_path or "")
    if model in _known:
        return _known[model]
    if model.name_or_path and (is_gguf(folder) or any(folder.glob("*.safetensors"))):
        _known[model] = folder_fingerprint(folder)
        return _known[model]
    return _digest(
        (name, _dtype_name(t), tuple(t.shape), _hash_tensor(t))
        for name, t in _base_parameters(model).items()
    )


def folder_fingerprint(folder: Path) -> str:
    """`fingerprint` of the model in a folder or GGUF file, without loading it."""
    tensors = model_tensors(folder)
    with ThreadPoolExecutor() as pool:
        hashes = list(pool.map(_hash_stored, tensors.values()))
    return _digest(
        (n, t.dtype, t.shape, h) for (n, t), h in zip(tensors.items(), hashes, strict=True)
    )


def _digest(parts: Iterable[tuple[str, str, tuple[int, ...], str]]) -> str:
    return hashlib.sha256(json.dumps(sorted(parts)).encode()).hexdigest()


def _hash_stored(info: TensorInfo) -> str:
    digest = hashlib.sha256()
    with info.file.open("rb") as file:
        file.seek(info.start)
        left = info.stop - info.start
        while left and (chunk := file.read(min(CHUNK, left))):
            digest.update(chunk)
            left -= len(chunk)
    return digest.hexdigest()


def _hash_tensor(tensor: Tensor) -> str:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().data).hexdigest()


def _dtype_name(tensor: Tensor) -> str:
    return next(name for name, dtype in DTYPES.items() if dtype == tensor.dtype)


def _base_parameters(model: PreTrainedModel) -> dict[str, Tensor]:
    """The base's parameters as transformers stores them: with their names without an adapter, tied
    ones once, GPT-2's weights as [in, out]."""
    wrapped = {
        name
        for name, module in model.named_modules()
        if isinstance(module, (GatedLinear, MaskEmbedding))
    }
    of_adapter = adapter_parameters(model)
    transposed = {id(m.weight) for m in model.modules() if isinstance(m, TransposedLinear)}
    parameters: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        owner, _, last = name.rpartition(".base.")
        if name not in of_adapter:
            stored = parameter.T if id(parameter) in transposed else parameter
            parameters[f"{owner}.{last}" if owner in wrapped else name] = stored
    return parameters


def whole(weight: Tensor) -> Tensor:
    """A weight that training shards over ranks, gathered: all ranks call it. Others as they are."""
    gathered: Tensor = weight.full_tensor() if isinstance(weight, DTensor) else weight
    return gathered.detach()


@torch.no_grad()
def fill(weight: Tensor, value: Tensor) -> None:
    """Copy a whole `value` into a weight, or this rank's part of it into one that is sharded."""
    if isinstance(weight, DTensor):
        value = value.to(weight.device)
        value = distribute_tensor(value, weight.device_mesh, weight.placements, src_data_rank=None)
    weight.copy_(value)


def embedding_rows(model: PreTrainedModel) -> Tensor:
    """The input embedding's weight [rows, D]."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight


def output_head(model: PreTrainedModel) -> nn.Linear:
    """The layer that turns hidden states into logits."""
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    assert isinstance(head, nn.Linear)
    return head
