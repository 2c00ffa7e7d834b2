"""The rewriting of a recorded step to use the C kernels: RMS norm, rotary embedding, SwiGLU, products of few rows.

Stock model code spells the first three out in two to ten operations, each with a pass over memory and the cost of a
call, which for a small model is most of the step. The recording is searched for those very operations; what does not
match stays as it is. Only float32: there the sums' order differs from PyTorch's, as it does between matrix shapes
anyway.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from idlm.kernels import native

# a pattern matches only where every value inside it has as many uses as here, constants included
_RMS_NORM = """
graph(%rows, %weight, %eps):
    %two : int = prim::Constant[value=2]()
    %squares = aten::pow(%rows, %two)
    %last : int = prim::Constant[value=-1]()
    %dims : int[] = prim::ListConstruct(%last)
    %keep : bool = prim::Constant[value=1]()
    %none : NoneType = prim::Constant()
    %mean = aten::mean(%squares, %dims, %keep, %none)
    %one : int = prim::Constant[value=1]()
    %sum = aten::add(%mean, %eps, %one)
    %rate = aten::rsqrt(%sum)
    %scaled = aten::mul(%rows, %rate)
    %out = aten::mul(%weight, %scaled)
    return (%out)"""
_ROTATE = """
graph(%heads, %cosine, %sine, %half, %half_too):
    %plain = aten::mul(%heads, %cosine)
    %dim_a : int = prim::Constant[value=3]()
    %start_a : int = prim::Constant[value=0]()
    %step_a : int = prim::Constant[value=1]()
    %a = aten::slice(%heads, %dim_a, %start_a, %half, %step_a)
    %dim_b : int = prim::Constant[value=3]()
    %end_b : int = prim::Constant[value=9223372036854775807]()
    %step_b : int = prim::Constant[value=1]()
    %b = aten::slice(%heads, %dim_b, %half_too, %end_b, %step_b)
    %minus = aten::neg(%b)
    %halves : Tensor[] = prim::ListConstruct(%minus, %a)
    %last : int = prim::Constant[value=-1]()
    %turned = aten::cat(%halves, %last)
    %crossed = aten::mul(%turned, %sine)
    %one : int = prim::Constant[value=1]()
    %out = aten::add(%plain, %crossed, %one)
    return (%out)"""
_FUSED = (
    (_RMS_NORM, "graph(%rows, %weight, %eps):\n    %out = idlm::rms_norm(%rows, %weight, %eps)\n    return (%out)"),
    (
        _ROTATE,
        "graph(%heads, %cosine, %sine, %half, %half_too):\n"
        "    %out = idlm::rotate(%heads, %cosine, %sine)\n    return (%out)",
    ),
)

SHORTEST_ROW = 512
"""Inputs of a head that lies by rows, from which on our product is faster than PyTorch's."""


def fuse(graph: torch.Graph, dtype: torch.dtype) -> None:
    """Put the fused operations into a recording of a model in float32, in place; others stay as they were."""
    if dtype != torch.float32 or not native.loaded():
        return
    torch._C._jit_pass_inline(graph)
    _drop_casts(graph)
    for pattern, fused in _FUSED:
        torch._C._jit_pass_custom_pattern_based_rewrite_graph(pattern, fused, graph)
    for node in list(graph.nodes()):
        if node.kind() == "idlm::rms_norm":
            _constant_eps(graph, node)
        elif node.kind() == "aten::linear" and _fits(*node.inputs()):
            _replace(graph, node, "idlm::linear", list(node.inputs())[:2])
        elif node.kind() == "aten::mul" and next(node.inputs()).node().kind() == "aten::silu":
            # at the product's place: between it and silu an adapter adds to the other factor, in place
            soft, up = node.inputs()
            _replace(graph, node, "idlm::swiglu", [next(soft.node().inputs()), up])
    torch._C._jit_pass_dce(graph)


def _drop_casts(graph: torch.Graph) -> None:
    """Take out conversions of float32 to float32, which return their input."""
    for node in list(graph.nodes()):
        if node.kind() == "aten::to":
            before, after = (value.type() for value in (next(node.inputs()), node.output()))
            if before.scalarType() == after.scalarType() == "Float":
                node.output().replaceAllUsesWith(next(node.inputs()))
                node.destroy()


def _constant_eps(graph: torch.Graph, node: torch.Node) -> None:
    """The recording holds it as a tensor, the operator takes a number."""
    *_, eps = node.inputs()
    number: Any = eps.toIValue()
    graph.setInsertPoint(node)
    node.replaceInput(2, graph.insertConstant(float(number)))  # type: ignore[attr-defined]


def _fits(x: torch.Value, weight: torch.Value, bias: torch.Value) -> bool:
    """Whether this is a product without bias by a weight that the kernel is fast with."""
    found = weight.toIValue()
    return (
        isinstance(found, Tensor)
        and (found.t().is_contiguous() or (found.is_contiguous() and found.shape[1] >= SHORTEST_ROW))
        and bias.toIValue() is None
        and bias.node().kind() == "prim::Constant"
    )


def _replace(graph: torch.Graph, node: torch.Node, kind: str, inputs: list[torch.Value]) -> None:
    made = graph.create(kind, inputs, 1)
    made.insertBefore(node)
    made.output().setType(node.output().type())
    node.output().replaceAllUsesWith(made.output())
    node.destroy()


def lay_out(model: nn.Module) -> None:
    """Turn weight matrices [N, K], adapters' too, to lie as [K, N], which is faster for few rows; the values stay.

    An embedding is read row by row, so it stays as it is, with the head where that is tied to it.
    """
    if not native.loaded():
        return
    owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            fits = parameter.dim() == 2 and parameter.dtype == torch.float32 and owners[id(parameter)] == 1
            if fits and not isinstance(module, nn.Embedding):
                parameter.data = parameter.data.t().contiguous().t()
