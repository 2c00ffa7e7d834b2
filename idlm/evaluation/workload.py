"""Requests for a bench: prompt and output lengths mixed, from a fixed seed, the same for all
engines.

Every request is greedy and ends at its own `max_tokens`, so that all engines do equal work. Engines
make text only if the bench asks for it, as servers do. Acceptance is measured on real text: bundled
models get their held-out problems, with outputs no longer than the solutions. A model without
prompts gets random tokens: good for the speed at a given acceptance, worthless as a measure of
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
"""Tokens: outputs have 16 to 128, random prompts 16 to 256, or fewer if the context is short."""


@dataclass(frozen=True)
class Request:
    """A prompt, the tokens to generate, and whether they become text."""

    prompt_token_ids: list[int]
    max_tokens: int
    detokenize: bool = False

    @property
    def params(self) -> SamplingParams:
        """Greedy, without an early end, the same for every engine."""
        return SamplingParams(
            max_tokens=self.max_tokens, temperature=0.0, ignore_eos=True, detokenize=self.detokenize
        )


Draw = Callable[[int, int], list[Request]]
"""(count of requests, seed) -> the requests; each seed gives others, so no prefix cache helps."""


def workload(idlm: Idlm, prompts: Sequence[Sequence[int]] = ()) -> Draw:
    """`prompts` if there are any, else held-out problems for bundled models, else random tokens.

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
        return lambda count, seed: _given(idlm, prompts, count, seed)
    if idlm.name in BUNDLED:
        return lambda count, seed: _problems(idlm, count, seed)
    return lambda count, seed: _random(idlm, count, seed)


def _given(idlm: Idlm, prompts: Sequence[Sequence[int]], count: int, seed: int) -> list[Request]:
    """The prompts in random order, repeated as needed."""
    rng = random.Random(f"given/{seed}")
    chosen = [
        list(prompt)
        for _ in range(-(-count // len(prompts)))
        for prompt in rng.sample(prompts, len(prompts))
    ]
    return [
        Request(prompt, rng.randint(SHORTEST, min(LONGEST_OUTPUT, idlm.context - len(prompt))))
        for prompt in chosen[:count]
    ]


def _problems(idlm: Idlm, count: int, seed: int) -> list[Request]:
    """Held-out problems, each answered up to a random point of its solution."""
    rng = random.Random(f"problems/{seed}")
    requests = []
    for problem in held_out_problems(count, seed=1000 + seed):
        question = [{"role": "user", "content": problem.question}]
        solution = idlm.encoder.text(problem.solution, add_special_tokens=False, trusted=True)
        requests.append(Request(idlm.encoder.chat(question), rng.randint(SHORTEST, len(solution))))
    return requests


def _random(idlm: Idlm, count: int, seed: int) -> list[Request]:
    rng = random.Random(f"random/{seed}")
    usable = sorted(set(range(idlm.vocab_size)) - {idlm.mask_id, *idlm.eos_ids})
    half = idlm.context // 2
    shortest = min(SHORTEST, half)
    lengths = [
        (
            rng.randint(shortest, min(LONGEST_PROMPT, half)),
            rng.randint(shortest, min(LONGEST_OUTPUT, half)),
        )
        for _ in range(count)
    ]
    return [Request(rng.choices(usable, k=length), max_tokens) for length, max_tokens in lengths]
