"""The cached decoder against the oracle: same tokens, same forwards, same drafts accepted."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from idlm import LLM, Guide, Idlm, InputError, SamplingParams
from idlm.decoding import reference
from tests.engine.tiny import CLASSES, VOCAB, tiny_idlm

PARAMS = [
    SamplingParams(temperature=0, max_tokens=14),
    SamplingParams(seed=3, max_tokens=14),
    SamplingParams(seed=5, max_tokens=14, temperature=0.8, top_k=9, top_p=0.9, min_p=0.05),
    SamplingParams(
        seed=7, max_tokens=14, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.3
    ),
    SamplingParams(
        temperature=0,
        max_tokens=14,
        repetition_penalty=1.5,
        logit_bias={3: 2.0},
        banned_tokens=(4, 9),
    ),
    SamplingParams(temperature=0, max_tokens=14, bad_words=[[t, t] for t in range(24)]),
    SamplingParams(
        seed=6, max_tokens=14, bad_words=[[3, 5], [5, 7, 3]], allowed_token_ids=[3, 5, 7, 9]
    ),
    SamplingParams(seed=-8, max_tokens=14, verification="ratio", bad_words=[[3, 5], [5, 3]]),
    SamplingParams(seed=8, max_tokens=14, verification="ratio", top_k=8),
    SamplingParams(seed=9, max_tokens=14, verification="ratio", presence_penalty=0.7),
    SamplingParams(seed=9, max_tokens=14, verification="relaxed", tau=0.5),
]


@pytest.fixture(scope="module", params=CLASSES)
def idlm(request: pytest.FixtureRequest) -> Idlm:
    """A random model of each family, with a random gated LoRA."""
    return tiny_idlm(request.param, adapter=True)


@pytest.fixture(scope="module")
def tiny() -> Idlm:
    return tiny_idlm("qwen3")


@pytest.mark.parametrize("params", PARAMS, ids=range(len(PARAMS)))
@pytest.mark.parametrize(
    "stride, branches", [(1, "all"), (2, "all"), (3, "chain"), (4, "all"), (4, (0, 2))]
)
def test_equals_the_reference(
    idlm: Idlm, params: SamplingParams, stride: int, branches: str | tuple[int, ...]
) -> None:
    prompt = [1, 2, 3, 5, 8]
    request = reference.Request(prompt, params, idlm.mask_id, idlm.eos_ids, params.seed or 0)
    expected = reference.isd(idlm.forward, request, stride, branches)
    (result,) = LLM(idlm, stride=stride, branches=branches).generate([prompt], params)
    assert result.token_ids == expected.tokens
    assert result.forwards == expected.forwards
    assert (result.reached, result.accepted) == (expected.reached, expected.accepted)
    if params.verification == "coupled":
        assert result.token_ids == reference.ar(idlm.forward, request).tokens


def test_prompts_of_every_length_up_to_the_context(idlm: Idlm) -> None:
    """Greedy ISD equals greedy AR from one token to one short of the context, where only one token
    fits."""
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    prompts = [[1 + i % 20 for i in range(length)] for length in range(1, idlm.context)]
    ar, isd = (
        LLM(idlm, stride=stride, branches="all").generate(prompts, params) for stride in (1, 4)
    )
    assert [one.token_ids for one in ar] == [one.token_ids for one in isd]
    assert [len(one.token_ids) for one in ar] == [
        min(8, idlm.context - len(prompt)) for prompt in prompts
    ]


def test_ar_equals_transformers_generate(idlm: Idlm) -> None:
    model = idlm.model
    for prompt in ([1, 2, 3], [7], [2] * 20):
        tokens = torch.tensor([prompt], device=idlm.device)
        limits = {
            "max_new_tokens": 20,
            "do_sample": False,
            "repetition_penalty": 1.2,
            "pad_token_id": 0,
            "use_cache": False,
        }
        expected = model.generate(tokens, attention_mask=torch.ones_like(tokens), **limits)[
            0, len(prompt) :
        ].tolist()
        params = SamplingParams(temperature=0, max_tokens=20, repetition_penalty=1.2)
        assert LLM(idlm, stride=1).generate([prompt], params)[0].token_ids == expected


def test_same_seed_same_tokens_whatever_the_plan(idlm: Idlm) -> None:
    params = SamplingParams(seed=11, max_tokens=16, top_p=0.95)
    plans = [*itertools.product((1, 2, 3, 5), ("all", "chain")), (4, (1, 3))]
    outputs = {
        tuple(LLM(idlm, stride=n, branches=b).generate([[4, 2]], params)[0].token_ids)
        for n, b in plans
    }
    assert len(outputs) == 1


def test_a_drawn_seed_is_reported_and_reproduces(idlm: Idlm) -> None:
    first = LLM(idlm, stride=2, branches="all").generate([[4, 2]], SamplingParams(max_tokens=12))[0]
    again = LLM(idlm, stride=4, branches="all").generate(
        [[4, 2]], SamplingParams(max_tokens=12, seed=first.seed)
    )[0]
    assert first.token_ids == again.token_ids


def test_stop_ids_end_the_output_and_are_its_last_token(idlm: Idlm) -> None:
    llm = LLM(idlm, stride=4, branches="all")
    free = llm.generate([[4, 2]], SamplingParams(seed=1, max_tokens=16, ignore_eos=True))[0]
    stop = free.token_ids[7]
    held = llm.generate(
        [[4, 2]], SamplingParams(seed=1, max_tokens=16, ignore_eos=True, stop_token_ids=(stop,))
    )[0]
    assert held.token_ids == free.token_ids[: free.token_ids.index(stop) + 1]
    assert (held.finish_reason, free.finish_reason) == ("stop", "length")


def test_sources_tell_where_tokens_come_from(idlm: Idlm) -> None:
    result = LLM(idlm, stride=3, branches="all").generate(
        [[4, 2]], SamplingParams(seed=1, max_tokens=16)
    )[0]
    assert result.sources[0] == "first" and len(result.sources) == len(result.token_ids)
    assert result.sources.count("accepted") == sum(result.accepted)
    assert result.sources.count("corrected") == sum(result.reached) - sum(result.accepted)


@pytest.mark.parametrize(
    "prompt, words",
    [([], "0 tokens"), ([99999], "outside"), ([True], "whole number"), ("text", "token ids")],
)
def test_bad_prompts_are_refused(idlm: Idlm, prompt: object, words: str) -> None:
    with pytest.raises(InputError, match=words):
        LLM(idlm, branches="all").generate([prompt])  # type: ignore[list-item]


def test_a_mask_in_the_prompt_is_refused(idlm: Idlm) -> None:
    with pytest.raises(InputError, match="MASK"):
        LLM(idlm, branches="all").generate([[1, idlm.mask_id]])


def test_a_model_without_mask_row_has_no_drafts_of_masks() -> None:
    plain = tiny_idlm("qwen3", adapter=False)
    # of plans of MASK rows the planner has nothing but AR to choose
    for options in ({"stride": 1}, {"drafts": "masks"}):
        assert (
            LLM(plain, **options).generate([[1, 2]], SamplingParams(max_tokens=3))[0].forwards == 3
        )
    with pytest.raises(InputError, match="no MASK row"):
        LLM(plain, stride=2, branches="all")


STUCK = {
    "all tokens": {"allowed_token_ids": (5, 7), "banned_tokens": (5, 7)},
    "all tokens after the first": {
        "allowed_token_ids": (5, 7),
        "bad_words": ((5, 5), (5, 7), (7, 5), (7, 7)),
    },
    "one token, once": {"allowed_token_ids": (5,), "bad_words": ((5, 5, 5, 5),)},
    "the end, at first": {"allowed_token_ids": (2,), "min_tokens": 3},
}


@pytest.mark.parametrize("bans", STUCK.values(), ids=STUCK.keys())
@pytest.mark.parametrize("rule", ["coupled", "ratio", "relaxed"])
@pytest.mark.parametrize("stride, temperature", [(1, 1.0), (4, 1.0), (4, 0.0)])
def test_bans_that_leave_no_token_end_the_request(
    tiny: Idlm, bans: dict[str, Any], rule: str, stride: int, temperature: float
) -> None:
    """It never emits what is banned; the requests beside it go on."""
    params = SamplingParams(
        max_tokens=9,
        temperature=temperature,
        seed=1,
        verification=rule,
        tau=0.1 if rule == "relaxed" else None,
        **bans,
    )
    request = reference.Request([1, 3], params, tiny.mask_id, tiny.eos_ids, 1)
    expected = reference.ar(tiny.forward, request)
    llm = LLM(tiny, stride=stride, branches="all")
    other = SamplingParams(max_tokens=9, seed=2, ignore_eos=True)
    stuck, free = llm.generate([[1, 3], [1, 3]], [params, other])
    assert expected.stuck and (stuck.finish_reason, stuck.token_ids) == ("error", expected.tokens)
    assert "leave no token" in str(stuck.stop_reason)
    assert free.finish_reason == "length" and len(free.token_ids) == 9
    llm.engine.check()


def test_a_stop_or_the_limit_goes_before_a_place_without_tokens(tiny: Idlm) -> None:
    bans: dict[str, Any] = {"allowed_token_ids": [5], "bad_words": [[5, 5, 5]], "seed": 0}
    llm = LLM(tiny, stride=4, branches="all")
    wishes = [
        SamplingParams(max_tokens=2, **bans),
        SamplingParams(stop_token_ids=[5], min_tokens=0, **bans),
    ]
    limit, stop = llm.generate([[1, 3], [1, 3]], wishes)
    assert (limit.finish_reason, limit.token_ids) == ("length", [5, 5])
    assert (stop.finish_reason, stop.token_ids) == ("stop", [5])


@pytest.mark.parametrize("stride", [1, 4])
def test_raw_logprobs_are_the_models_own(tiny: Idlm, stride: int) -> None:
    prompt = [1, 3, 4, 9]
    greedy = SamplingParams(temperature=0, max_tokens=1)
    likeliest = LLM(tiny, stride=1).generate([prompt], greedy)[0].token_ids[0]
    params = SamplingParams(
        max_tokens=8,
        seed=4,
        temperature=2.0,
        top_k=5,
        repetition_penalty=1.5,
        banned_tokens=[likeliest],
        logprobs=VOCAB - 4,
        prompt_logprobs=2,
        ignore_eos=True,
    )
    raw, law = (
        LLM(tiny, stride=stride, branches="all", logprobs_mode=mode).generate([prompt], params)[0]
        for mode in ("raw_logprobs", "processed_logprobs")
    )
    assert raw.token_ids == law.token_ids
    text = torch.tensor(prompt + raw.token_ids)
    rows = torch.ones(len(text), len(text)).tril() > 0
    own = tiny.forward(text, torch.arange(len(text)), rows)[:, :VOCAB].double().log_softmax(dim=-1)
    assert raw.logprobs is not None and raw.prompt_logprobs is not None and law.logprobs is not None
    for at, entry in enumerate([*raw.prompt_logprobs[1:], *raw.logprobs]):
        assert entry is not None
        for token, found in entry.items():
            assert found.logprob == pytest.approx(float(own[at, token]), abs=1e-9)
    assert raw.logprobs[0][likeliest].rank == 1
    found = [entry[likeliest] for entry in law.logprobs if likeliest in entry]
    assert all(one.logprob == -torch.inf for one in found)


def test_each_text_of_bad_words_is_banned_at_the_start_and_after_a_space() -> None:
    llm = LLM("nano", stride=4, dtype="float64", kv_memory="16MiB", max_num_seqs=2)
    wish: dict[str, Any] = {"temperature": 0, "max_tokens": 24}
    prompt = "Mia has 14 apples."
    (free,) = llm.generate(prompt, SamplingParams(**wish))
    words = [word for word in free.text.split() if word.isalpha()][:2]
    (held,) = llm.generate(prompt, SamplingParams(bad_words=words, **wish))
    assert len(words) == 2 and not set(words) & set(held.text.split())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_bans_and_a_guide_together(temperature: float) -> None:
    """Both hold, with drafts and without; where they leave nothing the output ends."""
    wish: dict[str, Any] = {"temperature": temperature, "seed": 3, "max_tokens": 24}
    results = []
    for stride in (1, 4):
        llm = LLM("nano", stride=stride, branches="all", dtype="float64", kv_memory="16MiB")
        assert llm.idlm.tokenizer is not None
        letters = llm.idlm.tokenizer.convert_tokens_to_ids(["a", "b"])
        wishes = [
            SamplingParams(
                guide=Guide("regex", "(Mia|has|14|apples| )+"), bad_words=["Mia", "1"], **wish
            ),
            SamplingParams(guide=Guide("regex", "ab"), bad_words=["ab", letters], **wish),
        ]
        results.append(llm.generate(["Mia", "Mia"], wishes))
    for free, drafted in zip(*results, strict=True):
        assert (free.token_ids, free.finish_reason) == (drafted.token_ids, drafted.finish_reason)
    held, stuck = results[1]
    assert "Mia" not in held.text and "1" not in held.text
    assert (stuck.text, stuck.finish_reason) == ("a", "error")
    assert "leave no token" in str(stuck.stop_reason)
