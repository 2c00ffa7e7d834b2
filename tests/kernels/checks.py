"""What every build of the C kernels has to do, against PyTorch twins; `kernels` are those of one
build."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from idlm.attention.base import write_pages
from idlm.attention.torch import TorchAttention
from idlm.kernels.panels import GROUP, SIDE, Panels
from tests.attention.oracle import CONSTANTS, Case, case
from tests.attention.oracle import attend as run
from tests.kernels.everywhere import Kernels, flat

SINGLE = {"atol": 2e-5, "rtol": 1e-4}
"""Tolerance of attention in float32."""


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows x [T, K] as csrc/linear.c rounds them, in whole numbers up to 32,767: int64 [T, K],
    scales [T]."""
    most = x.abs().amax(dim=1)
    rate = torch.full_like(most, 65534) / most  # 65534 / most would multiply by a reciprocal
    twice = (x * torch.where(most > 1e-30, rate, 0)[:, None]).nan_to_num().trunc().to(torch.int64)
    return (twice + (twice >= 0)) >> 1, most / 32767


def int8_twin(x: Tensor, panels: Panels) -> Tensor:
    """The same roundings by PyTorch: exact sums of a group, then the float32 operations of
    csrc/linear.c, in order."""
    numbers, scales = rounded(x)
    codes = panels._replace(scales=torch.empty(0)).matrix().double()
    of_groups = panels.scales.transpose(0, 1).flatten(1)[:, : panels.out]
    sums = torch.zeros(len(x), panels.out)
    for group, group_scales in enumerate(of_groups):
        part = slice(group * GROUP, (group + 1) * GROUP)
        sums += (numbers[:, part].double() @ codes[:, part].t()).float() * group_scales
    return sums * scales[:, None]


