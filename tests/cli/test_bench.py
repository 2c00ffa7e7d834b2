"""`idlm bench`: its JSON, its table and plot, and its refusals."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from idlm.cli import app
from idlm.cli.report import plot

KEYS = {
    "engine",
    "mode",
    "simulated",
    "concurrency",
    "tokens_per_second",
    "speedup_over_ar",
    "tpf",
    "acceptance",
}
KEYS |= {"ttft_ms", "ttft_ms_p99", "tpot_ms", "tpot_ms_p99", "worst_gap_ms", "peak_memory_mb"}
KEYS |= {"flops_per_token_over_ar", "tpf_decode", "tpf_expected", "plans", "reason"}


def bench(checkpoint: Path, *arguments: object) -> Any:
    model = (checkpoint / "base", "--adapter", checkpoint / "lora", "--requests", 2, "--repeats", 1)
    return CliRunner().invoke(app, ["bench", *map(str, (*model, *arguments))])


def test_one_object_with_a_row_for_every_mode_and_concurrency(checkpoint: Path) -> None:
    result = bench(
        checkpoint, "--modes", "ar,chain,all", "--stride", 2, "--concurrency", "1,2", "--json"
    )
    assert result.exit_code == 0 and result.stdout.count("\n") == 1, result.output
    report = json.loads(result.stdout)
    assert set(report) == {"rows", "environment"}
    rows = report["rows"]
    assert [row["concurrency"] for row in rows] == [1, 1, 1, 2, 2, 2]
    assert [row["mode"] for row in rows] == ["ar", "chain", "all"] * 2
    assert all(
        set(row) >= KEYS and row["engine"] == "idlm" and row["same_as_ar"] == 1 for row in rows
    )
    assert all(
        isinstance(row[key], float)
        for row in rows
        for key in ("ttft_ms", "tpot_ms", "tokens_per_second")
    )
    assert (
        report["environment"]["simulated_acceptance"] is None
        and report["environment"]["threads"] == 1
    )


def test_the_planner_says_why(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # where measured step costs are kept
    result = bench(checkpoint, "--modes", "planner,ar", "--stride", 2, "--concurrency", 1)
    assert result.exit_code == 0, result.output
    assert (
        "planner at 1: " in result.stdout
        and "tok/s" in result.stdout
        and "simulated" not in result.stdout.lower()
    )


def test_given_prompts_are_what_is_run(checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("Tom has 3 apples.\n")
    shared = ("--modes", "ar", "--concurrency", 1, "--prompts", file)
    report = json.loads(bench(checkpoint, *shared, "--json").stdout)
    assert report["rows"][0]["requests"] == 2 and report["rows"][0]["speedup_over_ar"] == 1


def test_simulated_acceptance_is_named_wherever_it_shows(checkpoint: Path) -> None:
    shared = (
        "--modes",
        "ar,all",
        "--stride",
        2,
        "--concurrency",
        1,
        "--simulate-acceptance",
        "0.9,0.9",
    )
    report = json.loads(bench(checkpoint, *shared, "--json").stdout)
    assert [row["simulated"] for row in report["rows"]] == [False, True]
    assert report["environment"]["simulated_acceptance"] == [0.9, 0.9]
    shown = bench(checkpoint, *shared).stdout
    assert shown.count("SIMULATED") == 2  # the titles of the table and of the plot
    assert shown.count("(simulated)") == 2  # and their rows


@pytest.mark.skipif(find_spec("matplotlib") is None, reason="matplotlib is not installed")
def test_its_figures_are_drawn(checkpoint: Path, tmp_path: Path) -> None:
    shared = ("--modes", "ar", "--concurrency", 1, "--plot", tmp_path / "plot.png", "--json")
    done = bench(checkpoint, *shared)
    assert done.exit_code == 0 and (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    plot(tmp_path / "plot.html", "idlm bench", json.loads(done.stdout))
    text = (tmp_path / "plot.html").read_text()
    assert "<td>idlm ar</td>" in text and "<svg" in text


REFUSED: dict[str, tuple[tuple[object, ...], str]] = {
    "an unknown mode": (("--modes", "ar,fast"), "fast"),
    "a mode twice": (("--modes", "ar,ar"), "ar twice"),
    "no mode": (("--modes", ""), "--modes"),
    "nothing in flight": (("--concurrency", "0"), "--concurrency 0"),
    "letters in flight": (("--concurrency", "1,many"), "many"),
    "too much in flight": (("--concurrency", "4096"), "4096"),
    "no requests": (("--requests", 0), "--requests 0"),
    "no repeats": (("--repeats", 0), "--repeats 0"),
    "no threads": (("--threads", 0), "--threads 0"),
    "stride 0": (("--stride", 0), "stride=0"),
    "stride 1 with modes that draft": (("--stride", 1), "--stride 1"),
    "a stride whose window is too wide": (("--stride", 40), "40"),
    "acceptance above 1": (("--simulate-acceptance", "0.9,1.2"), "1.2"),
    "acceptance of letters": (("--simulate-acceptance", "high"), "high"),
    "acceptance of nothing": (("--simulate-acceptance", ""), "''"),
    "a plot of another form": (("--plot", "plot.pdf"), "plot.pdf"),
    "a plot nowhere": (("--plot", "nowhere/plot.png"), "nowhere"),
    "no such prompts": (("--prompts", "nowhere.txt"), "nowhere.txt"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_values_are_refused_in_one_line(case: str, checkpoint: Path) -> None:
    arguments, named = REFUSED[case]
    result = bench(checkpoint, *arguments)
    assert result.exit_code == 2 and result.stdout == "", result.output
    assert (
        result.stderr.startswith("error: ")
        and result.stderr.count("\n") == 1
        and named in result.stderr
    )
