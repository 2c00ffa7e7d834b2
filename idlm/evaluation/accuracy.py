"""How many problems with a known answer a model solves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter

from idlm.engine.llm import LLM, Result
from idlm.nano.problems import Problem, read_answer
from idlm.params import SamplingParams


@dataclass(frozen=True)
class Accuracy:
    """Exact answers, and the decoding that gave them."""

    correct: int
    results: list[Result]
    seconds: float

    @property
    def share(self) -> float:
        """Exact answers as a share of the problems."""
        return self.correct / len(self.results)


def evaluate(llm: LLM, problems: Sequence[Problem], params: SamplingParams) -> Accuracy:
    """Give the model each problem through its chat template, in one batch, and compare the answers.

    Raises:
        InputError: the model has no chat template.
    """
    started = perf_counter()
    chats = [[{"role": "user", "content": problem.question}] for problem in problems]
    results = llm.chat(chats, params)
    correct = [
        read_answer(result.text) == problem.answer
        for result, problem in zip(results, problems, strict=True)
    ]
    return Accuracy(sum(correct), results, perf_counter() - started)
