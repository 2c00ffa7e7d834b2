"""Are the graders of `idlm eval` right? Known answers, right and wrong, through each of them.

    python -m benchmarks.graders --data DIR [--only gsm8k mbpp ...] [--jobs 2] [--out FILE]

DIR has the files of the suites, as `idlm eval --data` reads them. Right answers are the files' own
solutions, in the form that a model would give them. Wrong ones are the same, perturbed: another
number, a line of code left out, a form that breaks the instruction. What grades them is what
`idlm eval` uses: the harness's tasks, or our graders in the sandbox. Exit status 1 if a right
answer does not count.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.harness.results import report
from idlm.evaluation import graders, ifeval, local_data, sandbox
from idlm.evaluation.suites import SUITES
from idlm.evaluation.suites.suite import Splits
from idlm.evaluation.tasks import Way, build

FORMS = 10
"""Every so many items, the answers whose form is wrong are tried too: each starts a process."""


class Case(NamedTuple):
    """An answer to an item.

    Attributes:
        kind: "right", or how it was perturbed.
        correct: whether it should count as correct.
    """

    item: str
    kind: str
    correct: bool
    text: str
    document: Any


Grade = Callable[[Any, str], float]


def other_number(text: str) -> str:
    """The last number of a text, made larger by one."""
    found = list(re.finditer(r"\d[\d,]*", text))[-1]
    larger = str(int(found[0].replace(",", "")) + 1)
    return text[: found.start()] + larger + text[found.end() :]


def gsm8k(data: Splits) -> Iterator[Case]:
    for at, row in enumerate(data["test"]):
        answer, _, value = row["answer"].rpartition("#### ")
        said = f"So the answer is {value}."
        for kind, correct, text in (
            ("right, as the file has it", True, row["answer"]),
            ("another number", False, f"{answer}#### {other_number(value)}"),
            ("no mark before the number", False, answer + said),
        ):
            yield Case(str(at), kind, correct, text, row)


def gsm8k_flexible(data: Splits) -> Iterator[Case]:
    for at, row in enumerate(data["test"]):
        value = row["answer"].rpartition("#### ")[2]
        yield Case(str(at), "right, in a sentence", True, f"So the answer is {value}", row)
        wrong = f"So the answer is {other_number(value)}"
        yield Case(str(at), "another number", False, wrong, row)
        yield Case(str(at), "no number", False, "So the answer is unknown", row)


def filtered(task: Any, name: str, text: str) -> str:
    """What a filter of the harness finds in an answer."""
    (chosen,) = [one for one in task._filters if one.name == name]
    found: Any = [[text]]
    for step in chosen.filters:
        found = list(step().apply(found, [None]))
    return str(found[0])


def of_harness(suite: str, data: Path, metric: str, name: str | None = None) -> Grade:
    """The grader of the harness's task, with a filter before it if there is one."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    (task,), _ = build(SUITES[suite], Way(data))
    rows = next(iter(local_data.read(data, SUITES[suite]).values()))
    documents = {asked(row): one for row, one in zip(rows, task.eval_docs, strict=True)}

    def grade(row: Any, text: str) -> float:
        answer = text if name is None else filtered(task, name, text)
        return float(task.process_results(documents[asked(row)], [answer])[metric])

    return grade


def asked(row: Any) -> str:
    return next(row[name] for name in ("question", "problem", "prompt") if name in row)


def of_code(grader: Callable[[Any, str], dict[str, float]]) -> Grade:
    return lambda row, text: grader(row, text)["pass@1"]


def math_500(data: Splits) -> Iterator[Case]:
    for row in data["test"]:
        form = "Therefore the result is $\\boxed{%s}$."
        answer = row["answer"]
        wrong = other_number(answer) if re.search(r"\d", answer) else answer + " + 1"
        yield Case(row["unique_id"], "right, in a box", True, form % answer, row)
        yield Case(row["unique_id"], "right, the file's solution", True, row["solution"], row)
        yield Case(row["unique_id"], "another number", False, form % wrong, row)
        yield Case(row["unique_id"], "no answer", False, "I do not know.", row)


def without_a_line(code: str) -> str:
    """The code without its last line that is not empty, replaced so that it still parses."""
    lines = code.rstrip().split("\n")
    indent = re.match(r"\s*", lines[-1])
    return "\n".join([*lines[:-1], (indent[0] if indent else "") + "pass"])


