"""outlines."""

import json
from typing import Any, Literal

import outlines
from features import KEY, MODEL, QUESTION, URL, Trip, check, feature
from openai import OpenAI
from outlines.types import CFG, Regex

client = OpenAI(base_url=URL, api_key=KEY, max_retries=0, timeout=300)


def check_forms(model: Any, choice: bool) -> None:
    """A schema, a regular expression, a grammar and a choice."""
    Trip.model_validate_json(model(QUESTION, Trip, max_tokens=96))
    assert model(QUESTION, Regex("[0-9]{3}"), max_tokens=8).isdigit()
    assert model(QUESTION, CFG('start: "a" | "b"'), max_tokens=8) in ("a", "b")
    if choice:
        assert model(QUESTION, Literal["yes", "no"], max_tokens=8) in ("yes", "no")


@feature("from_openai: text, pydantic, stream")
def openai() -> None:
    model = outlines.from_openai(client, MODEL)
    assert model(QUESTION, max_tokens=8) and list(model.stream(QUESTION, max_tokens=8))
    assert json.loads(model(QUESTION, Trip, max_tokens=96))


@feature("from_vllm: text, schema, regex, grammar, choice, stream")
def vllm() -> None:
    model = outlines.from_vllm(client, MODEL)
    assert model(QUESTION, max_tokens=8)
    check_forms(model, True)
    assert "".join(model.stream(QUESTION, Literal["yes", "no"], max_tokens=8)) in ("yes", "no")


@feature("from_sglang: schema, regex, choice")
def sglang() -> None:
    model = outlines.from_sglang(client, MODEL)
    Trip.model_validate_json(model(QUESTION, Trip, max_tokens=96))
    assert model(QUESTION, Regex("[0-9]{3}"), max_tokens=8).isdigit()
    assert model(QUESTION, Literal["yes", "no"], max_tokens=8) in ("yes", "no")


check("outlines")
