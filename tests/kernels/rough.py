"""The two kinds of noise of `idlm.kernels.choose_triton`, by themselves."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from idlm.kernels.choose_triton import _noise, _rough

BLOCK = 1024


@triton.jit
def _both(bits, exact, rough, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    bit = tl.load(bits + at, mask=inside, other=0)
    tl.store(exact + at, _noise(bit), mask=inside)
    tl.store(rough + at, _rough(bit), mask=inside)


def noises(bits: Tensor) -> tuple[Tensor, Tensor]:
    """The exact noise and the rough one of random numbers `bits`."""
    exact, rough = bits.double(), bits.float()
    _both[(triton.cdiv(len(bits), BLOCK),)](bits, exact, rough, len(bits), BLOCK=BLOCK)
    return exact, rough
