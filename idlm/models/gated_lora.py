"""Gated LoRA: `y = W x + g s B A x` with g = 1 on MASK rows and 0 on all others.

The scale s is alpha / r, or alpha / sqrt(r) in rank-stabilised LoRA (arXiv 2312.03732).

The MASK rows of a forward are contiguous (first in training, last in a window), so the gate is a
slice. The rows outside it are computed by the base's operations alone, so they are bit-equal to the
base model's.

Shapes: B batch, Q rows of a forward, D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from idlm.errors import InputError
from idlm.models.entry import below_entry, enter_late
from idlm.models.gate import NO_ROWS, Gate
from idlm.models.parallel import InputPart, part_of

ALL_LINEAR = "all-linear"
ROUTERS = {"router", "gate", "shared_expert_gate", "altup"}
"""Names of modules that weigh experts, or Gemma 3n's streams."""


@dataclass(frozen=True)
class LoraSpec:
    """The shape of an adapter.

    Attributes:
        rank: r.
        alpha: the update is scaled by alpha / r, or by alpha / sqrt(r) with `rslora`.
        targets: the last name components of the adapted linear layers, such as q_proj.
        rslora: whether the scale is rank-stabilised.
        entry: the layer that MASK rows enter at, from 0; lower layers are not adapted.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]
    rslora: bool = False
    entry: int = 0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise InputError(f"LoRA rank {self.rank} is not positive; use 8 to 128")
        if not self.targets:
            raise InputError(
                "LoRA targets are empty; name linear layers such as q_proj, v_proj, down_proj"
            )

    @property
    def scale(self) -> float:
        """The factor of the update B A x."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class LowRank(NamedTuple):
    """The update of one layer by a further adapter, whose index is `number`.

    `a` is A [r, in], `b` is B [out, r], `scale` is that of its `LoraSpec`.
    """

    number: int
    a: Tensor
    b: Tensor
    scale: float


class Stack(NamedTuple):
    """The matrices of a layer's adapters side by side: `a` [sum of r, in], `b` [out, sum of r].

    `columns` has the adapter and the scale of each of their rows and columns; `parts` is what they
    were made of.
    """

    a: Tensor
    b: Tensor
    columns: tuple[tuple[int, float], ...]
    parts: tuple[int, ...]


