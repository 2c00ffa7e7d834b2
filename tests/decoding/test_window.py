"""The layout of a window against a double loop over rows described one by one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from idlm import InputError
from idlm.decoding.window import Branches, Window, outcomes, parse_branches, window


def described(layout: Window, valid: int) -> list[tuple[str, int, int]]:
    """Each row as (kind, outcome, depth), with `valid` drafts; groups past the outcomes repeat the
    last one."""
    served = list(outcomes(layout.branches, valid))
    served += served[-1:] * (layout.groups - len(served))
    rows = [("verify", k, k) for k in range(layout.stride)]
    return rows + [("mask", j, k) for j in served for k in range(1, layout.stride)]


def may_see(query: int, key: int, rows: list[tuple[str, int, int]], layout: Window) -> bool:
    """DESIGN section 4, row by row; a mask sees no other group's."""
    if key > query:
        return False
    if rows[key][0] == "verify":
        return rows[key][2] <= rows[query][1]
    same_group = (query - layout.stride) // layout.num_masks == (
        key - layout.stride
    ) // layout.num_masks
    return rows[query][0] == "mask" and same_group


@st.composite
def plans(draw: st.DrawFn) -> tuple[int, Branches]:
    stride = draw(st.integers(1, 8))
    some = st.sets(st.integers(0, stride - 1), min_size=1).map(lambda chosen: tuple(sorted(chosen)))
    return stride, draw(st.one_of(st.sampled_from(["all", "chain"]), some))


@given(plans(), st.data())
def test_layout_equals_the_double_loop(plan: tuple[int, Branches], data: st.DataObject) -> None:
    layout = window(*plan)
    valid = data.draw(st.integers(0, layout.num_masks))
    rows = described(layout, valid)
    assert layout.width == len(rows) == layout.stride + layout.mask_rows
    for i, (kind, outcome, depth) in enumerate(rows):
        assert layout.offsets[valid, i] == (depth if kind == "verify" else outcome + depth)
        word = int(layout.visible[valid, i])
        for j in range(len(rows)):
            assert (word >> j & 1) == may_see(i, j, rows, layout)


@given(plans(), st.data())
def test_each_outcome_finds_its_own_masks(plan: tuple[int, Branches], data: st.DataObject) -> None:
    layout = window(*plan)
    valid = data.draw(st.integers(0, layout.num_masks))
    rows = described(layout, valid)
    for accepted in range(layout.stride):
        group = int(layout.group[valid, accepted])
        if layout.num_masks and accepted in outcomes(layout.branches, valid):
            assert rows[layout.stride + group * layout.num_masks] == ("mask", accepted, 1)
        else:
            assert group == -1


@pytest.mark.parametrize("stride", [1, 2, 4, 8])
def test_widths(stride: int) -> None:
    assert window(stride, "all").width == stride**2
    assert window(stride, "chain").width == 2 * stride - 1


def test_a_window_wider_than_a_word_is_refused() -> None:
    assert window(32, "chain").width == 63
    with pytest.raises(InputError, match="81 rows"):
        window(9, "all")


@pytest.mark.parametrize(
    "stride, branches",
    [(0, "all"), (65, "all"), (4, "some"), (4, (4,)), (4, ()), (True, "all"), (2.0, "all")],
)
def test_wrong_plans_are_refused(stride: int, branches: Branches) -> None:
    with pytest.raises(InputError):
        parse_branches(branches, stride)
