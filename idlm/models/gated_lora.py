"""Gated LoRA: `y = W x + g (alpha / r) B A x` with g = 1 on MASK rows and 0 on every other row.

The MASK rows of every layout are one run of rows (training puts them first, a window last), so the
gate is a slice: rows outside it are computed by the base's own kernels alone and stay bit-equal to
the base model's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from idlm.errors import InputError

NO_ROWS = slice(0, 0)


@dataclass(frozen=True)
class LoraSpec:
    """What is adapted: the rank r, alpha, and the names of the linear layers (their last path
    component)."""

    rank: int
    alpha: float
    targets: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise InputError(f"LoRA rank {self.rank} is not positive; use 8 to 128")
        if not self.targets:
            raise InputError(
                "LoRA targets are empty; name linear layers such as q_proj, v_proj, down_proj"
            )

    @property
    def scale(self) -> float:
        """alpha / r."""
        return self.alpha / self.rank


class Gate:
    """Which rows of the running forward are MASK rows, and whose; shared by all gated layers of one
    model.

    Attributes:
        rows: a slice along the row dimension.
        adapters: how many adapters the model has.
        adapter: int64 [MASK rows], which of them each MASK row uses; looked at where there are
            several.
        merged: the linear layers' products have the update in them (`merged_weights`).
    """

    def __init__(self) -> None:
        self.rows = NO_ROWS
        self.adapters = 1
        self.adapter: Tensor | None = None
        self.merged = False

    @contextmanager
    def open(self, rows: slice) -> Iterator[None]:
        """Run one forward with `rows` (along the row dimension) as its MASK rows."""
        self.rows = rows
        try:
            yield
        finally:
            self.rows = NO_ROWS


class LowRank(NamedTuple):
    """A further adapter's update of one layer: A [r, in], B [out, r], alpha / r; `number` is the
    adapter's."""

    number: int
    a: Tensor
    b: Tensor
    scale: float


