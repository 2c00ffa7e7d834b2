"""`Panels`: the weights of a linear layer in the layout of the C kernels (csrc/linear.c).

A decode step has few rows, so the time of a product is the time to read its weights. The kernels
read each weight once, in the order of memory. bfloat16 halves what is read, int8 quarters it. Sums
and activations are float32. With int8 a row of activations is rounded to 16 bits, and products are
added exactly. uint8 holds the int8 codes plus 128. It is for MASK rows alone, whose activations are
rounded to 8 bits.

Shapes: N outputs, K inputs, P = ceil(N / 32) panels, g inputs side by side (see `SIDE`),
T = ceil(K / g) steps, C = ceil(K / 128) groups with a scale each.
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
"""g, the inputs that are side by side in memory, by format."""
FORMATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
"""The formats that a user can choose for a CPU, by name."""


class Panels(NamedTuple):
    """The weights of a linear layer.

    Attributes:
        weights: [P, T, 32, g]; entries past N or K are 0.
        scales: float32 [P, C, 32] for int8 and uint8: GROUP inputs of an output share a scale;
            otherwise empty.
        out: N.
        inner: K.
    """

    weights: Tensor
    scales: Tensor
    out: int
    inner: int

    @classmethod
    def of(cls, weight: Tensor, format: str) -> Panels:
        """Convert `weight` [N, K]. In a group the largest absolute value gets the code +-127."""
        out, inner = weight.shape
        source, scales = weight.detach().float(), weight.new_empty(0, dtype=torch.float32)
        if format in ("int8", "uint8"):
            source, scales = _codes(source)
        if format == "uint8":
            source = source + SHIFT
        group = SIDE[format]
        padded = F.pad(source.to(getattr(torch, format)), (0, -inner % group, 0, -out % PANEL))
        split = padded.view(-1, PANEL, padded.shape[1] // group, group)  # [P, 32, T, g]
        return cls(split.transpose(1, 2).contiguous(), scales, out, inner)

    def matrix(self) -> Tensor:
        """The weights that the panels represent: float32 [N, K]."""
        values = self.weights.transpose(1, 2).flatten(2).float()  # [P, 32, T * g]
        if self.weights.dtype == torch.uint8:
            values = values - SHIFT
        if self.scales.numel():
            scales = self.scales.transpose(1, 2).repeat_interleave(GROUP, 2)  # [P, 32, C * 128]
            values = values * scales[..., : values.shape[2]]
        return values.flatten(0, 1)[: self.out, : self.inner]


def _codes(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise `weight` [N, K]: integer codes [N, K], still float32, and scales [P, C, 32]."""
    out, inner = weight.shape
    groups = F.pad(weight, (0, -inner % GROUP)).view(out, -1, GROUP)  # [N, C, 128]
    scales = groups.abs().amax(dim=2) / MOST
    codes = groups / scales.clamp(min=torch.finfo(torch.float32).tiny)[..., None]  # 0 / 0 -> 0
    panels = F.pad(scales, (0, 0, 0, -out % PANEL)).view(-1, PANEL, scales.shape[1])
    return codes.round().flatten(1)[:, :inner], panels.transpose(1, 2).contiguous()


def draft_format() -> str:
    """The format of MASK rows' weights on this machine: uint8 if the processor has VNNI."""
    target = native.instruction_set()
    return "uint8" if target is not None and target.dot4 else "int8"


def stacked(weights: Sequence[Tensor], format: str) -> tuple[Tensor, Tensor]:
    """Panels [A, P, T, 32, g] and scales [A, P, C, 32] of a layer's weights, one by adapter."""
    all_panels = [Panels.of(weight, format) for weight in weights]
    codes = torch.stack([panels.weights for panels in all_panels])
    return codes, torch.stack([panels.scales for panels in all_panels])
