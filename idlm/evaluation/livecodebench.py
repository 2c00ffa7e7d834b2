"""LiveCodeBench: the items of its files, and the grader that runs their tests.

An item is of AtCoder or Codeforces (a program from stdin to stdout) or of LeetCode (a method of
`Solution`). All tests must pass, the hidden ones included.
"""

from __future__ import annotations

import base64
import io
import json
import pickle
import zlib
from collections.abc import Mapping
from typing import Any

from idlm.errors import InputError
from idlm.evaluation import answers, sandbox

LIMITS = sandbox.Limits(seconds=30.0, cpu=6)
"""Of each test, as in the authors' own grader: 6 seconds."""
CALL = """
import json as _json, sys as _sys
_given = [_json.loads(_line) for _line in {arguments!r}.split("\\n") if _line]
_solution = Solution() if "Solution" in globals() else None
_function = getattr(_solution, {name!r}) if _solution else globals()[{name!r}]
_found = _function(*_given)
_found = list(_found) if isinstance(_found, tuple) else _found
assert _found == _json.loads({expected!r})
"""
HEAD = (
    "from typing import *\nfrom collections import *\nfrom functools import *\n"
    "from itertools import *\nfrom math import *\nfrom heapq import *\nfrom bisect import *\n"
    "import sys, math, re, string, random, collections, itertools, functools, heapq, bisect\n"
)
"""What answers may use without importing it, as LeetCode gives it."""


def items(data: Mapping[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The items, each with its tests as [input, output]."""
    return [_item(row) for row in data["test"]]


def _item(row: Mapping[str, Any]) -> dict[str, Any]:
    metadata = row.get("metadata") or "{}"
    known = json.loads(metadata) if isinstance(metadata, str) else metadata
    tests = [*_tests(row["public_test_cases"]), *_tests(row.get("private_test_cases") or "[]")]
    return {
        "question_id": row["question_id"],
        "question": row["question_content"],
        "starter": row.get("starter_code") or "",
        "function": known.get("func_name"),
        "tests": [[test["input"], test["output"]] for test in tests],
    }


class _Texts(pickle.Unpickler):
    """Reads a pickled text and nothing else: no class is ever looked up."""

    def find_class(self, module: str, name: str) -> Any:
        raise InputError(f"a test case pickles {module}.{name}; it should be a text: leave it out")


def _tests(packed: Any) -> list[dict[str, str]]:
    """Test cases: JSON, or JSON that is pickled, compressed and written in base 64."""
    if not isinstance(packed, str):
        return list(packed)
    try:
        found = json.loads(packed)
    except json.JSONDecodeError:
        text = _Texts(io.BytesIO(zlib.decompress(base64.b64decode(packed)))).load()
        found = json.loads(text)
    return list(found)


def prompt(item: Mapping[str, Any], chat: bool) -> str:
    """The problem, and the form of the answer."""
    if item["starter"]:
        form = f"Complete this code:\n```python\n{item['starter'].rstrip()}\n```\n"
    else:
        form = "Write a program that reads from stdin and writes to stdout.\n"
    end = "Answer with one block of Python." if chat else "```python\n"
    return f"{item['question'].strip()}\n\n{form}{end}"


def grade(item: Mapping[str, Any], text: str) -> dict[str, float]:
    """Whether the answer passes all tests of the item."""
    block = answers.code(text)
    program = (text if block is None else block).replace("\r\n", "\n")
    passes = _calls if item["function"] else _prints
    good = bool(item["tests"]) and all(passes(item, program, *test) for test in item["tests"])
    return {"pass@1": float(good)}


def _calls(item: Mapping[str, Any], program: str, given: str, expected: str) -> bool:
    call = CALL.format(arguments=given, name=item["function"], expected=expected)
    return sandbox.run(f"{HEAD}{program}\n{call}", limits=LIMITS).finished


def _prints(item: Mapping[str, Any], program: str, given: str, expected: str) -> bool:
    outcome = sandbox.run(HEAD + program, given, LIMITS)
    ended = outcome.finished or (outcome.end == "exit" and outcome.detail in ("0", "None"))
    return ended and _same(outcome.output, expected)


def _same(left: str, right: str) -> bool:
    """Whether two outputs are equal: line by line, words as texts or as numbers."""
    lines = [[line.split() for line in text.strip().split("\n")] for text in (left, right)]
    if [list(map(len, text)) for text in lines][0] != [len(line) for line in lines[1]]:
        return False
    words = zip(sum(lines[0], []), sum(lines[1], []), strict=True)
    return all(a == b or _equal_numbers(a, b) for a, b in words)


def _equal_numbers(left: str, right: str) -> bool:
    try:
        return float(left) == float(right)
    except ValueError:
        return False
