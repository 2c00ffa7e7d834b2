"""Memory in huge pages, for what every step reads from end to end.

A step of one row reads all weights once. In pages of 4 KiB that is a look-up of an address for each
64 lines, which on a virtual machine goes through two tables; in pages of 2 MiB it is one in 32,768.
Linux gives them to whoever asks, where `transparent_hugepage` is `madvise` or `always`.
"""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor

HUGE = 2 << 20
LINE = 64


def in_huge_pages(tensors: list[Tensor]) -> list[Tensor]:
    """Copies of dense CPU tensors, one behind the other in one piece of memory; the tensors
    themselves where the system has no such pages."""
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    starts, end = [], 0
    for tensor in tensors:
        starts.append(end)
        end += -(-tensor.nbytes // LINE) * LINE
    if advice is None or not end:
        return tensors
    memory = mmap.mmap(-1, end + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(advice)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    first = -whole.data_ptr() % HUGE
    return [
        _placed(one, whole[first + start :]) for one, start in zip(tensors, starts, strict=True)
    ]


def give_back() -> None:
    """Return to the system what was freed; glibc keeps pieces below 32 MiB for later."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _placed(tensor: Tensor, memory: Tensor) -> Tensor:
    """A copy at the beginning of `memory`."""
    copy = memory[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
    copy.copy_(tensor)
    return copy
