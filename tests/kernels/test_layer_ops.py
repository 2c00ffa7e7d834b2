"""The kernels between a layer's products are their twins, row by row."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from idlm.kernels import layer_kernels, layer_ops
from idlm.kernels.layer_ops import Heads, Turn, Update

kernels = pytest.importorskip(
    "idlm.kernels.layer_ops_triton", reason="triton is not installed: there are no kernels"
)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZES = {"6 2 40, 96": ((6, 2, 40), 96), "1 1 2, 1100": ((1, 1, 2), 1100)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_kernels_are_their_twins(
    sizes: tuple[tuple[int, int, int], int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer_kernels, "use_triton", lambda like: True)
    if dtype == torch.bfloat16 and DEVICE.type == "cpu":  # the interpreter multiplies no bfloat16
        monkeypatch.setattr(kernels, "update", layer_ops.update)
    layer_kernels.try_layer_ops(torch.empty(0, dtype=dtype, device=DEVICE), *sizes)


@pytest.mark.parametrize("name", ["norm", "add_norm", "swiglu", "rotate", "update"])
def test_a_wrong_kernel_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*given: object) -> object:
        found = getattr(layer_ops, name)(*given)
        if found is None:  # it has changed its first argument
            assert isinstance(given[0], Tensor)
            given[0][-1] *= 1.01
            return None
        return (*found[:-1], 1.01 * found[-1]) if isinstance(found, tuple) else 1.01 * found

    names = ("norm", "add_norm", "swiglu", "rotate", "update")
    ops = SimpleNamespace(**{one: getattr(layer_ops, one) for one in names} | {name: wrong})
    monkeypatch.setattr(layer_kernels, "ops_for", lambda like: ops)
    with pytest.raises(RuntimeError, match="differs from PyTorch"):
        layer_kernels.try_layer_ops(torch.empty(0), (2, 1, 8), 16)


@pytest.fixture
def placed() -> Iterator[None]:
    """New tensors are on the device that runs the kernels."""
    with DEVICE:
        yield


@pytest.mark.usefixtures("placed")
def test_a_row_does_not_depend_on_the_rows_beside_it() -> None:
    """Each row alone, bit for bit."""
    torch.manual_seed(0)
    rows, size = 20, 48
    x, more, weight = torch.randn(rows, size), torch.randn(rows, size), torch.randn(size)
    turn, heads = torch.randn(2, rows, 8), Heads(4, 1, torch.randn(8), torch.randn(8), 1e-5)
    update = Update(
        torch.randn(24, size),
        torch.randn(size, 24),
        torch.arange(24) // 8 - 1,
        torch.tensor([[0.5, 3.0]]),
        (size,),
    )
    low, adapter = torch.randn(rows, 24), torch.arange(rows) % 2

    def computed(part: slice) -> list[Tensor]:
        pages, y = torch.zeros(2, 1, rows, 1, 8), x[part].clone()
        kernels.update(y, low[part], update, adapter[part])
        place = torch.arange(rows)[part]
        turned = kernels.rotate(x[part], Turn(*turn[:, part].contiguous()), heads, pages, place)
        sums = kernels.add_norm(x[part], more[part], weight, 1e-6)
        return [*sums, kernels.swiglu(x[part]), *turned, *pages[:, 0, part], y]

    whole = computed(slice(0, rows))
    for row in range(rows):
        alone = computed(slice(row, row + 1))
        assert all(torch.equal(one[0], all_[row]) for one, all_ in zip(alone, whole, strict=True))


@pytest.mark.usefixtures("placed")
def test_only_the_first_rows_are_written_to_the_pages() -> None:
    pages, heads = torch.full((2, 3, 4, 2, 8), torch.nan), Heads(2, 2)
    rows, turn, places = torch.randn(5, 48), Turn(*torch.randn(2, 5, 8)), torch.tensor([9, 4])
    _, key, value = kernels.rotate(rows, turn, heads, pages, places)
    flat = pages.flatten(1, 2)
    assert torch.equal(flat[0, [9, 4]], key[:2]) and torch.equal(flat[1, [9, 4]], value[:2])
    assert int(flat.isnan().all(-1).all(-1).sum()) == 2 * (12 - 2)
