"""Gated LoRA on disk: PEFT's two files, and two for what PEFT has no field for.

    adapter_config.json         PEFT: rank, alpha, targets, layers
    adapter_model.safetensors   PEFT: base_model.model.<module>.lora_A.weight [r, in]
                                      base_model.model.<module>.lora_B.weight [out, r]
    idlm.json                   format, gating, MASK id, block size, fingerprint of the base, head,
                                entry
    mask_row.safetensors        mask_row [D]
    draft_head.safetensors      the draft head, if idlm.json names one (`idlm.models.heads`)

A PEFT folder without the last three is read as a gated LoRA too. Its MASK row is then the base's
own embedding row.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from idlm.errors import InputError
from idlm.models.entry import below_entry
from idlm.models.gate import Gate
from idlm.models.gated_lora import LoraSpec, adapter_parameters, attach
from idlm.models.heads import (
    DraftHead,
    HeadSpec,
    check_head,
    head_tensors,
    load_head,
    read_spec,
    save_head,
)
from idlm.models.idlm_model import Idlm
from idlm.models.parallel import part_of, whole_shape
from idlm.models.peft_config import refuse_features
from idlm.models.sources import read_json
from idlm.models.tensor_info import TensorInfo
from idlm.models.transposed import has_transposed
from idlm.models.weights import embedding_rows, file_tensors, fill, fingerprint, whole

__all__ = ["AdapterInfo", "fingerprint", "load_into", "read", "refill", "save"]

FORMAT = 1
CONFIG, TENSORS, EXTRA, MASK_ROW = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "idlm.json",
    "mask_row.safetensors",
)
PREFIX = "base_model.model."
TENSOR_NAME = re.compile(re.escape(PREFIX) + r"(.+)\.(lora_[AB])\.weight")

PUBLISHED_MASKS = {"qwen3": 151669}
"""The MASK id of published I-DLM adapters by base family, if the base names none: an unused row."""


@dataclass(frozen=True)
class AdapterInfo:
    """The metadata of an adapter folder. The last four are None for a folder without idlm.json."""

    folder: Path
    spec: LoraSpec
    base_name: str | None
    mask_id: int | None = None
    block_size: int | None = None
    base_fingerprint: str | None = None
    head: HeadSpec | None = None

    @property
    def ours(self) -> bool:
        """Whether idlm wrote it: it has a MASK row and the fingerprint of its base."""
        return self.base_fingerprint is not None


def read(folder: Path) -> AdapterInfo:
    """Read the JSON files of an adapter folder, and the headers of its tensors.

    Raises:
        InputError: there is no adapter, or it uses a PEFT feature that is not implemented; the
            message has the key and the value.
    """
    if folder.is_file():
        raise InputError(f"adapter {str(folder)!r} is a file; give the folder of a gated LoRA")
    config, extra = read_json(folder / CONFIG), _read_extra(folder)
    entry = 0 if extra is None else extra.entry
    refuse_features(config, f"{str(folder / CONFIG)!r}", entry)
    if not (folder / TENSORS).exists():
        raise InputError(
            f"no {TENSORS} in {str(folder)!r}; "
            "save the adapter as safetensors (pickle is never read)"
        )
    targets = sorted({module.rpartition(".")[2] for module, _ in _modules(folder)})
    rslora = bool(config.get("use_rslora"))
    spec = LoraSpec(*_rank_alpha(config, folder), tuple(targets), rslora, entry)
    base = config.get("base_model_name_or_path")
    if extra is None:
        return AdapterInfo(folder, spec, base)
    return AdapterInfo(folder, spec, base, extra.mask_id, extra.block_size, extra.base, extra.head)


def _rank_alpha(config: dict[str, Any], folder: Path) -> tuple[int, float]:
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, (int, float)):
        raise InputError(
            f"{str(folder / CONFIG)!r} has r {rank!r} and lora_alpha {alpha!r}; "
            "both must be positive numbers"
        )
    return rank, alpha


class _Extra(NamedTuple):
    """idlm.json; `base` is the fingerprint of the base."""

    mask_id: int
    block_size: int | None
    base: str
    head: HeadSpec | None
    entry: int


def _read_extra(folder: Path) -> _Extra | None:
    """The content of idlm.json; None if there is none."""
    if not (folder / EXTRA).exists():
        return None
    extra, where = read_json(folder / EXTRA), f"{str(folder / EXTRA)!r}"
    if extra.get("format") != FORMAT:
        raise InputError(
            f"{where} has format {extra.get('format')!r}, not {FORMAT}; use the idlm that wrote it"
        )
    if extra.get("gated") is not True:
        raise InputError(
            f"{where} has gated {extra.get('gated')!r}; only gated adapters are supported"
        )
    mask, block, base = (
        extra.get(key) for key in ("mask_token_id", "block_size", "base_fingerprint")
    )
    if type(mask) is not int or mask < 0:
        raise InputError(f"{where} has mask_token_id {mask!r}; it must be a token id")
    if block is not None and (type(block) is not int or block < 1):
        raise InputError(f"{where} has block_size {block!r}; it must be a positive integer or null")
    if not isinstance(base, str):
        raise InputError(
            f"{where} has base_fingerprint {base!r}; it must be a sha256 in hexadecimal"
        )
    entry = extra.get("entry", 0)
    if type(entry) is not int or entry < 0:
        raise InputError(f"{where} has entry {entry!r}; it must be a layer, 0 or more")
    return _Extra(mask, block, base, read_spec(extra.get("draft_head"), where), entry)


def _modules(folder: Path) -> dict[tuple[str, str], TensorInfo]:
    """The adapter's tensors by (module, "lora_A" or "lora_B")."""
    tensors = {}
    for name, info in file_tensors(folder / TENSORS).items():
        match = TENSOR_NAME.fullmatch(name)
        if match is None:
            raise InputError(
                f"unexpected tensor {name!r} in {str(folder / TENSORS)!r}; "
                "only lora_A and lora_B are supported"
            )
        tensors[match[1], match[2]] = info
    if not tensors:
        raise InputError(f"{str(folder / TENSORS)!r} holds no tensors; give a trained adapter")
    return tensors


