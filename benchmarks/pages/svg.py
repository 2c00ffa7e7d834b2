"""A few SVG elements as text, so that pictures are the same on every machine."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

FONT = "system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif"
INK, MUTED, LINE, PAPER = "#1f2430", "#5d6472", "#d9dde4", "#ffffff"
BLUE, ORANGE, GREEN, GREY, PURPLE = "#2563c9", "#c2570c", "#1d8a5b", "#7b8494", "#7a3fb5"
"""Colours of series and roles; labels tell them apart without colour too."""


def picture(width: int, height: int, title: str, parts: Iterable[str]) -> str:
    """The whole file; screen readers read `title`."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" role="img" font-family="{FONT}" font-size="13">'
    )
    paper = f'<rect width="{width}" height="{height}" rx="8" fill="{PAPER}"/>'
    return "\n".join([head, f"<title>{escape(title)}</title>", paper, *parts, "</svg>"]) + "\n"


def coordinate(value: float) -> str:
    """A length in tenths of a pixel."""
    return f"{value:.1f}".removesuffix(".0")


def text(
    x: float, y: float, words: str, colour: str = INK, anchor: str = "start", **more: str
) -> str:
    """Words with their baseline at y; `more` are attributes, with _ for -."""
    extra = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in more.items())
    at = f'x="{coordinate(x)}" y="{coordinate(y)}" fill="{colour}" text-anchor="{anchor}"'
    return f"<text {at}{extra}>{escape(words)}</text>"


def box(
    x: float, y: float, width: float, height: float, fill: str, line: str, dashed: bool = False
) -> str:
    """A rounded rectangle with its upper left corner at (x, y)."""
    dash = ' stroke-dasharray="4 3"' if dashed else ""
    corner = f'x="{coordinate(x)}" y="{coordinate(y)}"'
    size = f'width="{coordinate(width)}" height="{coordinate(height)}"'
    return f'<rect {corner} {size} rx="5" fill="{fill}" stroke="{line}" stroke-width="1.5"{dash}/>'


def line(points: Iterable[tuple[float, float]], colour: str, width: float = 1) -> str:
    """Straight lines from point to point."""
    path = " ".join(f"{coordinate(x)},{coordinate(y)}" for x, y in points)
    style = f'fill="none" stroke="{colour}" stroke-width="{width:g}" stroke-linejoin="round"'
    return f'<polyline points="{path}" {style}/>'


def dot(x: float, y: float, colour: str) -> str:
    """A filled circle around (x, y)."""
    centre = f'cx="{coordinate(x)}" cy="{coordinate(y)}"'
    return f'<circle {centre} r="4" fill="{colour}" stroke="{PAPER}" stroke-width="1.5"/>'
