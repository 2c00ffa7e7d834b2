"""Our graders: right answers count, wrong ones do not, in every form that models give them."""

from __future__ import annotations

import base64
import json
import pickle
import time
import zlib
from fractions import Fraction
from typing import Any

import pytest

from idlm.errors import InputError
from idlm.evaluation import answers, cpu_time, graders, livecodebench

ADD = {
    "prompt": 'from typing import List\n\n\ndef add(a: List[int]) -> int:\n    """The sum."""\n',
    "entry_point": "add",
    "test": "def check(candidate):\n    assert candidate([1, 2]) == 3\n",
}
WHOLE = "def add(a: List[int]) -> int:\n    return sum(a)\n"


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ("    return sum(a)\n", 1.0),
        (f"Here:\n```python\n{WHOLE}```\nDone.", 1.0),
        (f"```\n{WHOLE}", 1.0),  # cut before the fence ends
        ("    return 3\n\nprint(add([1]))", 1.0),
        ("    return sum(a) + 1\n", 0.0),
        ("    pass\n", 0.0),
        ("I cannot.", 0.0),
    ],
)
def test_human_eval(text: str, good: float) -> None:
    assert graders.human_eval(ADD, text) == {"pass@1": good}


def test_mbpp() -> None:
    item = {"test_list": ["assert f(1) == 2"], "test_setup_code": "one = 1"}
    assert graders.mbpp(item, "def f(x):\r\n    return x + 1")["pass@1"] == 1
    assert graders.mbpp(item, "```python\ndef f(x):\n    return x + one\n```")["pass@1"] == 1
    assert graders.mbpp(item, "def f(x):\n    return x")["pass@1"] == 0


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("The answer is (B).", "B"),
        ("First A, then the answer is: **C**", "C"),
        ("I think \\boxed{D}", "D"),
        ("\\boxed{\\text{A}}", "A"),
        ("(B)", "B"),
        ("The answer is (E).", None),
        ("Answer with care", None),
    ],
)
def test_choice(text: str, letter: str | None) -> None:
    assert answers.letter(text, 4) == letter
    item = {"options": ["1", "2", "3", "4"], "target": letter or "A"}
    assert graders.choice(item, text)["exact_match"] == (letter is not None)


@pytest.mark.parametrize(
    ("text", "target", "good"),
    [
        ("so \\boxed{18}", "18", 1.0),
        ("so \\boxed{1,800.0}.", "1800", 1.0),
        ("it is 7 apples", "7", 1.0),
        ("\\boxed{\\frac{1}{2}}", "0.5", 1.0),
        ("\\boxed{\\left(3,\\frac{\\pi}{2}\\right)}", "\\left( 3, \\frac{\\pi}{2} \\right)", 1.0),
        ("\\boxed{x+1}", "1+x", 1.0),
        ("\\boxed{19}", "18", 0.0),
        ("\\boxed{18", "19", 0.0),
        ("nothing", "18", 0.0),
    ],
)
def test_maths(text: str, target: str, good: float) -> None:
    assert graders.maths({"target": target}, text) == {"exact_match": good}


def test_the_limits_of_math_verify_are_of_cpu_time() -> None:
    from math_verify.errors import TimeoutException

    def works(seconds: float) -> str:
        started = time.process_time()
        while time.process_time() - started < seconds:
            pass
        return "done"

    time_limited = cpu_time.timeout(0.2)
    assert time_limited(lambda: time.sleep(0.5) or "slept")() == "slept"
    with pytest.raises(TimeoutException):
        time_limited(works)(5)
    assert works(0.3) == "done"  # the limit is gone


def test_thoughts_are_cut() -> None:
    cut = answers.after_thinking
    assert cut("<think>a 1</think>\n\nb 2", "<think>", "</think>") == "b 2"
    assert cut("a 1</think>b</think> c", "<think>", "</think>", inside=True) == "c"
    assert cut("<think>it never ends", "<think>", "</think>") == ""
    assert cut("it never ends", "<think>", "</think>", inside=True) == ""
    assert cut("no thoughts", "<think>", "</think>") == "no thoughts"


def problem(tests: list[dict[str, str]], **more: Any) -> dict[str, Any]:
    packed = base64.b64encode(zlib.compress(pickle.dumps(json.dumps(tests[1:])))).decode()
    row = {
        "question_id": "1",
        "question_content": "Double it.",
        "starter_code": "",
        "public_test_cases": json.dumps(tests[:1]),
        "private_test_cases": packed,
        "metadata": "{}",
    }
    (item,) = livecodebench.items({"test": [{**row, **more}]})
    return item


def test_live_code_bench_programs() -> None:
    item = problem([{"input": "2\n", "output": "4\n"}, {"input": "5", "output": "10.0"}])
    assert "stdin" in livecodebench.prompt(item, chat=True)
    right = "```python\nprint(int(input()) * 2)\nraise SystemExit\n```"
    assert livecodebench.grade(item, right)["pass@1"] == 1
    assert livecodebench.grade(item, "print(int(input()) + 2)")["pass@1"] == 0  # the hidden test
    assert livecodebench.grade(item, "print(4); print(4)")["pass@1"] == 0
    assert livecodebench.grade(item, "print(int(input()) * 2); 1 / 0")["pass@1"] == 0


def test_live_code_bench_methods() -> None:
    starter = "class Solution:\n    def double(self, x: List[int]) -> List[int]:\n"
    item = problem(
        [{"input": "[1, 2]", "output": "[2, 4]"}, {"input": "[]", "output": "[]"}],
        starter_code=starter,
        metadata=json.dumps({"func_name": "double"}),
    )
    assert starter.strip() in livecodebench.prompt(item, chat=True)
    assert livecodebench.grade(item, starter + "        return [2 * y for y in x]")["pass@1"] == 1
    assert livecodebench.grade(item, starter + "        return x")["pass@1"] == 0


def test_live_code_bench_reads_texts_alone() -> None:
    packed = base64.b64encode(zlib.compress(pickle.dumps(Fraction(1, 2)))).decode()
    with pytest.raises(InputError, match=r"pickles fractions\.Fraction"):
        problem([{"input": "1", "output": "1"}], private_test_cases=packed)
