"""Exact answers to verifiable problems."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter

from idlm.decoding.params import SamplingParams
from idlm.engine.llm import LLM, Result
from idlm.nano.problems import Problem, read_answer


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


def evaluate(
    llm: LLM, problems: Sequence[Problem], params: SamplingParams, advance: Callable[[], None] = lambda: None
) -> Accuracy:
    """Ask every problem through the chat template, and read the answers.

    Raises:
        InputError: the model has no chat template.
    """
    started = perf_counter()
    correct, results = 0, []
    for problem in problems:
        result = llm.chat([{"role": "user", "content": problem.question}], params)
        correct += read_answer(result.text) == problem.answer
        results.append(result)
        advance()
    return Accuracy(correct, results, perf_counter() - started)
