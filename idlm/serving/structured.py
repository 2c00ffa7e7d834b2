"""The fields of a request that fix the form of its output, under the names of several servers.

OpenAI          response_format
vLLM            structured_outputs, and before it guided_*
SGLang          regex, ebnf, json_schema
llama.cpp       grammar, json_schema, and a schema within response_format
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field

from idlm.params import Guide
from idlm.serving.config import Limits
from idlm.serving.errors import ApiError
from idlm.serving.strict import Boolean, Strict, check_shape, decode

Wish = tuple[str, str, str]
"""Kind and text of a guide, and the field that asks for it."""
Schema = str | dict[str, Any]
"""A JSON schema, or its JSON text."""


class PlainFormat(Strict):
    """Any text."""

    type: Literal["text"]


# `BaseModel.schema` exists, hence the alias
class ObjectFormat(Strict):
    """A JSON object; `schema` says which."""

    type: Literal["json_object"]
    body: Annotated[dict[str, Any] | None, Field(alias="schema")] = None


class JsonSchema(Strict):
    """A JSON schema in OpenAI's wrapping. The output always obeys it, as if `strict` were true."""

    name: str | None = None
    description: str | None = None
    body: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class SchemaFormat(Strict):
    """JSON that obeys a JSON schema: `json_schema` in OpenAI's wrapping, or `schema` alone."""

    type: Literal["json_schema"]
    json_schema: JsonSchema | None = None
    body: Annotated[dict[str, Any] | None, Field(alias="schema")] = None


ResponseFormat = Annotated[PlainFormat | ObjectFormat | SchemaFormat, Discriminator("type")]


class StructuredOutputs(Strict):
    """One of these forms."""

    body: Annotated[Schema | None, Field(alias="json")] = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: Any = None
    disable_any_whitespace: Annotated[Literal[False] | None, Boolean] = None
    disable_additional_properties: Annotated[Literal[False] | None, Boolean] = None
    whitespace_pattern: None = None


class Structured(Strict):
    """At most one of these fields. `guided_decoding_backend` has no effect: there is one."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    guided_decoding_backend: str | None = None
    guided_whitespace_pattern: None = None
    json_schema: Schema | None = None
    regex: str | None = None
    ebnf: str | None = None
    grammar: str | None = None

    def guide(self, limits: Limits) -> Guide | None:
        """The guide of the request, or None.

        Raises:
            ApiError: 400: more than one guide, or one that is too long. InputError: it is not
                valid.
        """
        wishes = list(self.wishes())
        # the same form under two names is one: guidance writes vLLM's old and its new name
        if len({(kind, text) for kind, text, _ in wishes}) > 1:
            raise ApiError(
                400,
                f"more than one form of the output: {', '.join(name for *_, name in wishes)}; "
                "use one",
            )
        for kind, text, name in wishes:
            if len(text.encode()) > limits.schema_bytes:
                raise ApiError(
                    400,
                    f"{name} is a {kind} of more than {limits.schema_bytes} bytes; shorten it",
                    name,
                )
            return Guide(kind, text, name)
        return None

    def wishes(self) -> Iterator[Wish]:
        """The guides that the request asks for.

        Raises:
            ApiError: 400: a schema is not a JSON object, or a form is not supported.
        """
        yield from _of_response_format(self.response_format)
        if self.structured_outputs is not None:
            yield from _of_structured_outputs(self.structured_outputs)
        for name, schema in (("guided_json", self.guided_json), ("json_schema", self.json_schema)):
            yield from schema_wish(schema, name)
        yield from choice_wish(self.guided_choice, "guided_choice")
        texts = {
            "guided_regex": ("regex", self.guided_regex),
            "regex": ("regex", self.regex),
            "guided_grammar": ("grammar", self.guided_grammar),
            "ebnf": ("grammar", self.ebnf),
            "grammar": ("grammar", self.grammar),
        }
        yield from ((kind, text, name) for name, (kind, text) in texts.items() if text is not None)


def _of_response_format(wanted: ResponseFormat | None) -> Iterator[Wish]:
    name = "response_format"
    if isinstance(wanted, ObjectFormat):
        yield from schema_wish(wanted.body, name)
        if wanted.body is None:
            yield "json_object", "", name
    if isinstance(wanted, SchemaFormat):
        wrapped = wanted.json_schema
        if (wrapped is None) == (wanted.body is None):
            raise ApiError(400, "response_format names no schema, or two; give json_schema", name)
        yield from schema_wish(wanted.body if wrapped is None else wrapped.body, name)


def _of_structured_outputs(wanted: StructuredOutputs) -> Iterator[Wish]:
    name = "structured_outputs"
    if wanted.structural_tag is not None:
        raise ApiError(
            400, f"{name}.structural_tag is not supported; use json, regex, choice or grammar", name
        )
    yield from schema_wish(wanted.body, f"{name}.json")
    yield from choice_wish(wanted.choice, f"{name}.choice")
    for kind, text in (("regex", wanted.regex), ("grammar", wanted.grammar)):
        if text is not None:
            yield kind, text, f"{name}.{kind}"
    if wanted.json_object:
        yield "json_object", "", f"{name}.json_object"


def choice_wish(choices: list[str] | None, name: str) -> Iterator[Wish]:
    """The guide for one of the texts in `choices`, if there are any."""
    if choices is not None:
        yield "choice", json.dumps(choices), name


def schema_wish(schema: Schema | None, name: str) -> Iterator[Wish]:
    """The guide for a JSON schema, if there is one.

    Raises:
        ApiError: 400: it is not a JSON object, or is nested too deep.
    """
    if schema is None:
        return
    value = decode(schema, name) if isinstance(schema, str) else schema
    if not isinstance(value, dict):
        raise ApiError(400, f"{name} is not a JSON object; give a JSON schema", name)
    check_shape(value, name)
    yield "json_schema", json.dumps(value, ensure_ascii=False), name
