"""The pictures of evaluations: panels for `idlm.plots`, by kind of figure.

Absolute speeds of two files may be of two machines, so each file has panels of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

from idlm.evaluation.results import (
    Compute,
    Drafting,
    Interval,
    Quality,
    Results,
    Speed,
    Tradeoff,
    lines_of,
)
from idlm.plots import Panel

HEIGHT = 3.4
"""Of a panel, in inches."""
SMALL = {"fontsize": 7}


def quality(results: Results) -> list[Panel]:
    """Each suite's figure with its 95 % interval, by method."""
    return [
        partial(_intervals, title=what, rows=rows)
        for what, rows in lines_of(results.quality, "what")
    ]


def drafting(results: Results) -> list[Panel]:
    """By file: acceptance by depth, and TPF, over the stride where it has several."""
    panels: list[Panel] = []
    for source, rows in lines_of(results.drafting, "source"):
        for measure, chosen in lines_of([row for row in rows if any_depth(row)], "measure"):
            title = f"{measure} by depth [{source}]"
            panels.append(partial(_depths, title=title, rows=chosen))
        known = list({row.method: row for row in rows if row.tpf is not None}.values())
        if known:
            panels.append(partial(_tpf, title=f"tokens per forward [{source}]", rows=known))
    return panels


def any_depth(row: Drafting) -> bool:
    """Whether a depth was reached."""
    return any(value is not None for value in row.by_depth)


def speed(results: Results) -> list[Panel]:
    """By file: tokens per second, and those of one request, by requests at once."""
    panels: list[Panel] = []
    for source, rows in lines_of(results.speed, "source"):
        for name, each in (("tokens/s", False), ("tokens/s of a request", True)):
            panels.append(partial(_speeds, title=f"{name} [{source}]", rows=rows, each=each))
    return panels


def frontier(results: Results) -> list[Panel]:
    """By file, figure and run: quality against speed, with the line of those that none beats."""
    return [
        partial(_frontier, title=f"{what}, {how} [{source}]", rows=rows)
        for source, of_source in lines_of(results.tradeoffs, "source")
        for what, of_what in lines_of(of_source, "what")
        for how, rows in lines_of(of_what, "how")
    ]


def compute(results: Results) -> list[Panel]:
    """By file: rows for each token."""
    return [
        partial(_bars, title=f"rows a token, AR has 1 [{source}]", values=_rows(rows))
        for source, rows in lines_of(results.compute, "source")
    ]


def _rows(rows: Sequence[Compute]) -> dict[str, float]:
    return {row.method: row.rows for row in rows}


def _intervals(axes: Any, title: str, rows: Sequence[Quality]) -> None:
    labels = [f"{row.method} [{row.source}]" for row in rows]
    places = list(range(len(rows)))
    axes.errorbar(
        [row.figure.value for row in rows],
        places,
        xerr=_errors(row.figure for row in rows),
        fmt="o",
    )
    _listed(axes, title, labels)


def _errors(figures: Iterable[Interval]) -> list[list[float]]:
    """The lengths below and above, as matplotlib wants them."""
    each = list(figures)
    return [[max(0.0, one.value - one.low) for one in each],
            [max(0.0, one.high - one.value) for one in each]]  # fmt: skip


def _listed(axes: Any, title: str, labels: Sequence[str]) -> None:
    axes.set_title(title)
    axes.set_yticks(range(len(labels)), labels, **SMALL)
    axes.invert_yaxis()


def _depths(axes: Any, title: str, rows: Sequence[Drafting]) -> None:
    axes.set_title(title)
    axes.set_xlabel("depth")
    for row in rows:
        points = [(k, value) for k, value in enumerate(row.by_depth, 1) if value is not None]
        axes.plot(*zip(*points, strict=True), marker=".", label=row.method)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(**SMALL)


def _tpf(axes: Any, title: str, rows: Sequence[Drafting]) -> None:
    """Over the stride, if a kind of plan was measured at several; else a bar for each method."""
    kinds: dict[str, dict[int, float]] = {}
    for row in rows:
        if row.stride is not None and row.tpf is not None:
            kind = row.method.replace(f"-{row.stride}", "").replace(f"N={row.stride} ", "")
            kinds.setdefault(kind, {})[row.stride] = row.tpf
    if not any(len(points) > 1 for points in kinds.values()):
        return _bars(axes, title, {row.method: row.tpf or 0.0 for row in rows})
    axes.set_title(title)
    axes.set_xlabel("stride")
    for kind, points in kinds.items():
        axes.plot(*zip(*sorted(points.items()), strict=True), marker="o", label=kind)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(**SMALL)


def _bars(axes: Any, title: str, values: dict[str, float]) -> None:
    axes.barh(range(len(values)), list(values.values()))
    _listed(axes, title, list(values))


def _speeds(axes: Any, title: str, rows: Sequence[Speed], each: bool) -> None:
    axes.set_title(title)
    axes.set_xlabel("requests at once")
    counts = sorted({row.concurrency for row in rows})
    for method, line in lines_of(rows, "method"):
        line = sorted(line, key=lambda row: row.concurrency)
        places = [row.concurrency for row in line]
        if each:
            axes.plot(places, [row.each for row in line], marker="o", label=method)
        else:
            errors = _errors(row.rate for row in line)
            rates = [row.rate.value for row in line]
            axes.errorbar(places, rates, yerr=errors, marker="o", label=method)
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, list(map(str, counts)))
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.legend(**SMALL)


def _frontier(axes: Any, title: str, rows: Sequence[Tradeoff]) -> None:
    axes.set_title(title)
    axes.set_xlabel("tokens/s")
    for row in rows:
        axes.errorbar(row.rate, row.quality.value, yerr=_errors([row.quality]), fmt="o")
        axes.annotate(row.method, (row.rate, row.quality.value), rotation=20, **SMALL)
    best = sorted(unbeaten(rows), key=lambda row: row.rate)
    line = [row.rate for row in best], [row.quality.value for row in best]
    axes.plot(*line, color="grey", linestyle="dashed", zorder=0)
    axes.margins(x=0.2, y=0.15)


def unbeaten(rows: Sequence[Tradeoff]) -> list[Tradeoff]:
    """Those that no other beats in one of quality and speed without losing in the other."""
    return [
        row
        for row in rows
        if not any(
            (other.rate, other.quality.value) != (row.rate, row.quality.value)
            and other.rate >= row.rate
            and other.quality.value >= row.quality.value
            for other in rows
        )
    ]