def human_eval(data: Splits) -> Iterator[Case]:
    for row in data["test"]:
        item, whole = row["task_id"], row["prompt"] + row["canonical_solution"]
        yield Case(item, "right, continued", True, row["canonical_solution"], row)
        yield Case(
            item, "right, in a block", True, f"Here it is:\n```python\n{whole}```\nDone.", row
        )
        wrong = without_a_line(row["canonical_solution"])
        yield Case(item, "last line deleted", False, wrong, row)
    for row in data["test"][::FORMS]:
        yield Case(row["task_id"], "no code", False, "I cannot do that.", row)
        early = "    import os; os._exit(0)\n"
        yield Case(row["task_id"], "leaves early", False, early, row)


def mbpp(data: Splits) -> Iterator[Case]:
    for row in data["test"]:
        item = str(row["task_id"])
        yield Case(item, "right", True, row["code"], row)
        yield Case(item, "last line deleted", False, without_a_line(row["code"]), row)
    for row in data["test"][::FORMS]:
        item, block = str(row["task_id"]), f"```python\n{row['code']}\n```"
        yield Case(item, "right, in a block", True, block, row)
        yield Case(item, "no code", False, "I cannot do that.", row)


ANSWERS = {
    "punctuation:no_comma": ("plain words here", "words, and more words"),
    "change_case:english_lowercase": (
        "this is a small text in plain english words",
        "This is a Small text in plain English words",
    ),
    "change_case:english_capital": (
        "THIS IS A SMALL TEXT IN PLAIN ENGLISH WORDS",
        "This is a small text in plain English words",
    ),
    "startend:quotation": ('"all of it"', "all of it"),
    "detectable_format:json_format": ('{"a": 1}', "a = 1"),
    "detectable_format:title": ("<<a title>>\ntext", "a title\ntext"),
    "combination:two_responses": ("one answer ****** another", "one answer alone"),
    "detectable_format:constrained_response": ("My answer is yes.", "Indeed."),
}
"""By instruction without arguments: an answer that follows it, and one that does not."""


def if_eval(data: Splits) -> Iterator[Case]:
    """Items of one instruction each: those above, and those whose arguments make an answer."""
    for row in data["train"]:
        if len(row["instruction_id_list"]) != 1:
            continue
        pair = ANSWERS.get(row["instruction_id_list"][0]) or _made(row)
        if pair is not None:
            yield Case(str(row["key"]), "follows", True, pair[0], row)
            yield Case(str(row["key"]), "breaks", False, pair[1], row)


def _made(row: Any) -> tuple[str, str] | None:
    """A pair of answers to an instruction with arguments."""
    name, given = row["instruction_id_list"][0], row["kwargs"][0]
    if name == "keywords:existence":
        words = given["keywords"]
        return " ".join(words), " ".join(words[1:]) or "nothing"
    if name == "keywords:forbidden_words":
        return "a text of other matters", f"a text of {given['forbidden_words'][0]} matters"
    if name == "keywords:frequency":
        return _counted(f"{given['keyword']} ", given["relation"], given["frequency"])
    if name == "length_constraints:number_words":
        return _counted("word ", given["relation"], given["num_words"])
    if name == "length_constraints:number_sentences":
        return _counted("This is one. ", given["relation"], given["num_sentences"])
    if name == "change_case:capital_word_frequency":
        return _counted("WORD ", given["capital_relation"], given["capital_frequency"])
    if name == "detectable_format:number_bullet_lists":
        points = "* a point\n" * given["num_bullets"]
        return points, points + "* one more\n"
    if name == "detectable_content:number_placeholders":
        return _counted("[place] ", "at least", given["num_placeholders"])
    if name == "startend:end_checker":
        return f"text {given['end_phrase']}", f"{given['end_phrase']} and more text"
    if name == "detectable_content:postscript":
        return f"text\n{given['postscript_marker']} more", "text\nmore"
    return None


def _counted(word: str, relation: str, count: int) -> tuple[str, str]:
    """Texts with as many words as a relation asks for, and with one too few or too many."""
    below, enough = word * (count - 1) or "nothing", word * count
    return (below, enough) if relation == "less than" else (enough, below)


