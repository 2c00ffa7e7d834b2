"""Bodies that are nearly right: every part of a request replaced by what does not belong there."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest

from tests.serving.conftest import Running
from tests.serving.test_messages_api import CASES as MESSAGES_CASES
from tests.serving.test_messages_api import HISTORY as MESSAGES_HISTORY
from tests.serving.test_messages_api import TOOL as MESSAGES_TOOL
from tests.serving.test_responses_api import HISTORY, TOOL

FUNCTION = {"type": "function", "name": "add"}
SCHEMA = {"type": "json_schema", "name": "n", "schema": {"type": "integer"}}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/responses": {
        **{"model": "nano", "input": HISTORY, "instructions": "x", "tools": [TOOL]},
        **{"tool_choice": FUNCTION, "text": {"format": {"type": "text"}}},
        **{"include": ["message.output_text.logprobs"], "top_logprobs": 1, "temperature": 0},
        **{"reasoning": {"summary": "auto"}, "metadata": {"a": "b"}, "stream": False},
        **{"max_output_tokens": 1, "seed": 1, "stream_options": {"include_obfuscation": False}},
    },
    "/v1/messages": {
        **{"model": "nano", "messages": MESSAGES_HISTORY, "max_tokens": 1, "stream": False},
        **{"system": [{"type": "text", "text": "x"}], "tools": [MESSAGES_TOOL]},
        **{"tool_choice": {"type": "tool", "name": "add"}, "stop_sequences": ["x"], "top_k": 1},
        **{"thinking": {"type": "disabled"}, "metadata": {"user_id": "x"}, "temperature": 0},
    },
    "/v1/messages/count_tokens": {
        **{"model": "nano", "messages": MESSAGES_HISTORY, "tools": [MESSAGES_TOOL]},
        "output_config": MESSAGES_CASES["a schema"]["output_config"],
    },
}
JUNK: list[Any] = [
    *(None, True, -1, 10**30, 1.5, "", "x\x00\ue000", [], {}, [None], {"type": "x"}, [[{}]]),
    {"type": ["text"]},
    {"type": {"a": 1}},
]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path to each part of a body."""
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


def replaced(body: dict[str, Any], path: tuple[Any, ...], junk: Any) -> dict[str, Any]:
    body = copy.deepcopy(body)
    parent: Any = body
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = junk
    return body


@pytest.mark.parametrize("path", BODIES)
def test_no_body_is_a_bug(path: str, engineless: Running) -> None:
    """Without an engine a request that is understood is a 503 (or, without a tokenizer, a 400)."""
    body = BODIES[path]
    with engineless.open() as http:
        assert http.post(path, json=body).status_code == (400 if "count" in path else 503)
        seen = set()
        for place in places(body):
            for junk in JUNK:
                answer = http.post(path, json=replaced(body, place, junk))
                seen.add(answer.status_code)
                assert answer.status_code in (400, 404, 503), (place, junk, answer.text)
                error = answer.json()["error"]
                assert error["message"] and "union" not in error["message"], (place, junk)
    assert 400 in seen and 404 in seen
