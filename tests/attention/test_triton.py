from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from idlm.attention.base import Segment
from idlm.attention.torch import TorchAttention
from idlm.attention.triton import TritonAttention
from tests.attention.oracle import CONSTANTS, SHAPES, Case, attend, case, trash

kernel = pytest.importorskip(
    "idlm.kernels.window_attention_triton", reason="triton is not installed"
)


def twin(case: Case) -> Tensor:
    return attend(TorchAttention(case.pages, case.query.shape[2]), case)


def triton_attend(case: Case, splits: int) -> Tensor:
    c, backend = case, TritonAttention()
    segment, firsts = backend.prepare(
        Segment(c.table, c.lengths, trash(c), c.visible), c.scores.window
    )
    prefix = kernel.Prefix(c.pages, c.table, c.lengths)
    windows = kernel.Windows(segment.visible, firsts)
    rows = (each.flatten(0, 1) for each in (c.query, c.key, c.value))
    found: Tensor = kernel.attend(*rows, prefix, windows, c.scores, splits)
    return found.view(c.query.shape)


@pytest.mark.parametrize("shape", [*SHAPES[:4], SHAPES[-1]], ids=str)
@pytest.mark.parametrize(
    ("constants", "splits", "causal"),
    [
        *(({}, splits, causal) for splits in (1, 3) for causal in (True, False)),
        *((constants, 1 + 2 * (i % 2), False) for i, constants in enumerate(CONSTANTS[1:])),
    ],
    ids=str,
)
def test_triton_is_the_twin(
    shape: tuple[list[int], int, int, int, int, int],
    splits: int,
    causal: bool,
    constants: dict[str, Any],
) -> None:
    example = case(*shape, causal=causal).scored(**constants).without_hidden_pages()
    torch.testing.assert_close(
        triton_attend(example.to(torch.float32), splits),
        twin(example).float(),
        atol=2e-5,
        rtol=1e-4,
    )


def test_many_splits_are_joined() -> None:
    one = case([300, 1], 2, 2, 1, 40, 16, causal=True).to(torch.float32)
    torch.testing.assert_close(
        triton_attend(one, 37), twin(one.to(torch.float64)).float(), atol=2e-5, rtol=1e-4
    )


def test_triton_chooses_its_splits() -> None:
    example = case([300], 2, 2, 1, 32, 16, causal=False)
    torch.testing.assert_close(
        attend(TritonAttention(), example.to(torch.float32)),
        twin(example).float(),
        atol=2e-5,
        rtol=1e-4,
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_triton_in_half_precision(dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and not torch.cuda.is_available():
        pytest.skip("Triton's interpreter multiplies no bfloat16; this needs a GPU")
    example = case([20, 3], 7, 6, 2, 64, 8, causal=False).to(dtype)
    expected = twin(example.to(torch.float64))
    torch.testing.assert_close(triton_attend(example, 2).double(), expected, atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize("splits", [1, 2])
def test_a_row_that_sees_nothing_gets_zeros(splits: int) -> None:
    example = case([0, 3], 2, 2, 1, 32, 4, causal=False)
    blind = replace(example, visible=torch.zeros_like(example.visible))  # type: ignore[arg-type]
    assert triton_attend(blind.to(torch.float32), splits)[0].eq(0).all()


@pytest.mark.parametrize(
    ("programs", "prefix", "splits"),
    [(1, 64, 1), (8, 4096, 32), (8, 40960, 33), (300, 4096, 1), (100, 4096, 2)],
)
def test_splits_fill_the_device_and_no_more(programs: int, prefix: int, splits: int) -> None:
    assert kernel.split_number(programs, prefix, keys=64, processors=132) == splits
