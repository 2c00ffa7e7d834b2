"""The built page: made of the sources that are there, small, and free of what the policy blocks."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
from pathlib import Path

import pytest

from idlm.serving import page

ROOT = Path(__file__).parents[2]
WEB, BUILT = ROOT / "web", ROOT / "idlm" / "ui" / "page"
MOST_BYTES = 250_000
SUFFIXES = (".html", ".mjs", ".json")


def sources() -> list[Path]:
    """What a build reads; see web/build.mjs."""
    inside = [one for folder in ("src", "public") for one in (WEB / folder).rglob("*")]
    beside = [one for one in WEB.iterdir() if one.suffix in SUFFIXES]
    return [one for one in [*inside, *beside] if one.is_file()]


def test_the_built_page_is_of_these_sources() -> None:
    """`make web` builds it again."""
    whole = hashlib.sha256()
    for path in sorted(sources(), key=lambda one: one.relative_to(WEB).as_posix()):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        whole.update(f"{digest}  {path.relative_to(WEB).as_posix()}\n".encode())
    assert (BUILT / "source.sha256").read_text().strip() == whole.hexdigest()


def test_the_measured_points_are_those_of_the_results() -> None:
    decode = json.loads((ROOT / "benchmarks/results/decode.json").read_text())
    runs = {name: run for name, run in decode["results"].items() if run["acceptance"]}
    shown = json.loads((WEB / "src/lib/measured.json").read_text())
    assert [(one["tpf"], one["speedup"], one["acceptance"]) for one in shown] == [
        (run["tpf"], run["speedup"], run["acceptance"]) for run in runs.values()
    ]


def test_the_script_is_small() -> None:
    assert len(gzip.compress((BUILT / "app.js").read_bytes())) <= MOST_BYTES


@pytest.mark.parametrize("name", ["index.html", "explorer.html"])
def test_nothing_comes_from_elsewhere(name: str) -> None:
    text = (BUILT / name).read_text()
    assert re.findall(r"""(?:src|href)=["']?(?:https?:)?//""", text) == []
    assert re.findall(r"""\son\w+=""", text.split("<script")[0]) == []


def test_the_index_has_no_inline_script_or_style() -> None:
    index = (BUILT / page.INDEX).read_text()
    assert re.findall(r"<script[^>]*>[^<]|<style| style=", index) == []
    named = set(re.findall(r'"ui/([^"]+)"', index))
    assert named == set(page.ASSETS)
    assert all((BUILT / one).is_file() for one in named)


def test_the_explorer_s_policy_allows_its_own_script_and_style_alone() -> None:
    text = (BUILT / "explorer.html").read_text()
    policy = re.findall(r'Content-Security-Policy" content="([^"]+)"', text)[0]
    for tag in ("script", "style"):
        inside = text.split(f"<{tag}>")[1].split(f"</{tag}>")[0]
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy


def test_the_grid_of_the_port_is_the_model_s() -> None:
    """web/tests/speedup.spec.ts compares the port with this file."""
    pytest.importorskip("idlm.evaluation.speedup")
    from tests.ui.speedup_grid import FILE, grid

    kept, made = json.loads(FILE.read_text()), json.loads(json.dumps(grid()))
    cases, others = kept.pop("cases"), made.pop("cases")
    assert kept == made
    for one, other in zip(cases, others, strict=True):
        assert one.pop("speed") == pytest.approx(other.pop("speed"))
        assert one.pop("efficiency") == pytest.approx(other.pop("efficiency"))
        assert one == other
