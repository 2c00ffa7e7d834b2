"""The requests of a bench: reproducible, of mixed lengths, and within the model's context."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from idlm import InputError, load
from idlm.evaluation.workload import SHORTEST, Request, workload
from idlm.models.idlm_model import Idlm
from idlm.nano.problems import held_out_problems, is_held_out


@pytest.fixture(scope="module")
def plain(checkpoint: Path) -> Idlm:
    return load(checkpoint / "base")


@pytest.fixture(scope="module")
def bundled() -> Idlm:
    return load("nano-base")


def lengths(requests: list[Request]) -> list[tuple[int, int]]:
    return [(len(request.prompt_token_ids), request.max_tokens) for request in requests]


def test_random_tokens_are_mixed_and_fit(plain: Idlm) -> None:
    requests = workload(plain)(200, 1)
    prompts, outputs = zip(*lengths(requests), strict=True)
    half = plain.context // 2
    assert (min(prompts), max(prompts)) == (SHORTEST, half) and (min(outputs), max(outputs)) == (
        SHORTEST,
        half,
    )
    used = {token for request in requests for token in request.prompt_token_ids}
    assert used == set(range(plain.vocab_size)) - {plain.mask_id, *plain.eos_ids}


def test_a_context_shorter_than_the_shortest_request_still_gets_some(plain: Idlm) -> None:
    config = type(plain.model.config)(
        **plain.model.config.to_dict() | {"max_position_embeddings": 10}
    )
    short = replace(plain, model=type(plain.model)(config))
    assert lengths(workload(short)(3, 0)) == [(5, 5)] * 3


def test_given_prompts_all_come_and_fit(plain: Idlm) -> None:
    prompts = [[5] * 3, [6] * (plain.context - SHORTEST), [7] * 20]
    requests = workload(plain, prompts)(7, 3)
    assert len(requests) == 7
    assert sorted(request.prompt_token_ids for request in requests[:3]) == sorted(prompts)
    assert all(
        output >= SHORTEST and prompt + output <= plain.context
        for prompt, output in lengths(requests)
    )


@pytest.mark.parametrize("length", [0, 145, 500])
def test_prompts_without_room_are_refused(plain: Idlm, length: int) -> None:
    with pytest.raises(InputError, match=f"{length} tokens"):
        workload(plain, [[5, 6], [5] * length])


def test_problems_end_within_their_solutions(bundled: Idlm) -> None:
    requests = workload(bundled)(40, 2)
    assert bundled.tokenizer is not None
    for request, problem in zip(requests, held_out_problems(40, seed=1002), strict=True):
        assert is_held_out(problem.question)
        assert problem.question in str(bundled.tokenizer.decode(request.prompt_token_ids))
        assert SHORTEST <= request.max_tokens <= len(bundled.tokenizer(problem.solution).input_ids)
    assert len({request.max_tokens for request in requests}) > 15


@pytest.mark.parametrize("which", ["plain", "bundled", "given"])
def test_a_seed_names_its_requests(which: str, plain: Idlm, bundled: Idlm) -> None:
    model, prompts = (
        (plain, [[5, 6], [7]])
        if which == "given"
        else ({"plain": plain, "bundled": bundled}[which], [])
    )
    draw = workload(model, prompts)
    assert draw(9, 4) == workload(model, prompts)(9, 4) != draw(9, 5)


def test_what_engines_are_asked_for_is_greedy_and_of_fixed_length() -> None:
    params = Request([5], 33).params
    assert params.greedy and params.max_tokens == 33 and params.ignore_eos
