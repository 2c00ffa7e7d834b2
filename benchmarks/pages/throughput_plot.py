"""docs/throughput.svg: tokens per second by requests at once, of idlm and its peers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from math import ceil, log2
from typing import Any

from benchmarks.pages import svg

RESULT = "serving_avx2.json"
SERIES = {
    ("idlm", "planner"): ("idlm, ISD", svg.BLUE),
    ("idlm", "ar"): ("idlm, AR", svg.GREEN),
    ("vllm", "compiled"): ("vLLM, compiled", svg.ORANGE),
    ("vllm", "eager"): ("vLLM, eager", svg.PURPLE),
    ("transformers", "static"): ("transformers", svg.GREY),
}
"""Label and colour of a line, by engine and mode; other rows are not drawn."""
WIDTH, HEIGHT = 760, 400
LEFT, RIGHT, TOP, BOTTOM = 70, 620, 70, 342
SPREAD = 16
"""Pixels that two labels must be apart."""
Line = list[tuple[int, float]]


def render(report: Mapping[str, Any]) -> str:
    """The picture as SVG; `report` is a file of `benchmarks.serving`."""
    lines = _lines(report["rows"])
    most = max(value for line in lines.values() for _, value in line)
    counts = sorted({count for line in lines.values() for count, _ in line})
    parts = [*_head(report["environment"]), *_axes(counts, most), *_drawn(lines, counts, most)]
    return svg.picture(WIDTH, HEIGHT, "Tokens per second by requests at once", parts)


def _lines(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], Line]:
    """The points of each series: requests at once, tokens per second."""
    points: dict[tuple[str, str], Line] = {}
    for row in rows:
        key = (row["engine"], row["mode"])
        if key in SERIES:
            points.setdefault(key, []).append((row["concurrency"], row["tokens_per_second"]))
    return {key: sorted(points[key]) for key in SERIES if key in points}


def _head(environment: Mapping[str, Any]) -> Iterator[str]:
    yield svg.text(
        24, 28, "Tokens per second by requests at once", font_weight="600", font_size="15"
    )
    about = (
        f"{environment['model']}, {environment['dtype']}, {environment['threads']} thread, "
        f"{environment['cpu']}; idlm's kernels built for AVX2; {RESULT}"
    )
    yield svg.text(24, 47, about, svg.MUTED, font_size="12")


def _axes(counts: Sequence[int], most: float) -> Iterator[str]:
    for tick in range(0, ceil(most / 1000) + 1):
        y = _y(tick * 1000, most)
        yield svg.line([(LEFT, y), (RIGHT, y)], svg.LINE)
        yield svg.text(LEFT - 10, y + 4, f"{tick * 1000:,}", svg.MUTED, "end", font_size="12")
    for count in counts:
        yield svg.text(
            _x(count, counts), BOTTOM + 20, str(count), svg.MUTED, "middle", font_size="12"
        )
    yield svg.text(
        (LEFT + RIGHT) / 2, BOTTOM + 42, "requests at once", svg.MUTED, "middle", font_size="12"
    )


def _drawn(
    lines: Mapping[tuple[str, str], Line], counts: Sequence[int], most: float
) -> Iterator[str]:
    """The lines, with a label at the end of each; a label that would overlap moves down."""
    ends = {key: _y(line[-1][1], most) for key, line in lines.items()}
    order = sorted(ends, key=ends.__getitem__)
    for above, below in pairwise(order):
        ends[below] = max(ends[below], ends[above] + SPREAD)
    for key, line in lines.items():
        label, colour = SERIES[key]
        points = [(_x(count, counts), _y(value, most)) for count, value in line]
        yield svg.line(points, colour, 2.5)
        yield from (svg.dot(x, y, colour) for x, y in points)
        yield svg.text(RIGHT + 12, ends[key] + 4, label, colour, font_weight="600")


def _x(count: int, counts: Sequence[int]) -> float:
    """The horizontal position of a count, on a logarithmic scale."""
    return LEFT + 20 + (RIGHT - LEFT - 20) * log2(count / counts[0]) / log2(counts[-1] / counts[0])


def _y(value: float, most: float) -> float:
    return BOTTOM - (BOTTOM - TOP) * value / (ceil(most / 1000) * 1000)
