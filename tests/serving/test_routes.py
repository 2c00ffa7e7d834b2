"""The smaller routes, metrics, and the OpenAPI document."""

from __future__ import annotations

import json
import logging
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import httpx2 as httpx
import jsonschema
import pytest
from prometheus_client.parser import text_string_to_metric_families

from idlm import LLM, SamplingParams, __version__
from idlm.serving.observe import EngineCollector, JsonLines
from idlm.serving.prompts import Prompts
from idlm.serving.wire import Stats
from tests.serving.conftest import Running
from tests.waiting import HANG_SECONDS

MESSAGES = [{"role": "user", "content": "1 + 1 ="}]


def test_tokenize_gives_the_ids_of_a_request(http: httpx.Client, llm: LLM) -> None:
    answer = http.post(
        "/tokenize", json={"model": "nano", "prompt": "1 + 1 =", "return_token_strs": True}
    ).json()
    assert answer["tokens"] == llm.encode("1 + 1 =") and answer["count"] == len(answer["tokens"])
    assert len(answer["token_strs"]) == answer["count"] and answer["max_model_len"] == 512
    plain = {"messages": MESSAGES, "add_special_tokens": False}
    chat = http.post("/tokenize", json=plain).json()
    assert chat["tokens"] == llm.chat([MESSAGES], SamplingParams(max_tokens=1))[0].prompt_token_ids
    assert http.post("/detokenize", json={"tokens": answer["tokens"]}).json() == {
        "prompt": "1 + 1 ="
    }


def test_the_state_of_the_server(http: httpx.Client) -> None:
    assert http.get("/health").json() == {"status": "alive"}
    assert http.get("/ready").json() == {"status": "ready"}
    assert http.get("/version").json() == {"version": __version__}


def test_metrics_count(http: httpx.Client) -> None:
    def numbers() -> dict[str, float]:
        text = http.get("/metrics").text
        families = text_string_to_metric_families(text)
        return {
            sample.name + json.dumps(sample.labels): sample.value
            for family in families
            for sample in family.samples
        }

    before = numbers()
    body = {"model": "nano", "messages": MESSAGES, "max_tokens": 9, "ignore_eos": True}
    usage = http.post("/v1/chat/completions", json=body).json()["usage"]
    http.post("/v1/chat/completions", json={})
    after = numbers()

    def grown(name: str, **labels: str) -> float:
        key = name + json.dumps(labels)
        return after[key] - before.get(key, 0.0)

    route = "/v1/chat/completions"
    assert grown("idlm_http_requests_total", route=route, status="200") == 1
    assert grown("idlm_http_requests_total", route=route, status="400") == 1
    assert (
        grown("idlm_time_to_first_token_seconds_count")
        == grown("idlm_time_per_token_seconds_count")
        == 1
    )
    assert (
        grown("idlm_completion_tokens_sum") == 9
        and grown("idlm_prompt_tokens_sum") == usage["prompt_tokens"]
    )
    assert {name for name in after if name.startswith("idlm_kv_pages")} and after[
        "idlm_engine_ready{}"
    ] == 1
    assert all(after[name] >= value for name, value in before.items() if "_total" in name)


def test_counters_do_not_go_back_when_the_engine_starts_again() -> None:
    quota = SimpleNamespace(samples=0, tokens=0)
    client: Any = SimpleNamespace(stats=Stats(), restarts=0, ready=True, quota=quota)
    collector = EngineCollector(client)
    seen: list[dict[str, float]] = []
    for restarts, tokens, plans, reached in (
        (0, 5, {"N4": 3}, [4, 2]),
        (1, 2, {"N1": 1}, [1]),
        (1, 9, {"N4": 2}, [2, 2]),
    ):
        client.restarts = restarts
        client.stats = Stats(
            tokens=tokens, plans=plans, reached=reached, accepted=reached, running=1
        )
        seen.append(
            {
                sample.name + str(sample.labels): sample.value
                for family in collector.collect()
                for sample in family.samples
            }
        )
    assert [one["idlm_generated_tokens_total{}"] for one in seen] == [5, 7, 14]
    assert [one["idlm_plan_steps_total{'plan': 'N4'}"] for one in seen] == [3, 3, 5]
    assert [one["idlm_drafts_reached_total{'depth': '2'}"] for one in seen] == [2, 2, 4]
    assert [one["idlm_samples_running{}"] for one in seen] == [1, 1, 1]


def test_logs_are_json_and_hold_no_text(
    http: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "idlm.serving"):
        body = {"model": "nano", "prompt": "a secret word", "max_tokens": 3, "ignore_eos": True}
        id = http.post("/v1/completions", json=body).headers["x-request-id"]
        http.post("/v1/completions", json={"model": "nano", "prompt": 5, "secret": 1})
    lines = [
        JsonLines().format(record)
        for record in caplog.records
        if record.name == "idlm.serving.access"
    ]
    assert "secret" not in "".join(lines)
    line = next(json.loads(line) for line in lines if id in line)
    assert (
        line["status"] == 200
        and line["completion_tokens"] == 3
        and line["finish_reasons"] == ["length"]
    )
    assert line["path"] == "/v1/completions" and line["model"] == "nano" and line["seconds"] > 0


def test_the_document_is_whole(http: httpx.Client) -> None:
    document = http.get("/openapi.json").json()
    schemas = document["components"]["schemas"]
    for name in re.findall(r'"#/components/schemas/([^"]+)"', json.dumps(document)):
        assert name in schemas
    for path, item in document["paths"].items():
        for operation in item.values():
            assert "422" not in operation["responses"], path
            assert path == "/health" or "401" in operation["responses"]


@pytest.mark.parametrize(
    "path, body, shape",
    [
        (
            "/v1/chat/completions",
            {"messages": MESSAGES, "logprobs": True, "max_tokens": 5, "idlm": {"trace": True}},
            "ChatCompletion",
        ),
        (
            "/v1/completions",
            {"prompt": "x", "logprobs": 2, "echo": True, "idlm": {"trace": True}},
            "Completion",
        ),
        ("/tokenize", {"prompt": "x", "return_token_strs": True}, "Tokenized"),
        ("/v1/completions", {"prompt": 5}, "ErrorBody"),
    ],
)
def test_answers_have_the_shape_of_the_document(
    path: str, body: dict[str, Any], shape: str, http: httpx.Client
) -> None:
    document = http.get("/openapi.json").json()
    answer = http.post(path, json={"model": "nano"} | body)
    schema = {"$ref": f"#/components/schemas/{shape}", "components": document["components"]}
    jsonschema.Draft202012Validator(schema).validate(answer.json())


def test_slow_text_is_cut_into_tokens_beside_the_loop(
    served: Running, http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other requests are answered while a long text is tokenized."""
    text, begun, answered = Prompts.text, threading.Event(), threading.Event()

    def slow(*arguments: Any) -> list[int]:
        begun.set()
        assert answered.wait(HANG_SECONDS)
        return text(*arguments)

    monkeypatch.setattr(Prompts, "text", slow)
    with ThreadPoolExecutor(1) as pool, served.open() as other:
        long = pool.submit(http.post, "/tokenize", json={"prompt": "ab " * 2000})
        try:
            assert begun.wait(HANG_SECONDS)
            assert other.get("/health", timeout=HANG_SECONDS / 2).status_code == 200
        finally:
            answered.set()
        assert long.result().status_code == 200
