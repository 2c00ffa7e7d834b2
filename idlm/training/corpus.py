"""The examples of a config: from a registered source, from files, or from the model itself."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import islice, repeat
from pathlib import Path
from typing import Any

import torch

from idlm.config import EngineConfig
from idlm.engine.build import build_engine
from idlm.engine.engine import Engine
from idlm.errors import InputError
from idlm.models.idlm_model import Idlm
from idlm.training.config import DataConfig
from idlm.training.data import SOURCES, Example, chat_examples, fit, jsonl_examples
from idlm.training.distill import Recipe, distill
from idlm.training.prompts import Encoding, Prompts
from idlm.training.tables import Named, Tables


@dataclass(frozen=True)
class Corpus:
    """Training and held-out examples; `cut` counts the training responses cut at the length
    limit, `bad` the rows left out."""

    training: list[Example]
    held_out: list[Example]
    cut: int
    bad: int = 0


def check_source(config: DataConfig) -> None:
    """Refuse an unknown `data.source` before anything is made or loaded."""
    known = (*SOURCES, "jsonl", "self")
    if config.source not in known:
        raise InputError(f"data.source is {config.source!r}; expected {' or '.join(known)}")


def corpus(config: DataConfig, idlm: Idlm, draws: int, folder: Path) -> Corpus:
    """The examples of a run.

    Args:
        draws: how many texts the run takes.
        folder: for generated responses.

    Raises:
        InputError: a row is broken (the message names it) and `data.skip_bad_rows` is not set, or
            there are too few rows.
    """
    check_source(config)
    limit, bad = min(config.max_length or idlm.context, idlm.context), 0
    if config.source in SOURCES:
        source = SOURCES[config.source]
        pairs = islice(source.training(config.seed), config.examples or draws)
        training = chat_examples(pairs, idlm)
        held_out = chat_examples(source.held_out(config.held_out), idlm)
    else:
        rows, bad = _rows(config, idlm, limit, folder)
        names = list(dict.fromkeys(example.row for example in rows))
        if len(names) <= config.held_out:
            raise InputError(
                f"data.held_out is {config.held_out} but there are {len(names)} rows; "
                "lower it or add rows"
            )
        last = set(names[-config.held_out :])  # all answers of a row are held out, or none
        training = [example for example in rows if example.row not in last]
        held_out = [example for example in rows if example.row in last]
    cut = sum(e.length > limit for e in training)
    return Corpus([fit(e, limit) for e in training], [fit(e, limit) for e in held_out], cut, bad)


def _rows(config: DataConfig, idlm: Idlm, limit: int, folder: Path) -> tuple[list[Example], int]:
    if config.source == "self":
        responses = folder / "responses"
        texts, how = own_prompts(config, idlm), recipe(config, idlm)
        distill(texts, how, responses, lambda: _engine(idlm), wait=True)  # for other ranks
        config = replace(config, path=str(responses))
    return jsonl_examples(config, idlm, limit)


def own_prompts(config: DataConfig, idlm: Idlm) -> Prompts:
    """The prompts that `data.prompts` and `data.examples` select."""
    encoding = Encoding(idlm, limit=config.max_length)
    return Prompts(lambda: _prompt_rows(config, idlm), encoding, config.examples, dedup=False)


def _prompt_rows(config: DataConfig, idlm: Idlm) -> Iterable[Named]:
    if config.prompts in ("bos", *SOURCES) and config.examples is None:
        raise InputError(
            f"data.examples is missing; data.prompts: {config.prompts} "
            "needs to know how many to generate"
        )
    if config.prompts == "bos":
        bos = idlm.model.config.bos_token_id
        if bos is None:
            raise InputError(
                f"the model {idlm.name!r} has no BOS token; "
                "give data.prompts a jsonl file of prompts"
            )
        return repeat(("the BOS prompt", {"prompt": [bos]}))
    if config.prompts in SOURCES:
        return (
            (f"problem {at}", {"messages": [{"role": "user", "content": question}]})
            for at, (question, _) in enumerate(SOURCES[config.prompts].training(config.seed))
        )
    return Tables((config.prompts,)).rows()


def recipe(config: DataConfig, idlm: Idlm) -> Recipe:
    """The settings of the responses: as the model decodes without a request's own, but for the
    temperature if the config has one. All are kept: `data.max_tokens` cuts training texts too."""
    given: dict[str, Any] = {"max_tokens": config.max_tokens}
    if config.temperature is not None:
        given["temperature"] = config.temperature
    params = idlm.sampling(given)
    return Recipe(params, seed=config.seed, keep_truncated=True, keep_repetitive=True)


def _engine(idlm: Idlm) -> Engine:
    """Its threads are those of the training. A model that was never trained to draft runs AR."""
    stride = 1 if idlm.block_size is None else EngineConfig.stride
    return build_engine(idlm, EngineConfig(stride, threads=torch.get_num_threads()))
