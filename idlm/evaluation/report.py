"""`idlm report` of evaluations: tables and pictures as one page of HTML, as Markdown, as PNG files.

Whatever comes from files is escaped. Every figure names its source, and the last table says with
which settings, on what machine and with which versions it was measured.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from jinja2 import Environment
from markupsafe import Markup

from idlm.errors import InputError
from idlm.evaluation import pictures
from idlm.evaluation.results import MACHINE, RECORD, VERSIONS, Interval, Results, Source
from idlm.plots import HEAD, Panel, draw

NOT_RECORDED = "not recorded"
PAGE = (
    HEAD
    + """<body>
<h1>{{ title }}</h1>
{% for section in sections %}
<h2>{{ section.title }}</h2>
<p>{{ section.note }}</p>
{{ section.svg }}
<table>
<tr>{% for cell in section.table.head %}<th>{{ cell }}</th>{% endfor %}</tr>
{% for row in section.table.rows %}
<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table>
{% endfor %}
{% for source in sources %}
<details><summary>[{{ source.number }}] {{ source.name }}, all that it records</summary>
<pre>{{ source.text }}</pre></details>
{% endfor %}
{% if left_out %}<p>Without figures of a known shape: {{ left_out|join(", ") }}</p>{% endif %}
</body>
</html>
"""
)


class Table(NamedTuple):
    """A table; each cell is text."""

    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


class Section(NamedTuple):
    """A part of the page; `key` is a part of the name of its picture."""

    key: str
    title: str
    note: str
    table: Table
    panels: list[Panel]


def _interval(figure: Interval, form: str = ".3f") -> str:
    return f"{figure.value:{form}} ({figure.low:{form}} to {figure.high:{form}})"


def _number(value: float | None, form: str = ".2f") -> str:
    return "-" if value is None else f"{value:{form}}"


def _quality(results: Results) -> Table:
    head = ("figure", "method", "value (95 % interval)", "items", "source")
    rows = [
        (r.what, r.method, _interval(r.figure), f"{r.items:,}", f"[{r.source}]")
        for r in results.quality
    ]
    return Table(head, rows)


def _differences(results: Results) -> Table:
    head = ("figure", "first", "second", "difference (95 % interval)", "McNemar's p",
            "equal answers", "source")  # fmt: skip
    rows = [
        (r.what, _number(r.first, ".3f"), _number(r.second, ".3f"),
         _interval(r.difference, "+.3f"), _number(r.p_value, ".3g"), f"{r.same_answers:.1%}",
         f"[{r.source}]")
        for r in results.differences
    ]  # fmt: skip
    return Table(head, rows)


def _drafting(results: Results) -> Table:
    head = ("method", "stride", "TPF", "measure", "by depth", "source")
    rows = [
        (r.method, "-" if r.stride is None else str(r.stride), _number(r.tpf), r.measure or "-",
         " ".join(_number(value, ".3f") for value in r.by_depth) or "-", f"[{r.source}]")
        for r in results.drafting
    ]  # fmt: skip
    return Table(head, rows)


def _speed(results: Results) -> Table:
    head = ("requests at once", "method", "tokens/s (range)", "tokens/s of a request",
            "over AR", "source")  # fmt: skip
    rows = [
        (str(r.concurrency), r.method, _interval(r.rate, ",.0f"), f"{r.each:,.0f}",
         "-" if r.over_ar is None else f"{r.over_ar:.2f}x", f"[{r.source}]")
        for r in results.speed
    ]  # fmt: skip
    return Table(head, rows)


def _frontier(results: Results) -> Table:
    head = ("figure", "speed", "method", "value (95 % interval)", "tokens/s", "unbeaten", "source")
    best = []
    for row in results.tradeoffs:
        group = (row.source, row.what, row.how)
        rivals = [r for r in results.tradeoffs if (r.source, r.what, r.how) == group]
        best.append(row in pictures.unbeaten(rivals))
    rows = [
        (r.what, r.how, r.method, _interval(r.quality), f"{r.rate:,.0f}", "yes" if won else "",
         f"[{r.source}]")
        for r, won in zip(results.tradeoffs, best, strict=True)
    ]  # fmt: skip
    return Table(head, rows)


def _compute(results: Results) -> Table:
    head = ("method", "rows a token", "TPF", "TPF / rows a token", "source")
    rows = [
        (r.method, f"{r.rows:.2f}", _number(r.tpf),
         _number(None if r.tpf is None else r.tpf / r.rows), f"[{r.source}]")
        for r in results.compute
    ]  # fmt: skip
    return Table(head, rows)


def _sources(results: Results) -> Table:
    head = ("", "source", "written by", "settings", "machine", "versions", "date")
    return Table(head, [_source(one) for one in results.sources])


def _source(source: Source) -> tuple[str, ...]:
    about = source.about
    aside = {*MACHINE, *VERSIONS, *RECORD}
    settings = {key: value for key, value in about.items() if key not in aside}
    machine = {key: about[key] for key in MACHINE if key in about and key != "instructions"}
    versions = {key: about[key] for key in VERSIONS if key in about}
    written = f"`{about['command']}`" if "command" in about else source.kind
    return (f"[{source.number}]", source.name, written, _flat(settings), _flat(machine),
            _flat(versions), str(about.get("date", NOT_RECORDED)))  # fmt: skip


def _flat(values: dict[str, Any]) -> str:
    """Names and values on one line; what has several is JSON."""
    said = {key: value for key, value in values.items() if value not in (None, {}, [], "")}
    parts = (
        f"{key} {value if isinstance(value, str | int | float) else json.dumps(value)}"
        for key, value in said.items()
    )
    return ", ".join(parts) or NOT_RECORDED


Rows = Callable[[Results], Table]
Pictures = Callable[[Results], list[Panel]]
SECTIONS: dict[str, tuple[str, str, Rows, Pictures | None]] = {
    "quality": (
        "Quality", "Means over items, with 95 % intervals: Wilson's for figures of 0 and 1.",
        _quality, pictures.quality,
    ),
    "differences": (
        "Pairs of runs", "The second run less the first, on the same items.", _differences, None,
    ),
    "drafting": (
        "Tokens per forward and acceptance",
        "acceptance: of the drafts that were reached, the share accepted. alpha: the mean of "
        "sum min(p, q).",
        _drafting, pictures.drafting,
    ),
    "speed": (
        "Speed under load",
        "Medians over rounds and their range. A request's own tokens/s are those after its first "
        "token, where the file has them. Compare absolute speeds within a source alone.",
        _speed, pictures.speed,
    ),
    "frontier": (
        "Quality and speed", "Unbeaten: no other method of the source is better in one and as "
        "good in the other.", _frontier, pictures.frontier,
    ),
    "compute": (
        "Compute for each token", "Rows for each token are the arithmetic over that of AR; TPF "
        "over them is the paper's compute efficiency.", _compute, pictures.compute,
    ),
    "sources": (
        "Sources", "What each file records of how its figures were measured.", _sources, None,
    ),
}  # fmt: skip
"""By key: title, note, table and pictures."""


def sections(results: Results) -> list[Section]:
    """The sections that have figures."""
    every = [
        Section(key, title, note, rows(results), [] if panels is None else panels(results))
        for key, (title, note, rows, panels) in SECTIONS.items()
    ]
    return [section for section in every if section.table.rows]


def page(results: Results, advance: Callable[[], object] = lambda: None) -> str:
    """One page of HTML, with its pictures; `advance` is called after each of them."""
    shown: list[dict[str, Any]] = []
    for section in sections(results):
        svg = ""
        if section.panels:
            svg = Markup(picture(section, "svg").decode())
            advance()
        words = {"title": section.title, "note": section.note}
        shown.append({**words, "table": section.table, "svg": svg})
    texts = [
        {"number": one.number, "name": one.name, "text": json.dumps(one.about, indent=1)}
        for one in results.sources
    ]
    template = Environment(autoescape=True).from_string(PAGE)
    named = {"title": "Evaluations", "left_out": results.left_out}
    return template.render(sections=shown, sources=texts, **named)


def picture(section: Section, form: Literal["svg", "png"]) -> bytes:
    """The pictures of a section as one."""
    return draw(section.panels, form, pictures.HEIGHT)


def pngs(
    results: Results, advance: Callable[[], object] = lambda: None
) -> Iterator[tuple[str, bytes]]:
    """The pictures of each section as a PNG file, with the section's key."""
    for section in sections(results):
        if section.panels:
            yield section.key, picture(section, "png")
            advance()


def whole_png(results: Results) -> bytes:
    """All pictures as one PNG file."""
    panels = [panel for section in sections(results) for panel in section.panels]
    return draw(panels, "png", pictures.HEIGHT)


def markdown(results: Results) -> Iterator[str]:
    """The lines of the sections, without pictures."""
    for section in sections(results):
        yield f"\n## {section.title}\n"
        yield f"{section.note}\n"
        yield from markdown_table(*section.table)


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """A table; a bar in a cell is escaped."""
    for number, row in enumerate([head, *rows]):
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"
        if number == 0:
            yield "|---" * len(head) + "|"


def write(files: dict[Path, bytes]) -> None:
    """Write files.

    Raises:
        InputError: one cannot be written.
    """
    for file, content in files.items():
        try:
            file.write_bytes(content)
        except OSError as error:
            raise InputError(
                f"cannot write {str(file)!r} ({error.strerror}); give another name"
            ) from None
