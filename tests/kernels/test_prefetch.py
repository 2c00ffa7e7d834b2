"""Who prefetches the weights: measured, kept, and without influence on a result."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from idlm.kernels import native, prefetch
from idlm.kernels.linears import Linears
from idlm.kernels.prefetch import ROWS, choose_prefetch

pytestmark = pytest.mark.skipif(
    not native.loaded(), reason="no C compiler: there is nothing to test"
)


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    assert native.loaded()  # from the cache of the kernels, before that has another place
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "idlm" / "choices"


def linears(format: str = "float32") -> Linears:
    torch.manual_seed(0)
    return Linears([[torch.randn(96, 256)], [torch.randn(64, 96)]], format)


@pytest.mark.parametrize(("wins", "expected"), [(0, 0), (1, 1), (2, 2), (3, 4)])
def test_the_most_rows_at_which_the_processor_wins(
    wins: int, expected: int, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    results = iter([[1.0, 2.0]] * wins + [[2.0, 1.0]] * len(ROWS))
    chosen = []
    monkeypatch.setattr(prefetch, "fastest", lambda _: next(results))
    monkeypatch.setattr(prefetch, "_set", lambda _, rows: chosen.append(rows))
    choose_prefetch(linears())
    (path,) = cache.iterdir()
    assert chosen == [expected] and json.loads(path.read_text()) == expected
    choose_prefetch(linears())  # from the file: a fourth win would change it
    assert chosen == [expected, expected]


@pytest.mark.parametrize("content", ["", "null", "[1]", "3", '"1"'])
def test_a_file_that_holds_something_else_is_measured_anew(content: str, cache: Path) -> None:
    choose_prefetch(linears())
    (path,) = cache.iterdir()
    path.write_text(content)
    choose_prefetch(linears())
    assert json.loads(path.read_text()) in (0, *ROWS)


@pytest.mark.parametrize("format", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8])
def test_it_changes_no_result(format: str, rows: int) -> None:
    layer = linears(format).layers[0]
    x = torch.randn(rows, 256)
    results = []
    for most in (0, 4):
        prefetch._set(format, most)
        results.append(layer.multiply(x, None))
    choose_prefetch(linears(format))
    assert torch.equal(*results)