def save(
    model: Idlm | PreTrainedModel,
    spec: LoraSpec,
    folder: str | Path,
    base_fingerprint: str,
    mask_id: int,
    block_size: int | None,
) -> None:
    """Write the adapter that is attached to `model` into `folder`, which is created if missing.
    If it is sharded over ranks, the others call `whole` on each of `adapter_parameters`, and
    then `head_tensors`."""
    name, inner = (
        (model.name, model.model) if isinstance(model, Idlm) else (model.name_or_path, model)
    )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: whole(p).cpu().contiguous() for key, p in adapter_parameters(inner).items()}
    head = model.draft_heads.get(0) if isinstance(model, Idlm) else None
    of_head = {} if head is None else head_tensors(head)
    row = next(t for key, t in tensors.items() if key.endswith("mask_row"))
    loras = {
        f"{PREFIX}{key}.weight": t for key, t in tensors.items() if not key.endswith("mask_row")
    }
    save_file(loras, folder / TENSORS, metadata={"format": "pt"})
    save_file({"mask_row": row}, folder / MASK_ROW, metadata={"format": "pt"})
    config = _peft_config(spec, name or "", has_transposed(inner))
    if spec.entry:
        config |= {"layers_to_transform": [*range(spec.entry, inner.config.num_hidden_layers)]}
    _write_json(folder / CONFIG, config)
    extra: dict[str, Any] = {
        "format": FORMAT,
        "gated": True,
        "mask_token_id": mask_id,
        "block_size": block_size,
    }
    extra |= {"base_fingerprint": base_fingerprint}
    if spec.entry:
        extra |= {"entry": spec.entry}
    if head is not None:
        save_head(of_head, folder)
        extra |= {"draft_head": head.spec.to_json()}
    _write_json(folder / EXTRA, extra)


def _peft_config(spec: LoraSpec, base_name: str, transposed: bool) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": spec.rank,
        "lora_alpha": int(spec.alpha) if float(spec.alpha).is_integer() else spec.alpha,
        "use_rslora": spec.rslora,
        "target_modules": list(spec.targets),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "inference_mode": True,
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def load_into(
    model: PreTrainedModel, folder: str | Path, mask_id: int | None = None
) -> tuple[Gate, int, int | None, DraftHead | None]:
    """Attach the adapter in `folder` to `model`, in place. After an error the model is unchanged.

    Args:
        model: a model without an adapter.
        folder: written by idlm or by PEFT.
        mask_id: the base's MASK id, for a folder that names none; by default the `mask_token_id` of
            the base's config.

    Returns:
        the gate, the MASK id, the trained block size (None if the folder does not say), and the
        draft head (None if it has none).

    Raises:
        InputError: the adapter is for another base, uses a feature that is not implemented, or has
            tensors of other shapes.
    """
    info = checked(model, Path(folder))
    mask, row = mask_row(model, info, mask_id)
    head = load_head(model, info.head, info.folder)
    gate = attach(model, info.spec, mask)
    _fill(model, load_file(info.folder / TENSORS), row)
    return gate, mask, info.block_size, head


def refill(model: PreTrainedModel, folder: Path, base: str) -> None:
    """Load the tensors of `folder` into the adapter of a model whose fingerprint is `base`; it has
    the same shape and may be sharded.

    Raises:
        InputError: as `load_into`.
    """
    _, row = mask_row(model, checked(model, folder, base), None)
    _fill(model, load_file(folder / TENSORS), row)


