"""Which implementation chooses tokens: decided once, when an engine starts."""

from __future__ import annotations

from importlib.util import find_spec

import torch

from idlm.decoding.law import Chooser, choose


def chooser(device: torch.device) -> Chooser:
    """The Triton kernel on a GPU that has triton, else `law.choose`; both choose alike.

    The PyTorch function writes the noise of all tokens to memory in float64, which for a vocabulary
    of 150,000 is many times the logits; the kernel makes a token's noise where its score is read.
    """
    if device.type != "cuda" or find_spec("triton") is None:
        return choose
    from idlm.kernels.choose_triton import choose_rows  # here: not every machine has triton

    return choose_rows
