"""`idlm report` of evaluations: each shape of file, its figures in tables and pictures."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from idlm.cli import app
from idlm.errors import InputError
from idlm.evaluation import report
from idlm.evaluation.pictures import drafting, frontier, quality, speed, unbeaten
from idlm.evaluation.results import Interval, Results, Tradeoff, mean_interval, read

needs_matplotlib = pytest.mark.skipif(
    find_spec("matplotlib") is None, reason="matplotlib is not installed"
)
EVIL = "<img src=x onerror=alert(1)>"
MACHINE = {
    "cpu": "A processor",
    "cores": 2,
    "idlm": "0.1.0",
    "torch": "2.13.0",
    "date": "2026-11-27",
}
BENCH = {
    "rows": [
        {"engine": "idlm", "mode": mode, "simulated": mode == "all", "concurrency": count,
         "tokens_per_second": 100.0 * count * tpf, "tokens_per_second_range": [90.0, 990.0],
         "speedup_over_ar": tpf, "tpf": tpf, "acceptance": acceptance, "tpot_ms": 4.0,
         "flops_per_token_over_ar": 2.5}
        for mode, tpf, acceptance in (("ar", 1.0, []), ("all", 1.75, [0.5, None]))
        for count in (8, 1)
    ],
    "environment": {**MACHINE, "command": "idlm bench nano", "stride": 3, "model": "nano"},
}  # fmt: skip
DEPTHS = [{"depth": k, "tokens": n, "alpha": a} for k, n, a in ((1, 9, 0.75), (2, 0, 0.0))]
ACCEPT = {
    "model": "nano", "adapter": None, "method": "idlm", "stride": 3, "rule": "coupled",
    "tpf_decode": 1.6, "rows_per_token": 5.5, "accepted": [0.625, None],
    "definitions": {"causal": {"alpha": 0.75, "by_depth": DEPTHS}}, "environment": MACHINE,
}  # fmt: skip
PAPER = {
    "environment": MACHINE, "steps": 100,
    "methods": {
        name: {"problems": 200, "accuracy": share, "interval": [share - 0.05, share + 0.05],
               "tpf": 2.0, "rows_per_token": 3.0, "acceptance": {},
               "tokens_per_second": {"1": rate, "8": 4 * rate}}
        for name, share, rate in (("ar", 0.9, 100.0), ("sdar", 0.7, 80.0), (EVIL, 0.6, 300.0))
    },
}  # fmt: skip
COMPARE = {
    "first": {"settings": {"stride": 1}, "environment": MACHINE},
    "second": {"settings": {"stride": 4}, "environment": MACHINE},
    "suites": {"gsm8k": {"items": 4, "same_answers": 0.5, "metrics": {"exact_match,strict": {
        "first": 0.5, "second": 0.75, "difference": 0.25, "interval": [-0.125, 0.5],
        "mcnemar": 0.375, "items_for_a_point": None}}}},
}  # fmt: skip


def save(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return path


def evaluation(folder: Path) -> Path:
    stderr = (0.75 * 0.25 / 99) ** 0.5  # of 0s and 1s
    metrics = {"exact_match,none": {"value": 0.75, "stderr": stderr, "n": 100}}
    settings = {"model": "nano", "stride": 4, "branches": "all", "seed": 3}
    versions = {"idlm": "0.1.0", "lm_eval": "0.4.13"}
    suites = {"gsm8k": {"title": "GSM8K", "metrics": metrics}}
    save(folder / "results.json", {"settings": settings, "versions": versions, "suites": suites})
    run = {"tokens": 1000, "new_tokens": 1000, "tpf": 3.5, "seconds": 4.0}
    save(folder / "run.json", {"suites": {"gsm8k": run}, "environment": MACHINE})
    save(folder / "settings.json", settings)
    return folder


def every(folder: Path) -> list[Path]:
    files = {"bench": BENCH, "accept": ACCEPT, "paper": PAPER, "compare": COMPARE}
    saved = [save(folder / f"{name}.json", value) for name, value in files.items()]
    return [*saved, evaluation(folder / "gsm8k-run")]


def axes_of(panel: Any) -> Any:
    from matplotlib.figure import Figure

    axes = Figure().add_subplot()
    panel(axes)
    return axes


def lines(axes: Any) -> dict[str, list[tuple[float, float]]]:
    """The points of each labelled line."""
    found = {}
    for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
        line = handle if hasattr(handle, "get_xydata") else handle.lines[0]
        found[label] = [tuple(map(float, point)) for point in line.get_xydata()]
    return found


def test_each_command_and_its_figures(tmp_path: Path) -> None:
    found = read(every(tmp_path))
    assert [source.kind for source in found.sources] == [
        "idlm bench", "idlm accept", "benchmarks.paper", "idlm compare", "idlm eval",
    ]  # fmt: skip
    text = "\n".join(report.markdown(found))
    for row in (
        "| 8 | idlm all (simulated) | 1,400 (90 to 990) | 250 | 1.75x | [1] |",
        "| idlm all (simulated), 8 at once | 3 | 1.75 | acceptance | 0.500 - | [1] |",
        "| nano idlm coupled | 3 | 1.60 | alpha, p: causal | 0.750 - | [2] |",
        "| nano idlm coupled | 3 | 1.60 | acceptance | 0.625 - | [2] |",
        "| nano idlm coupled | 5.50 | 1.60 | 0.29 | [2] |",
        "| word problems, exact answers | sdar | 0.700 (0.650 to 0.750) | 200 | [3] |",
        "| gsm8k exact_match,strict | 0.500 | 0.750 | +0.250 (-0.125 to +0.500) | 0.375 | 50.0% |",
        "| gsm8k exact_match | nano N=4 all | 0.750 (0.657 to 0.825) | 100 | [5] |",
        "| of the evaluation | nano N=4 all | 0.750 (0.657 to 0.825) | 250 | yes | [5] |",
    ):
        assert row in text, row
    sources = text.split("## Sources")[1].splitlines()
    assert any("`idlm bench nano` | stride 3, model nano | cpu A processor" in x for x in sources)
    assert any("lm_eval 0.4.13" in x and "seed 3" in x and "cores 2" in x for x in sources)


def test_a_folder_gives_what_it_has_and_names_the_rest(tmp_path: Path) -> None:
    every(tmp_path)
    save(tmp_path / "soak.json", {"requests": 3})
    found = read([tmp_path])
    assert len(found.sources) == 5 and found.left_out == ["soak.json"]


def test_intervals() -> None:
    assert mean_interval(1.0, 0.0, 10).low == pytest.approx(0.722, abs=1e-3)  # Wilson's, not 1
    assert mean_interval(0.5, 0.01, 100) == Interval(0.5, 0.5 - 0.0196, 0.5 + 0.0196)
    assert mean_interval(1.0, None, 1).low == pytest.approx(0.207, abs=1e-3)


def test_who_is_unbeaten() -> None:
    def row(name: str, value: float, rate: float) -> Tradeoff:
        return Tradeoff(1, name, "", "", Interval(value, value, value), rate)

    slow, fast = row("slow", 0.9, 10), row("fast", 0.5, 30)
    rows = [slow, row("beaten", 0.5, 10), fast, row("as good, slower", 0.9, 9)]
    assert unbeaten(rows) == [slow, fast]
    twice = [slow, row("equal", 0.9, 10)]
    assert unbeaten(twice) == twice


@needs_matplotlib
def test_pictures_have_the_points(tmp_path: Path) -> None:
    found = read(every(tmp_path))
    rate, each = (axes_of(panel) for panel in speed(found)[:2])
    assert lines(rate)["idlm all (simulated)"] == [(1, 175), (8, 1400)]
    assert lines(each)["idlm ar"] == [(1, 250), (8, 250)]
    depths = [lines(axes_of(panel)) for panel in drafting(found)]
    assert {"nano idlm coupled": [(1, 0.75)]} in depths
    (bars,) = (axes_of(panel) for panel in quality(found)[1:])
    assert [label.get_text() for label in bars.get_yticklabels()] == ["nano N=4 all [5]"]
    first = axes_of(frontier(found)[0])
    assert [text.get_text() for text in first.texts] == ["ar", "sdar", EVIL]
    front = [line for line in first.lines if line.get_linestyle() == "--"]
    assert front[0].get_xydata().tolist() == [[100, 0.9], [300, 0.6]]


@needs_matplotlib
def test_the_command_writes_a_safe_page_and_its_pictures(tmp_path: Path) -> None:
    page = tmp_path / "out.html"
    done = CliRunner().invoke(app, ["report", *map(str, every(tmp_path / "in")), "-o", str(page)])
    assert done.exit_code == 0, done.output
    written = [Path(line) for line in done.stdout.splitlines()]
    assert written[0] == page and {path.name for path in written[1:]} == {
        f"out-{key}.png" for key in ("quality", "drafting", "speed", "frontier", "compute")
    }
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written[1:])
    text = page.read_text()
    assert text.count("<svg") == 5 and "default-src 'none'" in text
    assert EVIL not in text and "&lt;img src=x" in text
    assert "<script" not in text and "src=" not in text.replace("src=x onerror", "")


REFUSED: dict[str, tuple[Any, str]] = {
    "another shape": ({"requests": 3}, "no figures of a known shape"),
    "no object": ([1], "no figures of a known shape"),
    "no JSON": ("{", "cannot read"),
    "broken figures": ({**PAPER, "methods": {"ar": {**PAPER["methods"]["ar"], "interval": 3}}},
                       "looks like a file of benchmarks.paper"),
}  # fmt: skip


@needs_matplotlib
@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_evaluation_is_one_error(case: str, tmp_path: Path) -> None:
    content, words = REFUSED[case]
    file = tmp_path / "found.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    done = CliRunner().invoke(app, ["report", str(file), "-o", str(tmp_path / "page.html")])
    assert done.exit_code == 2 and words in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "page.html").exists()


@needs_matplotlib
def test_runs_and_evaluations_are_not_mixed(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    other = save(tmp_path / "bench.json", BENCH)
    done = CliRunner().invoke(app, ["report", str(tmp_path / "run"), str(other)])
    assert done.exit_code == 2 and "is a training run" in done.stderr


def test_a_missing_file_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read .*nowhere\.json"):
        read([tmp_path / "nowhere.json"])


def test_nothing_is_added_of_an_unknown_shape() -> None:
    results = Results()
    assert not results.add("x", {"rows": []}) and not results.sources
