"""Guided requests in the engine, the oracle's tokens, in any company, and always what the guide
says."""

from __future__ import annotations

import json
import random
import re
import time
from functools import cache
from pathlib import Path

import jsonschema
import pytest
import torch
from llguidance import LLMatcher, LLParserLimits, grammar_from
from llguidance.hf import from_tokenizer
from torch import Tensor

from benchmarks.structured import fault, params_for, schemas
from idlm import LLM, Guide, Idlm, InputError, SamplingParams, load
from idlm.config import EngineConfig
from idlm.decoding import reference
from idlm.engine import guide as engine_guide
from idlm.engine.build import build_engine
from idlm.engine.guide import OBJECT, WHITESPACE
from idlm.engine.request import Result, Terms
from idlm.params import Thinking
from tests.decoding.laws import BOTH
from tests.engine.tiny import DEVICE, DTYPE, ROUNDING, tiny_idlm

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "tags": {"type": "array", "items": {"enum": ["a", "größe", None]}, "maxItems": 3},
        "inner": {"anyOf": [{"type": "boolean"}, {"$ref": "#"}]},
    },
    "required": ["name"],
    "additionalProperties": False,
}
GUIDES = [
    Guide("json_object"),
    Guide("json_schema", json.dumps(SCHEMA)),
    Guide("regex", r"(ja|nein|[a-f]{2,9}x+)(, (ja|nein))*"),
    Guide("grammar", 'start: "(" start ")" | NUMBER\nNUMBER: /[0-9]+/'),
    Guide("grammar", 'root ::= "a" root "b" | [x-z]+'),
]
PARAMS = [
    SamplingParams(temperature=0, max_tokens=16),
    SamplingParams(seed=3, max_tokens=24),
    SamplingParams(seed=5, max_tokens=24, temperature=1.4, top_k=20, top_p=0.9, min_p=0.01),
    SamplingParams(
        seed=7, max_tokens=24, repetition_penalty=1.3, frequency_penalty=0.5, logit_bias={40: 3.0}
    ),
    SamplingParams(seed=8, max_tokens=24, verification="ratio", presence_penalty=0.7),
    SamplingParams(seed=9, max_tokens=24, verification="relaxed", tau=0.5),
]
PROMPT = [40, 41, 70, 99, 300]


@pytest.fixture(scope="module")
def idlm(checkpoint: Path) -> Idlm:
    """Random weights, a tokenizer of all bytes, and a gated LoRA."""
    return load(
        str(checkpoint / "base"), adapter=str(checkpoint / "lora"), dtype=DTYPE, device=DEVICE
    )


def with_guide(params: SamplingParams, guide: Guide | None) -> SamplingParams:
    return SamplingParams(**{**vars(params), "guide": guide})


def oracle(idlm: Idlm, guide: Guide) -> reference.Allowed:
    """The guide as a function of the whole output, by llguidance's plainest functions."""
    assert idlm.tokenizer is not None
    tokens = from_tokenizer(idlm.tokenizer, n_vocab=idlm.vocab_size, eos_token=sorted(idlm.eos_ids))  # type: ignore[arg-type]
    blanks = {"whitespace_pattern": WHITESPACE}
    grammar = (
        LLMatcher.grammar_from_json_schema(guide.text or OBJECT, overrides=blanks)  # type: ignore[arg-type]
        if guide.kind.startswith("json")
        else grammar_from(guide.kind, guide.text)  # type: ignore[arg-type]
    )

    @cache
    def after(output: tuple[int, ...]) -> Tensor:
        matcher = LLMatcher(tokens, grammar, log_level=0)
        if idlm.eos_ids & set(output) or matcher.try_consume_tokens(list(output)) < len(output):
            return torch.ones(idlm.vocab_size, dtype=torch.bool)
        return (
            torch.frombuffer(bytearray(matcher.compute_logit_bias()), dtype=torch.uint8)[
                : idlm.vocab_size
            ]
            > 0
        )

    return lambda output: after(tuple(output))


