"""The deterministic mode: a row's result does not depend on the rows beside it, to the last bit.

Floating-point sums depend on their order, and libraries choose the order by the shape of the whole call. Here every sum
of a row has a shape and an order of its own:

- linear layers run on tiles of a fixed size: on a CPU `TILE` rows at a time, padded, one GEMM shape for ever; on a GPU
  a Triton kernel whose tiles and order of summation are the same for every number of rows
- reductions over the last dimension (norms, softmax) run on tiles of `TILE` rows too
- activations run on flat blocks: a CPU's vector loop and the loop over its left-over elements round differently
- attention gathers each row's own keys in the order of their positions and cuts them in blocks of `BLOCK` from
  position 0 on: the key at position t is always number t % BLOCK of block t // BLOCK, whether it came from a page or
  from the window, whatever W, B and M are; the blocks are summed one after the other

It holds between runs on one machine with one number of threads. It costs time: use it where equal bytes matter more.

Shapes are those of `idlm.kernels.window_attention`; N = B * W rows, L = S + W + 1 rows of one slot's keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from idlm.kernels.window_attention import use_triton, visible_rows

TILE = 16
"""Rows of one GEMM."""
BLOCK = 64
"""Keys of one block."""
FLAT = 16384
"""Elements of one call of an activation: few enough for one thread, a multiple of every vector length."""
REDUCTIONS = frozenset({"mean", "softmax", "layer_norm", "rms_norm"})
ACTIVATIONS = frozenset({"silu", "gelu", "sigmoid", "tanh"})

Function = Callable[..., Any]


@contextmanager
def batch_invariant() -> Iterator[None]:
    """Run the model code inside with batch-invariant linear layers, reductions and activations; forward only."""
    with _Replace():
        yield


class _Replace(TorchFunctionMode):
    """Hands the functions named above to their invariant forms; stock model code needs no change."""

    def __torch_function__(
        self, func: Function, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
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
    """Whether the call reduces the last dimension alone and leaves the number of dimensions as it is."""
    if name in ("layer_norm", "rms_norm"):
        shape = kwargs.get("normalized_shape", args[1] if len(args) > 1 else ())
        return len(shape) == 1
    dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
    last = dim in (-1, [-1], (-1,), args[0].dim() - 1)
    return last and (name == "softmax" or kwargs.get("keepdim", args[2] if len(args) > 2 else False))


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
    done = torch.cat([func(tile) for tile in padded.view(-1, TILE, x.shape[-1]).unbind()]) if number else func(rows)
    return done[:number].view(*x.shape[:-1], done.shape[-1])


def by_elements(func: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`func` of every element of `x`, in full vectors only."""
    number = x.numel()
    padded = F.pad(x.reshape(-1), (0, -number % BLOCK))
    return torch.cat([func(part) for part in torch.split(padded, FLAT)])[:number].view(x.shape)


class InvariantMeta(NamedTuple):
    """What all layers of one step share; as `WindowMeta`, for `invariant_attention`.

    Attributes:
        order: int64 [B, W, W]: the window rows that a row sees, first to last; the rest is of no account.
        counts: int64 [B, W]: how many keys a row sees in all.
        rows: int64 [B * L], for the PyTorch twin: as `WindowMeta.rows`, and one more that holds zeros.
        sources: int64 [N', T], for the PyTorch twin: which of all slots' L rows is a row's key number t; rows padded to
            a multiple of TILE, keys to a multiple of BLOCK.
    """

    table: Tensor
    lengths: Tensor
    order: Tensor
    counts: Tensor
    rows: Tensor | None = None
    sources: Tensor | None = None


def invariant_meta(
    pages: Tensor, table: Tensor, lengths: Tensor, visible: Tensor | None, width: int, heads: int
) -> InvariantMeta:
    """As `window_meta`."""
    seen = visible_rows(visible, lengths, width)
    order = (~seen).to(torch.uint8).argsort(dim=-1, stable=True)
    counts = lengths[:, None] + seen.sum(-1)
    meta = InvariantMeta(table, lengths, order, counts)
    if use_triton(pages):
        return meta
    page = pages.shape[2]
    prefix = torch.arange(table.shape[1] * page, device=pages.device)
    rows = (table.repeat_interleave(page, 1) * page + prefix % page) * (prefix < lengths[:, None])
    return meta._replace(rows=F.pad(rows, (0, width + 1)).flatten(), sources=_sources(meta, rows.shape[1]))


