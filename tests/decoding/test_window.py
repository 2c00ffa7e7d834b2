"""The layout of a window against a double loop over rows described one by one."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from idlm import InputError
from idlm.decoding.window import Branches, outcomes, parse_branches, window
from idlm.engine.kv_cache import visible_rows


def described(stride: int, drafts: int, branches: Branches) -> list[tuple[str, int, int]]:
    """Each row as (kind, outcome, depth)."""
    rows = [("verify", 0, k) for k in range(drafts + 1)]
    return rows + [("mask", j, k) for j in outcomes(branches, drafts) for k in range(1, stride)]


def may_see(query: tuple[str, int, int], key: tuple[str, int, int]) -> bool:
    """DESIGN section 4, row by row."""
    if query[0] == "verify":
        return key[0] == "verify" and key[2] <= query[2]
    if key[0] == "verify":
        return key[2] <= query[1]
    return key[1] == query[1] and key[2] <= query[2]


@st.composite
def plans(draw: st.DrawFn) -> tuple[int, int, Branches]:
    stride = draw(st.integers(1, 8))
    some = st.sets(st.integers(0, stride - 1), min_size=1).map(lambda chosen: tuple(sorted(chosen)))
    return stride, draw(st.sampled_from([0, stride - 1])), draw(st.one_of(st.sampled_from(["all", "chain"]), some))


@given(plans())
def test_layout_equals_the_double_loop(plan: tuple[int, int, Branches]) -> None:
    stride, drafts, branches = plan
    layout, rows = window(*plan), described(*plan)
    assert layout.width == len(rows)
    for i, query in enumerate(rows):
        position = query[2] if query[0] == "verify" else query[1] + query[2]
        assert layout.offsets[i] == position
        for j, key in enumerate(rows):
            assert layout.visible[i, j] == may_see(query, key)
    masks = range(layout.width)[layout.mask_rows]
    assert [row[0] == "mask" for row in rows] == [i in masks for i in range(layout.width)]
    for j in range(drafts + 1):
        branch = layout.branch(j)
        mine = [i for i, row in enumerate(rows) if row[0] == "mask" and row[1] == j]
        assert mine == ([] if branch is None else list(range(branch.start, branch.stop)))


@pytest.mark.parametrize("stride", [1, 2, 4, 8])
def test_widths(stride: int) -> None:
    assert window(stride, stride - 1, "all").width == stride**2
    assert window(stride, stride - 1, "chain").width == 2 * stride - 1


def test_every_row_sees_the_whole_prefix() -> None:
    layout = window(3, 2, "all")
    visible = visible_rows(layout.visible, 5)
    assert visible[:, :5].all() and torch.equal(visible[:, 5:], layout.visible)


@pytest.mark.parametrize(
    "stride, branches", [(0, "all"), (65, "all"), (4, "some"), (4, (4,)), (4, ()), (True, "all"), (2.0, "all")]
)
def test_wrong_plans_are_refused(stride: int, branches: Branches) -> None:
    with pytest.raises(InputError):
        parse_branches(branches, stride)
