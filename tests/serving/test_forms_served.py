"""Tools, forms of the output and thoughts over HTTP, from a random model: it writes nonsense, in
the form that is asked for."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2 as httpx
import jsonschema
import pytest
import torch
from transformers import PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM

from idlm.config import EngineConfig
from idlm.serving.config import WorkerConfig
from idlm.serving.prompts import Prompts
from tests.serving.conftest import CONFIG, running

TEMPLATE = (
    "{%- if tools %}{{ '<|im_start|>system\\n' }}{%- for t in tools %}{{ t.function.name + ' ' }}"
    "{%- endfor %}{{ '<tool_call><|im_end|>\\n' }}{%- endif %}"
    "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{ '\\n</think>\\n\\n' }}"
    "{%- endif %}{%- endif %}"
)
INNER = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"]}
NESTED = {
    "type": "object",
    "properties": {"o": {"$ref": "#/$defs/O"}, "tags": {"enum": ["a", "b"]}},
    "required": ["o"],
    "additionalProperties": False,
    "$defs": {"O": {**INNER, "additionalProperties": False}},
}
SCHEMAS: dict[str, Any] = {"nested": NESTED, "now": {"type": "object", "maxProperties": 0}}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": schema}}
    for name, schema in SCHEMAS.items()
]
NAMED = {"type": "function", "function": {"name": "nested"}}


@pytest.fixture(scope="module")
def http(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase
) -> Iterator[httpx.Client]:
    """A client of a server with a random model that thinks and has Hermes' tool calls."""
    folder = str(tmp_path_factory.mktemp("thinker"))
    thinking = copy.deepcopy(tokenizer)
    thinking.add_tokens(["<think>", "</think>"])
    thinking.chat_template = TEMPLATE
    thinking.save_pretrained(folder)
    torch.manual_seed(0)
    Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(thinking),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            max_position_embeddings=1024,
            eos_token_id=thinking.eos_token_id,
            bos_token_id=None,
        )
    ).save_pretrained(folder)
    engine = EngineConfig(stride=1, max_num_seqs=8, threads=1, kv_memory="16MiB")
    worker = WorkerConfig(Path(folder).as_posix(), dtype="float64", engine=engine)
    config = replace(CONFIG, worker=worker, name="m")
    with running(Prompts.load(folder), True, config) as server, server.open() as client:
        yield client


def body(**fields: Any) -> dict[str, Any]:
    """A request that does not think, unless `fields` say so."""
    messages = [{"role": "user", "content": "x"}]
    shared = {"model": "m", "messages": messages, "max_tokens": 400, "seed": 1}
    return {**shared, "reasoning_effort": "none", **fields}


def whole(http: httpx.Client, **fields: Any) -> dict[str, Any]:
    answer = http.post("/v1/chat/completions", json=body(**fields))
    assert answer.status_code == 200, answer.text
    return answer.json()  # type: ignore[no-any-return]


def streamed(http: httpx.Client, **fields: Any) -> dict[str, Any]:
    """The message and finish reason that a stream's chunks add up to, in the form of a choice."""
    answer = http.post("/v1/chat/completions", json=body(stream=True, **fields))
    message: dict[str, Any] = {"content": ""}
    calls: list[dict[str, Any]] = []
    reason = None
    for line in answer.text.split("\n\n")[:-2]:
        (choice,) = json.loads(line.removeprefix("data: "))["choices"]
        for name, piece in choice["delta"].items():
            if name == "tool_calls":
                for call in piece:
                    if call["index"] == len(calls):
                        calls.append({"type": call["type"], "function": {"arguments": ""}})
                        calls[-1]["function"]["name"] = call["function"]["name"]
                        assert len(call["id"]) == 9
                    calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
            elif name != "role":
                message[name] = message.get(name, "") + piece
        reason = choice["finish_reason"] or reason
    return {"finish_reason": reason, "message": message | {"tool_calls": calls}}


def same(whole: dict[str, Any], streamed: dict[str, Any]) -> bool:
    """Whether a choice is what its stream adds up to."""
    message = {key: whole["message"].get(key) for key in ("content", "reasoning")}
    calls = [
        {key: call[key] for key in ("type", "function")}
        for call in whole["message"].get("tool_calls", [])
    ]
    other = streamed["message"]
    return (
        whole["finish_reason"] == streamed["finish_reason"]
        and (message["content"] or "") == other["content"]
        and message["reasoning"] == other.get("reasoning") == other.get("reasoning_content")
        and calls == other["tool_calls"]
    )


@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
@pytest.mark.parametrize("most", [None, 40, 12, 1])
def test_forced_calls(http: httpx.Client, choice: Any, most: int | None) -> None:
    """Whole and in a stream, complete and cut: calls and no content."""
    for seed in range(3):
        fields = {"tools": TOOLS, "tool_choice": choice, "seed": seed, "max_tokens": most or 900}
        (answer,) = whole(http, **fields)["choices"]
        assert same(answer, streamed(http, **fields))
        assert not answer["message"]["content"]
        calls = answer["message"].get("tool_calls", [])
        cut = answer["finish_reason"] == "length"
        assert most or not cut
        assert answer["finish_reason"] == ("length" if cut else "tool_calls")
        assert (1 <= len(calls) <= 16) or cut
        for call in calls[: len(calls) - cut]:
            arguments = json.loads(call["function"]["arguments"])
            jsonschema.validate(arguments, SCHEMAS[call["function"]["name"]])


