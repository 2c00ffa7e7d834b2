"""The examples of a config: from a registered source, from a jsonl file, or from the model
itself."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from idlm.errors import InputError
from idlm.models.idlm_model import Idlm
from idlm.training.config import DataConfig
from idlm.training.data import SOURCES, Example, chat_examples, fit, jsonl_examples
from idlm.training.distill import distill


@dataclass(frozen=True)
class Corpus:
    """Training and held-out examples; `cut` counts the training responses cut at the length
    limit."""

    training: list[Example]
    held_out: list[Example]
    cut: int


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
        InputError: a row is broken (the message names it), or there are too few rows.
    """
    check_source(config)
    limit = min(config.max_length or idlm.context, idlm.context)
    if config.source in SOURCES:
        source = SOURCES[config.source]
        pairs = islice(source.training(config.seed), config.examples or draws)
        training = chat_examples(pairs, idlm)
        held_out = chat_examples(source.held_out(config.held_out), idlm)
    else:
        rows = _rows(config, idlm, folder)
        if len(rows) <= config.held_out:
            raise InputError(
                f"data.held_out is {config.held_out} but there are {len(rows)} rows; "
                "lower it or add rows"
            )
        training, held_out = rows[: -config.held_out], rows[-config.held_out :]
    cut = sum(e.length > limit for e in training)
    return Corpus([fit(e, limit) for e in training], [fit(e, limit) for e in held_out], cut)


def _rows(config: DataConfig, idlm: Idlm, folder: Path) -> list[Example]:
    if config.source == "jsonl":
        return jsonl_examples(config, idlm)
    return distill(config, idlm, folder / "responses.jsonl")
