"""Requests for a bench: prompt and output lengths mixed, from a fixed seed, the same for every
engine.

Every request is greedy and ends at its own `max_tokens`, whatever the model says, so that all
engines do equal work. No engine makes text of the tokens unless a bench asks for it, as those of
servers do. Drafts of real text are accepted as users will see it: the bundled models are asked
their held-out problems, and no output is longer than the problem's solution. Without prompts that
fit, a model gets random tokens: right for speed at a given acceptance, worthless as a measure of
acceptance.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from idlm.errors import InputError
from idlm.models.idlm_model import Idlm
from idlm.models.sources import BUNDLED
from idlm.nano.problems import held_out_problems
from idlm.params import SamplingParams

SHORTEST, LONGEST_OUTPUT, LONGEST_PROMPT = 16, 128, 256
"""Tokens: outputs are 16 to 128, random prompts 16 to 256, less where the context is short."""


@dataclass(frozen=True)
class Request:
    """One request: its prompt, how many tokens it gets, and whether as text too."""

    prompt_token_ids: list[int]
    max_tokens: int
    detokenize: bool = False

    @property
    def params(self) -> SamplingParams:
        """What every engine is asked for."""
        return SamplingParams(
            max_tokens=self.max_tokens, temperature=0.0, ignore_eos=True, detokenize=self.detokenize
        )


Draw = Callable[[int, int], list[Request]]
"""Gives (number of requests, seed) -> the requests; another seed gives others, which no prefix
cache remembers."""


def workload(idlm: Idlm, prompts: Sequence[Sequence[int]] = ()) -> Draw:
    """The workload that fits a model: `prompts` where given, else held-out problems, else random
    tokens.

    Raises:
        InputError: a prompt leaves no room for the shortest output.
    """
    for prompt in prompts:
        if not 0 < len(prompt) <= idlm.context - SHORTEST:
            room = idlm.context - SHORTEST
            raise InputError(
                f"a prompt has {len(prompt)} tokens; for a bench with this model give 1 to {room}"
            )
    if prompts:
        return lambda number, seed: _given(idlm, prompts, number, seed)
    if idlm.name in BUNDLED:
        return lambda number, seed: _problems(idlm, number, seed)
    return lambda number, seed: _random(idlm, number, seed)


def _given(idlm: Idlm, prompts: Sequence[Sequence[int]], number: int, seed: int) -> list[Request]:
    """The prompts in random order, again and again if need be."""
    rng = random.Random(f"given/{seed}")
    chosen = [
        list(prompt)
        for _ in range(-(-number // len(prompts)))
        for prompt in rng.sample(prompts, len(prompts))
    ]
    return [
        Request(prompt, rng.randint(SHORTEST, min(LONGEST_OUTPUT, idlm.context - len(prompt))))
        for prompt in chosen[:number]
    ]


def _problems(idlm: Idlm, number: int, seed: int) -> list[Request]:
    """Held-out problems, each answered up to a random point of its solution."""
    rng = random.Random(f"problems/{seed}")
    requests = []
    for problem in held_out_problems(number, seed=1000 + seed):
        question = [{"role": "user", "content": problem.question}]
        solution = idlm.encoder.text(problem.solution, add_special_tokens=False, trusted=True)
        requests.append(Request(idlm.encoder.chat(question), rng.randint(SHORTEST, len(solution))))
    return requests


def _random(idlm: Idlm, number: int, seed: int) -> list[Request]:
    """Random tokens, special ones left out."""
    rng = random.Random(f"random/{seed}")
    usable = sorted(set(range(idlm.vocab_size)) - {idlm.mask_id, *idlm.eos_ids})
    half = idlm.context // 2
    shortest = min(SHORTEST, half)
    lengths = [
        (
            rng.randint(shortest, min(LONGEST_PROMPT, half)),
            rng.randint(shortest, min(LONGEST_OUTPUT, half)),
        )
        for _ in range(number)
    ]
    return [Request(rng.choices(usable, k=length), max_tokens) for length, max_tokens in lengths]