@pytest.mark.parametrize("guide", GUIDES, ids=range(len(GUIDES)))
@pytest.mark.parametrize("params", PARAMS, ids=range(len(PARAMS)))
def test_equals_the_reference(idlm: Idlm, params: SamplingParams, guide: Guide) -> None:
    params, allowed, seed = with_guide(params, guide), oracle(idlm, guide), params.seed or 0
    request = reference.Request(PROMPT, params, idlm.mask_id, idlm.eos_ids, seed, allowed)
    for stride, branches in ((4, "all"), (3, "chain"), (1, "all")):
        expected = reference.isd(idlm.forward, request, stride, branches)
        (result,) = LLM(idlm, stride=stride, branches=branches).generate([PROMPT], params)
        assert result.token_ids == expected.tokens
        assert result.forwards == expected.forwards
        assert (result.reached, result.accepted) == (expected.reached, expected.accepted)
        if params.verification == "coupled":
            assert result.token_ids == reference.ar(idlm.forward, request).tokens


def test_requests_without_a_guide_beside_guided_ones_are_untouched(idlm: Idlm) -> None:
    wishes = [with_guide(params, guide) for params in PARAMS for guide in (None, *GUIDES[:3])]
    together = LLM(idlm, max_num_seqs=7, branches="all").generate([PROMPT] * len(wishes), wishes)
    for params, result in zip(wishes, together, strict=True):
        assert result.token_ids == LLM(idlm, branches="all").generate([PROMPT], params)[0].token_ids


@pytest.mark.parametrize("late", [0, 1])
@pytest.mark.parametrize("seed", range(3))
def test_any_schedule(idlm: Idlm, late: int, seed: int) -> None:
    """Requests with and without guides come, are aborted and pre-empted; each gives what AR gives
    it alone."""
    chance = random.Random(seed)
    memory = 2**12 * 3 * DTYPE.itemsize
    engine = build_engine(
        idlm,
        EngineConfig(
            4,
            "all",
            max_num_seqs=3,
            kv_memory=memory,
            page_size=4,
            prefill_tokens=9,
            lookahead=late,
        ),
    )
    alone, done, wanted = LLM(idlm, stride=1), dict[str, Result](), {}
    while engine.busy or len(wanted) < 14:
        if len(wanted) < 14 and chance.random() < 0.3:
            params = with_guide(chance.choice(PARAMS[:4]), chance.choice([None, *GUIDES]))
            thinking = chance.choice([None, Thinking(60, 61, open=True, budget=4)])
            params = SamplingParams(**{**vars(params), "thinking": thinking})
            prompt = PROMPT * chance.randint(1, 4)
            wanted[
                engine.add(prompt, params, len(wanted), Terms(drafting=chance.random() < 0.8))
            ] = (
                prompt,
                params,
            )
        if chance.random() < 0.1:
            engine.drain()
            if engine.scheduler.running:
                engine._preempt()
        if chance.random() < 0.02 and wanted:
            engine.abort(chance.choice(list(wanted)))
        done |= {
            update.request_id: update.result
            for update in engine.step()
            if update.result is not None
        }
        engine.check()
    assert engine.metrics.preemptions > 0
    for number, (name, (prompt, params)) in enumerate(wanted.items()):
        tokens = alone.generate([prompt], SamplingParams(**{**vars(params), "seed": number}))[
            0
        ].token_ids
        result = done[name]
        assert result.token_ids == (
            tokens[: len(result.token_ids)] if result.finish_reason == "abort" else tokens
        )


def test_forty_schemas_of_growing_size(idlm: Idlm) -> None:
    wanted = schemas(40)
    params = params_for(wanted, 120)
    prompts = [PROMPT] * len(wanted)
    ar, isd = (
        LLM(idlm, stride=stride, branches="all").generate(prompts, params) for stride in (1, 4)
    )
    assert [one.token_ids for one in ar] == [one.token_ids for one in isd]
    assert [one.text for one in ar] == [one.text for one in isd]
    assert [
        found for schema, one in zip(wanted, isd, strict=True) if (found := fault(schema, one))
    ] == []
    assert sum(one.finish_reason == "stop" for one in isd) >= 10


