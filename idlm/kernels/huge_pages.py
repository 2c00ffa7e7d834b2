"""Memory in huge pages, for weights, which every step reads in full.

A step of one row reads all weights once. With pages of 4 KiB the processor translates an address
every 64 cache lines, through two tables on a virtual machine; with pages of 2 MiB, every 32,768
lines. Linux provides huge pages if `transparent_hugepage` is `madvise` or `always`.
"""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor

HUGE = 2 << 20
LINE = 64


def in_huge_pages(tensors: list[Tensor]) -> list[Tensor]:
    """Copy dense CPU tensors into one allocation of huge pages; without a copy if the system has
    none."""
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    starts, end = [], 0
    for tensor in tensors:
        starts.append(end)
        end += -(-tensor.nbytes // LINE) * LINE
    if advice is None or not end:
        return tensors
    memory = mmap.mmap(-1, end + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(advice)
    buffer = torch.frombuffer(memory, dtype=torch.uint8)
    aligned = buffer[-buffer.data_ptr() % HUGE :]  # from the start of a huge page
    return [
        _copy_into(aligned[start:], tensor) for tensor, start in zip(tensors, starts, strict=True)
    ]


def give_back() -> None:
    """Return freed memory to the system: glibc keeps blocks below 32 MiB."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _copy_into(memory: Tensor, tensor: Tensor) -> Tensor:
    """A copy of `tensor` at the start of `memory`, a uint8 tensor that is long enough."""
    copy = memory[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
    copy.copy_(tensor)
    return copy
