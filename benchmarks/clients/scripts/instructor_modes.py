"""instructor."""

from typing import Any

import instructor
from anthropic import Anthropic
from features import HOST, KEY, MODEL, QUESTION, URL, Trip, check, feature
from openai import OpenAI

USER: Any = {"role": "user", "content": QUESTION}
MODES = instructor.Mode
FIELDS: Any = {
    "model": MODEL,
    "messages": [USER],
    "response_model": Trip,
    "max_retries": 1,
}


def ask(mode: instructor.Mode, **fields: Any) -> Any:
    """A Trip through a mode."""
    openai = OpenAI(base_url=URL, api_key=KEY, max_retries=0, timeout=300)
    client: Any = instructor.from_openai(openai, mode=mode)
    return client.chat.completions.create(**FIELDS, **fields)


@feature("TOOLS, TOOLS_STRICT, JSON_SCHEMA")
def modes() -> None:
    for mode in (MODES.TOOLS, MODES.TOOLS_STRICT, MODES.JSON_SCHEMA):
        assert isinstance(ask(mode, max_tokens=96), Trip)


@feature("RESPONSES_TOOLS")
def responses() -> None:
    assert isinstance(ask(MODES.RESPONSES_TOOLS, max_output_tokens=96), Trip)


@feature("partial stream")
def partial() -> None:
    openai = OpenAI(base_url=URL, api_key=KEY, max_retries=0, timeout=300)
    client: Any = instructor.from_openai(openai, mode=MODES.TOOLS)
    parts = list(client.chat.completions.create_partial(**FIELDS, max_tokens=96))
    assert Trip.model_validate(parts[-1].model_dump())


@feature("from_anthropic: ANTHROPIC_TOOLS")
def anthropic() -> None:
    claude = Anthropic(base_url=HOST, api_key=KEY, max_retries=0, timeout=300)
    client: Any = instructor.from_anthropic(claude, mode=MODES.ANTHROPIC_TOOLS)
    assert isinstance(client.messages.create(**FIELDS, max_tokens=96), Trip)


check("instructor")