def test_at_most_one_call(http: httpx.Client) -> None:
    for seed in range(4):
        fields = {"tools": TOOLS, "tool_choice": "required", "seed": seed}
        (answer,) = whole(http, parallel_tool_calls=False, **fields)["choices"]
        assert answer["finish_reason"] == "tool_calls" and len(answer["message"]["tool_calls"]) == 1
    assert whole(http, parallel_tool_calls=False, max_tokens=2)["choices"]
    assert whole(http, parallel_tool_calls=False, max_tokens=2, tools=TOOLS)["choices"]


ENUM = {"type": "object", "properties": {"a": {"enum": [1, 22]}}, "required": ["a"]}
FORMAT = {"type": "json_schema", "json_schema": {"schema": {**ENUM, "additionalProperties": False}}}


@pytest.mark.parametrize("budget", [0, 4, 25])
def test_thoughts_then_the_form(http: httpx.Client, budget: int) -> None:
    fields = {
        "response_format": FORMAT,
        "thinking_token_budget": budget,
        "reasoning_effort": "high",
    }
    result = whole(http, **fields)
    (answer,) = result["choices"]
    assert same(answer, streamed(http, **fields))
    jsonschema.validate(json.loads(answer["message"]["content"]), ENUM)
    assert answer["message"].get("reasoning") == answer["message"].get("reasoning_content")
    used = result["usage"]["completion_tokens_details"]["reasoning_tokens"]
    assert used <= budget and bool(used) == bool(answer["message"].get("reasoning"))
    hidden = whole(http, include_reasoning=False, **fields)
    assert "reasoning" not in hidden["choices"][0]["message"]
    assert hidden["usage"] | {"prompt_tokens_details": 0} == result["usage"] | {
        "prompt_tokens_details": 0
    }


def test_thoughts_then_calls(http: httpx.Client) -> None:
    fields = {"tools": TOOLS, "tool_choice": NAMED, "thinking_budget": 6, "reasoning_effort": "low"}
    (answer,) = whole(http, **fields)["choices"]
    assert same(answer, streamed(http, **fields)) and answer["message"]["reasoning"]
    (call,) = answer["message"]["tool_calls"]
    jsonschema.validate(json.loads(call["function"]["arguments"]), NESTED)


def test_no_thoughts_if_none_are_wanted(http: httpx.Client) -> None:
    result = whole(http, response_format=FORMAT)
    assert "reasoning" not in result["choices"][0]["message"]
    assert result["usage"]["completion_tokens_details"]["reasoning_tokens"] == 0


def test_thoughts_that_are_cut(http: httpx.Client) -> None:
    (answer,) = whole(http, reasoning_effort="high", max_tokens=8)["choices"]
    assert answer["finish_reason"] == "length" and answer["message"]["content"] == ""
    assert answer["message"]["reasoning"]


def test_where_thoughts_are_shown(http: httpx.Client) -> None:
    fields = {"response_format": FORMAT, "thinking_budget": 6, "reasoning_effort": "low"}
    (answer,) = whole(http, **fields)["choices"]
    (inline,) = whole(http, separate_reasoning=False, **fields)["choices"]
    thoughts, content = answer["message"]["reasoning"], answer["message"]["content"]
    assert "reasoning" not in inline["message"]
    begin, _, after = inline["message"]["content"].rpartition("</think>")
    assert begin.strip().removeprefix("<think>").strip() == thoughts and after.strip() == content
    assert same(inline, streamed(http, separate_reasoning=False, **fields))
    assert same(answer, streamed(http, stream_reasoning=False, **fields))


def test_a_continued_message_can_be_echoed(http: httpx.Client) -> None:
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "So it"}]
    fields = {"messages": messages, "continue_final_message": True, "max_tokens": 6}
    (plain,), (echoed,) = (whole(http, echo=echo, **fields)["choices"] for echo in (None, True))
    assert echoed["message"]["content"] == "So it" + plain["message"]["content"]
    assert same(echoed, streamed(http, echo=True, **fields))


def test_forms_of_other_servers(http: httpx.Client) -> None:
    def content(**fields: Any) -> str:
        return str(whole(http, **fields)["choices"][0]["message"]["content"])

    assert content(structured_outputs={"choice": ["ja", "nein"]}) in ("ja", "nein")
    assert content(guided_choice=['say "ä"\n']) == 'say "ä"\n'
    assert content(ebnf='root ::= "a" [bc]') in ("ab", "ac")
    assert content(regex="[xy]{3}").strip("xy") == ""
    schema = {"type": "array", "items": {"enum": [1, 2]}, "maxItems": 2, "uniqueItems": True}
    assert isinstance(json.loads(content(guided_json=schema)), list)
    annotated = {"type": "string", "format": "binary", "maxLength": 3}
    assert isinstance(json.loads(content(guided_json=annotated)), str)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"guided_json": {"not": {}}}, "guided_json cannot be used: it cannot be obeyed for not"),
        ({"guided_json": {"oneOf": [{}, {"minLength": 1}]}}, "guided_json cannot be used"),
        ({"guided_choice": []}, "guided_choice cannot be used: choices are a list of one string"),
        ({"ebnf": "root ::= ("}, "ebnf cannot be used"),
        (
            {"tools": [{**TOOLS[0], "function": {"name": "f", "parameters": {"type": "x"}}}]},
            "parameters of tool 'f' have the type 'x'",
        ),
        (
            {"tools": [{**TOOLS[0], "function": {"name": "f", "parameters": {"$ref": "#/a"}}}]},
            "tools cannot be used: Pointer '/a' does not exist; change it",
        ),
    ],
)
def test_what_cannot_be_obeyed_is_refused(
    http: httpx.Client, fields: dict[str, Any], words: str
) -> None:
    if "tools" in fields:
        fields = fields | {"tool_choice": "required"}
    answer = http.post("/v1/chat/completions", json=body(**fields))
    assert answer.status_code == 400 and words in answer.json()["error"]["message"], answer.text
