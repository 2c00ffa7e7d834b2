"""docs/window.svg: the rows of one window at stride 4, and the next window."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.pages import svg
from idlm.decoding.window import Window, window

STRIDE, ACCEPTED = 4, 2
"""The stride of the window, and how many of its drafts are accepted in the example."""
LEFT, CELL, GAP, HEIGHT, PITCH = 190, 72, 6, 30, 38
"""Pixels: width of the labels, of a cell with its gap, and of the gap; height of a cell, of a row.
"""
CACHE = 118
TOP = 74
PALE = {
    svg.BLUE: "#e3ecfb",
    svg.ORANGE: "#fdeadd",
    svg.GREEN: "#dcf3e8",
    svg.GREY: "#eef0f3",
    svg.INK: "#e4e6eb",
}
NOTE = (
    "The row of position i gives the token at i+1. "
    "The MASK rows of the outcome that came true have drafted",
    "the next tokens already. "
    "A row sees the cache, the pending token, the drafts that its outcome accepts,",
    "and the MASK rows before it in its own group. MASK rows never enter the cache.",
)
DIGITS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")


def render() -> str:
    layout = window(STRIDE, "all")
    parts = [*_head(layout), *_verify_row(), *_mask_rows(layout), *_next_window(layout)]
    height = TOP + PITCH * (layout.groups + 3) + 92
    title = f"One window at stride {STRIDE}: {layout.width} rows in one causal forward pass"
    return svg.picture(LEFT + CACHE + 16 + CELL * 7 + 24, height, title, parts)


def _x(offset: int) -> float:
    """The left edge of a cell whose position is `offset` after the pending token's."""
    return LEFT + CACHE + 16 + offset * CELL


def _y(row: float) -> float:
    return TOP + row * PITCH


def _cell(offset: int, row: float, label: str, colour: str, dashed: bool = False) -> list[str]:
    x, y = _x(offset), _y(row)
    frame = svg.box(x, y, CELL - GAP, HEIGHT, PALE[colour], colour, dashed)
    return [frame, svg.text(x + (CELL - GAP) / 2, y + 20, label, svg.INK, "middle")]


def _cache(row: float, label: str) -> list[str]:
    frame = svg.box(LEFT, _y(row), CACHE + 10, HEIGHT, PALE[svg.GREY], svg.GREY)
    return [frame, svg.text(LEFT + CACHE / 2 + 5, _y(row) + 20, label, svg.MUTED, "middle")]


def _label(row: float, words: str, colour: str = svg.INK) -> str:
    return svg.text(LEFT - 14, _y(row) + 20, words, colour, "end")


def _head(layout: Window) -> Iterator[str]:
    rows = f"{layout.stride} verify rows, {layout.mask_rows} MASK rows"
    words = f"One forward pass at stride N = {STRIDE}: {rows}"
    yield svg.text(24, 30, words, font_weight="600", font_size="15")
    yield svg.text(LEFT - 14, TOP - 10, "position in the text", svg.MUTED, "end", font_size="12")
    for offset in range(int(layout.offsets[-1].max()) + 1):
        name = "n−1" if offset == 0 else "n" if offset == 1 else f"n+{offset - 1}"
        yield svg.text(
            _x(offset) + (CELL - GAP) / 2, TOP - 10, name, svg.MUTED, "middle", font_size="12"
        )


def _verify_row() -> Iterator[str]:
    yield _label(0, "verify the drafts")
    yield from _cache(0, "KV cache")
    yield from _cell(0, 0, "pending", svg.INK)
    for k in range(1, STRIDE):
        yield from _cell(k, 0, _sub("d", k), svg.BLUE)


def _mask_rows(layout: Window) -> Iterator[str]:
    """A row of the picture for each outcome, with its MASK rows at their positions."""
    offsets = (
        layout.offsets[-1, layout.stride :].unflatten(0, (layout.groups, layout.num_masks)).tolist()
    )
    for accepted, group in enumerate(offsets):
        chosen = accepted == ACCEPTED
        drafts = "draft" if accepted == 1 else "drafts"
        yield _label(
            1 + accepted, f"if {accepted} {drafts} accepted", svg.ORANGE if chosen else svg.INK
        )
        for offset in group:
            yield from _cell(
                offset, 1 + accepted, "MASK", svg.ORANGE if chosen else svg.GREY, not chosen
            )


def _next_window(layout: Window) -> Iterator[str]:
    """What is committed in the example, and the verify rows of the next window."""
    row = layout.groups + 1.3
    yield svg.line([(24, _y(row) - 8), (_x(7), _y(row) - 8)], svg.LINE)
    wrong = _sub("d", ACCEPTED + 1)
    yield _label(row, f"{wrong} differs: y replaces it")
    for k in range(1, ACCEPTED + 1):
        yield from _cell(k, row, _sub("d", k) + " ✓", svg.GREEN)
    yield from _cell(ACCEPTED + 1, row, "y", svg.GREEN)
    words = f"{ACCEPTED + 1} tokens, those of AR"
    yield svg.text(_x(ACCEPTED + 2) + 4, _y(row) + 20, words, svg.GREEN)
    yield _label(row + 1, "the next window")
    yield from _cell(ACCEPTED + 1, row + 1, "pending", svg.INK)
    for k in range(1, STRIDE):
        yield from _cell(ACCEPTED + 1 + k, row + 1, _sub("d", k), svg.BLUE)
    for k, words in enumerate(NOTE):
        yield svg.text(24, _y(row + 2) + 22 + 18 * k, words, svg.MUTED, font_size="12")


def _sub(letter: str, k: int) -> str:
    return letter + str(k).translate(DIGITS)
