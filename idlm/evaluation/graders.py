"""Graders for tasks that the harness has none for, or none that works without the network.

Each takes the item and the text of the answer and returns its figures, 1.0 or 0.0. What runs code
takes `run`, the sandbox's by default.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from idlm.evaluation import answers, cpu_time, sandbox

Item = Mapping[str, Any]
Figures = dict[str, float]


def human_eval(item: Item, text: str) -> Figures:
    """Complete the function of the prompt, and run the item's tests on it."""
    block = answers.code(text)
    body = text if block is None else block
    whole = re.search(rf"^\s*def\s+{re.escape(item['entry_point'])}\b", body, re.MULTILINE)
    # an answer with the whole function still needs the imports and helpers of the prompt
    program = f"{item['prompt']}\n    pass\n\n\n{body}" if whole else item["prompt"] + body
    return _passes(f"{program}\n{item['test']}\ncheck({item['entry_point']})\n")


def mbpp(item: Item, text: str) -> Figures:
    """Run the item's assertions after the answer."""
    block = answers.code(text)
    setup = item.get("test_setup_code") or "\n".join(item.get("test_imports") or [])
    tests = "\n".join(item["test_list"])
    return _passes(f"{text if block is None else block}\n{setup}\n{tests}\n")


def _passes(program: str) -> Figures:
    outcome = sandbox.run(program.replace("\r\n", "\n"))
    return {"pass@1": float(outcome.finished)}


def choice(item: Item, text: str) -> Figures:
    """Compare the letter of the answer; `item` has `options` and the right letter as `target`."""
    found = answers.letter(text, len(item["options"]))
    return {"exact_match": float(found == item["target"])}


def maths(item: Item, text: str) -> Figures:
    r"""Compare the answer in the last \boxed{...}, else the last number, with `target`.

    Equal as text, as a number, or for math_verify. Needs the package math-verify.
    """
    found = answers.boxed(text)
    if found is None:
        numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
        found = numbers[-1] if numbers else ""
    return {"exact_match": float(same_value(found, str(item["target"])))}


def same_value(found: str, target: str) -> bool:
    """Whether two expressions are equal."""
    left, right = (_bare(text) for text in (found, target))
    if not left:
        return False
    if left == right:
        return True
    try:
        return abs(float(left) - float(right)) <= 1e-9 * max(1.0, abs(float(right)))
    except ValueError:
        from math_verify import parse, verify

    cpu_time.prepare()
    gold, answer = (parse(f"${text}$") for text in (target, found))
    return bool(gold and answer and verify(gold, answer))


def _bare(text: str) -> str:
    """Without spaces, dollar signs, a final point, and commas between thousands."""
    bare = re.sub(r"\s|\\[,;! ]|\$|\\%|%", "", text).rstrip(".")
    return bare.replace(",", "") if re.fullmatch(r"-?\d{1,3}(,\d{3})+(\.\d+)?", bare) else bare
