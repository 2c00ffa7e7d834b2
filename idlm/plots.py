"""Pictures by matplotlib, as SVG and as PNG, and the head of a page of HTML that loads nothing.

The same data give the same SVG: it has no date, no random names, and its text stays text.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

Panel = Callable[[Any], None]
"""Draws one picture into matplotlib's axes."""
COLUMNS, WIDTH, HEIGHT = 2, 11.0, 2.6
"""Pictures beside each other; inches of all, and of one."""
SETTINGS: dict[str, Any] = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "idlm",  # the same picture each time
    "text.parse_math": False,
    "path.simplify": False,
    "font.size": 9.0,
    "axes.grid": True,
    "grid.alpha": 0.3,
}
HEAD = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{{ title }}</title>
<style>
body { font: 14px system-ui, sans-serif; max-width: 1060px; margin: 2em auto; padding: 0 1em; }
svg { max-width: 100%; height: auto; }
table { border-collapse: collapse; } td, th { padding: .2em .8em .2em 0; text-align: left; }
pre { background: #f5f6f8; padding: 1em; overflow-x: auto; }
</style>
</head>
"""
"""A template of Jinja; the page's own policy forbids scripts and all requests."""


def draw(panels: Sequence[Panel], form: Literal["svg", "png"], height: float = HEIGHT) -> bytes:
    """All panels as one picture: a PNG file, or an SVG element without the head of a file.

    Args:
        height: of a panel, in inches.
    """
    import matplotlib
    from matplotlib.figure import Figure

    columns = min(COLUMNS, len(panels))
    rows = math.ceil(len(panels) / COLUMNS)
    with matplotlib.rc_context(cast(Any, SETTINGS)):
        figure = Figure((WIDTH * columns / COLUMNS, height * rows), layout="constrained")
        for number, panel in enumerate(panels, start=1):
            panel(figure.add_subplot(rows, columns, number))
        out = io.BytesIO()
        if form == "png":
            figure.savefig(out, format="png", dpi=120, metadata={"Software": None})
            return out.getvalue()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(out, format="svg", metadata=nothing)
    text = out.getvalue()
    return text[text.index(b"<svg") :]
