"""Fields that change nothing here. Clients and routers send them all the same.

Hints, which no output depends on, are accepted with any legal value and not used:

    user, safety_identifier, prompt_cache_key, prompt_cache_retention, metadata, store,
    service_tier, prediction (chat)

A field that would change the output, if it were supported, is accepted at the value that asks for
nothing, and refused at any other with a sentence that says what to do. Null is as good as absent.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from idlm.serving.strict import Strict


def only(*values: object, instead: str = "leave it out") -> BeforeValidator:
    """For a field that is supported at these values alone; `instead` ends the sentence of its
    error."""

    def check(value: object) -> object:
        if value is not None and not any(
            value == one and type(value) is type(one) for one in values
        ):
            shown = " or ".join(map(json.dumps, values)) or "null"
            raise ValueError(f"only {shown} is supported; {instead}")
        return value

    return BeforeValidator(check)


Off = Literal[False] | None
On = Literal[True] | None


class Neutral(Strict):
    """Such fields of chat and of completions requests."""

    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: Literal["auto", "default", "flex", "scale", "priority"] | None = None

    no_stop_trim: Annotated[Off, only(False, instead="set include_stop_str_in_output")] = None
    return_hidden_states: Annotated[Off, only(False)] = None
    spaces_between_special_tokens: Annotated[On, only(True)] = None
    use_beam_search: Annotated[Off, only(False, instead="set n for several samples")] = None
    length_penalty: Annotated[float | None, only(1, 1.0)] = None


class ChatNeutral(Neutral):
    """Such fields of chat requests alone."""

    prediction: dict[str, Any] | None = None

    modalities: Annotated[
        list[Literal["text"]] | None, only(["text"], instead="the model writes text")
    ] = None
    verbosity: Annotated[
        Literal["medium"] | None,
        only("medium", instead="the model has no such setting: say it in a message"),
    ] = None
    audio: Annotated[None, only(instead="the model writes text")] = None
    functions: Annotated[None, only(instead="use tools")] = None
    function_call: Annotated[None, only(instead="use tool_choice")] = None
    web_search_options: Annotated[None, only(instead="offer a tool that searches")] = None
