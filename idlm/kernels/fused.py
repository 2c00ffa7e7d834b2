"""RMS norm, rotary embedding and SwiGLU in one pass each (rows.c), and the rewriting of a recorded step to use them.

Stock model code spells them out in six to ten operations, each with a pass over memory and the cost of a call, which
for a small model is most of the step. The recording is searched for those very operations; what does not match stays
as it is. Only float32: there the sums' order differs from PyTorch's, as it does between matrix shapes anyway.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from idlm.kernels.native import library

_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_int64


@cache
def _functions() -> ctypes.CDLL | None:
    found = library("rows", torch.float32)
    if found is not None:
        found.rms_norm.argtypes = [*[_POINTER] * 3, _SIZE, _SIZE, ctypes.c_double]
        found.rotate.argtypes = [*[_POINTER] * 4, *[_SIZE] * 5]
        found.swiglu.argtypes = [*[_POINTER] * 3, _SIZE]
    return found


def _rms_norm(rows: Tensor, weight: Tensor, eps: Tensor) -> Tensor:
    rows = rows.contiguous()
    out, size = torch.empty_like(rows), rows.shape[-1]
    _functions().rms_norm(  # type: ignore[union-attr]
        rows.data_ptr(), weight.data_ptr(), out.data_ptr(), rows.numel() // size, size, float(eps)
    )
    return out


def _rotate(heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """[1, H, T, E] with [1, 1, T, E]; laid out as [1, T, H, E]."""
    _, number, rows, size = heads.shape
    heads = heads if heads.stride(3) == 1 else heads.contiguous()
    cosine, sine = cosine.contiguous(), sine.contiguous()
    out = heads.new_empty(1, rows, number, size)
    _functions().rotate(  # type: ignore[union-attr]
        *(one.data_ptr() for one in (heads, cosine, sine, out)), rows, number, size, heads.stride(2), heads.stride(1)
    )
    return out.transpose(1, 2)


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    _functions().swiglu(gate.data_ptr(), up.data_ptr(), out.data_ptr(), gate.numel())  # type: ignore[union-attr]
    return out


_library = torch.library.Library("idlm", "FRAGMENT")
for _name, _signature, _call in (
    ("rms_norm", "(Tensor rows, Tensor weight, Tensor eps) -> Tensor", _rms_norm),
    ("rotate", "(Tensor heads, Tensor cosine, Tensor sine) -> Tensor", _rotate),
    ("swiglu", "(Tensor gate, Tensor up) -> Tensor", _swiglu),
):
    _library.define(_name + _signature)
    _library.impl(_name, _call, "CPU")

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
_SWIGLU = """
graph(%gate, %up):
    %soft = aten::silu(%gate)
    %out = aten::mul(%soft, %up)
    return (%out)"""
_FUSED = (
    (_RMS_NORM, "graph(%rows, %weight, %eps):\n    %out = idlm::rms_norm(%rows, %weight, %eps)\n    return (%out)"),
    (
        _ROTATE,
        "graph(%heads, %cosine, %sine, %half, %half_too):\n"
        "    %out = idlm::rotate(%heads, %cosine, %sine)\n    return (%out)",
    ),
    (_SWIGLU, "graph(%gate, %up):\n    %out = idlm::swiglu(%gate, %up)\n    return (%out)"),
)


def fuse(graph: torch.Graph, dtype: torch.dtype) -> None:
    """Put the fused operations into a recording of a model in float32, in place; others stay as they were."""
    if dtype != torch.float32 or _functions() is None:
        return
    torch._C._jit_pass_inline(graph)
    _drop_casts(graph)
    for pattern, fused in _FUSED:
        torch._C._jit_pass_custom_pattern_based_rewrite_graph(pattern, fused, graph)
    torch._C._jit_pass_dce(graph)


def _drop_casts(graph: torch.Graph) -> None:
    """Take out conversions of float32 to float32, which return their input."""
    for node in [one for one in graph.nodes() if one.kind() == "aten::to"]:
        before, after = (value.type() for value in (next(node.inputs()), node.output()))
        if before.scalarType() == after.scalarType() == "Float":
            node.output().replaceAllUsesWith(next(node.inputs()))
            node.destroy()