MALICIOUS = {
    "opens a socket": "import socket\ntry:\n    socket.create_connection(('1.1.1.1', 80))\n"
    "except BaseException:\n    pass",
    "starts processes": "import os\ntry:\n    while True:\n        os.fork()\n"
    "except BaseException:\n    pass",
    "runs a program": "import subprocess\ntry:\n    subprocess.run(['ls'])\n"
    "except BaseException:\n    pass",
    "fills the disk": "n = 0\nwhile True:\n    open(f'{n}', 'wb').write(bytes(1 << 20)); n += 1",
    "writes a large file": "open('f', 'wb').write(bytes(1 << 28))",
    "writes elsewhere": "open('/tmp/elsewhere', 'w')",
    "loops": "while True:\n    pass",
    "sleeps": "import time\ntime.sleep(1000)",
    "takes all memory": "x = [bytes(1 << 26) for _ in range(1 << 10)]",
    "floods stdout": "while True:\n    print('x' * 1000)",
    "leaves with status 0": "import os\nos._exit(0)",
    "exits with status 0": "raise SystemExit(0)",
}
"""Programs that would count as correct if their end counted."""


def malicious() -> dict[str, dict[str, str]]:
    limits = sandbox.Limits(seconds=10, cpu=2)
    outcomes = {name: sandbox.run(code, limits=limits) for name, code in MALICIOUS.items()}
    return {
        name: {"counted": "correct" if one.finished else "wrong", "why": one.detail or one.end}
        for name, one in outcomes.items()
    }


def count(cases: Iterable[Case], grade: Grade, jobs: int) -> dict[str, dict[str, Any]]:
    """By kind of answer: how many there were, how many counted as correct, and which did not do as
    they should."""
    found: dict[str, dict[str, Any]] = {}
    listed = list(cases)

    def right(case: Case) -> bool:
        return grade(case.document, case.text) == 1.0

    with ThreadPoolExecutor(jobs) as pool:  # math_verify needs the main thread
        goods = list(pool.map(right, listed) if jobs > 1 else map(right, listed))
    for case, good in zip(listed, goods, strict=True):
        line = found.setdefault(
            case.kind, {"should": case.correct, "answers": 0, "correct": 0, "others": []}
        )
        line["answers"] += 1
        line["correct"] += good
        if good != case.correct:
            line["others"].append(case.item)
    return found


def checks(data: Path, jobs: int) -> dict[str, Callable[[], dict[str, dict[str, Any]]]]:
    """By name: what counts one grader's answers."""
    cases: dict[str, tuple[str, Callable[[Splits], Iterator[Case]], Callable[[], Grade]]] = {
        "gsm8k, strict": (
            "gsm8k", gsm8k, lambda: of_harness("gsm8k", data, "exact_match", "strict-match"),
        ),
        "gsm8k, flexible": (
            "gsm8k",
            gsm8k_flexible,
            lambda: of_harness("gsm8k", data, "exact_match", "flexible-extract"),
        ),
        "math-500, math_verify": (
            "math-500", math_500, lambda: of_harness("math-500", data, "math_verify"),
        ),
        "math-500, own": (
            "math-500",
            math_500,
            lambda: lambda row, text: graders.maths({"target": row["answer"]}, text)["exact_match"],
        ),
        "ifeval, strict": (
            "ifeval",
            if_eval,
            lambda: of_harness("ifeval", data, "prompt_level_strict_acc"),
        ),
        "humaneval": (
            "humaneval", human_eval, lambda: of_code(graders.human_eval),
        ),
        "mbpp": ("mbpp", mbpp, lambda: of_code(graders.mbpp)),
    }  # fmt: skip
    return {
        name: lambda one=one: count(
            one[1](local_data.read(data, SUITES[one[0]])),
            one[2](),
            jobs if one[0] in ("humaneval", "mbpp") else 1,
        )
        for name, one in cases.items()
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=[], help="beginnings of names")
    parser.add_argument("--jobs", type=int, default=2, help="programs that run at once")
    parser.add_argument("--out", type=Path, help="graders that are there already stay")
    args = parser.parse_args()
    sentences = ifeval.prepare(offline=True)
    before = json.loads(args.out.read_text()) if args.out and args.out.exists() else {}
    results: dict[str, Any] = before.get("graders", {})
    for name, check in checks(args.data, args.jobs).items():
        if not args.only or name.startswith(tuple(args.only)):
            results[name] = check()
            print(name, results[name], file=sys.stderr, flush=True)
    stopped = malicious()
    report({"graders": results, "malicious": stopped, "ifeval_sentences": sentences}, args.out)


if __name__ == "__main__":
    sys.exit(main())
