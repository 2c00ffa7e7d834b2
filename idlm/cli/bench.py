"""`idlm bench MODEL`: AR, chain, all outcomes, the planner and lookup drafts under load."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from idlm.cli import common, drafts, prompts
from idlm.cli import report as reports
from idlm.config import EngineConfig
from idlm.errors import InputError

if TYPE_CHECKING:
    from rich.table import Table

    from idlm.evaluation.serving_bench import Row
    from idlm.models.idlm_model import Idlm

MODES = ("ar", "chain", "all", "planner")
ORDINARY = ("ar", "lookup")
"""Of a model that was not trained to draft."""


def bench(
    model: common.Model,
    modes: Annotated[
        str | None,
        typer.Option(
            metavar="A,B",
            help="What to compare, and in which order.",
            show_default=f"{','.join(MODES)}; {','.join(ORDINARY)} for a model that was not "
            "trained to draft",
        ),
    ] = None,
    concurrency: Annotated[str, typer.Option(metavar="C,D", help="Requests in flight.")] = "1,8,32",
    requests: Annotated[
        int, typer.Option(help="Requests a run; at least twice those in flight are made.")
    ] = 32,
    repeats: Annotated[
        int, typer.Option(help="Runs of each mode, in turn, after one to warm up.")
    ] = 3,
    simulate_acceptance: Annotated[
        str | None,
        typer.Option(
            metavar="P,Q",
            help="Accept drafts by chance, by depth: for shapes without trained weights.",
        ),
    ] = None,
    prompts_file: Annotated[
        Path | None,
        typer.Option("--prompts", metavar="FILE", help="Prompts: .txt one a line, or .jsonl."),
    ] = None,
    stride: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="N of chain and all; the planner's largest.",
            rich_help_panel="Decoding",
        ),
    ] = 4,
    adapter: common.Adapter = None,
    dtype: common.Dtype = "auto",
    device: common.Device = "cpu",
    max_model_len: common.MaxModelLen = None,
    weights: common.Weights = "auto",
    threads: Annotated[
        int, typer.Option(help="CPU threads; small models gain nothing from more.")
    ] = 1,
    plot: reports.Plot = None,
    as_json: common.Json = False,
) -> None:
    """Measure speed under load: tokens per second, latency, TPF and memory of each mode, in turn,
    on the same weights.

    Requests are greedy, with prompt and output lengths mixed from a fixed seed: the prompts of
    FILE, held-out problems for the bundled models, or random tokens (then acceptance means nothing:
    simulate it).
    """
    chosen = _modes(",".join(MODES) if modes is None else modes)
    in_flight = [_count("concurrency", text, 1024) for text in _split("concurrency", concurrency)]
    shares = None if simulate_acceptance is None else _shares(simulate_acceptance)
    _check(stride, chosen, requests=requests, repeats=repeats, threads=threads)
    reports.check_plot(plot, "idlm bench")
    given = prompts.given([], prompts_file)

    import torch

    from idlm.engine.preflight import Wanted, preflight
    from idlm.environment import environment
    from idlm.evaluation.closed_loop import bench_engines
    from idlm.evaluation.serving_bench import bench as run
    from idlm.evaluation.workload import workload
    from idlm.models.loading import load

    torch.set_num_threads(threads)
    ordinary = set(chosen) <= set(ORDINARY)
    largest = 1 if ordinary else stride
    engine = EngineConfig(
        largest, max_num_seqs=max(in_flight), weights=weights, max_model_len=max_model_len
    )
    adapters = [] if adapter is None else [adapter]
    found = preflight(Wanted(model, adapters, dtype, device), engine)
    if not found.trained and not ordinary:
        if modes is None and shares is None:
            chosen = list(ORDINARY)
        elif not found.possible:
            asked = "--simulate-acceptance" if modes is None else f"--modes {modes}"
            drafts.refuse(model, asked, f"--modes {','.join(ORDINARY)}")
    idlm = load(model, adapter, dtype, device, max_model_len)
    draw = workload(idlm, [prompt.encode(idlm, chat=True) for prompt in given])
    with common.progress("starting engines", len(chosen)) as advance:
        engines = bench_engines(
            idlm, chosen, stride, max(in_flight), shares, weights=weights, advance=advance
        )
    if chosen == list(ORDINARY) and modes is None:
        drafts.say_lookup(model)
    common.keep_what_is_loaded()
    runs = len(in_flight) * (repeats + 1) * len(engines)
    with common.progress("measuring in turn", runs) as advance:
        rows = run(engines, draw, in_flight, requests, repeats, advance)
    settings: dict[str, object] = {
        "model": model,
        "adapter": adapter,
        "stride": stride,
        "weights": weights,
    }
    settings |= {"simulated_acceptance": shares} | _work(idlm, requests, repeats)
    report: dict[str, object] = {"rows": rows, "environment": environment() | settings}
    reports.plot(plot, "idlm bench", report)
    if as_json:
        common.print_json(report)
    else:
        show(report)


def _work(idlm: Idlm, requests: int, repeats: int) -> dict[str, object]:
    dtype = str(idlm.dtype).removeprefix("torch.")
    return {"dtype": dtype, "device": str(idlm.device), "requests": requests, "repeats": repeats}


def _split(name: str, text: str) -> list[str]:
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise InputError(
            f"--{name} {text!r} has an empty entry; write one or more, joined by commas"
        )
    twice = [part for part in parts if parts.count(part) > 1]
    if twice:
        raise InputError(f"--{name} {text!r} names {twice[0]} twice; name it once")
    return parts


def _modes(text: str) -> list[str]:
    chosen = _split("modes", text)
    known = (*MODES, "lookup")
    unknown = [mode for mode in chosen if mode not in known]
    if unknown:
        raise InputError(
            f"--modes: {unknown[0]!r} is unknown; use {', '.join(known)}, joined by commas"
        )
    return chosen


def _count(name: str, text: str, most: int) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= most:
        raise InputError(f"--{name} {text} is out of range; use 1 to {most}")
    return int(text)


def _shares(text: str) -> list[float]:
    """Acceptance by depth; unlike the entries of other options, these may repeat."""
    try:
        shares = [float(part) for part in text.split(",")]
    except ValueError:
        shares = [-1.0]
    if not all(0 <= share <= 1 for share in shares):
        raise InputError(
            f"--simulate-acceptance {text!r} is not by-depth acceptance; "
            "write for example 0.9,0.88,0.85"
        )
    return shares


def _check(stride: int, modes: Sequence[str], **counts: int) -> None:
    from idlm.decoding.window import parse_branches

    parse_branches("all", stride)
    drafting = [mode for mode in modes if mode != "ar"]
    if stride == 1 and drafting:
        raise InputError(
            f"--stride 1 is AR; use 2 or more for {', '.join(drafting)}, or --modes ar"
        )
    for name, value in counts.items():
        _count(name, str(value), 10_000)


COLUMNS: dict[str, Callable[[Row], str]] = {
    "": lambda row: str(row["concurrency"]),
    "mode": lambda row: _name(row),
    "tok/s": lambda row: _figure(row["tokens_per_second"], 0),
    "x AR": lambda row: _figure(row["speedup_over_ar"], 2),
    "TPF": lambda row: _figure(row["tpf"], 2),
    "TTFT": lambda row: _pair(row, "ttft_ms"),
    "TPOT": lambda row: _pair(row, "tpot_ms"),
    "gap": lambda row: _figure(row["worst_gap_ms"], 0),
    "FLOPs": lambda row: _figure(row["flops_per_token_over_ar"], 2),
}
LEGEND = (
    "First column: requests in flight. TTFT, TPOT: ms to the first token and per token after it, "
    "median/p99. gap: worst ms between two steps of a running request. "
    "FLOPs: per token, AR's are 1."
)


def _name(row: Row) -> str:
    name = str(row["mode"]) if row["engine"] == "idlm" else f"{row['engine']} {row['mode']}"
    return f"{name} (simulated)" if row["simulated"] else name


def _float(value: Any) -> float:
    return float(value)


def _figure(value: Any, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _pair(row: Row, name: str) -> str:
    return "/".join(
        f"{ms:.0f}" if ms >= 10 else f"{ms:.1f}"
        for ms in (_float(row[name]), _float(row[f"{name}_p99"]))
    )


def show(report: dict[str, Any]) -> None:
    """Print the table, the planner's reasons, and a plot of tokens per second."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    rows: list[Row] = report["rows"]
    table = Table(
        *COLUMNS, title=_title(report["environment"]), box=SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    table.columns[1].no_wrap = True
    for row in rows:
        table.add_row(*(column(row) for column in COLUMNS.values()))
    console.print(table)
    console.print(LEGEND, style="dim", markup=False)
    for row in rows:
        if row["mode"] == "planner":
            console.print(f"planner at {row['concurrency']}: {row['reason']}", markup=False)
    console.print(_plot(rows, "Tokens per second, " + _title(report["environment"])))


def _title(environment: dict[str, Any]) -> str:
    shares = environment["simulated_acceptance"]
    simulated = "" if shares is None else f", SIMULATED acceptance {', '.join(map(str, shares))}"
    return "{model}, {dtype}, {device}, stride {stride}".format(**environment) + simulated


def _plot(rows: Sequence[Row], title: str) -> Table:
    """A bar for each mode, grouped by requests in flight."""
    from rich.bar import Bar
    from rich.table import Table

    rates = [_float(row["tokens_per_second"]) for row in rows]
    plot = Table(box=None, show_header=False, title=title, title_justify="left")
    before = None
    for row, rate in zip(rows, rates, strict=True):
        first, before = row["concurrency"] != before, row["concurrency"]
        bar = Bar(max(rates), 0, rate, width=40)
        plot.add_row(str(before) if first else "", _name(row), bar, f"{rate:.0f}")
    return plot
