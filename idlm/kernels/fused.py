"""Rewrites a recorded step to use fused C operators: RMS norm, rotary embedding, SwiGLU.

Stock model code writes each of them as two to ten operations. Each operation is a pass over memory
and a call, which takes most of a small model's step. The recording is searched for exactly those
operations; what does not match is kept. This is done in float32 only. The order of the sums then
differs from PyTorch's, as it does between matrix shapes anyway.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Container
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from idlm.kernels import native
from idlm.kernels.choice import Call, faster, noise

log = logging.getLogger("idlm")

TIMED_ROWS = 8
"""Rows of the inputs that the operators are timed with."""

# A pattern matches only if each value inside it, constants too, has exactly the uses written here.
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
    (
        "rms_norm",
        _RMS_NORM,
        "graph(%rows, %weight, %eps):\n"
        "    %out = idlm::rms_norm(%rows, %weight, %eps)\n    return (%out)",
    ),
    (
        "rotate",
        _ROTATE,
        "graph(%heads, %cosine, %sine, %half, %half_too):\n"
        "    %out = idlm::rotate(%heads, %cosine, %sine)\n    return (%out)",
    ),
)

OPERATORS = frozenset(("rms_norm", "rotate", "swiglu"))


def fuse(graph: torch.Graph, dtype: torch.dtype, operators: Container[str] = OPERATORS) -> None:
    """Replace operations by fused ones in the recording of a float32 model, in place.

    The log says how many were replaced. A transformers release that writes one of them differently
    makes steps slower, not wrong.
    """
    if dtype != torch.float32 or not native.loaded():
        return
    torch._C._jit_pass_inline(graph)
    _drop_casts(graph)
    for name, pattern, fused in _FUSED:
        if name in operators:
            torch._C._jit_pass_custom_pattern_based_rewrite_graph(pattern, fused, graph)
    for node in list(graph.nodes()):
        if node.kind() == "idlm::rms_norm":
            _constant_eps(graph, node)
        elif "swiglu" in operators and _is_swiglu(node):
            # Insert at the mul, not at silu: between the two, the LoRA update is added to `up` in
            # place.
            silu, up = node.inputs()
            _replace(graph, node, "idlm::swiglu", [next(silu.node().inputs()), up])
    torch._C._jit_pass_dce(graph)
    kinds = Counter(node.kind() for node in graph.nodes())
    _log_counts(
        ", ".join(
            f"{kinds[f'idlm::{name}']} {name}" for name in sorted(OPERATORS) if name in operators
        )
    )


@cache
def _log_counts(counts: str) -> None:
    """Log each set of counts once: many kinds of step are recorded, and most have the same."""
    log.info("a recorded step has fused operators: %s", counts or "none is faster here")


def _is_swiglu(node: torch.Node) -> bool:
    return node.kind() == "aten::mul" and next(node.inputs()).node().kind() == "aten::silu"


@torch.inference_mode()
def faster_operators(hidden: int, inner: int, heads: int, size: int) -> frozenset[str]:
    """The `OPERATORS` that are faster on this machine than stock model code; times are logged.

    Args:
        hidden, inner: the sizes of a hidden state and of the MLP's intermediate state.
        heads, size: query heads and their size.
    """
    if not native.loaded():
        return frozenset()
    rows, weight, eps = noise(1, TIMED_ROWS, hidden), noise(hidden), torch.tensor(1e-6)
    gate, up = noise(2, 1, TIMED_ROWS, inner)
    query = noise(1, TIMED_ROWS, heads, size).transpose(1, 2)
    cosine, sine = noise(2, 1, 1, TIMED_ROWS, size)
    ops, half = torch.ops.idlm, size // 2

    def norm() -> Tensor:
        return weight * (rows * torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + eps))

    def rotate() -> Tensor:
        return query * cosine + torch.cat((-query[..., half:], query[..., :half]), dim=-1) * sine

    candidates: dict[str, tuple[Call, Call]] = {
        "rms_norm": (lambda: ops.rms_norm(rows, weight, eps), norm),
        "rotate": (lambda: ops.rotate(query, cosine, sine), rotate),
        "swiglu": (lambda: ops.swiglu(gate, up), lambda: F.silu(gate) * up),
    }
    return frozenset(
        name for name, (ours, theirs) in candidates.items() if faster(name, ours, theirs)
    )


def _drop_casts(graph: torch.Graph) -> None:
    """Remove conversions from float32 to float32, which return their input."""
    for node in list(graph.nodes()):
        if node.kind() == "aten::to":
            source, target = (value.type() for value in (next(node.inputs()), node.output()))
            if source.scalarType() == target.scalarType() == "Float":
                node.output().replaceAllUsesWith(next(node.inputs()))
                node.destroy()


def _constant_eps(graph: torch.Graph, node: torch.Node) -> None:
    """Replace eps by a float: the recording has it as a tensor, the operator takes a number."""
    *_, eps = node.inputs()
    value: Any = eps.toIValue()
    graph.setInsertPoint(node)
    node.replaceInput(2, graph.insertConstant(float(value)))  # type: ignore[attr-defined]


def _replace(graph: torch.Graph, node: torch.Node, kind: str, inputs: list[torch.Value]) -> None:
    fused = graph.create(kind, inputs, 1)
    fused.insertBefore(node)
    fused.output().setType(node.output().type())
    node.output().replaceAllUsesWith(fused.output())
    node.destroy()