class GatedLinear(nn.Module):
    """A frozen linear layer with a low-rank update of the MASK rows.

    The update is computed in the type of the rows; in training its matrices may have a wider one.
    `more` holds the updates of further adapters. Each is computed for all MASK rows, and a row
    keeps that of its adapter. So shapes do not depend on the batch, but the cost grows with the
    number of adapters; on a GPU the number of launches does not.
    """

    def __init__(self, base: nn.Linear, spec: LoraSpec, gate: Gate) -> None:
        super().__init__()
        self.base = base
        self.gate = gate
        self.scale = spec.scale
        self.more: list[LowRank] = []
        self._stack: Stack | None = None
        self.lora_A = nn.Parameter(base.weight.new_empty(spec.rank, base.in_features))
        self.lora_B = nn.Parameter(base.weight.new_zeros(base.out_features, spec.rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, Q, in] to [B, Q, out], or [B Q, in] to [B Q, out]."""
        if isinstance(self.base, InputPart):  # one sum over ranks, of base and update
            return self.base.total(self._updated(x, self.base.part(x)))
        return self._updated(x, self.base(x))

    def _updated(self, x: Tensor, y: Tensor) -> Tensor:
        """The base's outputs y of rows x, with the update of MASK rows added in place."""
        if self.gate.shut or self.gate.merged:  # AR does not compute the adapter
            return y
        mask_x, mask_y = self.gate.select(x), self.gate.select(y)
        if self._launches_few(mask_x):
            self._add(mask_x[0], mask_y[0])
            return y
        a, b = self.lora_A.to(x.dtype), self.lora_B.to(x.dtype)
        update = F.linear(F.linear(mask_x, a), b)
        if self.gate.adapters == 1:
            mask_y.add_(update, alpha=self.scale)
            return y
        assert self.gate.adapter is not None  # noqa: S101
        updates = [(0, update * self.scale)]
        updates += [
            (more.number, F.linear(F.linear(mask_x, more.a), more.b) * more.scale)
            for more in self.more
        ]
        for adapter, update in updates:  # each [B, MASK rows, out], 0 for rows of other adapters
            mask_y.add_(update * self.gate.adapter.eq(adapter)[:, None])
        return y

    def _launches_few(self, x: Tensor) -> bool:
        """Whether rows x [B, MASK rows, in] are those of an engine on a GPU."""
        on_gpu = x.device.type != "cpu" and not torch.is_grad_enabled()
        return on_gpu and len(x) == 1 and x.dtype == self.lora_A.dtype

    def _add(self, x: Tensor, y: Tensor) -> None:
        """Add the updates of MASK rows x [MASK rows, in] to y [MASK rows, out] in two launches, or
        three if there are several adapters: a product by every A, a factor that leaves to each row
        its own adapter, a product by every B."""
        if self.gate.adapters == 1:
            y.addmm_(F.linear(x, self.lora_A), self.lora_B.T, alpha=self.scale)
            return
        if self._stack is None or self._stack.parts != self.parts():
            self._stack = self._stacked()
        low = F.linear(x, self._stack.a) * self.gate.factors(self._stack.columns, x.dtype)
        y.addmm_(low, self._stack.b.T)

    def updates(self) -> list[LowRank]:
        """The updates by all adapters."""
        return [LowRank(0, self.lora_A, self.lora_B, self.scale), *self.more]

    def parts(self) -> tuple[int, ...]:
        """What changes when an adapter is attached or detached."""
        matrices = (self.lora_A, self.lora_B, *(m for more in self.more for m in (more.a, more.b)))
        return tuple(matrix.data_ptr() for matrix in matrices)

    @torch.no_grad()
    def _stacked(self) -> Stack:
        """All adapters' matrices side by side. Theirs become slices of these."""
        updates = self.updates()
        a = torch.cat([update.a for update in updates])
        b = torch.cat([update.b for update in updates], dim=1)
        ranks = [len(update.a) for update in updates]
        self.lora_A.data, *more_a = a.split_with_sizes(ranks)
        self.lora_B.data, *more_b = b.split_with_sizes(ranks, dim=1)
        self.more = [
            more._replace(a=a, b=b) for more, a, b in zip(self.more, more_a, more_b, strict=True)
        ]
        columns = [
            (update.number, update.scale)
            for update, rank in zip(updates, ranks, strict=True)
            for _ in range(rank)
        ]
        return Stack(a, b, tuple(columns), self.parts())

    @torch.no_grad()
    def merged(self) -> list[Tensor]:
        """The merged weight W + s B A, [out, in], of each adapter, with its scale s."""
        weight = self.base.weight
        updates = {0: self.scale * self.lora_B @ self.lora_A}
        updates |= {more.number: more.scale * more.b @ more.a for more in self.more}
        return [
            weight + updates[adapter] if adapter in updates else weight
            for adapter in range(self.gate.adapters)
        ]

    def low_rank(self) -> list[Tensor]:
        """A [r, in] and B [out, r] of each adapter, in one list."""
        return [
            self.lora_A,
            self.lora_B,
            *(matrix for more in self.more for matrix in (more.a, more.b)),
        ]


class MaskEmbedding(nn.Module):
    """The base's embedding and the MASK row of the adapter.

    `mask_id` may equal the number of rows: then the base has no MASK row and does not grow. `more`
    holds the MASK rows of further adapters.
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
        """Embed tokens [B, Q]: [B, Q, D]. MASK rows get the MASK row of their adapter."""
        is_mask = tokens == self.mask_id
        rows: Tensor = self.base(tokens.masked_fill(is_mask, 0))  # MASK may be past the last row
        if self.gate.entry and not self.gate.shut:
            self.gate.entering = self._entering(rows)
            return rows
        if not self.more:
            return torch.where(is_mask.unsqueeze(-1), self.mask_row.to(rows.dtype), rows)
        masks = self.gate.rows
        if masks == NO_ROWS:
            return rows
        mask_rows = self._of_adapters()
        return torch.cat([rows[:, : masks.start], mask_rows[None], rows[:, masks.stop :]], dim=1)

    def _of_adapters(self) -> Tensor:
        """The MASK row of each MASK row's adapter, [M, D]."""
        return torch.stack([self.mask_row, *self.more])[self.gate.adapter]

    def _entering(self, rows: Tensor) -> Tensor:
        """The hidden states [B, M, D] with which MASK rows enter late, beside `rows` [B, Q, D]."""
        if self.more:
            return self._of_adapters()[None]
        shape = self.gate.select(rows).shape
        return self.mask_row.to(rows.dtype).expand(shape)


def attach(model: PreTrainedModel, spec: LoraSpec | None, mask_id: int) -> Gate:
    """Freeze `model` and attach a new gated LoRA, in place. After an error it is unchanged.

    Without `spec`, adapter 0 changes no layer; others can be attached beside it.

    Raises:
        InputError: a target names no linear layer of the model, the MASK id is not in 0 to the
            number of embedding rows, or MASK rows cannot enter late.
    """
    embedding = model.get_input_embeddings()
    if not isinstance(embedding, nn.Embedding):
        raise InputError("the model has an adapter already; load the base model again")
    rows = embedding.num_embeddings
    if not 0 <= mask_id <= rows:
        raise InputError(
            f"mask_token_id {mask_id} is outside 0..{rows}, the embedding's rows and one more"
        )
    targets, entry = ((), 0) if spec is None else (spec.targets, spec.entry)
    layers = [found for target in targets for found in _find_layers(model, target, entry)]
    gate = Gate()
    if entry:
        enter_late(model, gate, entry)
    model.requires_grad_(False)
    for parent, name, layer in layers:
        assert spec is not None  # noqa: S101
        setattr(parent, name, GatedLinear(layer, spec, gate))
    model.set_input_embeddings(MaskEmbedding(embedding, mask_id, gate))
    return gate


def all_linear(model: PreTrainedModel, entry: int = 0) -> tuple[str, ...]:
    """The names of all linear layers in the backbone, from layer `entry` on, but the routers of
    experts: PEFT's `all-linear`.

    A layer of a list has a number for a name, which would be that of whole blocks too.
    """
    paths = [name.split(".") for name, _ in _linear_layers(model, entry)]
    names = (path[-1] for path in paths if ROUTERS.isdisjoint(path))
    return tuple(dict.fromkeys(name for name in names if not name.isdigit()))


def _linear_layers(model: PreTrainedModel, entry: int) -> list[tuple[str, nn.Linear]]:
    """The linear layers of the backbone from layer `entry` on, with their names in the model."""
    inside, below = set(model.base_model.modules()), below_entry(model, entry)
    return [
        (name, layer)
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and layer in inside and not below(name)
    ]


def _find_layers(
    model: PreTrainedModel, target: str, entry: int
) -> list[tuple[nn.Module, str, nn.Linear]]:
    """The backbone's linear layers named `target`, from layer `entry` on: parent, name, layer.

    The output head is not in the backbone: it runs on selected rows, which the gate does not fit.
    """
    layers = [
        (model.get_submodule(name.rpartition(".")[0]), target, layer)
        for name, layer in _linear_layers(model, entry)
        if name.rpartition(".")[2] == target
    ]
    if not layers:
        what = type(model.base_model).__name__ + (f" from layer {entry} on" if entry else "")
        raise InputError(
            f"LoRA target {target!r} names no linear layer inside {what}; "
            f"name some of {', '.join(all_linear(model, entry))}"
        )
    return layers


@torch.no_grad()
def attach_more(
    model: PreTrainedModel,
    gate: Gate,
    spec: LoraSpec,
    tensors: Mapping[tuple[str, str], Tensor],
    mask_row: Tensor,
) -> int:
    """Attach a further adapter to a model that has one; returns its index.

    `tensors` maps (module, "lora_A" or "lora_B") to the tensor. A layer that only the new adapter
    changes becomes a gated layer whose other updates are 0.
    """
    index = min(gate.free, default=gate.adapters)
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, MaskEmbedding)  # noqa: S101
    for module in sorted({module for module, _ in tensors}):
        layer = model.get_submodule(module)
        if isinstance(layer, nn.Linear):
            parent, _, name = module.rpartition(".")
            layer = GatedLinear(layer, LoraSpec(1, 1.0, spec.targets), gate)
            setattr(model.get_submodule(parent), name, layer)
        assert isinstance(layer, GatedLinear)  # noqa: S101
        a, b = (
            part_of(layer.base, kind, tensors[module, kind]).to(layer.base.weight)
            for kind in ("lora_A", "lora_B")
        )
        layer.more.append(LowRank(index, a, b, spec.scale))
    embedding.more[index - 1 : index] = [mask_row.to(embedding.weight)]
    gate.adapters = max(gate.adapters, index + 1)
    gate.free.discard(index)
    return index


@torch.no_grad()
def detach(model: PreTrainedModel, gate: Gate, index: int) -> None:
    """Detach an adapter. The indexes of the others stay; `attach_more` gives the index away again,
    but not index 0."""
    for layer in gated_layers(model):
        layer.more = [more for more in layer.more if more.number != index]
        if index == 0:
            layer.lora_A = nn.Parameter(layer.lora_A.new_zeros(1, layer.lora_A.shape[1]), False)
            layer.lora_B = nn.Parameter(layer.lora_B.new_zeros(layer.lora_B.shape[0], 1), False)
    if index > 0:
        gate.free.add(index)


def gated_layers(model: PreTrainedModel) -> list[GatedLinear]:
    """The linear layers that an adapter changes, in the order of the model."""
    return [layer for layer in model.modules() if isinstance(layer, GatedLinear)]


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter's parameters by name: each lora_A and lora_B, and the MASK row."""
    ends = ("lora_A", "lora_B", "mask_row")
    return {name: p for name, p in model.named_parameters() if name.rpartition(".")[2] in ends}
