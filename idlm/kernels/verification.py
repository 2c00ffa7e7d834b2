"""Verification and drafting with the fused choice of a token: argmax(logits + bias + temperature * noise) in one pass.

The PyTorch twin, `idlm.decoding.batch.choose`, writes the noise of all tokens to memory in float64, which for a
vocabulary of 150,000 is many times the logits; the Triton kernel makes each token's noise where its logit is read.
Both give the same tokens.

Shapes: B slots, R rows, K drafts, V logit columns.
"""

from __future__ import annotations

from importlib.util import find_spec

from torch import Tensor

from idlm.decoding import batch
from idlm.decoding.batch import Allow, Verdicts
from idlm.decoding.noise import Stream
from idlm.decoding.settings import Features, Settings


def use_triton(logits: Tensor) -> bool:
    """Whether the Triton kernel chooses among such logits; the PyTorch twin does among all others."""
    return logits.is_cuda and find_spec("triton") is not None


def choose(
    logits: Tensor, bias: Tensor | None, settings: Settings, sampled: bool, stream: Stream, first: Tensor
) -> Tensor:
    """A token int64 [B, R] of each row of `logits` [B, R, V]; see `idlm.decoding.batch.choose`."""
    if not use_triton(logits):
        return batch.choose(logits, bias, settings, sampled, stream, first)
    from idlm.kernels.verification_triton import choose_rows  # here, since not every machine has triton

    return choose_rows(logits, bias, settings, sampled, stream, first)


def verify(
    logits: Tensor,
    drafts: Tensor,
    valid: Tensor,
    log_q: Tensor | None,
    settings: Settings,
    features: Features,
    first: Tensor,
) -> Verdicts:
    """`idlm.decoding.batch.verify`."""
    return batch.verify(logits, drafts, valid, log_q, settings, features, first, choose)


def draft(
    logits: Tensor, settings: Settings, features: Features, first: Tensor, allow: Allow | None = None
) -> tuple[Tensor, Tensor | None]:
    """`idlm.decoding.batch.draft`."""
    return batch.draft(logits, settings, features, first, choose, allow)