def test_logprobs_are_those_of_the_guided_law(idlm: Idlm) -> None:
    guide = GUIDES[2]
    params = SamplingParams(seed=4, max_tokens=12, top_k=30, logprobs=2, guide=guide)
    ar, isd = (
        LLM(idlm, stride=stride, branches="all").generate([PROMPT], params)[0] for stride in (1, 4)
    )
    allowed = oracle(idlm, guide)
    text = torch.tensor(PROMPT + ar.token_ids)
    logits = idlm.forward(
        text, torch.arange(len(text)), torch.ones(len(text), len(text)).tril() > 0
    )
    assert ar.token_ids == isd.token_ids
    for result in (ar, isd):
        for at, entry in enumerate(result.logprobs or []):
            output = ar.token_ids[:at]
            may_come = allowed(output)
            for law in BOTH:
                row = law(
                    logits[len(PROMPT) - 1 + at].clone(),
                    params,
                    idlm.mask_id,
                    PROMPT,
                    output,
                    may_come,
                )
                for token, found in entry.items():
                    assert found.logprob == pytest.approx(float(row[token]), abs=ROUNDING)


def test_samples_share_a_guide_and_each_follows_it(idlm: Idlm) -> None:
    params = SamplingParams(n=4, seed=1, max_tokens=60, guide=GUIDES[2])
    result = LLM(idlm, branches="all").generate([PROMPT], params)[0]
    texts = [one.text for one in (result, *result.samples) if one.finish_reason == "stop"]
    assert len(set(texts)) > 1 and all(re.fullmatch(GUIDES[2].text, text) for text in texts)


def test_a_guide_ends_the_output_even_where_the_end_token_is_ignored(idlm: Idlm) -> None:
    params = SamplingParams(
        seed=2, max_tokens=50, ignore_eos=True, guide=Guide("regex", "[a-z]{4}")
    )
    (result,) = LLM(idlm, branches="all").generate([PROMPT], params)
    assert re.fullmatch("[a-z]{4}", result.text) and result.finish_reason == "stop"
    assert result.token_ids[-1] in idlm.eos_ids


def test_the_bundled_model_answers_in_json() -> None:
    """It does not know JSON, its tokenizer has fewer tokens than its logits columns."""
    nano = load("nano", dtype=DTYPE, device=DEVICE)
    params = SamplingParams(
        temperature=0, max_tokens=80, guide=Guide("json_schema", json.dumps(SCHEMA))
    )
    ar, isd = (
        LLM(nano, stride=stride, branches="all").generate("Mia has 5 boxes.", params)[0]
        for stride in (1, 4)
    )
    assert ar.token_ids == isd.token_ids and ar.finish_reason == "stop" and isd.tpf > 1
    jsonschema.validate(json.loads(isd.text), SCHEMA)


BAD = [
    Guide("json_schema", '{"type": "object"'),
    Guide("json_schema", "[1, 2]"),
    Guide("json_schema", '{"type": "foo"}'),
    Guide("json_schema", "false"),
    Guide("json_schema", '{"$ref": "http://example.com/schema"}'),
    Guide("json_schema", '{"type": "array", "items":' * 2000 + "{}" + "}" * 2000),
    Guide("regex", "["),
    Guide("regex", "(?=a)b"),
    Guide("regex", "(" * 10_000 + ")" * 10_000),
    Guide("grammar", "start: nothing"),
    Guide("grammar", "root ::= [a-z"),
    Guide("grammar", "{}"),
    Guide("grammar", "start: a\na: b\nb: a"),
    Guide("grammar", 'start: <|im_start|> "a"'),
    Guide("grammar", "start: <|MASK|>"),
]
COSTLY = [
    Guide("regex", "(((((a{1,30}){1,30}){1,30}){1,30}){1,30})b"),
    Guide("regex", "(a|b)*a(a|b){500}"),
    Guide("regex", "((a?){100}){100}a{100}"),
    Guide("regex", "(.{0,300}(a|b|c|d).{0,300}){30}"),
    Guide("regex", "(.*a){200}"),
    Guide("regex", "a" * 60_000),
    Guide("json_schema", '{"type": "string", "minLength": 100000, "maxLength": 1000000000}'),
    Guide("json_schema", json.dumps({"enum": [f"value{i}" for i in range(4000)]})),
    Guide(
        "json_schema",
        json.dumps({"properties": {f"k{i}": {"type": "string"} for i in range(1500)}}),
    ),
    Guide("json_schema", '{"type": "array", "items":' * 100 + "{}" + "}" * 100),
    Guide("grammar", "start: " + '"a" ' * 15_000),
]


