"""`idlm compare FIRST SECOND`: are two evaluations the same, item by item?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from idlm.cli import common


def compare(
    first: Annotated[
        Path, typer.Argument(metavar="FIRST", help="A folder of idlm eval.", show_default=False)
    ],
    second: Annotated[
        Path, typer.Argument(metavar="SECOND", help="Another one.", show_default=False)
    ],
    *,
    as_json: common.Json = False,
) -> None:
    """Compare two evaluations of the same items: AR and ISD, two models, or two servers.

    The difference with its interval, McNemar's exact p-value, the items that would show one point,
    and the share of equal answers.
    """
    from idlm.evaluation import paired

    with common.progress("comparing", len(paired.common_suites(first, second))) as advance:
        report = paired.compare(first, second, advance)
    if as_json:
        runs = {"first": paired.about(first), "second": paired.about(second)}
        return common.print_json({**runs, "suites": report})
    for name, suite in report.items():
        typer.echo(f"{name}: {100 * suite['same_answers']:.1f} % of the answers are equal")
        for metric, figures in suite["metrics"].items():
            typer.echo(f"  {metric.removesuffix(',none')}: {_line(figures)}")


def _line(figures: dict[str, Any]) -> str:
    low, high = (100 * one for one in figures["interval"])
    line = "{first:.1%} and {second:.1%}, difference {difference:+.1%}".format(**figures)
    line += f" [{low:+.1f}, {high:+.1f}] points"
    if "mcnemar" in figures:
        line += ", {only_first} to {only_second}, p = {mcnemar:.3g}".format(**figures)
    needed = figures["items_for_a_point"]
    return line + ("" if needed is None else f"; {needed} items would show one point")
