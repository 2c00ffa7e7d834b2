"""Files of every suite, of two items each, in the form in which they are published, and answers."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]
ARC: Rows = [
    {
        "id": str(at),
        "question": f"Which is {word}?",
        "choices": {"text": ["a stone", "a tree", "a river"], "label": ["A", "B", "C"]},
        "answerKey": key,
    }
    for at, (word, key) in enumerate((("green", "B"), ("hard", "A")))
]
MMLU: Rows = [
    {
        "question": f"What is {at} + 1?",
        "subject": subject,
        "choices": ["7", "8", "9", str(at + 1)],
        "answer": 3,
    }
    for at, subject in enumerate(("anatomy", "astronomy"))
]
MMLU_PRO: Rows = [
    {
        "question": f"What is {at} + 2?",
        "options": ["17", str(at + 2), "19"],
        "answer": "B",
        "answer_index": 1,
        "cot_content": f"A: Let's think step by step. The answer is (B). {at}",
        "category": category,
    }
    for at, category in enumerate(("math", "computer science"))
]
GPQA: Rows = [
    {
        "Question": f"Which one is number {at}?",
        "Correct Answer": f"right {at}",
        **{f"Incorrect Answer {n}": f"wrong {n}" for n in (1, 2, 3)},
    }
    for at in range(2)
]
GSM8K: Rows = [
    {"question": f"Mia has {at} apples and gets 3. How many?", "answer": f"So.\n#### {at + 3}"}
    for at in range(2)
]
MATH: Rows = [
    {
        "problem": f"What is {at} + 4?",
        "solution": f"It is $\\boxed{{{at + 4}}}$.",
        "answer": str(at + 4),
        "unique_id": str(at),
    }
    for at in range(2)
]
CLOZE: Rows = [{"question": "What is 5 + 5?", "answer": "10"}]
SINGLE: Rows = [{"question": "Which is 6 + 6?", "options": ["1", "2", "12", "3"], "answer": "C"}]
AIME_24: Rows = [{"ID": str(at), "Problem": f"Add {at} to 6.", "Answer": at + 6} for at in range(2)]
AIME_25: Rows = [
    {"id": str(at), "problem": f"Add {at} to 7.", "answer": str(at + 7)} for at in (0, 1)
]
HUMAN_EVAL: Rows = [
    {
        "task_id": f"HumanEval/{at}",
        "prompt": f'def add_{at}(x):\n    """x and {at}"""\n',
        "entry_point": f"add_{at}",
        "canonical_solution": f"    return x + {at}\n",
        "test": f"def check(f):\n    assert f(1) == {at + 1}\n",
    }
    for at in range(2)
]
MBPP: Rows = [
    {
        "task_id": at,
        "text": f"Write a function that adds {at}.",
        "code": f"def add(x):\r\n    return x + {at}",
        "test_setup_code": "",
        "test_list": [f"assert add(1) == {at + 1}"] * 3,
    }
    for at in (2, 3, 4, 11, 12, 600)
]
LIVE: Rows = [
    {
        "question_id": str(at),
        "question_content": f"Print {at}.",
        "starter_code": "",
        "public_test_cases": json.dumps([{"input": "", "output": str(at), "testtype": "stdin"}]),
        "private_test_cases": "[]",
        "metadata": "{}",
    }
    for at in range(2)
]
IF_EVAL: Rows = [
    {
        "key": 1,
        "prompt": "Write without commas.",
        "instruction_id_list": ["punctuation:no_comma"],
        "kwargs": [{}],
    },
    {
        "key": 2,
        "prompt": "Write two sentences or more, and end with END.",
        "instruction_id_list": ["length_constraints:number_sentences", "startend:end_checker"],
        "kwargs": [{"relation": "at least", "num_sentences": 2}, {"end_phrase": "END"}],
    },
]
MT_BENCH: Rows = [
    {"question_id": at, "category": "writing", "turns": [f"Say {at}.", "Again."]} for at in range(2)
]


def write(folder: Path) -> Path:
    """The files of all suites in a folder, as `idlm eval --data` takes it."""
    _lines(folder / "arc_challenge" / "ARC-Challenge-Test.jsonl", ARC)
    _lines(folder / "mmlu" / "test.jsonl", MMLU)
    _lines(folder / "mmlu_pro" / "test.jsonl", MMLU_PRO)
    _lines(folder / "mmlu_pro" / "validation.jsonl", MMLU_PRO * 6)
    for name in ("main", "diamond"):
        with open(_ready(folder / "gpqa" / f"gpqa_{name}.csv"), "w", newline="") as file:
            writer = csv.DictWriter(file, GPQA[0])
            writer.writeheader()
            writer.writerows(GPQA)
    _lines(folder / "gsm8k" / "test.jsonl", GSM8K)
    _lines(folder / "gsm8k" / "train.jsonl", [*GSM8K] * 3)
    _lines(folder / "math500" / "test.jsonl", MATH)
    _lines(folder / "mathbench" / "primary" / "cloze_en.jsonl", CLOZE)
    _lines(folder / "mathbench" / "college" / "single_choice_en.jsonl", SINGLE)
    _lines(folder / "mathbench" / "college" / "single_choice_cn.jsonl", SINGLE)
    _ready(folder / "aime24" / "aime.json").write_text(json.dumps(AIME_24))
    _lines(folder / "aime25" / "aime2025.jsonl", AIME_25)
    with gzip.open(_ready(folder / "humaneval" / "HumanEval.jsonl.gz"), "wt") as packed:
        packed.writelines(json.dumps(row) + "\n" for row in HUMAN_EVAL)
    _lines(folder / "mbpp" / "mbpp.jsonl", MBPP)
    _lines(folder / "livecodebench" / "test6.jsonl", LIVE)
    _lines(folder / "ifeval" / "input_data.jsonl", IF_EVAL)
    _lines(folder / "mt_bench" / "question.jsonl", MT_BENCH)
    return folder


def _ready(file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    return file


def _lines(file: Path, rows: Rows) -> None:
    _ready(file).write_text("".join(json.dumps(row) + "\n" for row in rows))


RIGHT = {
    "green": "It is a tree. The answer is (B).",
    "hard": "The answer is A.",
    "What is 0 + 1": "So the answer is (D)",
    "What is 1 + 1": "\\boxed{D}",
    "What is 0 + 2": "the answer is (B)",
    "What is 1 + 2": "the answer is (B)",
    "has 0 apples": "So \\boxed{3}.\n#### 3",
    "has 1 apples": "So \\boxed{4}.\n#### 4",
    "What is 0 + 4": "Final Answer: The final answer is $4$. I hope it is correct. \\boxed{4}",
    "What is 1 + 4": "Final Answer: The final answer is $5$. I hope it is correct. \\boxed{5}",
    "5 + 5": "\\boxed{10}",
    "6 + 6": "The answer is (C).",
    "Add 0 to 6": "\\boxed{6}",
    "Add 1 to 6": "\\boxed{7}",
    "Add 0 to 7": "\\boxed{7}",
    "Add 1 to 7": "\\boxed{8}",
    "add_0": "```python\ndef add_0(x):\n    return x\n```",
    "add_1": "```python\ndef add_1(x):\n    return x + 1\n```",
    "adds 11": "```python\ndef add(x):\n    return x + 11\n```",
    "adds 12": "```python\ndef add(x):\n    return x + 12\n```",
    "Print 0": "```python\nprint(0)\n```",
    "Print 1": "```python\nprint(1)\n```",
    "without commas": "Words alone",
    "two sentences": "This is one. This is another. END",
}
"""By what a prompt holds: an answer that is right. The last match in a prompt counts."""


def answer(prompt: str) -> str:
    """A right answer; for GPQA the letter is where the right text is."""
    if "number " in prompt and "right" in prompt:
        return f"The answer is ({prompt[prompt.index('right') - 3]})."
    places = {text: prompt.rfind(text) for text in RIGHT}
    best = max(places, key=lambda text: places[text])
    return RIGHT[best] if places[best] >= 0 else "I do not know."
