"""`idlm verify MODEL`: prove on prompts that ISD's output is the AR model's own."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from idlm.cli import common, prompts
from idlm.cli.sampling import Sampling, with_sampling

if TYPE_CHECKING:
    from idlm.models.idlm_model import Idlm


@with_sampling
def verify(
    model: common.Model,
    *,
    prompts_file: Annotated[
        Path | None,
        typer.Option("--prompts", metavar="FILE", help="Prompts: .txt one a line, or .jsonl."),
    ] = None,
    adapter: common.Adapter = None,
    stride: common.Stride = 4,
    branches: common.BranchesOption = "all",
    chat: common.Chat = True,
    dtype: common.Dtype = "auto",
    device: common.Device = "cpu",
    max_model_len: common.MaxModelLen = None,
    as_json: common.Json = False,
    sampling: Sampling,
) -> None:
    """Decode with AR and with ISD and compare token by token; exit status 1 when they differ.

    The ratio rule keeps AR's law and not its sample path, so there the law is tested: each token's
    probability integral transform under AR's law, by Kolmogorov-Smirnov with a false-alarm rate of
    one in a million.
    """
    given = prompts.given([], prompts_file)

    from idlm.decoding.plan import plans_for
    from idlm.models.loading import load

    plans_for(stride, branches)  # before the model is loaded, which can take minutes
    idlm = load(model, adapter, dtype, device, max_model_len)
    ids = [prompt.encode(idlm, chat) for prompt in given or prompts.defaults(idlm)]
    params = sampling.of(idlm)
    check = _law if params.verification == "ratio" else _tokens
    with common.progress("verifying", len(ids)) as advance:
        passed, figures = check(idlm, ids, params, stride, branches, advance)
    settings = {
        "model": model,
        "stride": stride,
        "branches": branches,
        "verification": params.verification,
    }
    report: dict[str, Any] = {
        **settings,
        "dtype": str(idlm.dtype).removeprefix("torch."),
        "prompts": len(ids),
        **figures,
    }
    if as_json:
        common.print_json(report)
    else:
        _show(idlm, report)
    raise typer.Exit(0 if passed else 1)


def _tokens(idlm: Idlm, ids: list[list[int]], *settings: Any) -> tuple[bool, dict[str, Any]]:
    from idlm.evaluation.metrics import summary
    from idlm.evaluation.parity import compare

    parity = compare(idlm, ids, *settings)
    totals = summary(parity.results)
    return parity.identical, {
        "identical": parity.identical,
        "compared_tokens": parity.compared_tokens,
        "tpf": totals["tpf"],
        "acceptance": totals["acceptance"],
        "differences": [asdict(difference) for difference in parity.differences],
    }


def _law(idlm: Idlm, ids: list[list[int]], *settings: Any) -> tuple[bool, dict[str, Any]]:
    from idlm.evaluation.metrics import summary
    from idlm.evaluation.parity import check_law

    test, results = check_law(idlm, ids, *settings)
    totals = summary(results)
    return test.passed, {
        "same_law": test.passed,
        **asdict(test),
        "tpf": totals["tpf"],
        "acceptance": totals["acceptance"],
    }


def _show(idlm: Idlm, report: dict[str, Any]) -> None:
    """Print the verdict, and each difference on a line of its own."""
    rule = report["verification"] + (
        " (approximate)" if report["verification"] == "relaxed" else ""
    )
    where = (
        "stride {stride}, branches {branches}, {rule}, {dtype}, {prompts} prompts, TPF {tpf:.2f}"
    ).format(**report, rule=rule)
    if "same_law" in report:
        verdict = "the law is AR's" if report["same_law"] else "the law is NOT AR's"
        line = (
            "statistic {statistic:.3f}, bound {bound:.3f}, {tokens} tokens, {impossible} impossible"
        ).format(**report)
    else:
        verdict = "identical" if report["identical"] else "DIFFERENT"
        line = "{compared_tokens} tokens compared".format(**report)
    typer.echo(f"{verdict}: {line} ({where})")
    for difference in report.get("differences", []):
        typer.echo(_difference(idlm, difference))


def _difference(idlm: Idlm, difference: dict[str, Any]) -> str:
    sides = []
    for side in ("ar", "isd"):
        token, margin = difference[f"{side}_token"], difference[f"{side}_margin"]
        text = (
            repr(idlm.tokenizer.decode([token]))
            if idlm.tokenizer is not None and token is not None
            else ""
        )
        sides.append(
            f"{side.upper()} ended"
            if token is None
            else f"{side.upper()} {token} {text} margin {margin:.3g}"
        )
    return f"  prompt {difference['prompt']}, token {difference['position']}: {'; '.join(sides)}"
