"""Whether the Triton kernels can be used, and on which device they run."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec

import torch
from torch import Tensor

TRITON_TYPES = (torch.float16, torch.bfloat16, torch.float32)


def use_triton(like: Tensor) -> bool:
    """Whether the Triton kernels support the type and device of `like`; else PyTorch is used."""
    return like.is_cuda and like.dtype in TRITON_TYPES and find_spec("triton") is not None


def current(device: torch.device) -> AbstractContextManager[object]:
    """A context that makes a GPU CUDA's current device. Triton, graphs, streams and events use the
    current device, not that of their tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
