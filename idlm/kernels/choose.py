"""The implementation of `law.choose`: decided once, when an engine starts."""

from __future__ import annotations

from importlib.util import find_spec

import torch

from idlm.decoding.law import Chooser, choose


def chooser(device: torch.device) -> Chooser:
    """The Triton kernel on a GPU with Triton, else `law.choose`; both choose the same tokens.

    The PyTorch function writes float64 noise for the whole vocabulary to memory, many times the
    size of the logits. The kernel computes a token's noise when it reads its score.
    """
    if device.type != "cuda" or find_spec("triton") is None:
        return choose
    from idlm.kernels.choose_triton import choose_rows  # Triton is optional

    return choose_rows