def in_pieces(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows x [T, K] in pieces of 128, in codes up to 127: int64 [T, C, 128], zeros past K, scales
    [T, C]."""
    groups = F.pad(x, (0, -x.shape[1] % GROUP)).view(len(x), -1, GROUP)
    most = groups.abs().amax(dim=2)
    rate = torch.full_like(most, 254) / most
    twice = (
        (groups * torch.where(most > 1e-30, rate, 0)[..., None])
        .nan_to_num()
        .trunc()
        .to(torch.int64)
    )
    return (twice + (twice >= 0)) >> 1, most / 127


def uint8_twin(x: Tensor) -> Tensor:
    """What rows x [T, K] become for uint8, float64."""
    codes, scales = in_pieces(x)
    return (codes * scales.double()[..., None]).flatten(1)[:, : x.shape[1]]


def check_product(
    kernels: Kernels, x: Tensor, weight: Tensor, format: str, num_threads: int
) -> None:
    """`x` [T, K] by `weight` [N, K]; a row's bits do not depend on the rows beside it or on the
    threads."""
    panels, rows = Panels.of(weight, format), x
    with threads(num_threads):
        result = kernels.linear(x, panels)
    if format == "int8":
        assert torch.equal(result, int8_twin(x, panels))
        x = (rounded(x)[0] * rounded(x)[1].double()[:, None]).float()
    if format == "uint8":
        x = uint8_twin(x)
    size = (
        x.abs().double() @ panels.matrix().abs().double().t()
    )  # what rounding errors are relative to
    error = (result - x.double() @ panels.matrix().double().t()).abs()
    assert (error <= 2**-22 * (2 + x.shape[1] ** 0.5) * size + 1e-30).all()
    if format != "int8":
        row = len(rows) // 2
        assert torch.equal(result[row : row + 1], kernels.linear(rows[row : row + 1], panels))


def twin(example: Case, rows: Tensor, real: int) -> tuple[Tensor, Tensor]:
    """What the PyTorch twin makes of the windows, and the pages it leaves."""
    pages = example.pages.clone()
    write_pages(pages, example.key[:, :real], example.value[:, :real], rows)
    backend = TorchAttention(pages, example.query.shape[2])
    return run(backend, replace(example, pages=pages.clone())), pages


def attend(kernels: Kernels, example: Case, pages: Tensor, rows: Tensor, real: int) -> Tensor:
    """Windows; where the rows are causal, as pieces of prompts."""
    if example.visible is not None:
        return kernels.attend(example, pages, rows, real)
    ends = torch.arange(1, len(example.lengths) + 1) * example.query.shape[1]
    return kernels.attend_pieces(flattened(example), pages, rows.flatten(), ends)


def flattened(example: Case, widths: Sequence[int] | None = None) -> Case:
    """The rows of all slots one after the other, as many of each as `widths` has."""

    def joined(rows: Tensor) -> Tensor:
        return torch.cat(
            [of[:width] for of, width in zip(rows, widths or [None] * len(rows), strict=True)]
        )

    return replace(
        example, query=joined(example.query), key=joined(example.key), value=joined(example.value)
    )


def check_attention(kernels: Kernels, example: Case, real: int, **tolerance: float) -> None:
    real = example.query.shape[1] if example.visible is None else real  # pieces have no masks
    rows = torch.zeros(
        len(example.lengths), real, dtype=torch.int64
    )  # the trash page's first row: nobody reads it
    expected, left = twin(example, rows, real)
    pages = example.pages.clone()
    result = attend(kernels, example, pages, rows, real)
    torch.testing.assert_close(result, flat(expected, real), **tolerance)
    torch.testing.assert_close(pages, left, rtol=0, atol=0, equal_nan=True)


def check_pieces(
    kernels: Kernels, example: Case, widths: Sequence[int], num_threads: int, **tolerance: float
) -> None:
    """Causal pieces of these lengths are the twin's one by one."""
    trash = torch.zeros(len(widths), max(widths), dtype=torch.int64)
    windows, _ = twin(example, trash, max(widths))
    with threads(num_threads):
        ends, flat_rows = (
            torch.tensor(widths).cumsum(0),
            torch.zeros(sum(widths), dtype=torch.int64),
        )
        result = kernels.attend_pieces(
            flattened(example, widths), example.pages.clone(), flat_rows, ends
        )
    expected = torch.cat([rows[:n] for rows, n in zip(windows, widths, strict=True)])
    torch.testing.assert_close(result, expected, **tolerance)


def check_threads(kernels: Kernels) -> None:
    """Attention is bit-equal on any number of threads."""
    for window in (None, 30):
        example, results = case([40, 7, 90], 40, 6, 2, 32, 16, causal=True).scored(window), []
        for num_threads in (1, 2):
            with threads(num_threads):
                rows = torch.zeros(3, 40, dtype=torch.int64)
                results.append(attend(kernels, example, example.pages.clone(), rows, 40))
        assert torch.equal(*results)


def check_alone(kernels: Kernels, dtype: torch.dtype) -> None:
    """Alone, after its predecessors were cached, a row gets the very bits that it gets in a window
    with them."""
    both = case([20], 7, 6, 2, 32, 4, causal=True).to(dtype)
    pages = torch.cat([both.pages, torch.zeros_like(both.pages)], 1)
    table = torch.cat([both.table, torch.arange(both.pages.shape[1], pages.shape[1])[None]], 1)
    table[:, 5:] = torch.arange(both.pages.shape[1], both.pages.shape[1] + table.shape[1] - 5)
    places = (table[0, torch.arange(20, 27) // 4] * 4 + torch.arange(20, 27) % 4)[None]
    ends, rows = torch.tensor([7]), replace(flattened(both), table=table)
    for constants in CONSTANTS:
        rows = rows.scored(**constants)
        together = kernels.attend_pieces(rows, pages, places[0], ends)
        brought = (of[6:] for of in (rows.query, rows.key, rows.value))
        last = Case(*brought, pages, table, rows.lengths + 6, None, rows.scores)
        alone = kernels.attend_pieces(last, pages, places[0, 6:], ends - 6)
        assert torch.equal(alone[0], together[6])


def check_blind(kernels: Kernels) -> None:
    """A row that sees nothing gets zeros."""
    example = replace(
        case([0], 2, 2, 1, 32, 4, causal=False), visible=torch.zeros(1, 2, dtype=torch.int64)
    )
    assert (
        kernels.attend(example, example.pages, torch.zeros(1, 2, dtype=torch.int64), 2).eq(0).all()
    )


def check_far_scores(kernels: Kernels) -> None:
    """Scores so far apart that most weights are 0, and all of them far below 0."""
    example = case([40, 3], 9, 4, 2, 8, 4, causal=False).to(torch.float32)
    for shift in (0, 50):
        check_attention(kernels, replace(example, query=200 * example.query - shift), 5, **SINGLE)


def check_row_operations(kernels: Kernels, rows: int, size: int, heads: int) -> None:
    """RMS norm, rotary embedding, SwiGLU."""
    x, up, weight = torch.randn(rows, size), torch.randn(rows, size), torch.randn(size)
    plain = weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))
    torch.testing.assert_close(kernels.rms_norm(x, weight, 1e-6), plain)
    torch.testing.assert_close(kernels.swiglu(x, up), F.silu(x) * up)
    half = (size + 1) // 2
    turning, (cosine, sine) = torch.randn(rows, heads, 2 * half), torch.randn(2, rows, 1, 2 * half)
    turned = torch.cat([-turning[..., half:], turning[..., :half]], -1)
    result = kernels.rotate(turning, cosine[:, 0], sine[:, 0])
    torch.testing.assert_close(result, turning * cosine + turned * sine)


def check_extremes(kernels: Kernels) -> None:
    """Gates of any size, rows of zeros and columns of zeros."""
    gates = torch.tensor([-1e6, -1000, -100, -89, -88.8, -88, -80, -50, 0, 50, 89, 1000, 1e30])
    gates = gates.repeat(5)[None]  # so that there are whole vectors and a rest
    torch.testing.assert_close(kernels.swiglu(gates, torch.ones_like(gates)), F.silu(gates))
    assert kernels.rms_norm(torch.zeros(2, 9), torch.ones(9), 1e-6).eq(0).all()
    weight, x = torch.randn(20, 8), torch.randn(4, 8)
    weight[3], x[1], x[2] = 0, 0, 1e-40
    for format in SIDE:
        result = kernels.linear(x, Panels.of(weight, format))
        assert result[1].eq(0).all()
        assert result[2].abs().max() < 1e-37
        assert result[:, 3].eq(0).all()
        assert result[0].ne(0).sum() == 19
    for wrong in (torch.nan, torch.inf):
        x[0, 5] = wrong
        for format in ("int8", "uint8"):
            result = kernels.linear(x, Panels.of(weight, format))
            assert result[0].isnan().all()
            assert result[1:].isfinite().all()
