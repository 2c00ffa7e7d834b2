"""Tensor parallelism: each rank, a process with a device of its own, holds a part of every layer.

transformers' plan says how a family's linear layers are split, and its loader reads each rank's
part alone. Then plain layers with these parts take the place of transformers' own, so that whatever
reads weights finds ordinary ones:

    q k v gate up    OutputPart: all inputs, this rank's outputs (its heads)
    o down           InputPart: this rank's inputs, all outputs, summed over the ranks
    all others       whole on every rank: norms, embedding, output head, draft heads

So every rank has the same hidden states and logits between layers, in the same bits: a sum is
computed once and handed to all.

An adapter's matrices are split with their layer: B of an OutputPart by its rows, A of an InputPart
by its columns. The update of an InputPart is added before the sum, which then holds both.
"""

from __future__ import annotations

import re
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from idlm.errors import InputError
from idlm.models.quiet import quiet

SPLIT = {"colwise": 0, "rowwise": 1}
"""By transformers' name of a rule: the dimension of a linear layer's weight that it splits."""
WHOLE = {"embedding_rowwise", "colwise_gather_output", "colwise_rep"}
"""Rules for embeddings and output heads, in whose place they stay whole."""
NEUTRAL = {"replicated_with_grad_allreduce", "replicate"}


class PartLinear(nn.Linear):
    """A rank's part of a linear layer; `in_features` and `out_features` are those of the part."""

    split: int
    """The dimension of the weight [out, in] that is split."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        out, inner = weight.shape
        super().__init__(inner, out, bias is not None, device="meta", dtype=weight.dtype)
        self.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            self.bias = nn.Parameter(bias, requires_grad=False)

    def of_adapter(self, kind: str, matrix: Tensor) -> Tensor:
        """This rank's part of an adapter's "lora_A" [r, in] or "lora_B" [out, r]."""
        if kind != ("lora_B", "lora_A")[self.split]:
            return matrix
        return matrix.chunk(dist.get_world_size(), dim=self.split)[dist.get_rank()].contiguous()


class OutputPart(PartLinear):
    """A rank's outputs of a linear layer."""

    split = 0


class InputPart(PartLinear):
    """A rank's inputs of a linear layer. Its outputs are summed over the ranks."""

    split = 1

    def forward(self, x: Tensor) -> Tensor:
        return self.total(self.part(x))

    def part(self, x: Tensor) -> Tensor:
        """What this rank adds to the outputs."""
        return F.linear(x, self.weight)

    def total(self, y: Tensor) -> Tensor:
        """The outputs, of what each rank adds."""
        y = torch.ops.idlm.summed(y)
        return y if self.bias is None else y + self.bias


@torch.library.custom_op("idlm::summed", mutates_args=())
def summed(x: Tensor) -> Tensor:
    """The sum of the ranks' `x`: an operator, so that recordings of steps hold it."""
    total = x.contiguous().clone()
    dist.all_reduce(total)
    return total


def least(number: int, device: torch.device) -> int:
    """The least of the ranks' numbers."""
    value = torch.tensor(number, device=device)
    dist.all_reduce(value, dist.ReduceOp.MIN)
    return int(value)


def part_of(layer: object, kind: str, value: Tensor) -> Tensor:
    """This rank's part of an adapter's matrix for `layer`; all of it for a layer that is whole."""
    return layer.of_adapter(kind, value) if isinstance(layer, PartLinear) else value


def whole_shape(layer: nn.Linear) -> tuple[int, int]:
    """The outputs and inputs of a layer, those of other ranks too."""
    shape = [layer.out_features, layer.in_features]
    if isinstance(layer, PartLinear):
        shape[layer.split] *= dist.get_world_size()
    return shape[0], shape[1]


def distribution(config: PreTrainedConfig, ranks: int, name: str) -> dict[str, Any]:
    """The arguments of `from_pretrained` that make it load this rank's part of a model.

    Raises:
        InputError: the model cannot be split into `ranks` parts.
    """
    from transformers.distributed import DistributedConfig  # imports what only ranks need

    rules = _rules(config, ranks, name)
    whole = {rule: "replicate" for rule, style in rules.items() if style in WHOLE}
    return {"distributed_config": DistributedConfig(tp_size=ranks, tp_plan=whole)}


def check_split(config: PreTrainedConfig, ranks: int, name: str) -> None:
    """Check that a model can be split into `ranks` parts; errors as of `distribution`."""
    _rules(config, ranks, name)


def _rules(config: PreTrainedConfig, ranks: int, name: str) -> dict[str, str]:
    """The rules of a model's plan by the names of modules, with * for a layer's number."""
    asked = f"tensor_parallel_size={ranks}"
    with quiet(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    rules = dict(getattr(model, "tp_plan", None) or {})
    if not any(style in SPLIT for style in rules.values()):
        raise InputError(
            f"{asked}: transformers has no tensor-parallel plan for {config.model_type!r}, "
            f"the family of {name!r}; leave the option out"
        )
    for rule, style in rules.items():
        if style not in SPLIT.keys() | WHOLE | NEUTRAL:
            raise InputError(
                f"{asked}: the plan of {config.model_type!r} splits {rule} by the rule {style!r}, "
                "which is not supported; leave the option out"
            )
    _check_sizes(model, rules, ranks, f"{asked} does not divide the %s of {name!r}; use %s")
    return rules


def _check_sizes(model: PreTrainedModel, rules: dict[str, str], ranks: int, problem: str) -> None:
    """Check that heads and split layers have equal parts. `problem` has places for what has not,
    and for the sizes that work."""
    config = model.config
    heads = int(config.num_attention_heads)
    groups = int(getattr(config, "num_key_value_heads", None) or heads)
    counts = {f"{groups} KV heads": groups, f"{heads} heads": heads}
    for name, layer in model.named_modules():
        rule = re.sub(r"\.\d+(?=\.|$)", ".*", name)
        if isinstance(layer, nn.Linear) and rules.get(rule) in SPLIT:
            split = SPLIT[rules[rule]]
            size = layer.weight.shape[split]
            counts[f"{size} {('outputs', 'inputs')[split]} of {rule}"] = size
    for what, count in counts.items():
        if count % ranks:
            fitting = [k for k in range(1, groups + 1) if all(c % k == 0 for c in counts.values())]
            raise InputError(problem % (what, ", ".join(map(str, fitting))))


def localise(model: PreTrainedModel) -> None:
    """Put plain layers with this rank's parts in the place of transformers' own, in place."""
    for name, module in list(model.named_modules()):
        module.__dict__.pop("forward", None)  # it cuts and sums what the parts here do themselves
        local = {
            key: value.to_local().detach()
            for key, value in module.named_parameters(recurse=False)
            if isinstance(value, DTensor)
        }
        if not local:
            continue
        assert isinstance(module, nn.Linear)  # noqa: S101
        (placement,) = module.weight.placements  # type: ignore[attr-defined]
        kind = InputPart if placement.is_shard(1) or placement.is_shard(-1) else OutputPart
        parent, _, last = name.rpartition(".")
        part = kind(local["weight"].contiguous(), local.get("bias"))
        setattr(model.get_submodule(parent), last, part)
