"""`idlm report`: a page with the points of the curves, that holds no foreign HTML and asks for
nothing."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from idlm.cli import app
from idlm.training.run import train
from tests.training import tiny

pytestmark = pytest.mark.skipif(
    find_spec("matplotlib") is None, reason="matplotlib is not installed"
)
REQUESTS = {"src", "href", "xlink:href", "action", "data", "srcset", "poster", "formaction"}


class Page(HTMLParser):
    """The tags of a page, what it would request, and its texts by tag."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.requests: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self._last = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self._last = tag
        self.requests += [value or "" for name, value in attrs if name in REQUESTS]
        styles = " ".join(value or "" for name, value in attrs if name not in REQUESTS)
        self.requests += re.findall(r"url\(\s*['\"]?([^)'\"]*)", styles)

    def handle_data(self, data: str) -> None:
        self.texts.setdefault(self._last, []).append(data)


def write_run(folder: Path, entries: list[dict[str, Any]], **files: str) -> Path:
    folder.mkdir(parents=True)
    lines = "".join(json.dumps(entry) + "\n" for entry in entries)
    (folder / "metrics.jsonl").write_text(lines + '{"step": 9, "lo')  # cut off by a kill
    for name, text in files.items():
        (folder / name.replace("_", ".")).write_text(text)
    return folder


def page_of(*folders: Path, output: Path) -> str:
    done = CliRunner().invoke(app, ["report", *map(str, folders), "-o", str(output)])
    assert done.exit_code == 0, done.stderr
    assert done.stdout == f"{output}\n"
    return output.read_text()


def points(page: str, curve: str) -> np.ndarray[Any, Any]:
    """The places of a curve's points in the picture, [n, 2]."""
    (path,) = re.findall(rf'<g id="{re.escape(curve)}">\s*<path d="([^"]*)"', page)
    return np.array([list(map(float, xy)) for xy in re.findall(r"[ML] (\S+) (\S+)", path)])


def assert_drawn(page: str, curve: str, steps: list[int], values: list[float]) -> None:
    """The points are the data's, but for the scale of each axis."""
    drawn = points(page, curve)
    assert len(drawn) == len(steps)
    for places, data in zip(drawn.T, (steps, values), strict=True):
        scale = np.polyfit(data, places, 1)
        np.testing.assert_allclose(np.polyval(scale, data), places, atol=1e-3)
        assert abs(scale[0]) * np.ptp(data) > 10  # not a flat line


def test_a_run_has_its_curves_config_and_environment(tmp_path: Path) -> None:
    tiny.model("full", torch.float32).model.save_pretrained(tmp_path / "model")
    tiny.write_jsonl(tmp_path / "data.jsonl", tiny.examples())
    train(tiny.config(tmp_path, stages=[{"steps": 4, "block_size": 2}], eval_steps=2))
    page = page_of(tmp_path / "run", output=tmp_path / "page.html")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    entries = list(map(json.loads, lines))
    for key in ("loss", "ce_noisy", "ce_clean", "learning_rate", "grad_norm", "tokens_per_second"):
        have = [entry for entry in entries if key in entry]
        assert_drawn(page, f"0/{key}/0", [e["step"] for e in have], [e[key] for e in have])
    assert len(points(page, "0/acceptance/1")) == len(points(page, "0/tpf/0")) == 2
    texts = Page(page).texts["pre"]
    assert any("batch_size: 4" in text for text in texts)
    assert any('"transformers"' in text and '"sha256"' in text for text in texts)


def test_several_runs_lie_over_each_other(tmp_path: Path) -> None:
    steps, losses = [10, 20, 30], ([3.0, 2.0, 1.5], [4.0, 2.5, 1.0])
    folders = [
        write_run(tmp_path / name, [{"step": s, "loss": v} for s, v in zip(steps, x, strict=True)])
        for name, x in zip(("_one", "two$x$"), losses, strict=True)
    ]
    page = page_of(*folders, output=tmp_path / "page.html")
    one, two = (points(page, f"{number}/loss/0") for number in (0, 1))
    places, values = np.concatenate([one, two])[:, 1], np.concatenate(losses)
    scale = np.polyfit(values, places, 1)  # one axis for both
    np.testing.assert_allclose(np.polyval(scale, values), places, atol=1e-3)
    assert {str(folder) for folder in folders} <= set(Page(page).texts["h2"])


def test_data_is_no_html_and_nothing_is_requested(tmp_path: Path) -> None:
    evil = "<img src=x onerror=alert(1)>"
    entries = [
        {"step": 1, "loss": 2.0, "tpf": 1.0, "acceptance": [0.5, evil], "kl": float("nan")},
        {"step": 2, "loss": evil, "tpf": float("inf"), "acceptance": [0.75, 0.25], evil: evil},
        {"step": evil, "loss": 1.0},
        {"step": 3, "loss": 1.0, "tpf": 1.5, "acceptance": "none"},
    ]
    config = f"output_dir: '</pre><script>alert(1)</script>{evil}'"
    folder = write_run(tmp_path / "<script>x<" / evil, entries, config_yaml=config)
    page = page_of(folder, output=tmp_path / "page.html")
    assert_drawn(page, "0/loss/0", [1, 3], [2.0, 1.0])
    assert len(points(page, "0/acceptance/0")) == 2 and "0/kl/0" not in page
    read = Page(page)
    assert read.tags.isdisjoint({"script", "img", "link", "iframe", "object", "embed", "image"})
    assert all(value.startswith("#") for value in read.requests), read.requests
    assert "".join(read.texts["pre"]).startswith(config[:20])
    assert "default-src 'none'" in page and "@import" not in page
    without = re.sub(r'xmlns(:\w+)?="[^"]*"', "", page)
    assert "http" not in without.replace("http-equiv", "")


@pytest.mark.parametrize("content", [None, "", "[1]\n", '{"step": 1, "lo'])
def test_a_folder_without_figures_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    output = tmp_path / "page.html"
    done = CliRunner().invoke(app, ["report", str(tmp_path), "-o", str(output)])
    assert done.exit_code == 2 and "has no figures in metrics.jsonl" in done.stderr
    assert done.stderr.count("\n") == 1 and not output.exists()


def test_a_page_that_cannot_be_written_is_one_error(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [{"step": 1, "loss": 2.0}])
    nowhere = tmp_path / "nowhere" / "page.html"
    done = CliRunner().invoke(app, ["report", str(folder), "-o", str(nowhere)])
    assert done.exit_code == 2 and done.stderr.count("\n") == 1 and "nowhere" in done.stderr
