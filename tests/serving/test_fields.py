"""Fields of requests: what each does, at which values it is accepted, and how it is refused."""

from __future__ import annotations

import json
from typing import Any

import httpx2 as httpx
import pytest

from idlm import LLM, SamplingParams
from idlm.serving.prompts import Prompts

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
MESSAGES: list[dict[str, Any]] = [{"role": "user", "content": "Mia has 14 apples."}]
PROMPT = "Mia has 14 apples. Then she buys 9 more"
BASE = {"seed": 7, "max_tokens": 6, "ignore_eos": True, "return_token_ids": True}
NEUTRAL: dict[str, list[Any]] = {
    "user": ["me"],
    "safety_identifier": ["x"],
    "prompt_cache_key": ["x"],
    "prompt_cache_retention": ["24h", "in_memory"],
    "metadata": [{"a": "b"}, {"a": 1, "b": [2]}, {}],
    "store": [True, False],
    "service_tier": ["auto", "default", "flex", "priority", "scale"],
    "no_stop_trim": [False],
    "return_hidden_states": [False],
    "spaces_between_special_tokens": [True],
    "use_beam_search": [False],
    "length_penalty": [1, 1.0],
}
CHAT_NEUTRAL: dict[str, list[Any]] = {
    "prediction": [{"type": "content", "content": "x"}],
    "modalities": [["text"]],
    "verbosity": ["medium"],
    "add_special_tokens": [False],
}
REFUSED: dict[str, tuple[Any, str]] = {
    # field: a value that is not accepted, what the sentence says
    "no_stop_trim": (True, "include_stop_str_in_output"),
    "return_hidden_states": (True, "only false"),
    "spaces_between_special_tokens": (False, "only true"),
    "use_beam_search": (True, "set n"),
    "length_penalty": (1.2, "only 1"),
    "modalities": (["text", "audio"], 'only ["text"]'),
    "verbosity": ("low", "say it in a message"),
    "audio": ({"voice": "x"}, "the model writes text"),
    "functions": ([], "use tools"),
    "function_call": ("auto", "use tool_choice"),
    "web_search_options": ({}, "offer a tool"),
    "add_special_tokens": (True, "chat template"),
    "service_tier": ("fast", "'flex'"),
    "store": (0, "boolean"),
    "metadata": ("x", "dictionary"),
}


def post(http: httpx.Client, path: str, status: int = 200, **fields: Any) -> dict[str, Any]:
    given = {"messages": MESSAGES} if path == CHAT else {"prompt": PROMPT}
    response = http.post(path, json={"model": "nano"} | BASE | given | fields)
    assert response.status_code == status, response.text
    return dict(response.json())


def chunks(http: httpx.Client, path: str, **fields: Any) -> list[dict[str, Any]]:
    given = {"messages": MESSAGES} if path == CHAT else {"prompt": PROMPT}
    body = {"model": "nano", "stream": True} | BASE | given | fields
    with http.stream("POST", path, json=body) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_neutral_values_change_nothing(path: str, http: httpx.Client) -> None:
    values = NEUTRAL | (CHAT_NEUTRAL if path == CHAT else {})
    plain = post(http, path)["choices"]
    for place in range(max(map(len, values.values()))):
        fields = {name: given[place % len(given)] for name, given in values.items()}
        assert post(http, path, **fields)["choices"] == plain
    assert post(http, path, **dict.fromkeys(values))["choices"] == plain


@pytest.mark.parametrize("name", REFUSED)
def test_other_values_are_refused_with_what_to_do(name: str, http: httpx.Client) -> None:
    value, sentence = REFUSED[name]
    error = post(http, CHAT, 400, **{name: value})["error"]
    assert (error["param"], error["code"]) == (name, "invalid_value")
    assert sentence in error["message"] and name in error["message"]


CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
QUESTION, AGAIN = MESSAGES[0], {"role": "user", "content": "And then?"}
LENIENT: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # case: a message as others send it, the same as it is meant
    "null fields": (
        dict.fromkeys(("refusal", "annotations", "audio", "function_call", "tool_calls", "name"))
        | {"role": "assistant", "content": "yes"},
        {"role": "assistant", "content": "yes"},
    ),
    "fields of others": (
        {"role": "assistant", "content": "yes", "annotations": [], "refusal": "no", "x": {"y": 1}},
        {"role": "assistant", "content": "yes"},
    ),
    "thoughts": (
        {"role": "assistant", "content": "yes", "reasoning_content": "hm", "reasoning": "hm"},
        {"role": "assistant", "content": "yes"},
    ),
    "a call of a stream": (
        {"role": "assistant", "content": None, "tool_calls": [CALL | {"index": 0}]},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
    ),
    "parts": (
        {"role": "user", "content": [{"type": "text", "text": "x", "cache_control": {}}]},
        {"role": "user", "content": "x"},
    ),
    "parts of responses": (
        {"role": "assistant", "content": [{"type": "output_text", "text": "x", "logprobs": []}]},
        {"role": "assistant", "content": "x"},
    ),
    "no content": ({"role": "user", "content": None}, {"role": "user", "content": ""}),
}


