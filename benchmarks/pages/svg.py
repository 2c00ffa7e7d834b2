"""A few SVG elements as text; pictures come out the same on every machine."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

FONT = "system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif"
INK, MUTED, LINE, PAPER = "#1f2430", "#5d6472", "#d9dde4", "#ffffff"
BLUE, ORANGE, GREEN, GREY, PURPLE = "#2563c9", "#c2570c", "#1d8a5b", "#7b8494", "#7a3fb5"
"""Series and roles; each is told apart in grey too, by its label."""


def picture(width: int, height: int, title: str, parts: Iterable[str]) -> str:
    """The whole file; `title` is read out in place of the picture."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" role="img" font-family="{FONT}" font-size="13">'
    )
    paper = f'<rect width="{width}" height="{height}" rx="8" fill="{PAPER}"/>'
    return "\n".join([head, f"<title>{escape(title)}</title>", paper, *parts, "</svg>"]) + "\n"


def number(value: float) -> str:
    """A coordinate, to a tenth of a pixel."""
    return f"{value:.1f}".removesuffix(".0")


def text(
    x: float, y: float, words: str, colour: str = INK, anchor: str = "start", **more: str
) -> str:
    """Words whose baseline is at y; `more` are attributes, with _ for -."""
    extra = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in more.items())
    at = f'x="{number(x)}" y="{number(y)}" fill="{colour}" text-anchor="{anchor}"'
    return f"<text {at}{extra}>{escape(words)}</text>"


def box(
    x: float, y: float, width: float, height: float, fill: str, line: str, dashed: bool = False
) -> str:
    """A rounded rectangle."""
    dash = ' stroke-dasharray="4 3"' if dashed else ""
    size = f'x="{number(x)}" y="{number(y)}" width="{number(width)}" height="{number(height)}"'
    return f'<rect {size} rx="5" fill="{fill}" stroke="{line}" stroke-width="1.5"{dash}/>'


def line(points: Iterable[tuple[float, float]], colour: str, width: float = 1) -> str:
    """Straight lines from point to point."""
    path = " ".join(f"{number(x)},{number(y)}" for x, y in points)
    style = f'fill="none" stroke="{colour}" stroke-width="{width:g}" stroke-linejoin="round"'
    return f'<polyline points="{path}" {style}/>'


def dot(x: float, y: float, colour: str) -> str:
    """A point of a series."""
    return f'<circle cx="{number(x)}" cy="{number(y)}" r="4" fill="{colour}" stroke="{PAPER}" stroke-width="1.5"/>'
