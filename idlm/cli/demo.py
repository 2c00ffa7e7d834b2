"""`idlm demo`: AR and ISD answer the same questions in turn, on the bundled model or another."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from idlm.cli import common
from idlm.errors import InputError
from idlm.ui.colours import COLOURS, LEGEND

if TYPE_CHECKING:
    from rich.text import Text

    from idlm.engine.llm import Result
    from idlm.models.idlm_model import Idlm


def demo(
    model: Annotated[
        str,
        typer.Argument(metavar="[MODEL]", help="A bundled model, a folder, a GGUF file, a hub id."),
    ] = "nano",
    adapter: common.Adapter = None,
    stride: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="The most tokens a forward commits; 1 is plain AR.",
            show_default="as many as MODEL has learnt to draft, and one",
            rich_help_panel="Decoding",
        ),
    ] = None,
    branches: common.BranchesOption = "planner",
    questions: Annotated[int, typer.Option(help="Held-out problems to answer.")] = 4,
    rounds: Annotated[
        int, typer.Option(help="Times each decoder runs, in turn; medians are reported.")
    ] = 5,
    threads: Annotated[
        int, typer.Option(help="CPU threads; small models gain nothing from more.")
    ] = 1,
    as_json: common.Json = False,
) -> None:
    """Decode with AR and with ISD: same bytes, fewer forward passes, less time."""
    _check(
        2 if stride is None else stride,
        branches,
        questions=questions,
        rounds=rounds,
        threads=threads,
    )

    import torch

    from idlm.engine.llm import LLM
    from idlm.evaluation.speed import race
    from idlm.models.loading import load
    from idlm.nano.problems import held_out_problems
    from idlm.params import SamplingParams

    torch.set_num_threads(threads)
    idlm = load(model, adapter=adapter)
    stride = (idlm.block_size or 7) + 1 if stride is None else stride
    problems = [problem.question for problem in held_out_problems(questions)]
    params = SamplingParams(max_tokens=256, temperature=0.0)

    def run(llm: LLM) -> list[Result]:
        return [llm.chat([{"role": "user", "content": problem}], params) for problem in problems]

    with common.progress("starting engines", 2) as advance:
        ar = LLM(idlm, stride=1, max_num_seqs=1)
        advance()
        isd = LLM(idlm, stride=stride, branches=branches, max_num_seqs=1)
    common.keep_what_is_loaded()
    with common.progress("AR and ISD in turn", 2 * (rounds + 1)) as advance:
        laps = race({"ar": lambda: run(ar), "isd": lambda: run(isd)}, rounds, advance)
    settings = {"stride": stride, "branches": branches, "prompts": questions, "rounds": rounds}
    report = _report(laps) | settings | {"threads": threads, "plan": isd.engine.planner.reason}
    report["plans"] = dict(isd.engine.metrics.plans)
    if branches != "planner" and report["speedup"] < 1:
        better = LLM(idlm, stride=stride, branches="planner", max_num_seqs=1)
        run(better)
        report["better"] = better.engine.planner.reason
    if as_json:
        common.print_json(report)
    else:
        _show(idlm, problems, laps["isd"].results, report)
    raise typer.Exit(0 if report["identical"] else 1)


def _check(stride: int, branches: str, **counts: int) -> None:
    from idlm.decoding.plan import plans_for

    plans_for(stride, branches)
    for name, value in counts.items():
        if not 1 <= value <= 1000:
            raise InputError(f"--{name} {value} is out of range; use 1 to 1000")


def _report(laps: Any) -> dict[str, Any]:
    """The figures; the speed-up is the ratio of the medians."""
    from idlm.evaluation.metrics import summary
    from idlm.evaluation.speed import same_tokens

    ar, isd = laps["ar"], laps["isd"]
    totals = summary(isd.results)
    return {
        "identical": same_tokens(ar.results, isd.results),
        "tpf": totals["tpf"],
        "acceptance": totals["acceptance"],
        "ar_tokens_per_second": ar.tokens_per_second,
        "isd_tokens_per_second": isd.tokens_per_second,
        "speedup": isd.tokens_per_second / ar.tokens_per_second,
        "tokens": totals["tokens"],
        "ar_forwards": summary(ar.results)["forwards"],
        "forwards": totals["forwards"],
    }


def _show(idlm: Idlm, questions: list[str], results: list[Result], report: dict[str, Any]) -> None:
    """Print the answers with each token in the colour of its source, a legend, and a table.

    A terminal wraps lines; a pipe gets them whole, so that they can be searched.
    """
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)
    for question, result in zip(questions, results, strict=True):
        console.print(question, style="dim", markup=False)
        console.print(_coloured(idlm, result), end="\n\n")
    for source, meaning in LEGEND.items():
        console.print(f"[{COLOURS[source]}]{source}[/] {meaning}")
    table = Table("", "AR", "ISD")
    table.add_row("forward passes", str(report["ar_forwards"]), str(report["forwards"]))
    table.add_row(
        "tokens per forward",
        f"{report['tokens'] / report['ar_forwards']:.2f}",
        f"{report['tpf']:.2f}",
    )
    table.add_row(
        "tokens per second",
        *(f"{report[f'{side}_tokens_per_second']:.0f}" for side in ("ar", "isd")),
    )
    console.print(table)
    depths = ", ".join("-" if a is None else f"{a:.3f}" for a in report["acceptance"])
    console.print(f"acceptance by depth: {depths}")
    ran = ", ".join(f"{name} {count}" for name, count in report["plans"].items())
    console.print(f"plan: {report['plan']} (steps by plan: {ran})", markup=False)
    if "better" in report:
        console.print(
            f"{report['branches']} is slower than AR here; the planner runs {report['better']}",
            markup=False,
        )
    same = "the same bytes" if report["identical"] else "[bold red]DIFFERENT bytes[/]"
    console.print(f"{same}, {report['speedup']:.2f} times as fast")


def _coloured(idlm: Idlm, result: Result) -> Text:
    """The answer, token by token, without special tokens."""
    from rich.text import Text

    text = Text()
    for token, source in zip(result.token_ids, result.sources, strict=True):
        assert idlm.tokenizer is not None  # else there is no chat template
        text.append(
            str(idlm.tokenizer.decode([token], skip_special_tokens=True)), style=COLOURS[source]
        )
    return text
