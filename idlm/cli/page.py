"""`idlm ui` and `idlm explore`: the playground and the explorer in a browser."""

from __future__ import annotations

import webbrowser
from importlib.resources import as_file, files
from typing import Annotated

import typer

from idlm.cli import drafts
from idlm.cli.serve import check_port, launch
from idlm.errors import InputError
from idlm.extras import need
from idlm.serving.config import ServeConfig, WorkerConfig

EXPLORER = "explorer.html"

Browser = Annotated[bool, typer.Option("--browser/--no-browser", help="Open it in a browser.")]


def ui(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]",
            help="A folder, a GGUF file, a hub id, or a bundled model: nano, nano-base, nano-full.",
        ),
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="A server with OpenAI's API in place of MODEL: the page talks to it through a "
            "proxy here.",
        ),
    ] = None,
    port: Annotated[int, typer.Option(help="Of the page; 0 takes a free one.")] = 0,
    stride: drafts.Stride = None,
    branches: drafts.Branches = None,
    draft_source: drafts.Source = None,
    browser: Browser = True,
) -> None:
    """Open the playground for a model, or for a server that runs.

    'idlm serve MODEL --ui' has the same page, and all options of a server.
    """
    need("serve", "idlm ui")
    if (model is None) == (url is None):
        raise InputError(
            "give MODEL or --url, and not both: 'idlm ui nano', or "
            "'idlm ui --url http://127.0.0.1:8000'"
        )
    check_port(port)

    def opened(page: str) -> None:
        if browser:
            webbrowser.open(page)

    if url is not None:
        from idlm.serving.page_server import show

        def announce(page: str) -> None:
            typer.echo(f"the page for {url} is at {page}")
            opened(page)

        show(url, port, announce)
        return
    assert model is not None
    wanted = drafts.Drafts(stride, branches, draft_source)
    worker = WorkerConfig(model, {}, "auto", "cpu", wanted.config())
    launch(ServeConfig(worker, model, port=port, ui=True), wanted, opened)


def explore(browser: Browser = True) -> None:
    """Open the explorer: what acceptance, stride and hardware make of speed. It needs no model.

    It is one file that works without a server and without a network.
    """
    with as_file(files("idlm.ui") / "page" / EXPLORER) as path:
        if not path.is_file():
            raise InputError(f"{EXPLORER} is missing from this installation; run 'make web'")
        typer.echo(path.as_uri())
        if browser:
            webbrowser.open(path.as_uri())
