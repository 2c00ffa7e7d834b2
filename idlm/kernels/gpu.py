"""Whether the Triton kernels can be used."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

TRITON_TYPES = (torch.float16, torch.bfloat16, torch.float32)


def use_triton(like: Tensor) -> bool:
    """Whether the Triton kernels support the type and device of `like`; else PyTorch is used."""
    return like.is_cuda and like.dtype in TRITON_TYPES and find_spec("triton") is not None