def test_a_bad_guide_is_refused_and_the_request_beside_it_is_not(idlm: Idlm) -> None:
    llm = LLM(idlm, branches="all")
    fine, updates = llm.engine.add(PROMPT, PARAMS[1], 3), []
    for guide in BAD:
        updates += llm.engine.step()
        with pytest.raises(InputError, match=f"guide '{guide.kind}' cannot be used: ") as refusal:
            llm.engine.add(PROMPT, SamplingParams(guide=guide), 0)
        assert len(str(refusal.value)) < 500 and "\n" not in str(refusal.value)
    updates += llm.engine.run()
    (result,) = [update.result for update in updates if update.request_id == fine and update.result]
    assert result.token_ids == LLM(idlm, branches="all").generate([PROMPT], PARAMS[1])[0].token_ids
    with pytest.raises(InputError, match="cannot be used"):
        llm.generate([PROMPT, PROMPT], [PARAMS[0], SamplingParams(guide=BAD[0])])
    with pytest.raises(InputError, match="cannot be used"):
        llm.stream(PROMPT, SamplingParams(guide=BAD[0]))
    assert not llm.engine.busy


@pytest.mark.parametrize("guide", COSTLY, ids=lambda guide: guide.text[:12])
def test_a_costly_guide_takes_bounded_time(idlm: Idlm, guide: Guide) -> None:
    """It runs, is refused, or ends in an error: in any case soon."""
    started = time.process_time()
    try:
        (result,) = LLM(idlm, branches="all").generate(
            [PROMPT], SamplingParams(temperature=0, max_tokens=12, guide=guide)
        )
        assert result.finish_reason in ("stop", "length", "error")
    except InputError:
        pass
    assert time.process_time() - started < 6


def banned_letters(idlm: Idlm, letters: str) -> tuple[int, ...]:
    assert idlm.tokenizer is not None
    return tuple(
        t for t in range(len(idlm.tokenizer)) if set(letters) & set(idlm.tokenizer.decode([t]))
    )


@pytest.mark.parametrize("stride", [1, 4])
def test_a_request_with_nothing_left_to_say_ends_in_an_error_for_itself(
    idlm: Idlm, stride: int
) -> None:
    stuck = SamplingParams(
        seed=1, guide=Guide("regex", "aab"), banned_tokens=banned_letters(idlm, "b")
    )
    wishes = [PARAMS[1], stuck, with_guide(PARAMS[1], GUIDES[1])]
    together = LLM(idlm, stride=stride, branches="all").generate([PROMPT] * 3, wishes)
    assert (together[1].text, together[1].finish_reason) == ("aa", "error")
    assert "bans" in str(together[1].stop_reason)
    for at in (0, 2):
        assert (
            together[at].token_ids
            == LLM(idlm, stride=1).generate([PROMPT], wishes[at])[0].token_ids
        )
    with pytest.raises(InputError, match="cannot be used"):
        LLM(idlm, branches="all").generate(
            [PROMPT], SamplingParams(guide=Guide("regex", "b"), banned_tokens=stuck.banned_tokens)
        )


def test_a_guide_that_becomes_too_complex_ends_its_request(
    idlm: Idlm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        engine_guide, "LIMITS", LLParserLimits(max_lexer_states=60, verbose_errors=False)
    )
    wishes = [with_guide(PARAMS[1], Guide("regex", "[a-z]{3,80}(x|y|[0-9]{7})")), PARAMS[1]]
    guided, free = LLM(idlm, stride=4, branches="all").generate([PROMPT] * 2, wishes)
    assert guided.finish_reason == "error" and "too many states" in str(guided.stop_reason)
    assert re.fullmatch("[a-z]*", guided.text)
    assert free.token_ids == LLM(idlm, branches="all").generate([PROMPT], PARAMS[1])[0].token_ids


def test_a_model_without_a_tokenizer_refuses_guides() -> None:
    with pytest.raises(InputError, match="guide needs a fast tokenizer"):
        LLM(tiny_idlm("qwen3"), branches="all").generate(
            [[1, 2]], SamplingParams(guide=Guide("json_object"))
        )
