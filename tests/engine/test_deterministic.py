"""The deterministic mode: in float32 a request's tokens and logprobs do not depend on who is beside
it."""

from __future__ import annotations

import torch

from idlm import LLM, SamplingParams, load
from idlm.nano.problems import held_out_problems
from tests.engine.tiny import DEVICE


def test_logprobs_are_equal_to_the_bit_alone_and_in_a_batch_at_any_stride() -> None:
    idlm = load("nano", dtype=torch.float32, device=DEVICE)
    asked = [[{"role": "user", "content": problem.question}] for problem in held_out_problems(4)]
    params = SamplingParams(temperature=0.8, seed=3, max_tokens=12, logprobs=2)
    alone = [
        LLM(idlm, stride=1, deterministic=True, max_num_seqs=1).chat([one], params)[0]
        for one in asked
    ]
    together = LLM(idlm, stride=3, branches="chain", deterministic=True, max_num_seqs=4).chat(
        asked, params
    )
    for left, right in zip(alone, together, strict=True):
        assert left.token_ids == right.token_ids
        assert left.logprobs == right.logprobs
