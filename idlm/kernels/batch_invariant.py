"""Batch-invariant operations: the result of a row does not depend on the rows beside it, bit for
bit.

A floating-point sum depends on its order, and libraries choose the order by the shape of the whole
call. Here the order depends on the row alone:

- Linear layers run on tiles of fixed size. On a CPU each call has `TILE` rows, padded, so all calls
  have the same GEMM shape. On a GPU a Triton kernel uses the same tiles and the same order for any
  number of rows.
- Reductions over the last dimension (norms, softmax) run on tiles of `TILE` rows too.
- Activations run on flat blocks, since a CPU's vector loop and the loop over the remaining elements
  round differently.
- Attention has a back-end for it, `idlm.attention.invariant`.

This holds between runs on the same machine with the same number of threads. It is slower.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from idlm.kernels.gpu import use_triton

TILE = 16
"""Rows of each GEMM."""
BLOCK = 64
"""Keys of an attention block; activations are padded to a multiple of it."""
FLAT = 16384
"""Elements per call of an activation: few enough for a single thread, and a multiple of every
vector length."""
REDUCTIONS = frozenset({"mean", "softmax", "layer_norm", "rms_norm"})
ACTIVATIONS = frozenset({"silu", "gelu", "sigmoid", "tanh"})

Function = Callable[..., Any]


@contextmanager
def batch_invariant() -> Iterator[None]:
    """Run the model code inside with batch-invariant linear layers, reductions and activations.

    There is no backward pass.
    """
    with _Replace():
        yield


class _Replace(TorchFunctionMode):
    """Replaces the functions above by their invariant forms, without a change to model code."""

    def __torch_function__(
        self,
        func: Function,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name == "linear":
            return linear(*args, **kwargs)
        if name == "_grouped_mm":  # what `F.grouped_mm` calls, for experts
            return grouped_mm(args[0], args[1], kwargs["offs"])
        if name in REDUCTIONS and _is_over_rows(name, args, kwargs):
            return by_tiles(lambda x: func(x, *args[1:], **kwargs), args[0])
        if name in ACTIVATIONS and not args[0].is_cuda:
            return by_elements(lambda x: func(x, *args[1:], **kwargs), args[0])
        return func(*args, **kwargs)


def _is_over_rows(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether the call reduces the last dimension alone and keeps the number of dimensions."""
    if name in ("layer_norm", "rms_norm"):
        shape = kwargs.get("normalized_shape", args[1] if len(args) > 1 else ())
        return len(shape) == 1
    dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
    last = dim in (-1, [-1], (-1,), args[0].dim() - 1)
    return last and (
        name == "softmax" or kwargs.get("keepdim", args[2] if len(args) > 2 else False)
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Batch-invariant `F.linear`: `x` [..., in], `weight` [out, in], `bias` [out] -> [..., out]."""
    if use_triton(x):
        from idlm.kernels.batch_invariant_triton import linear as triton_linear

        return triton_linear(x, weight, bias)
    return by_tiles(lambda rows: F.linear(rows, weight, bias), x)


def grouped_mm(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """Batch-invariant `F.grouped_mm`: `x` [S, in] in groups that end before the rows `ends` [E],
    `weights` [E, in, out] -> [S, out]."""
    counts = ends.diff(prepend=ends.new_zeros(1)).tolist()
    groups = zip(x.split(counts), weights, strict=True)
    return torch.cat([linear(rows, weight.T.contiguous()) for rows, weight in groups])


def by_tiles(func: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply `func` to the rows of `x` [..., D], `TILE` rows per call; the last call is padded with
    zeros."""
    rows = x.reshape(-1, x.shape[-1])
    count = rows.shape[0]
    padded = F.pad(rows, (0, 0, 0, -count % TILE))
    result = (
        torch.cat([func(tile) for tile in padded.view(-1, TILE, x.shape[-1]).unbind()])
        if count
        else func(rows)
    )
    return result[:count].view(*x.shape[:-1], result.shape[-1])


def by_elements(func: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply `func` to every element of `x`, padded so that only the vector loop runs."""
    count = x.numel()
    padded = F.pad(x.reshape(-1), (0, -count % BLOCK))
    return torch.cat([func(part) for part in torch.split(padded, FLAT)])[:count].view(x.shape)