def _sources(meta: InvariantMeta, prefix: int) -> Tensor:
    """See `InvariantMeta.sources`; a row's keys: those of the prefix, then the window rows it sees, then zeros."""
    batch, width, _ = meta.order.shape
    local = prefix + width + 1
    keys = torch.arange((local + BLOCK - 1) // BLOCK * BLOCK, device=meta.order.device)
    after = (keys - meta.lengths[:, None]).clamp(0, width - 1)
    window = prefix + meta.order.gather(2, after[:, None].expand(-1, width, -1))
    source = torch.where(keys < meta.lengths[:, None, None], keys, window)
    source = torch.where(keys < meta.counts[..., None], source, local - 1)
    source = source + local * torch.arange(batch, device=source.device)[:, None, None]
    return F.pad(source.flatten(0, 1), (0, 0, 0, -batch * width % TILE), value=local - 1)


def invariant_attention(
    query: Tensor, key: Tensor, value: Tensor, pages: Tensor, meta: InvariantMeta, scale: float
) -> Tensor:
    """As `window_attention`, each row by itself; [B, W, H, E]."""
    if meta.sources is not None:
        return attend_torch(query, key, value, pages, meta, scale)
    from idlm.kernels.batch_invariant_triton import attend  # here, since not every machine has triton

    return attend(query, key, value, pages, meta.table, meta.lengths, meta.order, meta.counts, scale)


def attend_torch(query: Tensor, key: Tensor, value: Tensor, pages: Tensor, meta: InvariantMeta, scale: float) -> Tensor:
    """The PyTorch twin, TILE rows at a time."""
    assert meta.rows is not None and meta.sources is not None
    batch, width, heads, size = query.shape
    groups = key.shape[2]
    pages[:, 0, 0].zero_()  # what no token stands behind is read from this row
    local = pages.view(2, -1, groups * size).index_select(1, meta.rows).view(2, batch, -1, groups, size)
    local[0, :, -width - 1 : -1] = key
    local[1, :, -width - 1 : -1] = value
    counts = F.pad(meta.counts.flatten(), (0, -batch * width % TILE))
    rows = F.pad((query * scale).reshape(batch * width, -1), (0, 0, 0, -batch * width % TILE))
    tiles = zip(*(torch.split(one, TILE) for one in (rows, meta.sources, counts)), strict=True)
    mixed = [_tile(one.view(TILE, groups, -1, size), local.view(2, -1, size), *of) for one, *of in tiles]
    return torch.cat(mixed)[: batch * width].view(batch, width, heads, size)


def _tile(query: Tensor, local: Tensor, sources: Tensor, counts: Tensor) -> Tensor:
    """One tile: `query` [TILE, G, F, E] over its keys `local` [2, B * L * G, E] at `sources` [TILE, T]: [TILE, H * E].

    Every product is [F, E] x [E, BLOCK] or [F, BLOCK] x [BLOCK, E]; blocks are added first to last, so that blocks that
    a row does not reach add zeros at the end and change nothing.
    """
    tile, groups, fold, size = query.shape
    index = sources[:, None] * groups + torch.arange(groups, device=sources.device)[:, None]
    keys, values = local.index_select(1, index.flatten()).view(2, -1, BLOCK, size)
    blocks = sources.shape[1] // BLOCK
    queries = query[:, :, None].expand(-1, -1, blocks, -1, -1).reshape(-1, fold, size)
    scores = torch.bmm(queries, keys.transpose(1, 2)).view(tile, groups, -1, fold, BLOCK)
    unseen = torch.arange(sources.shape[1], device=sources.device) >= counts[:, None]
    scores = scores.masked_fill(unseen.view(tile, 1, -1, 1, BLOCK), -torch.inf)
    top = scores.amax((2, 4), keepdim=True).clamp(min=torch.finfo(scores.dtype).min)  # a row may see nothing
    weights = (scores - top).exp()
    total = weights.sum(-1).cumsum(2)[:, :, -1].clamp(min=1)  # it is 1 or more, or the row sees nothing
    mixed = torch.bmm(weights.view(-1, fold, BLOCK), values).view(tile, groups, -1, fold, size).cumsum(2)[:, :, -1]
    return (mixed / total[..., None]).flatten(1)
