"""The generator: right sums, right answers, and a held-out set that no training stream meets."""

import re
from itertools import islice

from hypothesis import given
from hypothesis import strategies as st

from idlm.nano.problems import (
    held_out_problems,
    is_held_out,
    problem,
    read_answer,
    training_problems,
)
from idlm.nano.tokenizer import MASK, train_tokenizer

SUM = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")


@given(st.integers(0, 100), st.integers(0, 10**6))
def test_every_sum_of_a_solution_is_right_and_leads_to_the_answer(seed: int, index: int) -> None:
    one = problem(seed, index)
    results = []
    for left, sign, right, result in SUM.findall(one.solution):
        a, b, c = int(left), int(right), int(result)
        assert {"+": a + b == c, "-": a - b == c, "*": a * b == c, "/": b * c == a}[sign]
        assert not results or a == results[-1]
        results.append(c)
    assert results[-1] == one.answer == read_answer(one.solution)
    assert 2 <= len(results) <= 4 and all(0 < value < 100 for value in results)
    assert one == problem(seed, index)


def test_no_training_question_is_held_out() -> None:
    held_out = {one.question for one in held_out_problems(300)}
    assert len(held_out) == 300
    assert all(is_held_out(question) for question in held_out)
    trained = {one.question for seed in (0, 1, 2) for one in islice(training_problems(seed), 3000)}
    assert not trained & held_out


def test_an_answer_is_read_only_where_there_is_one() -> None:
    assert read_answer("so 3 + 4 = 7. The answer is 7.") == 7
    assert read_answer("The answer is") is None


def test_the_tokenizer_is_the_bundled_one_and_encodes_any_text() -> None:
    tokenizer = train_tokenizer()
    text = "Mia has 14 apples. Ünïcödé €, \ttabs\nand 日本"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.tokenize("1475") == ["1", "4", "7", "5"]
    assert tokenizer.convert_tokens_to_ids(MASK) == 3
