"""Mixtures of experts in the engine: a row's experts depend on that row alone, also when steps are
recorded."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from idlm import LLM, Idlm, SamplingParams, load
from idlm.config import EngineConfig
from idlm.engine import products
from idlm.models.gated_lora import LoraSpec, adapter_parameters, all_linear, attach
from tests.engine.tiny import VOCAB, tiny_idlm

FAMILIES = {
    "mixtral": {"num_local_experts": 4, "sliding_window": None},
    "qwen2_moe": {
        "num_experts": 4,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
    "phimoe": {"num_local_experts": 4, "sliding_window": None},
}
PROMPTS = [[1, 2, 3, 5, 8], [4], [20, 3] * 6]
PARAMS = [
    SamplingParams(max_tokens=16, temperature=temperature, seed=5, ignore_eos=True, logprobs=1)
    for temperature in (0, 1, 1)
]


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Idlm:
    """A random model in float32 with a random gated LoRA."""
    folder: Path = tmp_path_factory.mktemp(request.param)
    config = AutoConfig.for_model(
        request.param,
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts_per_tok=2,
        max_position_embeddings=48,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
        **FAMILIES[request.param],
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    idlm = load(folder, dtype="float32")
    idlm.gate = attach(idlm.model, LoraSpec(4, 8.0, all_linear(idlm.model)), idlm.mask_id)
    for parameter in adapter_parameters(idlm.model).values():
        torch.nn.init.normal_(parameter, std=0.2)
    return idlm


@pytest.mark.parametrize("drafts", [False, True], ids=["one kind of weights", "int8 MASK rows"])
def test_a_recorded_step_routes_as_its_rows_say(
    model: Idlm, drafts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recording is made on the spare slot, whose rows have other experts than the requests'."""
    monkeypatch.setattr(products, "drafts_pay", lambda *_: drafts)
    plain, recorded = (
        LLM(model, config=EngineConfig(stride=3, branches="all", record=record))
        for record in (False, True)
    )
    expected = plain.generate(PROMPTS, PARAMS)
    for _ in range(2):  # the first steps are not recorded yet
        results = recorded.generate(PROMPTS, PARAMS)
    assert recorded.engine.runner._steps._recordings
    for one, two in zip(expected, results, strict=True):
        assert one.token_ids == two.token_ids
        assert one.logprobs and two.logprobs
        chosen = [
            torch.tensor([entry[token].logprob for token, entry in zip(*pairs, strict=True)])
            for pairs in ((one.token_ids, one.logprobs), (two.token_ids, two.logprobs))
        ]
        torch.testing.assert_close(*chosen, rtol=1e-3, atol=1e-3)
    ar = LLM(model, stride=1).generate(PROMPTS, PARAMS)
    assert [one.token_ids for one in ar] == [one.token_ids for one in results]


def test_in_float64_steps_are_not_recorded_and_the_log_says_why(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO, "idlm"):
        llm = LLM(tiny_idlm("qwen3_moe"), stride=2, branches="all")
    assert not llm.engine.runner._steps.on
    assert caplog.text.count("steps are not recorded: experts in float64 run one after") == 1


def test_a_row_does_not_depend_on_the_rows_beside_it() -> None:
    idlm = tiny_idlm("qwen3_moe")
    tokens, alone = torch.arange(VOCAB), torch.eye(VOCAB, dtype=torch.bool)
    positions = torch.zeros_like(tokens)
    together = idlm.forward(tokens, positions, alone)
    for token in tokens:
        single = idlm.forward(token[None], positions[:1], alone[:1, :1])
        torch.testing.assert_close(together[token], single[0], rtol=1e-12, atol=1e-12)


def test_deterministic_logprobs_are_equal_to_the_bit_alone_and_in_a_batch(model: Idlm) -> None:
    together = LLM(model, stride=3, branches="all", deterministic=True, max_num_seqs=4)
    single = LLM(model, stride=1, deterministic=True, max_num_seqs=1)
    for left, right in zip(
        together.generate(PROMPTS, PARAMS), single.generate(PROMPTS, PARAMS), strict=True
    ):
        assert left.token_ids == right.token_ids
        assert left.logprobs == right.logprobs
