"""OpenAI's client against the real server: every field it may send, streaming and not."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from idlm import LLM, SamplingParams
from tests.serving.conftest import KEY, Running

QUESTION = "Mia has 3 apples and buys 4 more. How many apples does she have?"
MESSAGES: Any = [{"role": "user", "content": QUESTION}]
CHAT: dict[str, dict[str, Any]] = {
    "nothing": {},
    "greedy": {"temperature": 0},
    "seed": {"seed": 7},
    "sampling": {"temperature": 0.7, "top_p": 0.9, "seed": 1},
    "penalties": {"presence_penalty": 0.5, "frequency_penalty": 0.5, "seed": 1},
    "bias": {"logit_bias": {"75": 5, "76": -100}, "seed": 1},
    "stop": {"stop": ["answer", "The"], "seed": 1},
    "one stop": {"stop": "answer", "seed": 1},
    "max_tokens": {"max_tokens": 3},
    "max_completion_tokens": {"max_completion_tokens": 4},
    "n": {"n": 3, "seed": 1, "max_tokens": 5},
    "logprobs": {"logprobs": True, "max_tokens": 4, "seed": 1},
    "top_logprobs": {"logprobs": True, "top_logprobs": 3, "max_tokens": 4, "seed": 1},
    "text": {"response_format": {"type": "text"}, "max_tokens": 3},
    "neutral": {
        "user": "someone",
        "store": False,
        "metadata": {"a": "b"},
        "service_tier": "auto",
        "parallel_tool_calls": True,
        "modalities": ["text"],
        "prompt_cache_key": "k",
        "safety_identifier": "s",
        "verbosity": "medium",
        "max_tokens": 3,
    },
    "extensions": {
        "max_tokens": 6,
        "seed": 3,
        "extra_body": {
            "top_k": 20,
            "min_p": 0.01,
            "repetition_penalty": 1.1,
            "min_tokens": 2,
            "ignore_eos": True,
            "stop_token_ids": [5],
            "skip_special_tokens": False,
            "include_stop_str_in_output": True,
            "priority": 1,
            "add_generation_prompt": True,
            "chat_template_kwargs": {"fast": True},
            "timeout": 30.0,
            "verification": "ratio",
            "idlm": {"trace": True},
        },
    },
    "no tools": {
        "tool_choice": "none",
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "max_tokens": 3,
    },
}


@pytest.fixture(scope="module")
def client(served: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=served.url, api_key=KEY, max_retries=0) as client:
        yield client


def gathered(chunks: list[ChatCompletionChunk], n: int) -> list[tuple[str, str | None, int]]:
    """Text, finish reason and number of logprobs of each sample of a stream, whose form is
    checked."""
    assert [chunk.choices[0].delta.role for chunk in chunks].count("assistant") == n
    assert len({chunk.id for chunk in chunks}) == 1 and chunks[0].object == "chat.completion.chunk"
    texts, reasons, entries = [""] * n, list[str | None]([None] * n), [0] * n
    for chunk in chunks:
        (choice,) = chunk.choices
        assert reasons[choice.index] is None  # nothing after the end
        texts[choice.index] += choice.delta.content or ""
        reasons[choice.index] = choice.finish_reason
        entries[choice.index] += len(choice.logprobs.content or []) if choice.logprobs else 0
    return list(zip(texts, reasons, entries, strict=True))


def compared(answer: ChatCompletion) -> list[tuple[str, str | None, int]]:
    return [
        (
            choice.message.content or "",
            choice.finish_reason,
            len(choice.logprobs.content or []) if choice.logprobs else 0,
        )
        for choice in answer.choices
    ]


@pytest.mark.parametrize("case", CHAT)
def test_chat_streamed_or_not(case: str, client: openai.OpenAI) -> None:
    fields = {"seed": 11, "max_tokens": 12} | CHAT[case]
    if "max_completion_tokens" in fields:
        del fields["max_tokens"]
    answer = client.chat.completions.create(model="nano", messages=MESSAGES, **fields)
    assert answer.object == "chat.completion" and len(answer.choices) == fields.get("n", 1)
    usage = answer.usage
    assert usage is not None and usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.completion_tokens_details is not None and usage.prompt_tokens_details is not None
    chunks = list(
        client.chat.completions.create(model="nano", messages=MESSAGES, stream=True, **fields)
    )
    assert gathered(chunks, fields.get("n", 1)) == compared(answer)


def test_async(served: Running) -> None:
    async def main() -> None:
        async with openai.AsyncOpenAI(base_url=served.url, api_key=KEY, max_retries=0) as client:
            options: Any = {"model": "math", "messages": MESSAGES, "seed": 5, "max_tokens": 20}
            answer = await client.chat.completions.create(**options)
            stream = await client.chat.completions.create(stream=True, **options)
            assert gathered([chunk async for chunk in stream], 1) == compared(answer)
            texts = await client.completions.create(
                model="nano", prompt=["1 + 1 =", "2 + 2 ="], seed=5, max_tokens=4
            )
            events = await client.completions.create(
                model="nano", prompt=["1 + 1 =", "2 + 2 ="], seed=5, max_tokens=4, stream=True
            )
            joined = ["", ""]
            async for event in events:
                joined[event.choices[0].index] += event.choices[0].text
            assert joined == [choice.text for choice in texts.choices]

    asyncio.run(main())


@pytest.mark.parametrize("model", ["nano", "nano:ar", "math"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_bytes_are_those_of_the_offline_engine(
    model: str, temperature: float, client: openai.OpenAI, llm: LLM
) -> None:
    params = SamplingParams(temperature=temperature, seed=21, n=2, max_tokens=40)
    offline = llm.chat(MESSAGES, params)
    answer = client.chat.completions.create(
        model=model, messages=MESSAGES, temperature=temperature, seed=21, n=2, max_tokens=40
    )
    assert [choice.message.content for choice in answer.choices] == [
        offline.text,
        offline.samples[0].text,
    ]
    assert [choice.finish_reason for choice in answer.choices] == [
        offline.finish_reason,
        offline.samples[0].finish_reason,
    ]
    plain = llm.generate("The answer", params)[0]
    texts = client.completions.create(
        model=model, prompt="The answer", temperature=temperature, seed=21, n=2, max_tokens=40
    )
    assert [choice.text for choice in texts.choices] == [plain.text, plain.samples[0].text]


def test_logprobs_are_those_of_the_offline_engine(client: openai.OpenAI, llm: LLM) -> None:
    offline = llm.chat(MESSAGES, SamplingParams(temperature=0, max_tokens=6, logprobs=3))
    answer = client.chat.completions.create(
        model="nano", messages=MESSAGES, temperature=0, max_tokens=6, logprobs=True, top_logprobs=3
    )
    shown = answer.choices[0].logprobs
    assert shown is not None and shown.content is not None and offline.logprobs is not None
    for entry, token, laws in zip(shown.content, offline.token_ids, offline.logprobs, strict=True):
        assert entry.logprob == pytest.approx(laws[token].logprob, abs=1e-9)
        likeliest = sorted((law.logprob for law in laws.values()), reverse=True)[:3]
        assert [top.logprob for top in entry.top_logprobs] == pytest.approx(likeliest, abs=1e-9)
        assert (
            bytes(entry.bytes or []).decode() == entry.token == llm.idlm.tokenizer.decode([token])
        )  # type: ignore[union-attr]


def test_usage_ends_a_stream_and_reports_drafts(client: openai.OpenAI) -> None:
    options: Any = {"messages": MESSAGES, "temperature": 0, "max_tokens": 40, "stream": True}
    for model in ("nano", "nano:ar"):
        *chunks, last = client.chat.completions.create(
            model=model, stream_options={"include_usage": True}, **options
        )
        assert (
            all(chunk.usage is None for chunk in chunks)
            and last.choices == []
            and last.usage is not None
        )
        details = last.usage.completion_tokens_details
        assert details is not None
        drafts = (details.accepted_prediction_tokens or 0) + (
            details.rejected_prediction_tokens or 0
        )
        assert (drafts > 0) == (model == "nano")


def test_the_trace_says_where_tokens_come_from(client: openai.OpenAI) -> None:
    options: Any = {
        "messages": MESSAGES,
        "temperature": 0,
        "max_tokens": 30,
        "extra_body": {"idlm": {"trace": True}},
    }
    answer = client.chat.completions.create(model="nano", **options)
    trace = answer.choices[0].model_extra["idlm"]  # type: ignore[index]
    assert answer.usage is not None and len(trace["trace"]) == answer.usage.completion_tokens
    assert trace["trace"][0]["source"] == "first" and trace["trace"][0]["forward"] == 1
    assert {entry["source"] for entry in trace["trace"]} <= {
        "first",
        "accepted",
        "corrected",
        "bonus",
    }
    forwards = [entry["forward"] for entry in trace["trace"]]
    assert forwards == sorted(forwards) and set(forwards) == set(range(1, forwards[-1] + 1))
    assert trace["tpf"] == pytest.approx(len(forwards) / forwards[-1])
    streamed = []
    for chunk in client.chat.completions.create(model="nano", stream=True, **options):
        streamed += (chunk.choices[0].model_extra or {}).get("idlm", {}).get("trace", [])
    assert streamed == trace["trace"]


def test_completions_take_every_form_of_prompt(client: openai.OpenAI, llm: LLM) -> None:
    ids = llm.encode("1 + 1 =")
    forms: list[Any] = ["1 + 1 =", ["1 + 1 ="], ids, [ids]]
    texts = [
        client.completions.create(model="nano", prompt=form, temperature=0).choices[0].text
        for form in forms
    ]
    assert len(set(texts)) == 1 and texts[0]
    both = client.completions.create(
        model="nano", prompt=["1 + 1 =", "2 + 2 ="], n=2, seed=1, best_of=2, suffix=""
    )
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]


def test_echo_with_logprobs_scores_a_prompt(client: openai.OpenAI, llm: LLM) -> None:
    """As lm-evaluation-harness computes a log-likelihood."""
    ids = llm.encode("She has 7 apples.")
    (offline,) = llm.generate([ids], SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=2))
    for max_tokens in (0, 1):
        answer = client.completions.create(
            model="nano", prompt=ids, echo=True, logprobs=2, max_tokens=max_tokens, temperature=0
        )
        shown = answer.choices[0].logprobs
        assert shown is not None and shown.token_logprobs and shown.tokens and shown.top_logprobs
        assert len(shown.tokens) == len(ids) + max_tokens and shown.token_logprobs[0] is None
        assert "".join(shown.tokens) == answer.choices[0].text
        assert shown.text_offset == [
            len("".join(shown.tokens[:at])) for at in range(len(shown.tokens))
        ]
        for at in range(1, len(ids)):
            laws = (offline.prompt_logprobs or [])[at]
            assert laws is not None and shown.token_logprobs[at] == pytest.approx(
                laws[ids[at]].logprob, abs=1e-9
            )
        assert answer.usage is not None and answer.usage.completion_tokens == max_tokens


def test_echo_streams_the_prompt_first(client: openai.OpenAI) -> None:
    options: Any = {"model": "nano", "prompt": "1 + 1 =", "echo": True, "temperature": 0}
    whole = client.completions.create(**options).choices[0].text
    pieces = [chunk.choices[0].text for chunk in client.completions.create(stream=True, **options)]
    assert "".join(pieces) == whole and whole.startswith("1 + 1 =")


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["nano", "nano:ar", "math"]
    assert client.models.retrieve("nano:ar").id == "nano:ar"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-7")


def test_its_exceptions_are_the_right_ones(client: openai.OpenAI, served: Running) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        client.chat.completions.create(model="nano", messages=MESSAGES, temperature=-1)
    assert "temperature" in raised.value.message
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="nobody", messages=MESSAGES)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=served.url, api_key="wrong", max_retries=0).models.list()


def test_a_deadline_is_an_error_and_no_short_answer(client: openai.OpenAI) -> None:
    options: Any = {
        "model": "nano",
        "messages": MESSAGES,
        "extra_body": {"timeout": 0.05, "ignore_eos": True},
    }
    with pytest.raises(openai.APIStatusError) as raised:
        client.chat.completions.create(**options)
    assert raised.value.status_code == 408
    with pytest.raises(openai.APIError, match="timeout"):
        list(client.chat.completions.create(stream=True, **options))
