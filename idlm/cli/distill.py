"""`idlm distill MODEL PROMPTS... -o DIR`: let a model write its own training data."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from idlm.cli import common, drafts
from idlm.cli.sampling import Sampling, with_sampling
from idlm.config import EngineConfig
from idlm.extras import need


def _option(help: str, *names: str, **settings: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel="Data", **settings)


@partial(with_sampling, without=("n", "seed", "verification", "tau"))
def distill(
    model: common.Model,
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="PROMPTS...",
            help="Files (.jsonl, .parquet, .txt), folders of them, or names of datasets.",
            show_default=False,
        ),
    ],
    *,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="DIR", help="Where rows go, after those there."),
    ],
    num_samples: Annotated[int, _option("Responses to each prompt.", min=1)] = 1,
    seed: Annotated[int, _option("Of all responses; each has one of its own.")] = 0,
    num: Annotated[int | None, _option("The most prompts.", min=1)] = None,
    column: Annotated[
        str | None,
        _option(
            "The field that holds the prompt.", metavar="NAME", show_default="prompt or messages"
        ),
    ] = None,
    subset: Annotated[str | None, _option("Of datasets.", metavar="NAME")] = None,
    split: Annotated[str, _option("Of datasets.", metavar="NAME")] = "train",
    max_length: Annotated[
        int | None,
        _option("The most tokens of prompt and response.", min=2, show_default="the context"),
    ] = None,
    dedup: Annotated[
        bool, _option("Leave out prompts that were there before.", "--dedup/--no-dedup")
    ] = True,
    skip_bad_rows: Annotated[
        bool, _option("Count broken prompts and go on.", "--skip-bad-rows")
    ] = False,
    keep_truncated: Annotated[
        bool, _option("Keep responses without an end.", "--keep-truncated")
    ] = False,
    keep_repetitive: Annotated[
        bool, _option("Keep responses that repeat themselves.", "--keep-repetitive")
    ] = False,
    shard_rows: Annotated[int, _option("Rows of a file.", min=1)] = 1000,
    adapter: common.Adapter = None,
    stride: drafts.Stride = None,
    branches: drafts.Branches = None,
    draft_source: drafts.Source = None,
    max_num_seqs: Annotated[
        int, typer.Option(help="Responses that run at once.", min=1, rich_help_panel="Decoding")
    ] = EngineConfig.max_num_seqs,
    chat: common.Chat = True,
    dtype: common.Dtype = "auto",
    device: common.Device = "cpu",
    max_model_len: common.MaxModelLen = None,
    weights: common.Weights = "auto",
    threads: common.Threads = None,
    as_json: common.Json = False,
    sampling: Sampling,
) -> None:
    """Write responses of a model to prompts: what `train` reads to convert that model.

    Killed at any point, the same command goes on without a lost or doubled row.
    """
    need("train", "idlm distill")
    wanted = drafts.Drafts(stride, branches, draft_source)
    config = wanted.config(
        max_num_seqs=max_num_seqs, weights=weights, threads=threads, max_model_len=max_model_len
    )
    # before the model is loaded, which can take minutes
    folders = [] if adapter is None else [adapter]
    config, _ = drafts.checked(wanted, config, model, folders, dtype, device)

    from idlm.engine.build import build_engine
    from idlm.engine.engine import Engine
    from idlm.models.loading import load
    from idlm.training import distill as task
    from idlm.training.prompts import Encoding, Prompts
    from idlm.training.tables import Tables

    for source in sources:
        next(Tables((source,), subset, split).rows(), None)
    idlm = load(model, adapter, dtype, device, max_model_len)
    tables = Tables(tuple(sources), subset, split)
    prompts = Prompts(
        tables.rows, Encoding(idlm, chat, column, max_length), num, dedup, skip_bad_rows
    )
    keep = keep_truncated, keep_repetitive
    recipe = task.Recipe(sampling.of(idlm), num_samples, seed, *keep, shard_rows)

    def engine() -> Engine:
        names = [] if idlm.gate is None else ["default"]
        built = build_engine(idlm, config, names, take_weights=True)
        common.keep_what_is_loaded()
        return built

    _show(task.distill(prompts, recipe, output, engine), as_json)


def _show(report: dict[str, Any], as_json: bool) -> None:
    """Print the counts on one line, or everything as one JSON object."""
    if as_json:
        return common.print_json(report)
    left_out = [f"{count} {reason}" for reason, count in report["dropped"].items()]
    left_out += [
        f"{report[key]} {words}"
        for key, words in (("duplicates", "duplicate prompts"), ("bad_rows", "bad rows"))
        if report[key]
    ]
    line = "{rows} rows of {prompts} prompts in {output}".format(**report)
    if left_out:
        line += f"; left out: {', '.join(left_out)}"
    speed = "{tokens} tokens in {seconds:.1f} s, {tokens_per_second:.0f} tokens/s, TPF {tpf:.2f}"
    typer.echo(f"{line}\n{speed.format(**report)}")
