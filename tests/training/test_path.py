"""What greedy decoding takes along a text, walked in training and decoded by the engine."""

from __future__ import annotations

import pytest
import torch

from idlm.engine.llm import LLM
from idlm.models.idlm_model import Idlm
from idlm.models.loading import load
from idlm.nano.problems import held_out_problems
from idlm.params import SamplingParams
from idlm.training.data import Draw, collate, exchange
from idlm.training.objective import Objective
from tests.training import tiny

TOKENS = 40


def models() -> dict[str, tuple[Idlm, list[list[int]], int]]:
    """Models in float64, prompts and block sizes."""
    nano = load("nano", dtype="float64")
    questions = [[{"role": "user", "content": p.question}] for p in held_out_problems(3)]
    own = tiny.model("lora").limited(48)
    return {
        "nano": (nano, nano.encoder.chats(questions), 7),
        "random": (own, [tiny.prompt(one) for one in tiny.examples(6)], 3),
    }


@pytest.mark.parametrize("name", ["nano", "random"])
def test_the_walk_takes_the_forwards_of_the_engine(name: str) -> None:
    """Along what the model writes itself they are the same, and so are the drafts, but for those
    that the last window of a prompt has past the end of the text."""
    idlm, prompts, block_size = models()[name]
    options = {"generation_config": "none", "record": False, "threads": 1}
    most = [min(TOKENS, idlm.context - len(prompt)) for prompt in prompts]
    params = [SamplingParams(temperature=0, max_tokens=tokens) for tokens in most]
    every, chain = (
        LLM(idlm, stride=block_size + 1, branches=branches, **options).generate(prompts, params)
        for branches in ("all", "chain")
    )
    texts = [exchange(p, r.token_ids) for p, r in zip(prompts, every, strict=True)]
    batch = collate([[Draw(0, text, phase)] for phase, text in enumerate(texts)])
    found = Objective(idlm, trains_clean=False).eval().walk(batch.texts, block_size).tolist()
    tokens = sum(len(result.token_ids) for result in every)
    forwards = [sum(result.forwards for result in results) for results in (every, chain)]
    assert found[:3] == [tokens, *forwards] and tokens > forwards[1] > forwards[0] > len(prompts)
    drafts = torch.tensor([[result.reached, result.accepted] for result in every]).sum(0).flatten()
    past_the_end = drafts - torch.tensor(found[3:])
    assert int(past_the_end.min()) >= 0 and int(past_the_end.max()) <= len(prompts)
