"""`idlm report PATH... [-o report.html]`: training runs, or evaluations, as one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from idlm.cli import common
from idlm.errors import InputError
from idlm.extras import need

Plot = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Draw the figures too: a .png, or a page as .html."),
]
FORMS = (".html", ".png")


def report(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="PATH...",
            help="The output_dir of runs of train; or files and folders of eval, bench, accept "
            "and compare.",
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="The page to write.")
    ] = Path("report.html"),
) -> None:
    """Draw the curves of training runs, or the figures of evaluations and benchmarks.

    The page is one HTML file that loads nothing from elsewhere. Curves of several runs lie over
    each other. Of evaluations each picture is also a PNG file beside the page, and every figure
    names its settings, machine and versions.
    """
    need("report", "idlm report")
    from idlm.evaluation.report import write

    runs = [is_run(path) for path in paths]
    if any(runs) and not all(runs):
        raise InputError(
            f"{str(paths[runs.index(True)])!r} is a training run and "
            f"{str(paths[runs.index(False)])!r} is none; give one kind at a time"
        )
    if all(runs):
        need("train", "idlm report")
        from idlm.training.report import report as page

        write({output: page(paths).encode()})
        return typer.echo(str(output))
    from idlm.evaluation import report as evaluations
    from idlm.evaluation.results import read

    results = read(paths)
    drawn = sum(bool(section.panels) for section in evaluations.sections(results))
    with common.progress("drawing", 2 * drawn) as advance:
        files = {output: evaluations.page(results, advance).encode()}
        for key, content in evaluations.pngs(results, advance):
            files[output.with_name(f"{output.stem}-{key}.png")] = content
    write(files)
    typer.echo("\n".join(map(str, files)))
    if results.left_out:
        typer.echo(f"without figures of a known shape: {', '.join(results.left_out)}", err=True)


def is_run(path: Path) -> bool:
    """Whether a path is that of a training run: a folder with its figures, or without any JSON."""
    return path.is_dir() and ((path / "metrics.jsonl").exists() or not any(path.rglob("*.json")))


def check_plot(file: Path | None, command: str) -> None:
    """Check --plot before anything is measured.

    Raises:
        InputError: it cannot be drawn or written.
    """
    if file is None:
        return
    if file.suffix not in FORMS:
        raise InputError(
            f"--plot {str(file)!r} is no picture; end its name in {' or '.join(FORMS)}"
        )
    if not file.parent.is_dir():
        raise InputError(f"--plot {str(file)!r}: there is no folder {str(file.parent)!r}; make it")
    need("report", f"{command} --plot")


def plot(file: Path | None, name: str, found: dict[str, object]) -> None:
    """Draw the report of a command, as PNG or as a page, by the suffix of `file`."""
    if file is None:
        return
    from idlm.evaluation import report as evaluations
    from idlm.evaluation.results import Results

    results = Results()
    results.add(name, found)
    if file.suffix == ".png":
        evaluations.write({file: evaluations.whole_png(results)})
    else:
        evaluations.write({file: evaluations.page(results).encode()})
