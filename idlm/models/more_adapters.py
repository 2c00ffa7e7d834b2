"""Further adapters beside the first; requests select them by name."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from idlm.errors import InputError
from idlm.models.adapter import TENSOR_NAME, TENSORS, checked, load_into, mask_row
from idlm.models.check import check_adapter
from idlm.models.entry import enter_late
from idlm.models.gated_lora import (
    LoraSpec,
    adapter_parameters,
    attach,
    attach_more,
    detach,
    gated_layers,
)
from idlm.models.heads import DraftHead, load_head
from idlm.models.idlm_model import Idlm
from idlm.models.sources import first_line, resolve
from idlm.models.weights import embedding_rows


class Loaded(NamedTuple):
    """A further adapter on the model's device, which fits the model. `tensors` maps (module,
    "lora_A" or "lora_B") to the tensor."""

    spec: LoraSpec
    tensors: dict[tuple[str, str], Tensor]
    mask_row: Tensor
    head: DraftHead | None = None


def load_more(idlm: Idlm, folder: Path) -> int:
    """Load a further adapter, which requests select by name; returns its index, from 0.

    Raises:
        InputError: as `load_into`; or its MASK id is not that of adapter 0.
    """
    if idlm.gate is None:
        base_mask = idlm.mask_id if idlm.mask_id < idlm.vocab_size else None
        load_first(idlm, folder, base_mask)
        return 0
    return attach_loaded(idlm, read_more(idlm, folder))


def load_checked(idlm: Idlm, folder: str | Path) -> None:
    """Load a further adapter, of a folder or hub id, and check that the model runs with it; errors
    as of `load_more` and `check_adapter`."""
    load_more(idlm, resolve(folder)[0])
    check_adapter(idlm)


def load_first(idlm: Idlm, folder: Path, base_mask: int | None) -> None:
    """Load the first adapter; arguments and errors as of `load_into`."""
    loaded = load_into(idlm.model, folder, base_mask)
    idlm.gate, idlm.mask_id, idlm.block_size, head = loaded
    idlm.draft_heads = {} if head is None else {0: head}


def read_more(idlm: Idlm, folder: Path) -> Loaded:
    """Read a further adapter for a model that has one, and do not change the model.

    Raises:
        InputError: as `load_more`; or there is no memory for it.
    """
    info = checked(idlm.model, folder)
    mask, row = mask_row(idlm.model, info, idlm.mask_id)
    if mask != idlm.mask_id:
        raise InputError(
            f"adapter {str(folder)!r} has mask_token_id {mask}, the first one {idlm.mask_id}; "
            "serve it apart"
        )
    try:
        # copies: a file that is mapped must not change
        tensors = {
            (match[1], match[2]): tensor.to(idlm.device, idlm.dtype, copy=True)
            for name, tensor in load_file(folder / TENSORS).items()
            if (match := TENSOR_NAME.fullmatch(name))
        }
    except (OSError, SafetensorError, RuntimeError) as error:
        raise InputError(
            f"adapter {str(folder)!r} cannot be read ({first_line(error)}); save it again"
        ) from error
    row = row.to(idlm.device, idlm.dtype, copy=True)
    for name, tensor in [("mask_row", row), *((".".join(key), t) for key, t in tensors.items())]:
        if not bool(tensor.isfinite().all()):
            raise InputError(f"adapter {str(folder)!r}: {name} is not finite; train it again")
    return Loaded(info.spec, tensors, row, load_head(idlm.model, info.head, folder))


def attach_loaded(idlm: Idlm, loaded: Loaded) -> int:
    """Attach a further adapter with its head; returns its index.

    Raises:
        InputError: its MASK rows enter at another layer than those that are there.
    """
    assert idlm.gate is not None  # noqa: S101
    spec, tensors, row, head = loaded
    if spec.entry != idlm.entry:
        alone = not gated_layers(idlm.model) and idlm.block_size is None
        if not alone:
            raise InputError(
                f"the adapter's MASK rows enter at layer {spec.entry}, those of the first at layer "
                f"{idlm.entry}; serve it apart"
            )
        enter_late(idlm.model, idlm.gate, spec.entry)
    index = attach_more(idlm.model, idlm.gate, spec, tensors, row)
    if head is not None:
        idlm.draft_heads[index] = head
    return index


def detach_loaded(idlm: Idlm, index: int) -> None:
    """Detach an adapter and its head; see `detach`."""
    assert idlm.gate is not None  # noqa: S101
    detach(idlm.model, idlm.gate, index)
    idlm.draft_heads.pop(index, None)


def attach_place(idlm: Idlm) -> None:
    """Attach adapter 0 without an update to a model without adapter, so that adapters can be
    attached beside it. Its MASK row is the base's own, if there is one."""
    weight = embedding_rows(idlm.model)
    own = idlm.mask_id < idlm.vocab_size
    idlm.gate = attach(idlm.model, None, idlm.mask_id)
    if own:
        with torch.no_grad():
            for parameter in adapter_parameters(idlm.model).values():
                parameter.copy_(weight[idlm.mask_id])
    idlm.model.requires_grad_(False)
