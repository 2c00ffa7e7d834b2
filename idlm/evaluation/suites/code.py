"""Suites of programming: HumanEval, MBPP, LiveCodeBench v6. Their graders run the answers."""

from __future__ import annotations

from idlm.evaluation import graders, livecodebench
from idlm.evaluation.graders import Item
from idlm.evaluation.suites.suite import Own, Rows, Splits, Suite

MBPP_TEST = range(11, 511)
"""Ids of MBPP's test items; `MBPP_SHOTS` are the first of its items for prompts."""
MBPP_SHOTS = (2, 3, 4)


def _human_eval(data: Splits) -> Rows:
    return data["test"]


def _human_eval_prompt(item: Item, chat: bool) -> str:
    if not chat:
        return str(item["prompt"])
    return (
        "Complete this function. Answer with the whole function in one block of Python.\n\n"
        f"```python\n{item['prompt'].rstrip()}\n```"
    )


def _mbpp(data: Splits) -> Rows:
    """The test items, each with the examples that a base model sees first."""
    rows = {row["task_id"]: row for row in [*data.get("prompt", []), *data["test"]]}
    shots = [_mbpp_example(rows[at], solved=True) for at in MBPP_SHOTS if at in rows]
    items = [row for row in data["test"] if row["task_id"] in MBPP_TEST]
    return [{**row, "examples": "".join(shots)} for row in items]


def _mbpp_example(row: Item, solved: bool) -> str:
    tests = "\n".join(row["test_list"])
    head = f"Task: {row['text']}\nYour code should pass these tests:\n{tests}\n[BEGIN]\n"
    return head + (f"{row['code'].replace(chr(13), '')}\n[DONE]\n\n" if solved else "")


def _mbpp_prompt(item: Item, chat: bool) -> str:
    if not chat:
        return item["examples"] + _mbpp_example(item, solved=False)
    tests = "\n".join(item["test_list"])
    return (
        f"{item['text']}\nThe code should pass these tests:\n```python\n{tests}\n```\n"
        "Answer with one block of Python."
    )


CODE = (
    Suite(
        "humaneval",
        "HumanEval",
        "openai/openai_humaneval",
        "humaneval",
        {"test": ("*",)},
        own=Own(
            _human_eval,
            _human_eval_prompt,
            graders.human_eval,
            "pass@1",
            until=("\nclass", "\ndef", "\n#", "\nif", "\nprint", "\n```"),
            runs_code=True,
        ),
        hub=("openai/openai_humaneval", None),
    ),
    Suite(
        "mbpp",
        "MBPP",
        "google-research-datasets/mbpp (full)",
        "mbpp",
        {"test": ("*test*", "*"), "prompt": ("*prompt*",)},
        own=Own(
            _mbpp,
            _mbpp_prompt,
            graders.mbpp,
            "pass@1",
            until=("[DONE]",),
            max_tokens=512,
            runs_code=True,
        ),
        hub=("google-research-datasets/mbpp", "full"),
    ),
    Suite(
        "livecodebench",
        "LiveCodeBench v6",
        "livecodebench/code_generation_lite (test*.jsonl)",
        "livecodebench",
        {"test": ("*test*", "*")},
        own=Own(
            livecodebench.items,
            livecodebench.prompt,
            livecodebench.grade,
            "pass@1",
            max_tokens=4096,
            runs_code=True,
        ),
    ),
)
