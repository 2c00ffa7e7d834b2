"""Requests without settings of their own: the checkpoint's defaults and ends, as transformers'
`generate` has them, at every stride."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from idlm import LLM, InputError, SamplingParams
from idlm.params import Guide

PROMPTS = [[5, 6, 7, 8], [9, 10, 11, 9, 10, 11], [40, 41]]
TOKENS = 24
MASK = 3
FILES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "repetition penalty": {"repetition_penalty": 1.4},
    "suppressed tokens": {"suppress_tokens": list(range(20, 260))},
    "bad words": {"bad_words_ids": [[token] for token in range(2, 300, 2)]},
    "a shortest length": {"min_new_tokens": 12, "eos_token_id": list(range(100, 200))},
    "all": {
        "repetition_penalty": 0.8,
        "suppress_tokens": list(range(20, 120)),
        "bad_words_ids": [[7], [100], [9]],
        "eos_token_id": [150, 151, 152],
        "min_new_tokens": 5,
        "temperature": 0.7,
    },
}


@pytest.fixture
def llms(checkpoint: Path, tmp_path: Path) -> Callable[..., dict[str, LLM]]:
    """AR and all outcomes, on a copy of the checkpoint with another generation config."""

    def make(keys: dict[str, Any], **options: Any) -> dict[str, LLM]:
        shutil.copytree(checkpoint / "base", tmp_path / "base")
        (tmp_path / "base" / "generation_config.json").write_text(json.dumps(keys))
        shared = {"dtype": "float64", "threads": 1, "kv_memory": "8MiB", **options}
        engine: Any = {"AR": {"stride": 1}, "ISD": {"stride": 4, "branches": "all"}}
        return {
            name: LLM(str(tmp_path / "base"), str(checkpoint / "lora"), **shared, **plan)
            for name, plan in engine.items()
        }

    return make


@pytest.mark.parametrize("keys", FILES.values(), ids=FILES)
def test_greedy_is_transformers_generate_with_the_same_file(
    keys: dict[str, Any], llms: Callable[..., dict[str, LLM]], tmp_path: Path
) -> None:
    ends = {"eos_token_id": 2} | keys
    engines = llms({"max_new_tokens": TOKENS, "do_sample": False} | ends)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float64)
    # MASK is never emitted by design; transformers does not know it
    stock.generation_config.suppress_tokens = [MASK, *keys.get("suppress_tokens", ())]
    expected = []
    for prompt in PROMPTS:
        output = stock.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)))
        expected.append(output[0, len(prompt) :].tolist())
    for llm in engines.values():
        named = ends["eos_token_id"]  # the tokenizer's end is one too
        assert llm.idlm.eos_ids == {2, *(named if isinstance(named, list) else [named])}
        results = llm.generate(PROMPTS)
        assert [result.token_ids for result in results] == expected


@pytest.mark.parametrize("keys", FILES.values(), ids=FILES)
def test_sampled_with_the_defaults_isd_is_ar(
    keys: dict[str, Any], llms: Callable[..., dict[str, LLM]]
) -> None:
    engines = llms({"top_k": 50, "top_p": 0.95, "max_new_tokens": TOKENS} | keys)
    outputs = []
    for llm in engines.values():
        params = replace(llm.get_default_sampling_params(), seed=4)
        assert (params.top_k, params.top_p, params.max_tokens) == (50, 0.95, TOKENS)
        outputs.append([result.token_ids for result in llm.generate(PROMPTS, params)])
    assert outputs[0] == outputs[1]


def test_settings_of_a_request_replace_all_defaults(llms: Callable[..., dict[str, LLM]]) -> None:
    keys = {"repetition_penalty": 1.4, "suppress_tokens": list(range(20, 260))}
    llm = llms(keys | {"do_sample": False, "max_new_tokens": TOKENS})["AR"]
    own = SamplingParams(temperature=0.0, max_tokens=TOKENS)
    shared: Any = {"stride": 1, "threads": 1, "kv_memory": "8MiB"}
    without = LLM(llm.idlm, generation_config="none", **shared)
    assert without.get_default_sampling_params() == SamplingParams()
    with_own, with_defaults = llm.generate(PROMPTS, own), llm.generate(PROMPTS)
    plain = without.generate(PROMPTS, own)
    assert [r.token_ids for r in with_own] == [r.token_ids for r in plain]
    assert [r.token_ids for r in with_own] != [r.token_ids for r in with_defaults]
    streamed = [token for update in llm.stream(PROMPTS[0]) for token in update.tokens]
    assert streamed == with_defaults[0].token_ids
    chat = llm.chat([{"role": "user", "content": "a"}])
    assert not set(chat.token_ids) & set(range(20, 260))


@pytest.mark.parametrize("end", [-1, 400, 99999, [-1, 2], [400, -5, 2]])
def test_an_end_that_cannot_come_out_ends_nothing(
    end: Any, llms: Callable[..., dict[str, LLM]]
) -> None:
    """Such an id once stopped the device at another token, or the engine for good."""
    for llm in llms({"eos_token_id": end}).values():
        assert llm.idlm.eos_ids == {2}
        last = llm.idlm.vocab_size - 1
        params = SamplingParams(max_tokens=5, temperature=0.0, logit_bias={last: 90.0})
        (result,) = llm.generate([PROMPTS[0]], params)
        assert (result.token_ids, result.finish_reason) == ([last] * 5, "length")
        (result,) = llm.generate([PROMPTS[0]], replace(params, logit_bias={2: 90.0}))
        assert (result.token_ids, result.finish_reason) == ([2], "stop")
        guided = SamplingParams(temperature=0.0, guide=Guide("regex", "a{2}"))
        assert llm.generate([PROMPTS[0]], guided)[0].text == "aa"


def test_a_bad_default_is_refused_before_an_engine_is_built(
    llms: Callable[..., dict[str, LLM]],
) -> None:
    with pytest.raises(InputError, match=r"top_p=1.5 .*generation_config to none"):
        llms({"top_p": 1.5})


def test_the_option_is_checked() -> None:
    with pytest.raises(InputError, match="generation_config='vllm' is unknown; use auto, none"):
        LLM("nano", generation_config="vllm")
