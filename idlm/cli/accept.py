"""`idlm accept MODEL PROMPTS`: how far a model accepts what it has written itself."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from idlm.cli import common, prompts
from idlm.cli import report as reports
from idlm.cli.sampling import Sampling, with_sampling
from idlm.errors import InputError

if TYPE_CHECKING:
    from idlm.baselines.llada import Llada
    from idlm.baselines.sdar import Sdar, TwoThresholds
    from idlm.models.idlm_model import Idlm

Method = Literal["ar", "idlm", "lookup", "sdar", "llada", "llada2"]


def _option(help: str, default: str) -> Any:
    return typer.Option(help=help, rich_help_panel="Baselines", show_default=default)


@with_sampling
def accept(
    model: common.Model,
    prompts_file: Annotated[
        Path | None,
        typer.Argument(
            metavar="[PROMPTS]",
            help="Prompts: .txt one a line, or .jsonl, with a domain and a language if you like.",
            show_default="built in",
        ),
    ] = None,
    *,
    method: Annotated[
        Method | None,
        typer.Option(
            help="What wrote the text: AR, ISD, lookup drafts, or a baseline of docs/methods.md.",
            show_default="idlm for a model that drafts, else ar",
        ),
    ] = None,
    adapter: common.Adapter = None,
    stride: common.Stride = 4,
    limit: Annotated[int | None, typer.Option(help="The most prompts.", min=1)] = None,
    block: Annotated[int | None, _option("Tokens of a block.", "4; llada, llada2 32")] = None,
    steps: Annotated[int | None, _option("Forwards to unmask a block.", "the block")] = None,
    strategy: Annotated[
        Literal["sequential", "static", "dynamic", "entropy"],
        typer.Option(help="Of sdar: which tokens stay.", rich_help_panel="Baselines"),
    ] = "dynamic",
    threshold: Annotated[
        float | None, _option("Probability from which a MASK is a token.", "0.9; llada2 0.7")
    ] = None,
    edit: Annotated[float, typer.Option(help="Of llada2: as much for a new token; 1 never.")] = 0.5,
    chat: common.Chat = True,
    dtype: common.Dtype = "auto",
    device: common.Device = "cpu",
    max_model_len: common.MaxModelLen = None,
    plot: reports.Plot = None,
    as_json: common.Json = False,
    sampling: Sampling,
) -> None:
    """Measure alpha, the mean of sum min(p, q), by depth and domain, with TPF and calibration.

    q is the law that a token was drafted or committed from, p what the model says of it once the
    text is clean. docs/methods.md defines both for each method.
    """
    reports.check_plot(plot, "idlm accept")
    given = prompts.given([], prompts_file)
    rule = _rule(method, {"block": block, "steps": steps, "threshold": threshold}, strategy, edit)

    from idlm.environment import environment
    from idlm.evaluation.acceptance import Item, measure_baseline, measure_causal
    from idlm.models.loading import load

    idlm = load(model, adapter, dtype, device, max_model_len)
    method = method or ("idlm" if idlm.block_size is not None else "ar")
    chosen = (given or prompts.defaults(idlm))[:limit]
    items = [Item(prompt.encode(idlm, chat), prompt.groups) for prompt in chosen]
    params = sampling.of(idlm)
    if rule is None:
        _check_stride(method, stride, idlm)
    width = stride if method in ("idlm", "lookup") else 1
    with common.progress("measuring", (1 if rule else 2) * len(items)) as advance:
        if rule is not None:
            figures = measure_baseline(idlm, items, params, rule, advance)
        else:
            branches = "lookup" if method == "lookup" else "all"
            figures = measure_causal(idlm, items, params, width, advance, branches)
    report: dict[str, Any] = {
        "model": model,
        "adapter": adapter,
        "method": method,
        "stride": width if rule is None else None,
        "rule": str(rule) if rule is not None else params.verification,
        "temperature": params.temperature,
        "prompts": len(items),
        "dtype": str(idlm.dtype).removeprefix("torch."),
        "device": str(idlm.device),
        **figures,
        "environment": environment(),
    }
    reports.plot(plot, "idlm accept", report)
    if as_json:
        common.print_json(report)
    else:
        _show(report)


def _rule(
    method: Method | None, given: dict[str, Any], strategy: Any, edit: float
) -> Sdar | TwoThresholds | Llada | None:
    """The decoding of a baseline; None for AR and ISD.

    Raises:
        InputError: an option is of another method, or out of range.
    """
    from idlm.baselines.llada import Llada
    from idlm.baselines.sdar import Sdar, TwoThresholds

    values = {name: value for name, value in given.items() if value is not None}
    fits = {"sdar": 3, "llada": 2, "llada2": 3}
    names = ("block", "steps", "threshold") if method != "llada2" else ("block", "threshold")
    known = names[: fits.get(method or "", 0)]
    for name in values:
        if name not in known:
            raise InputError(f"--{name} is not of method {method or 'idlm'}; leave it out")
    if method == "llada2":
        unmask = values.pop("threshold", 0.7)
        return TwoThresholds(unmask=unmask, edit=edit, **values)
    size = values.get("block")
    if method in ("sdar", "llada") and size is not None:
        values.setdefault("steps", size)
    if method == "sdar":
        return Sdar(strategy=strategy, **values)
    return Llada(**values) if method == "llada" else None


def _check_stride(method: str, stride: int, idlm: Idlm) -> None:
    from idlm.decoding.plan import plans_for

    plans_for(stride, "lookup" if method == "lookup" else "all")
    if method == "lookup" and stride < 2:
        raise InputError("--method lookup at stride 1 has no drafts; give a stride of 2 or more")
    if method == "idlm" and (stride < 2 or idlm.block_size is None):
        raise InputError(
            f"--method idlm at stride {stride} with model {idlm.name!r} has no drafts; "
            "give a model or an adapter that was trained to draft and a stride of 2 or more"
        )


def _show(report: dict[str, Any]) -> None:
    """A table for each definition of p, and the totals."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for name, found in report["definitions"].items():
        table = Table(title=f"{report['method']}, p: {name.replace('_', ' ')}")
        for column in ("tokens of", "tokens", "alpha", "argmax", "calibration error"):
            table.add_column(column, justify="left" if column == "tokens of" else "right")
        rows = [("all", found)]
        rows += [(f"depth {one['depth']}", one) for one in found["by_depth"]]
        for kind in prompts.GROUPS:
            rows += [(f"{kind} {key}", one) for key, one in found.get(f"by_{kind}", {}).items()]
        for label, one in rows:
            error = f"{one['calibration']['error']:.3f}" if "calibration" in one else ""
            figures = (f"{one['alpha']:.3f}", f"{one['argmax']:.3f}", error)
            table.add_row(label, f"{one['tokens']:,}", *figures)
        console.print(table)
    expected = report["tpf_expected"]
    said = "" if expected is None else f" (predicted from alpha: {expected:.2f})"
    typer.echo(
        f"TPF {report['tpf_decode']:.2f}{said}, {report['rows_per_token']:.2f} rows a token, "
        f"{report['answer_tokens']:,} tokens of {report['prompts']} prompts"
    )
