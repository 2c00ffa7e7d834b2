"""The deterministic mode: a row's result does not depend on the rows beside it, to the last bit.

Floating-point sums depend on their order, and libraries choose the order by the shape of the whole
call. Here every sum of a row has a shape and an order of its own:

- linear layers run on tiles of a fixed size: on a CPU `TILE` rows at a time, padded, one GEMM shape
  for ever; on a GPU a Triton kernel whose tiles and order of summation are the same for every
  number of rows
- reductions over the last dimension (norms, softmax) run on tiles of `TILE` rows too
- activations run on flat blocks: a CPU's vector loop and the loop over its left-over elements round
  differently
- attention has a back-end of its own, `idlm.attention.invariant`

It holds between runs on one machine with one number of threads. It costs time: use it where equal
bytes matter more.
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
"""Rows of one GEMM."""
BLOCK = 64
"""Keys of one block."""
FLAT = 16384
"""Elements of one call of an activation: few enough for one thread, a multiple of every vector
length."""
REDUCTIONS = frozenset({"mean", "softmax", "layer_norm", "rms_norm"})
ACTIVATIONS = frozenset({"silu", "gelu", "sigmoid", "tanh"})

Function = Callable[..., Any]


@contextmanager
def batch_invariant() -> Iterator[None]:
    """Run the model code inside with batch-invariant linear layers, reductions and activations;
    forward only."""
    with _Replace():
        yield


class _Replace(TorchFunctionMode):
    """Hands the functions named above to their invariant forms; stock model code needs no change."""

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
        if name in REDUCTIONS and _is_over_rows(name, args, kwargs):
            return by_tiles(lambda x: func(x, *args[1:], **kwargs), args[0])
        if name in ACTIVATIONS and not args[0].is_cuda:
            return by_elements(lambda x: func(x, *args[1:], **kwargs), args[0])
        return func(*args, **kwargs)


def _is_over_rows(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether the call reduces the last dimension alone and leaves the number of dimensions as it
    is."""
    if name in ("layer_norm", "rms_norm"):
        shape = kwargs.get("normalized_shape", args[1] if len(args) > 1 else ())
        return len(shape) == 1
    dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
    last = dim in (-1, [-1], (-1,), args[0].dim() - 1)
    return last and (
        name == "softmax" or kwargs.get("keepdim", args[2] if len(args) > 2 else False)
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x` [..., in] times `weight` [out, in], plus `bias` [out]: [..., out]."""
    if use_triton(x):
        from idlm.kernels.batch_invariant_triton import linear as triton_linear

        return triton_linear(x, weight, bias)
    return by_tiles(lambda rows: F.linear(rows, weight, bias), x)


def by_tiles(func: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`func` of the rows `x` [..., D], `TILE` rows a call, the last call padded with zeros."""
    rows = x.reshape(-1, x.shape[-1])
    number = rows.shape[0]
    padded = F.pad(rows, (0, 0, 0, -number % TILE))
    done = (
        torch.cat([func(tile) for tile in padded.view(-1, TILE, x.shape[-1]).unbind()])
        if number
        else func(rows)
    )
    return done[:number].view(*x.shape[:-1], done.shape[-1])


def by_elements(func: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`func` of every element of `x`, in full vectors only."""
    number = x.numel()
    padded = F.pad(x.reshape(-1), (0, -number % BLOCK))
    return torch.cat([func(part) for part in torch.split(padded, FLAT)])[:number].view(x.shape)
