"""`stacked`: the low-rank updates of layers with the same input, as one `Update`.

Shapes as in `idlm.kernels.layer_ops`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from idlm.kernels.layer_ops import Update
from idlm.models.gated_lora import GatedLinear, LowRank

MULTIPLE = 8
"""Ranks are padded to a multiple of it, so that rows begin at multiples of 16 bytes."""


@torch.no_grad()
def stacked(layers: Sequence[nn.Module], adapters: int) -> Update:
    """The updates of all adapters of `layers`, some of which may have none. The adapters' matrices
    become slices of these, so they take no more memory."""
    bases: list[Any] = [each.base if isinstance(each, GatedLinear) else each for each in layers]
    updates = [each.updates() if isinstance(each, GatedLinear) else [] for each in layers]
    ranks = [sum(len(one.a) for one in each) for each in updates]
    rank = -(-max(ranks) // MULTIPLE) * MULTIPLE
    weight, widths = bases[0].weight, tuple(base.out_features for base in bases)
    a = weight.new_zeros(len(layers), rank, weight.shape[1])
    b = weight.new_zeros(sum(widths), rank)
    owners = torch.full((len(layers), rank), -1)
    scales = torch.zeros(len(layers), adapters)
    for number, (layer, own, outputs) in enumerate(
        zip(layers, updates, b.split(widths), strict=True)
    ):
        at, moved = 0, []
        for one in own:
            part = slice(at, at + len(one.a))
            a[number, part], outputs[:, part] = one.a, one.b
            owners[number, part], scales[number, one.number] = one.number, one.scale
            moved.append(one._replace(a=a[number, part], b=outputs[:, part]))
            at = part.stop
        if isinstance(layer, GatedLinear):
            _move(layer, moved)
    device = weight.device
    return Update(a.flatten(0, 1), b, owners.flatten().to(device), scales.to(device), widths)


def _move(layer: GatedLinear, updates: Sequence[LowRank]) -> None:
    first, *layer.more = updates
    if layer.lora_A.dtype == first.a.dtype:
        layer.lora_A.data, layer.lora_B.data = first.a, first.b
