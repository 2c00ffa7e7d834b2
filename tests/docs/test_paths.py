"""Every path and function named in the documents exists; links lead to headings that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("*.md")]
)
HISTORY = {"LOG.md", "CHANGELOG.md"}
"""Pages that may name files that no longer exist."""
LINK = re.compile(r"\]\(([^)\s]+)\)")
FOLDERS = ("idlm", "benchmarks", "configs", "deploy", "docs", "examples", "tests")
PATH = re.compile(rf"`((?:{'|'.join(FOLDERS)})/[\w./-]+)`")


def ids(page: Path) -> str:
    return str(page.relative_to(ROOT))


def anchors(page: Path) -> set[str]:
    """The headings of a page as GitHub links to them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text()):
        if target.startswith(("http:", "https:", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        place = (page.parent / path) if path else page
        assert place.exists(), target
        assert not anchor or anchor in anchors(place), target


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in HISTORY], ids=ids)
def test_paths_in_the_text_are_there(page: Path) -> None:
    for path in PATH.findall(page.read_text()):
        assert (ROOT / path).exists(), path


def where_to_look() -> list[tuple[str, list[Path], list[str]]]:
    """The rows of the table of docs/architecture.md: question, files, names."""
    section = (
        (ROOT / "docs" / "architecture.md")
        .read_text()
        .split("## Where to look\n")[1]
        .split("\n## ")[0]
    )
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| ")][
        1:
    ]
    return [
        (
            row[0].strip(),
            [ROOT / "docs" / link for link in LINK.findall(row[1])],
            re.findall(r"`(\w+)`", row[2]),
        )
        for row in rows
    ]


def defined(place: Path) -> set[str]:
    """Names of the functions and classes of a file, or of the files of a folder."""
    files = [place] if place.is_file() else list(place.rglob("*.py"))
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text()))]
    return {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}


@pytest.mark.parametrize("row", where_to_look(), ids=lambda row: row[0])
def test_what_the_table_names_is_where_it_says(row: tuple[str, list[Path], list[str]]) -> None:
    _, files, names = row
    assert files
    found = set().union(*(defined(file) for file in files))
    assert set(names) <= found, set(names) - found


def test_a_reader_finds_the_four_places_in_one_hop() -> None:
    questions = " ".join(question for question, _, _ in where_to_look())
    for what in ("a draft accepted", "freed", "the loss computed", "a bad request refused"):
        assert what in questions
