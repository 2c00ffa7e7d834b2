"""Acceptance of a request and of the server, in the shapes that vLLM's tools read."""

from __future__ import annotations

import json
from collections import Counter
from itertools import groupby
from typing import Any

import httpx2 as httpx
from prometheus_client.parser import text_string_to_metric_families

from idlm.serving.client import EngineClient
from idlm.serving.observe import Meters
from idlm.serving.wire import Stats
from tests.serving.conftest import CONFIG
from tests.waiting import wait_until

STRIDE = 4
BODY = {
    "model": "nano",
    "messages": [{"role": "user", "content": "Mia has 3 apples and buys 4 more. How many?"}],
    "seed": 3,
    "max_tokens": 40,
    "ignore_eos": True,
    "idlm": {"trace": True},
}


def numbers(http: httpx.Client) -> Counter[str]:
    """The metrics under vLLM's names, by name and, for drafts by depth, position."""
    found: Counter[str] = Counter()
    for family in text_string_to_metric_families(http.get("/metrics").text):
        for sample in family.samples:
            if sample.name.startswith("vllm:") and "le" not in sample.labels:
                assert sample.labels["model_name"] == "nano" and sample.labels["engine"] == "0"
                position = sample.labels.get("position", sample.labels.get("finished_reason", ""))
                found[sample.name.removeprefix("vllm:") + position] += sample.value
    return found


def expected(trace: list[dict[str, Any]]) -> dict[str, Any]:
    """The acceptance in the trace of a sample that drafts for all outcomes: every forward but the
    first verifies three drafts. Those past the end of the output do not count."""
    steps, drafted = [], 0
    for forward, group in groupby(trace, lambda entry: entry["forward"]):
        tokens = [entry["source"] for entry in group]
        if forward > 1:
            steps.append(tokens.count("accepted"))
            drafted += STRIDE - 1 if tokens[-1] != "accepted" else len(tokens)
    return {
        "mean_acceptance_length": 1 + sum(steps) / len(steps),
        "draft_acceptance_rate": sum(steps) / drafted,
        "acceptance_histogram": [steps.count(accepted) for accepted in range(STRIDE)],
        "num_spec_steps": len(steps),
        "num_accepted_draft_tokens": sum(steps),
        "num_draft_tokens": drafted,
        "num_spec_tokens": STRIDE - 1,
    }


def test_a_request_and_the_counters_say_the_same(http: httpx.Client) -> None:
    before = numbers(http)
    answer = http.post("/v1/chat/completions", json=BODY).json()
    spec = answer["metrics"]["speculative_decoding"]
    wanted = before["spec_decode_num_drafts_total"] + spec["num_spec_steps"]
    # the engine reports its counters from time to time
    wait_until(lambda: numbers(http)["spec_decode_num_drafts_total"] >= wanted)
    grown = numbers(http)
    grown.subtract(before)
    assert spec == expected(answer["choices"][0]["idlm"]["trace"])
    histogram = spec["acceptance_histogram"]
    assert min(histogram[0], histogram[-1]) > 0, "the test needs rejected and accepted drafts"
    assert grown["spec_decode_num_drafts_total"] == spec["num_spec_steps"]
    assert grown["spec_decode_num_draft_tokens_total"] == spec["num_draft_tokens"]
    assert grown["spec_decode_num_accepted_tokens_total"] == spec["num_accepted_draft_tokens"]
    for position in range(STRIDE - 1):
        at = grown[f"spec_decode_num_accepted_tokens_per_pos_total{position}"]
        assert at == sum(histogram[position + 1 :])
    usage = answer["usage"]
    assert grown["generation_tokens_total"] == usage["completion_tokens"] == 40
    assert grown["prompt_tokens_total"] == grown["request_prompt_tokens_sum"]
    assert grown["prompt_tokens_total"] == usage["prompt_tokens"]
    assert grown["prefix_cache_hits_total"] == usage["prompt_tokens_details"]["cached_tokens"]
    assert grown["request_success_totallength"] == 1
    for name in ("time_to_first_token", "e2e_request_latency", "request_time_per_output_token"):
        assert grown[f"{name}_seconds_count"] == 1
    forwards = answer["choices"][0]["idlm"]["trace"][-1]["forward"]
    assert grown["inter_token_latency_seconds_count"] == forwards - 1
    assert 0 <= numbers(http)["kv_cache_usage_perc"] <= 1


def test_where_answers_have_metrics(http: httpx.Client) -> None:
    """At the end of a stream, with the usage; not for several samples; zeros without drafts."""
    events = http.post(
        "/v1/chat/completions",
        json=BODY | {"stream": True, "stream_options": {"include_usage": True}},
    ).text.split("\n\n")
    *chunks, last = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    whole = http.post("/v1/chat/completions", json=BODY).json()
    assert last["metrics"] == whole["metrics"] and not last["choices"]
    assert not any("metrics" in chunk for chunk in chunks)

    text = {"model": "nano", "prompt": "1 + 1 =", "max_tokens": 8, "ignore_eos": True}
    one = http.post("/v1/completions", json=text).json()
    assert one["metrics"]["speculative_decoding"]["num_spec_steps"] > 0
    assert "metrics" not in http.post("/v1/completions", json=text | {"n": 2}).json()
    ar = http.post("/v1/completions", json=text | {"model": "nano:ar"}).json()
    assert ar["metrics"]["speculative_decoding"] == {
        "mean_acceptance_length": 1.0,
        "draft_acceptance_rate": 0.0,
        "acceptance_histogram": [0, 0, 0, 0],
        "num_spec_steps": 0,
        "num_accepted_draft_tokens": 0,
        "num_draft_tokens": 0,
        "num_spec_tokens": 3,
    }


def test_vllms_names_are_an_option_and_the_use_of_pages_is_not() -> None:
    client = EngineClient(CONFIG.worker, CONFIG.limits)
    client.stats = Stats(pages_total=8, pages_live=2)
    text = Meters(client).render().decode()
    assert "vllm:" not in text and "idlm_kv_usage 0.25" in text
    assert 'vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25' in (
        Meters(client, "m").render().decode()
    )
