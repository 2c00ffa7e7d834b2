"""Exact answers to verifiable problems."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter

from idlm.engine.llm import LLM, Result
from idlm.nano.problems import Problem, read_answer
from idlm.params import SamplingParams


@dataclass(frozen=True)
class Accuracy:
    """How many of the problems were answered exactly, and the decoding that did it."""

    correct: int
    results: list[Result]
    seconds: float

    @property
    def share(self) -> float:
        """Exact answers as a share of the problems."""
        return self.correct / len(self.results)


def evaluate(llm: LLM, problems: Sequence[Problem], params: SamplingParams) -> Accuracy:
    """Ask every problem through the chat template, all in one batch, and read the answers.

    Raises:
        InputError: the model has no chat template.
    """
    started = perf_counter()
    asked = [[{"role": "user", "content": problem.question}] for problem in problems]
    results = llm.chat(asked, params)
    right = [
        read_answer(one.text) == problem.answer
        for one, problem in zip(results, problems, strict=True)
    ]
    return Accuracy(sum(right), results, perf_counter() - started)
