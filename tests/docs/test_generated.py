"""Generated pages and pictures are what `make pages` would write now, and every result is shown."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks.pages import (
    benchmarks_page,
    config_table,
    generated,
    throughput_plot,
    window_picture,
)
from idlm.decoding.window import window


@pytest.mark.parametrize("page", generated.PAGES, ids=lambda page: page.path.name)
def test_nothing_is_stale(page: generated.Page) -> None:
    assert page.path.read_text() == page.render(), f"{page.path} is stale; run make pages"


def test_a_key_without_a_meaning_is_no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    documented = config_table.TrainConfig.__doc__ or ""
    monkeypatch.setattr(
        config_table.TrainConfig, "__doc__", documented.replace("resume:", "resumes:")
    )
    with pytest.raises(ValueError, match="TrainConfig and its fields differ in .*resume"):
        config_table.render()


def test_a_changed_result_changes_the_page_and_the_plot(tmp_path: Path) -> None:
    for file in benchmarks_page.RESULTS.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    changed = tmp_path / throughput_plot.RESULT
    report = json.loads(changed.read_text())
    report["rows"][0]["tokens_per_second"] *= 1.1
    plot = throughput_plot.render(json.loads(changed.read_text()))
    changed.write_text(json.dumps(report))
    assert benchmarks_page.render(tmp_path) != benchmarks_page.render()
    assert throughput_plot.render(report) != plot


def test_every_result_is_on_the_page_or_dropped_by_name() -> None:
    shown = {section.file for sections in benchmarks_page.SECTIONS.values() for section in sections}
    there = {file.name for file in benchmarks_page.RESULTS.glob("*.json")}
    assert shown | set(benchmarks_page.DROPPED) == there
    assert not shown & set(benchmarks_page.DROPPED)


def test_what_a_result_does_not_record_is_said() -> None:
    page = benchmarks_page.render()
    sources = [
        line
        for line in page.splitlines()
        if "](../benchmarks/results/" in line and "Machine:" in line
    ]
    assert len(sources) == sum(map(len, benchmarks_page.SECTIONS.values()))
    for line in sources:
        name = re.findall(r"results/(\w+\.json)", line)[0]
        report = json.loads((benchmarks_page.RESULTS / name).read_text())
        found = report | report.get("environment", {})
        assert ("Date: not recorded" in line) == ("date" not in found)
        assert ("Machine: not recorded" in line) == ("cpu" not in found)
        assert line.startswith("**Earlier engine.**") == ("instructions" not in found)


def test_the_picture_has_a_cell_for_each_row_of_the_window() -> None:
    layout = window(window_picture.STRIDE, "all")
    picture = window_picture.render()
    assert picture.count(">MASK<") == layout.mask_rows
    assert picture.count(">pending<") == 2  # of this window and of the next