def check_fit(model: PreTrainedModel, info: AdapterInfo, base_mask: int | None) -> None:
    """Check an adapter's tensors against a model, whose own weights need not be loaded.

    Raises:
        InputError: a tensor fits no layer of the model, or there is no MASK row.
    """
    _check_modules(model, info)
    mask_row(model, info, base_mask)
    if info.head is not None:
        check_head(model, info.head, info.folder)


def checked(model: PreTrainedModel, folder: Path, base: str | None = None) -> AdapterInfo:
    """Read the folder and check that the adapter is for this model, with that fingerprint."""
    info = read(folder)
    base = base or (fingerprint(model) if info.ours else "")
    if info.ours and info.base_fingerprint != base:
        theirs = str(info.base_fingerprint)[:16]
        raise InputError(
            f"adapter {str(folder)!r} is for base {info.base_name!r} with fingerprint {theirs}, "
            f"not {model.name_or_path!r} with {base[:16]}; give the base it was trained on"
        )
    _check_modules(model, info)
    return info


def _check_modules(model: PreTrainedModel, info: AdapterInfo) -> None:
    """Check that each tensor fits a linear layer, and that each layer that `attach` will wrap has
    both tensors: those of the backbone, since BERT's head has a layer of the same name."""
    named, backbone = model.named_modules(), set(model.base_model.modules())
    linear = {
        name.removesuffix(".base"): module
        for name, module in named
        if isinstance(module, nn.Linear)
    }
    tensors, rank, where = _modules(info.folder), info.spec.rank, f"adapter {str(info.folder)!r}"
    below = below_entry(model, info.spec.entry)
    for (module, kind), tensor in tensors.items():
        if module not in linear:
            raise InputError(
                f"{where} targets {module!r}, no linear layer of {model.name_or_path!r}; "
                "give its own base"
            )
        if linear[module] not in backbone:
            raise InputError(
                f"{where} targets {module!r} of the output head, which is not supported; "
                "train it without"
            )
        if below(module):
            raise InputError(
                f"{where} targets {module!r}, below its entry at layer {info.spec.entry}; "
                "use the idlm that wrote it"
            )
        out, inner = whole_shape(linear[module])
        shape = (rank, inner) if kind == "lora_A" else (out, rank)
        if tensor.shape != shape:
            raise InputError(
                f"{where}: {module}.{kind} has shape {list(tensor.shape)}, not {list(shape)}; "
                "give its own base"
            )
    wanted = {
        (m, kind)
        for m, layer in linear.items()
        for kind in ("lora_A", "lora_B")
        if m.rpartition(".")[2] in info.spec.targets and layer in backbone and not below(m)
    }
    if missing := sorted(wanted - set(tensors)):
        raise InputError(
            f"{where} lacks {len(missing)} tensors, {'.'.join(missing[0])} first; "
            "all layers must be adapted"
        )


def mask_row(
    model: PreTrainedModel, info: AdapterInfo, base_mask: int | None
) -> tuple[int, Tensor]:
    """The MASK id and its embedding row [D]: the adapter's, else the base's."""
    weight = embedding_rows(model)
    rows, width = weight.shape
    mask, where = info.mask_id, f"adapter {str(info.folder)!r}"
    if mask is not None:
        if mask > rows:
            raise InputError(
                f"{where}: mask_token_id {mask} is outside the vocabulary of {rows}; "
                "give its own base"
            )
        return mask, _stored_row(info.folder, width)
    mask = getattr(model.config, "mask_token_id", None) if base_mask is None else base_mask
    mask = PUBLISHED_MASKS.get(model.config.model_type) if mask is None else mask
    if mask is None or not 0 <= mask < rows:
        raise InputError(
            f"{where} has no MASK row and its base names none; "
            "set mask_token_id in the base's config.json"
        )
    return mask, weight[mask].detach().clone()


def _stored_row(folder: Path, width: int) -> Tensor:
    stored = file_tensors(folder / MASK_ROW)
    if set(stored) != {"mask_row"} or stored["mask_row"].shape != (width,):
        raise InputError(
            f"{str(folder / MASK_ROW)!r} holds no mask_row of shape [{width}]; "
            "give the adapter's own base"
        )
    return load_file(folder / MASK_ROW)["mask_row"]


def _fill(model: PreTrainedModel, tensors: Mapping[str, Tensor], row: Tensor) -> None:
    for name, parameter in adapter_parameters(model).items():
        owner, _, kind = name.rpartition(".")
        value = row if kind == "mask_row" else tensors[f"{PREFIX}{name}.weight"]
        fill(parameter, part_of(model.get_submodule(owner).base, kind, value))
