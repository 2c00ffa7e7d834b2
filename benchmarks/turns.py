"""Requests that draft and requests that ask for AR take turns in one engine.

    python -m benchmarks.turns [--concurrency 1 8 32] [--rounds 5] [--same-prompts]

Tokens per CPU second, so that other jobs on the machine count little. Each phase has prompts of its
own and the output lengths of the other phase of its round. With --same-prompts AR gets the prompts
of the phase before it, with drafts, and finds them in the prefix cache.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from statistics import median
from time import process_time

import torch

from idlm.config import EngineConfig
from idlm.engine.engine import Engine
from idlm.engine.llm import LLM
from idlm.engine.request import Terms
from idlm.evaluation.closed_loop import WARM_UP_SECONDS
from idlm.evaluation.workload import Request, workload
from idlm.models.loading import load

SLOTS = 64


def rate(engine: Engine, requests: Sequence[Request], concurrency: int, drafting: bool) -> float:
    """Tokens per CPU second of a closed loop of the requests."""
    waiting, terms, tokens = iter(requests), Terms(drafting=drafting), 0

    def add(count: int) -> None:
        for request in islice(waiting, count):
            engine.add(request.prompt_token_ids, request.params, 0, terms)

    started = process_time()
    add(concurrency)
    while engine.busy:
        for update in engine.step():
            if update.result is not None:
                tokens += len(update.result.token_ids)
                add(1)
    return tokens / (process_time() - started)


def phases(
    one: list[Request], two: list[Request], same: bool
) -> Iterator[tuple[bool, list[Request]]]:
    """The two phases of a round: whether requests draft, and the requests."""
    lengths = [min(a.max_tokens, b.max_tokens) for a, b in zip(one, two, strict=True)]
    for drafting, requests in ((True, one), (False, one if same else two)):
        pairs = zip(requests, lengths, strict=True)
        yield drafting, [replace(request, max_tokens=length) for request, length in pairs]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="nano")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--stride", type=int, default=4)
    parser.add_argument("--same-prompts", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    idlm = load(options.model)
    draw = workload(idlm)
    engine = LLM(idlm, config=EngineConfig(options.stride, max_num_seqs=SLOTS)).engine
    engine.warm_up(WARM_UP_SECONDS)
    seed = 0
    for concurrency in options.concurrency:
        rates: dict[bool, list[float]] = {True: [], False: []}
        for _ in range(options.rounds + 1):  # the first is not counted
            one, two = (draw(max(32, 2 * concurrency), seed + number) for number in (0, 1))
            seed += 2
            for drafting, requests in phases(one, two, options.same_prompts):
                rates[drafting].append(rate(engine, requests, concurrency, drafting))
        ratios = sorted(a / b for a, b in zip(rates[True][1:], rates[False][1:], strict=True))
        print(
            f"{concurrency:3} requests: {median(rates[True][1:]):.0f} tokens/CPU-s with drafts, "
            f"{median(rates[False][1:]):.0f} without: {median(ratios):.2f} "
            f"({ratios[0]:.2f}-{ratios[-1]:.2f})",
            flush=True,
        )


if __name__ == "__main__":
    main()
