"""Reported figures: totals over results, races, exact answers."""

from __future__ import annotations

import pytest

from idlm import LLM, InputError, SamplingParams
from idlm.engine.request import Result, Timing
from idlm.evaluation.accuracy import evaluate
from idlm.evaluation.metrics import summary
from idlm.evaluation.speed import Lap, race, same_tokens
from idlm.models.loading import load
from idlm.nano.problems import held_out_problems
from tests.engine.tiny import tiny_idlm


def result(tokens: int, forwards: int, reached: list[int], accepted: list[int]) -> Result:
    return Result(
        [1], 0, reached, accepted, Timing(0.0), token_ids=list(range(tokens)), forwards=forwards
    )


def test_totals_weigh_results_by_their_size() -> None:
    totals = summary([result(9, 3, [4, 2, 0], [2, 1, 0]), result(1, 1, [0, 0, 0], [0, 0, 0])])
    assert totals["tokens"] == 10 and totals["forwards"] == 4 and totals["tpf"] == 2.5
    assert totals["acceptance"] == [0.5, 0.5, None]


def test_a_race_runs_in_turn_and_leaves_the_warm_up_out() -> None:
    order: list[str] = []

    def runner(name: str) -> list[Result]:
        order.append(name)
        return [result(len(order), 1, [], [])]

    steps: list[int] = []
    laps = race({"a": lambda: runner("a"), "b": lambda: runner("b")}, 2, lambda: steps.append(1))
    assert order == ["a", "b"] * 3 and len(steps) == 6
    assert len(laps["a"].seconds) == len(laps["b"].seconds) == 2
    assert len(laps["b"].results[0].token_ids) == 6  # the last round's
    assert not same_tokens(laps["a"].results, laps["b"].results)


def test_a_lap_reports_the_median_rate() -> None:
    lap = Lap([result(6, 2, [], []), result(4, 2, [], [])], [1.0, 10.0, 2.0])
    assert lap.rates == [10.0, 1.0, 5.0] and lap.tokens_per_second == 5.0


def test_exact_answers_are_counted() -> None:
    """The bundled base solves nearly all held-out problems; an answer that is cut off does not
    count."""
    problems = held_out_problems(6)
    llm, params = (
        LLM("nano", stride=4, branches="all"),
        SamplingParams(max_tokens=256, temperature=0.0),
    )
    found = evaluate(llm, problems, params)
    assert found.share >= 5 / 6 and len(found.results) == 6
    cut = evaluate(llm, problems[:2], SamplingParams(max_tokens=3, temperature=0.0))
    assert cut.correct == 0


@pytest.mark.parametrize("tokenizer, words", [(False, "no tokenizer"), (True, "chat template")])
def test_a_model_without_a_chat_template_is_refused(tokenizer: bool, words: str) -> None:
    idlm = tiny_idlm("llama")
    if tokenizer:
        idlm.tokenizer = load("nano").tokenizer
        assert idlm.tokenizer is not None
        idlm.tokenizer.chat_template = None
    with pytest.raises(InputError, match=words):
        evaluate(LLM(idlm, branches="all"), held_out_problems(1), SamplingParams())
