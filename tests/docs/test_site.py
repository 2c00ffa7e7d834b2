"""The site has every page once, and the links of the pages lead to places that it has."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import pytest

import idlm
from benchmarks.pages import site
from tests.docs.shell import ROOT

CONFIG = (ROOT / "mkdocs.yml").read_text()
DOCS = {page.name for page in (ROOT / "docs").glob("*.md")}
LISTED = re.findall(r": ([\w/.-]+\.md)$", CONFIG, re.MULTILINE)
API = (ROOT / "docs" / "api.md").read_text()
NAMED = re.findall(r"<!-- site: ::: ([\w.]+) -->", API)


def test_every_page_is_listed_once() -> None:
    ours = [place for place in LISTED if not place.startswith("source/")]
    assert len(ours) == len(set(ours)) and set(ours) == DOCS
    assert all((ROOT / site.repository_path(place)).is_file() for place in LISTED)


@pytest.mark.parametrize(
    ("written", "at", "made"),
    [
        ("(config.md)", "faq.md", "(config.md)"),
        ("(config.md#stages)", "faq.md", "(config.md#stages)"),
        ("(#here)", "faq.md", "(#here)"),
        ("(https://example.org/a.md)", "faq.md", "(https://example.org/a.md)"),
        ("(../idlm/decoding/law.py)", "faq.md", "(source/idlm/decoding/law.py.md)"),
        ("(../idlm/attention)", "faq.md", "(source/idlm/attention/index.md)"),
        ("(../deploy/grafana.json)", "faq.md", "(source/deploy/grafana.json)"),
        ("(../CHANGELOG.md#added)", "faq.md", "(source/CHANGELOG.md#added)"),
        ("(docs/faq.md)", "source/CONTRIBUTING.md", "(../faq.md)"),
        ("(base.py)", "source/idlm/attention/index.md", "(base.py.md)"),
        ("(../nowhere.py)", "faq.md", "(../nowhere.py)"),  # MkDocs says so
        ("(../idlm/params.py)", "source/idlm/params.py.md", "(../idlm/params.py)"),  # code
    ],
)
def test_links_lead_to_places_of_the_site(written: str, at: str, made: str) -> None:
    assert site.as_site(f"[a]{written} b", at) == f"[a]{made} b"


def test_what_a_comment_holds_is_on_the_site() -> None:
    assert site.as_site("a\n<!-- site: b\nc -->\n", "faq.md") == "a\nb\nc\n"
    assert site.as_site("<!-- not run: b -->", "faq.md") == "<!-- not run: b -->"


def test_all_that_is_linked_to_is_reached() -> None:
    reached = site.reached({"docs/architecture.md"})
    assert reached >= {"docs/glossary.md", "idlm/attention", "idlm/attention/base.py", "deploy"}
    assert not any("__pycache__" in path for path in reached)
    for path in reached:
        assert (ROOT / path).exists()


def test_the_reference_has_every_public_name() -> None:
    assert {f"idlm.{name}" for name in idlm.__all__} <= set(NAMED)
    for name in NAMED:
        module, _, attribute = name.rpartition(".")
        assert getattr(import_module(module), attribute).__doc__, name


def test_the_site_needs_neither_torch_nor_this_package() -> None:
    pinned = re.findall(r"^([\w.-]+)==", (ROOT / "requirements-docs.txt").read_text(), re.MULTILINE)
    assert "mkdocs-material" in pinned and not {"torch", "transformers", "idlm"} & set(pinned)
    hook = Path(site.__file__).read_text()
    assert not re.search(r"^(?:from|import) (?:torch|idlm|mkdocs)", hook, re.MULTILINE)


def test_who_drafted_for_every_outcome_first_is_said_wherever_cold_starts_are() -> None:
    pages = [page for page in (ROOT / "docs").glob("*.md") if page.name != "LOG.md"]
    texts = {page.name: page.read_text() for page in pages}
    explained = {name for name, text in texts.items() if "cold start" in text.lower()}
    assert explained >= {"index.md", "decoding.md", "faq.md"}
    assert all("2507.11851" in texts[name] for name in explained)


def test_the_explorer_is_part_of_the_site() -> None:
    page = (ROOT / "docs" / "explorer.md").read_text()
    (frame,) = re.findall(r'<iframe src="([^"]+)"', page)
    path = site.repository_path(frame)
    assert site.place(path) == frame and (ROOT / path).is_file()
    assert path in site.reached({"docs/explorer.md"})
