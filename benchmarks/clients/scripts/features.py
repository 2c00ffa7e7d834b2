"""What the scripts share: the server's address, and features to check.

A feature is a function that raises where the server does not do it. One that the server refuses
has a part of the sentence that its error must hold.
"""

import asyncio
import inspect
import json
import os
from collections.abc import Callable
from importlib.metadata import version
from typing import Any, Literal

from pydantic import BaseModel

HOST = os.environ["SERVER"]
"""Without a path: http://127.0.0.1:8000."""
URL = f"{HOST}/v1"
MODEL = os.environ["MODEL"]
KEY = "none"
QUESTION = "Say hello."
LOOP = asyncio.new_event_loop()
FEATURES: list[tuple[str, Callable[[], Any], str | None]] = []


class City(BaseModel, extra="forbid"):
    """A city."""

    name: Literal["Oslo", "Rome"]


class Trip(BaseModel, extra="forbid"):
    """A trip; all that it allows is short, so that a small model ends it."""

    city: City
    days: Literal[1, 2, 3]


def feature(name: str, refused: str | None = None) -> Callable[[Callable[[], Any]], None]:
    """Registers a check."""
    return lambda function: FEATURES.append((name, function, refused))


def verdict(function: Callable[[], Any], refused: str | None) -> str:
    """passes, refused: SENTENCE, or fails: ERROR."""
    try:
        result = function()
        if inspect.iscoroutine(result):
            LOOP.run_until_complete(result)
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        if refused is not None and refused in text:
            return f"refused: {text}"
        return f"fails: {text[:2000]}"
    return "passes" if refused is None else "fails: it is not refused"


def check(package: str) -> None:
    """Print a line of JSON for each feature."""
    for name, function, refused in FEATURES:
        row = {"client": package, "version": version(package), "feature": name}
        print(json.dumps(row | {"verdict": verdict(function, refused)}), flush=True)
