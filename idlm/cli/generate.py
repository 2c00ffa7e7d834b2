"""`idlm generate MODEL [PROMPT]...`: complete prompts with ISD."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated

import typer

from idlm.cli import common, drafts, prompts
from idlm.cli.sampling import Sampling, with_sampling
from idlm.errors import InputError

if TYPE_CHECKING:
    from idlm.config import EngineConfig
    from idlm.engine.llm import Result


@with_sampling
def generate(
    model: common.Model,
    prompt: Annotated[
        list[str] | None, typer.Argument(metavar="[PROMPT]...", help="What to complete.")
    ] = None,
    *,
    prompts_file: Annotated[
        Path | None,
        typer.Option("--prompts", metavar="FILE", help="Prompts: .txt one a line, or .jsonl."),
    ] = None,
    adapter: common.Adapter = None,
    stride: drafts.Stride = None,
    branches: drafts.Branches = None,
    draft_source: drafts.Source = None,
    chat: common.Chat = True,
    dtype: common.Dtype = "auto",
    device: common.Device = "cpu",
    max_model_len: common.MaxModelLen = None,
    weights: common.Weights = "auto",
    threads: common.Threads = None,
    as_json: common.Json = False,
    sampling: Sampling,
) -> None:
    """Complete prompts, several tokens per forward pass."""
    given = prompts.given(prompt or [], prompts_file)
    if not given:
        raise InputError(
            "no prompt given; write one after the model's name, or name a file with --prompts"
        )

    from idlm.engine.llm import LLM
    from idlm.models.loading import load

    # before the model is loaded, which can take minutes
    wanted = drafts.Drafts(stride, branches, draft_source)
    config = wanted.config(
        max_model_len=max_model_len,
        weights=weights,
        threads=threads,
        generation_config=sampling.generation_config,
    )
    folders = [] if adapter is None else [adapter]
    config, ordinary = drafts.checked(wanted, config, model, folders, dtype, device)
    idlm = load(model, adapter, dtype, device, max_model_len)
    params = sampling.of(idlm)
    llm = LLM(idlm, config=config)
    common.keep_what_is_loaded()
    ids = [each.encode(llm.idlm, chat) for each in given]
    started = perf_counter()
    first = llm.generate(ids, params, progress=True)
    if ordinary:
        drafts.say_lookup(model)
    results = [sample for result in first for sample in (result, *result.samples)]
    report(model, config, results, perf_counter() - started, as_json)


def report(
    model: str, config: EngineConfig, results: list[Result], seconds: float, as_json: bool
) -> None:
    """Print texts on stdout and a summary on stderr, or everything as one JSON object."""
    from idlm.evaluation.metrics import summary

    totals = {**summary(results), "seconds": seconds}
    if not as_json:
        for result in results:
            typer.echo(result.text or " ".join(map(str, result.token_ids)))
        line = "{tokens} tokens in {forwards} forwards: TPF {tpf:.2f}, {seconds:.2f} s"
        typer.echo(line.format(**totals), err=True)
        return
    answers = [
        {
            "text": result.text,
            "token_ids": result.token_ids,
            "prompt_token_ids": result.prompt_token_ids,
            "finish_reason": result.finish_reason,
            "seed": result.seed,
            **summary([result]),
        }
        for result in results
    ]
    plan = {"stride": config.stride, "branches": config.branches, "drafts": config.drafts}
    common.print_json({"model": model, **plan, **totals, "results": answers})
