"""The word problems as training data. Importing this module registers the source `nano`."""

from __future__ import annotations

from collections.abc import Iterator

from idlm.nano.problems import held_out_problems, training_problems
from idlm.nano.tokenizer import train_tokenizer
from idlm.training.data import SOURCES, Source


def _training(seed: int) -> Iterator[tuple[str, str]]:
    return ((p.question, p.solution) for p in training_problems(seed))


def _held_out(size: int) -> list[tuple[str, str]]:
    return [(p.question, p.solution) for p in held_out_problems(size)]


SOURCES["nano"] = Source(_training, _held_out, train_tokenizer)