@pytest.mark.parametrize("case", LENIENT)
def test_history_is_read_leniently(case: str, http: httpx.Client) -> None:
    sent, meant = LENIENT[case]
    prompts = [
        post(http, CHAT, messages=[QUESTION, message, AGAIN])["prompt_token_ids"]
        for message in (sent, meant)
    ]
    assert prompts[0] == prompts[1]


def test_a_role_of_the_templates_own(http: httpx.Client, llm: LLM) -> None:
    message = {"role": "critic", "content": "no"}
    ids = post(http, CHAT, messages=[QUESTION, message])["prompt_token_ids"]
    assert "critic\nno" in Prompts.load("nano-base").decode(ids)


ERRORS: list[tuple[str, dict[str, Any], str | None, str]] = [
    (CHAT, {"temperature": 3e4}, "temperature", "invalid_value"),
    (CHAT, {"top_p": 0}, "top_p", "invalid_value"),
    (CHAT, {"presence_penalty": 1e9}, "presence_penalty", "invalid_value"),
    (CHAT, {"seed": 2**63}, "seed", "invalid_value"),
    (CHAT, {"max_tokens": 0}, "max_tokens", "invalid_value"),
    (CHAT, {"max_completion_tokens": 0}, "max_completion_tokens", "invalid_value"),
    (CHAT, {"min_tokens": 9}, "min_tokens", "invalid_value"),
    (CHAT, {"logit_bias": {"x": 1}}, "logit_bias", "invalid_value"),
    (CHAT, {"logit_bias": {"5": 1e9}}, "logit_bias", "invalid_value"),
    (CHAT, {"stop_token_ids": [99999]}, "stop_token_ids", "invalid_value"),
    (CHAT, {"stop": ""}, "stop", "invalid_value"),
    (CHAT, {"stop": ["x"] * 17}, "stop", "invalid_value"),
    (CHAT, {"stop": ["x", 5]}, "stop.1", "invalid_value"),
    (CHAT, {"guided_regex": "("}, "guided_regex", "invalid_value"),
    (
        CHAT,
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": {"type": "x"}},
            }
        },
        "response_format",
        "invalid_value",
    ),
    (CHAT, {"messages": [{"role": "tool", "content": "x"}]}, "messages.0.tool_call_id", "missing"),
    (CHAT, {"messages": [{"role": "user"}]}, "messages.0.content", "missing"),
    (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages.0.content.0.type",
        "invalid_value",
    ),
    (CHAT, {"messages": [QUESTION] * 99}, "messages", "context_length_exceeded"),
    (CHAT, {"messages": [QUESTION | {"content": "word " * 9**5}]}, "messages", "context_length"),
    (TEXT, {"prompt": "word " * 600}, "prompt", "context_length_exceeded"),
    (TEXT, {"prompt": [5] * 512}, "prompt", "context_length_exceeded"),
    (TEXT, {"prompt": [5, -1]}, "prompt", "invalid_value"),
    (TEXT, {"prompt": ["x", 5]}, "prompt.1", "invalid_value"),
    (TEXT, {"suffix": "x"}, "suffix", "invalid_value"),
    (TEXT, {"top_q": 1}, "top_q", "unsupported_parameter"),
]


@pytest.mark.parametrize("path, fields, param, code", ERRORS)
def test_errors_name_the_field_and_the_kind(
    path: str, fields: dict[str, Any], param: str, code: str, http: httpx.Client
) -> None:
    error = post(http, path, 400, **fields)["error"]
    assert error["param"] == param and code in error["code"], error
    if "context" in code:
        assert "this model's maximum context length is 512 tokens" in error["message"]


@pytest.mark.parametrize("model", [None, "", "nano"])
@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_without_a_model_the_base_is_meant(
    path: str, model: str | None, http: httpx.Client
) -> None:
    assert post(http, path, model=model)["model"] == "nano"


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize(
    "options, every", [({}, False), ({"continuous_usage_stats": True}, True)], ids=["end", "all"]
)
def test_usage_in_a_stream(
    path: str, options: dict[str, bool], every: bool, http: httpx.Client
) -> None:
    *parts, last = chunks(http, path, n=2, stream_options={"include_usage": True} | options)
    usage = last["usage"]
    assert last["choices"] == [] and usage["completion_tokens"] == 12
    assert all((part["usage"] is not None) == every for part in parts)
    if every:
        seen = [part["usage"]["completion_tokens"] for part in parts]
        assert seen == sorted(seen) and seen[0] >= 0 and seen[-1] == 12
        assert {part["usage"]["prompt_tokens"] for part in parts} == {usage["prompt_tokens"]}


