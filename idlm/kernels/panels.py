"""`Panels`: a linear layer's weights as the C kernels read them (csrc/linear.c): in float32,
bfloat16 or int8.

A general matrix product takes a whole matrix; a decode step has 1 to 64 rows, so what counts is to
read each weight once, from end to end. bfloat16 halves what is read and int8 quarters it. Sums and
activations stay float32; for int8, a row of activations is rounded to 16 bits and products are
added exactly. uint8 holds int8's codes plus 128, for MASK rows alone: their activations are rounded
to 8 bits.

Shapes: N outputs, K inputs, P = N / 32 rounded up, g inputs side by side (see `SIDE`), T = K / g
rounded up, C = K / 128 rounded up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from idlm.kernels import native

PANEL, GROUP = 32, 128
MOST, SHIFT = 127, 128
SIDE = {"float32": 1, "bfloat16": 2, "int8": 2, "uint8": 4}
"""How many inputs lie side by side, by format."""
FORMATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
"""What linear layers can hold their weights in on a CPU, by the name that users give."""


class Panels(NamedTuple):
    """One layer.

    Attributes:
        weights: [P, T, 32, g]; what lies past N or K is 0.
        scales: float32 [P, C, 32] for int8 and uint8: 128 inputs of an output share one; else
            empty.
        out: N; inner: K.
    """

    weights: Tensor
    scales: Tensor
    out: int
    inner: int

    @classmethod
    def of(cls, weight: Tensor, format: str) -> Panels:
        """From `weight` [N, K]. The largest weight that shares a scale gets the code +-127."""
        out, inner = weight.shape
        source, scales = weight.detach().float(), weight.new_empty(0, dtype=torch.float32)
        if format in ("int8", "uint8"):
            source, scales = _codes(source)
        if format == "uint8":
            source = source + SHIFT
        group = SIDE[format]
        padded = F.pad(source.to(getattr(torch, format)), (0, -inner % group, 0, -out % PANEL))
        split = padded.view(-1, PANEL, padded.shape[1] // group, group)
        return cls(split.transpose(1, 2).contiguous(), scales, out, inner)

    def matrix(self) -> Tensor:
        """What the panels stand for: float32 [N, K]."""
        whole = self.weights.transpose(1, 2).flatten(2).float()
        if self.weights.dtype == torch.uint8:
            whole = whole - SHIFT
        if self.scales.numel():
            scales = self.scales.transpose(1, 2).repeat_interleave(GROUP, 2)
            whole = whole * scales[..., : whole.shape[2]]
        return whole.flatten(0, 1)[: self.out, : self.inner]


def _codes(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers [N, K] and the scales [P, C, 32] that make `weight` [N, K] of them."""
    out, inner = weight.shape
    groups = F.pad(weight, (0, -inner % GROUP)).view(out, -1, GROUP)
    scales = groups.abs().amax(dim=2) / MOST
    codes = groups / scales.clamp(min=torch.finfo(torch.float32).tiny)[..., None]
    panels = F.pad(scales, (0, 0, 0, -out % PANEL)).view(-1, PANEL, scales.shape[1])
    return codes.round().flatten(1)[:, :inner], panels.transpose(1, 2).contiguous()


def draft_format() -> str:
    """Of the weights of MASK rows here: products of 8 bits pay where they are one instruction."""
    target = native.instruction_set()
    return "uint8" if target is not None and target.dot4 else "int8"


def stacked(weights: Sequence[Tensor], format: str) -> tuple[Tensor, Tensor]:
    """Panels [A, P, T, 32, g] and scales [A, P, C, 32] of one layer's weights by adapter."""
    each = [Panels.of(weight, format) for weight in weights]
    return torch.stack([one.weights for one in each]), torch.stack([one.scales for one in each])