class GatedLinear(nn.Module):
    """A frozen linear layer with a low-rank update on the MASK rows only.

    `more` holds other adapters' updates. All are computed for all MASK rows, and each row takes its
    own: the shapes do not depend on who is in the batch, and the cost grows with the number of
    adapters loaded.
    """

    def __init__(self, base: nn.Linear, spec: LoraSpec, gate: Gate) -> None:
        super().__init__()
        self.base = base
        self.gate = gate
        self.scale = spec.scale
        self.more: list[LowRank] = []
        self.lora_A = nn.Parameter(base.weight.new_empty(spec.rank, base.in_features))
        self.lora_B = nn.Parameter(base.weight.new_zeros(base.out_features, spec.rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """[B, Q, in] -> [B, Q, out]."""
        y: Tensor = self.base(x)
        rows = self.gate.rows
        if rows.start == rows.stop or self.gate.merged:  # plain AR pays nothing for the adapter
            return y
        masks = x[:, rows]
        update = F.linear(F.linear(masks, self.lora_A), self.lora_B)
        if self.gate.adapters == 1:
            y[:, rows].add_(update, alpha=self.scale)
            return y
        assert self.gate.adapter is not None  # noqa: S101
        updates = [(0, update * self.scale)]
        updates += [
            (more.number, F.linear(F.linear(masks, more.a), more.b) * more.scale)
            for more in self.more
        ]
        for index, one in updates:
            y[:, rows].add_(one * self.gate.adapter.eq(index)[:, None])
        return y

    @torch.no_grad()
    def merged(self) -> list[Tensor]:
        """W + (alpha / r) B A, [out, in], of each adapter."""
        weight = self.base.weight
        updates = {0: self.scale * self.lora_B @ self.lora_A}
        updates |= {more.number: more.scale * more.b @ more.a for more in self.more}
        return [
            weight + updates[number] if number in updates else weight
            for number in range(self.gate.adapters)
        ]

    def low_rank(self) -> list[Tensor]:
        """A [r, in] and B [out, r] of every adapter."""
        return [
            self.lora_A,
            self.lora_B,
            *(matrix for more in self.more for matrix in (more.a, more.b)),
        ]


class MaskEmbedding(nn.Module):
    """The base's embedding, with the MASK row kept beside it.

    `mask_id` may equal the number of rows: the base then never grows, and MASK exists only here.
    `more` holds the MASK rows of further adapters.
    """

    def __init__(self, base: nn.Embedding, mask_id: int, gate: Gate) -> None:
        super().__init__()
        self.base = base
        self.mask_id = mask_id
        self.gate = gate
        self.more: list[Tensor] = []
        self.mask_row = nn.Parameter(base.weight.detach().mean(dim=0))

    @property
    def weight(self) -> Tensor:
        """The base's rows [V, D]; transformers ties the output head to them."""
        return self.base.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, Q] -> [B, Q, D]."""
        is_mask = tokens == self.mask_id
        rows: Tensor = self.base(tokens.masked_fill(is_mask, 0))
        if not self.more:
            return torch.where(is_mask.unsqueeze(-1), self.mask_row, rows)
        masks = self.gate.rows
        if masks == NO_ROWS:
            return rows
        own = torch.stack([self.mask_row, *self.more])[self.gate.adapter]
        return torch.cat([rows[:, : masks.start], own[None], rows[:, masks.stop :]], dim=1)


def attach(model: PreTrainedModel, spec: LoraSpec, mask_id: int) -> Gate:
    """Freeze `model` and give it a gated LoRA, in place; a refused one leaves it as it was.

    Raises:
        InputError: a target names no linear layer inside the model, or the MASK id is neither a row
            of the embedding nor the one after its last.
    """
    embedding = model.get_input_embeddings()
    if not isinstance(embedding, nn.Embedding):
        raise InputError("the model has an adapter already; load the base model again")
    rows = embedding.num_embeddings
    if not 0 <= mask_id <= rows:
        raise InputError(
            f"mask_token_id {mask_id} is outside 0..{rows}, the embedding's rows and one more"
        )
    places = [place for target in spec.targets for place in _places(model, target)]
    model.requires_grad_(False)
    gate = Gate()
    for parent, name, layer in places:
        setattr(parent, name, GatedLinear(layer, spec, gate))
    model.set_input_embeddings(MaskEmbedding(embedding, mask_id, gate))
    return gate


def _places(model: PreTrainedModel, target: str) -> list[tuple[nn.Module, str, nn.Linear]]:
    """The backbone's linear layers whose last name is `target`; the head is outside: it runs on
    chosen rows."""
    backbone: nn.Module = model.base_model
    found = [
        (parent, name, child)
        for parent in backbone.modules()
        for name, child in parent.named_children()
        if name == target and isinstance(child, nn.Linear)
    ]
    if not found:
        what = type(backbone).__name__
        raise InputError(
            f"LoRA target {target!r} names no linear layer inside {what}; name others, such as q_proj"
        )
    return found


@torch.no_grad()
def attach_more(
    model: PreTrainedModel,
    gate: Gate,
    spec: LoraSpec,
    tensors: Mapping[tuple[str, str], Tensor],
    mask_row: Tensor,
) -> int:
    """Give a model that has an adapter another one; returns its number.

    `tensors` maps (module, "lora_A" or "lora_B") to its update. A layer that only the new one
    adapts is gated with an update of zero for the others.
    """
    index = gate.adapters
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, MaskEmbedding)  # noqa: S101
    for module in sorted({module for module, _ in tensors}):
        layer = model.get_submodule(module)
        if isinstance(layer, nn.Linear):
            parent, _, name = module.rpartition(".")
            layer = GatedLinear(layer, LoraSpec(1, 1.0, spec.targets), gate)
            setattr(model.get_submodule(parent), name, layer)
        assert isinstance(layer, GatedLinear)  # noqa: S101
        a, b = (tensors[module, kind].to(layer.base.weight) for kind in ("lora_A", "lora_B"))
        layer.more.append(LowRank(index, a, b, spec.scale))
    embedding.more.append(mask_row.to(embedding.weight))
    gate.adapters += 1
    return index


def gated_layers(model: PreTrainedModel) -> list[GatedLinear]:
    """The layers that an adapter changes."""
    return [layer for layer in model.modules() if isinstance(layer, GatedLinear)]


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trained parameters by name: every lora_A, lora_B and the MASK row."""
    ends = ("lora_A", "lora_B", "mask_row")
    return {name: p for name, p in model.named_parameters() if name.rpartition(".")[2] in ends}