def test_continuous_usage_is_part_of_usage(http: httpx.Client) -> None:
    parts = chunks(http, CHAT, stream_options={"continuous_usage_stats": True})
    assert not any("usage" in part for part in parts)


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_token_ids(path: str, http: httpx.Client, llm: LLM) -> None:
    params = SamplingParams(seed=7, max_tokens=6, ignore_eos=True)
    expected = llm.chat(MESSAGES, params) if path == CHAT else llm.generate(PROMPT, params)[0]
    whole = post(http, path)
    (choice,) = whole["choices"]
    assert choice["token_ids"] == expected.token_ids
    holder = whole if path == CHAT else choice
    assert holder["prompt_token_ids"] == expected.prompt_token_ids
    parts = chunks(http, path)
    ids = [part["choices"][0].get("token_ids", []) for part in parts]
    assert sum(ids, []) == expected.token_ids
    first = parts[0] if path == CHAT else parts[0]["choices"][0]
    assert first["prompt_token_ids"] == expected.prompt_token_ids
    assert "token_ids" not in json.dumps(post(http, path, return_token_ids=False))


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_prompt_logprobs(path: str, http: httpx.Client, llm: LLM) -> None:
    params = SamplingParams(seed=7, max_tokens=6, ignore_eos=True, prompt_logprobs=2)
    expected = llm.chat(MESSAGES, params) if path == CHAT else llm.generate(PROMPT, params)[0]
    whole = post(http, path, prompt_logprobs=2)
    found = (whole if path == CHAT else whole["choices"][0])["prompt_logprobs"]
    assert expected.prompt_logprobs is not None and len(found) == len(expected.prompt_token_ids)
    assert found[0] is None
    for entry, other in zip(found[1:], expected.prompt_logprobs[1:], strict=True):
        assert other is not None and list(entry) == [str(token) for token in other]
        for token, one in other.items():
            assert entry[str(token)]["rank"] == one.rank
            assert entry[str(token)]["logprob"] == pytest.approx(one.logprob, abs=1e-9)
    echoed = post(http, TEXT, prompt_logprobs=4, echo=True, logprobs=1)["choices"][0]
    assert all(len(tops) <= 2 for tops in echoed["logprobs"]["top_logprobs"] if tops)


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_bans_and_seeds_are_those_of_llm(path: str, http: httpx.Client, llm: LLM) -> None:
    ids = llm.encode("Mia has 14 apples and 9")
    for fields in (
        {"bad_words": ["apples", "has 1"], "temperature": 0},
        {"allowed_token_ids": ids, "bad_words": ["9"]},
        {"seed": -1},
        {"seed": -(2**63)},
    ):
        params = SamplingParams(**{"seed": 7, "max_tokens": 6, "ignore_eos": True} | fields)  # type: ignore[arg-type]
        expected = llm.chat(MESSAGES, params) if path == CHAT else llm.generate(PROMPT, params)[0]
        assert post(http, path, **fields)["choices"][0]["token_ids"] == expected.token_ids


def test_truncated_prompts_keep_their_end(http: httpx.Client, llm: LLM) -> None:
    ids = llm.encode(PROMPT)
    for prompt in (PROMPT, ids):
        (choice,) = post(http, TEXT, prompt=prompt, truncate_prompt_tokens=4, echo=True)["choices"]
        assert choice["prompt_token_ids"] == ids[-4:]
        assert choice["text"].startswith(Prompts.load("nano-base").decode(ids[-4:]))
    body = {"prompt": [5] * 900, "truncate_prompt_tokens": -1, "max_tokens": 12}
    (choice,) = post(http, TEXT, **body)["choices"]
    assert len(choice["prompt_token_ids"]) == 500 and len(choice["token_ids"]) == 12
    long = post(http, CHAT, messages=[QUESTION] * 99, truncate_prompt_tokens=30)
    assert len(long["prompt_token_ids"]) == long["usage"]["prompt_tokens"] == 30


def test_special_tokens_in_a_raw_prompt(http: httpx.Client) -> None:
    prompts = Prompts.load("nano-base")
    text = "<|im_start|>user\nx<|im_end|>"
    for parsed in (None, False, True):
        (choice,) = post(http, TEXT, prompt=text, parse_special=parsed)["choices"]
        assert choice["prompt_token_ids"] == prompts.text(text, trusted=bool(parsed))
    assert len(prompts.text(text, trusted=True)) < len(prompts.text(text))
    mask = post(http, TEXT, 400, prompt="<|MASK|>", parse_special=True)["error"]
    assert "MASK" in mask["message"]


def test_prefixes_are_shared_within_a_salt(http: httpx.Client) -> None:
    def cached(salt: str | None) -> int:
        body = {"prompt": [9, 8, 7, 6] * 12, "cache_salt": salt}
        details = post(http, TEXT, **body)["usage"]["prompt_tokens_details"]
        return int(details["cached_tokens"])

    assert [cached(salt) for salt in ("a", "a", "b", "b", None, None)] == [0, 32, 0, 32, 0, 32]
