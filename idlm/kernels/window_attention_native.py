"""The CPU kernel of `idlm.kernels.window_attention` (window_attention.c), as a torch operator that can be traced."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from idlm.kernels.native import library

_POINTERS = ("query", "key", "value", "pages", "out", "table", "lengths", "visible", "rows")
_NUMBERS = ("batch", "real", "masks", "heads", "groups", "size", "page", "columns", "half")
_STRIDES = ("query_row", "query_head", "key_row", "key_group", "value_row", "value_group")


class _Job(ctypes.Structure):
    """`Job` of the C source, field by field."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in _NUMBERS + _STRIDES),
        ("scale", ctypes.c_double),
    ]


def available(pages: Tensor) -> bool:
    """Whether the kernel serves such pages."""
    return pages.device.type == "cpu" and _function(pages.dtype) is not None


@cache
def _function(dtype: torch.dtype) -> Any:
    found = library("window_attention", dtype)
    if found is None:
        return None
    found.attend.argtypes = [ctypes.POINTER(_Job), ctypes.c_int]
    return found.attend


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pages: Tensor,
    rows: Tensor,
    table: Tensor,
    lengths: Tensor,
    visible: Tensor | None,
    masks: int,
    scale: float,
) -> Tensor:
    query, key, value = (one if one.stride(2) == 1 else one.contiguous() for one in (query, key, value))
    rows, table, lengths = rows.contiguous(), table.contiguous(), lengths.contiguous()
    visible = None if visible is None else visible.contiguous()
    out = query.new_empty(query.shape)
    job = _Job(
        *(one.data_ptr() for one in (query, key, value, pages, out, table, lengths)),
        None if visible is None else visible.data_ptr(),
        rows.data_ptr(),
        *rows.shape,
        masks,
        *(query.shape[1], key.shape[1], query.shape[2]),
        *(pages.shape[2], table.shape[1], pages.stride(0)),
        *(query.stride()[:2] + key.stride()[:2] + value.stride()[:2]),
        scale,
    )
    if _function(pages.dtype)(ctypes.byref(job), torch.get_num_threads()):
        raise MemoryError(f"no memory for the attention of {len(query)} rows over up to {lengths.max()} cached tokens")
    return out


_library = torch.library.Library("idlm", "DEF")
_library.define(
    "window_attention(Tensor query, Tensor key, Tensor value, Tensor(a!) pages, Tensor rows, Tensor table, "
    "Tensor lengths, Tensor? visible, int masks, float scale) -> Tensor"
)
_library.impl("window_attention", _attend, "CPU")


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pages: Tensor,
    rows: Tensor,
    table: Tensor,
    lengths: Tensor,
    visible: Tensor | None,
    masks: int,
    scale: float,
) -> Tensor:
    """Write and attend: see `idlm.kernels.window_attention.attend_rows`."""
    mixed: Tensor = torch.ops.idlm.window_attention(
        query, key, value, pages, rows, table, lengths, visible, masks, scale
    )
    return mixed
