"""Wall-clock comparison of decoders that take turns, so that disturbances affect them alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter

from idlm.engine.llm import Result

Run = Callable[[], list[Result]]


@dataclass
class Lap:
    """The rounds of one decoder: seconds of each, and the results, which are the same each time."""

    results: list[Result] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def rates(self) -> list[float]:
        """Tokens per second of each round."""
        tokens = sum(len(result.token_ids) for result in self.results)
        return [tokens / seconds for seconds in self.seconds]

    @property
    def tokens_per_second(self) -> float:
        return median(self.rates)  # over the rounds


def race(
    decoders: Mapping[str, Run], rounds: int, advance: Callable[[], None] = lambda: None
) -> dict[str, Lap]:
    """Run each decoder once to warm up, then `rounds` times in turn; `advance` is called after each
    run."""
    laps = {name: Lap() for name in decoders}
    for attempt in range(rounds + 1):
        for name, run in decoders.items():
            started = perf_counter()
            laps[name].results = run()
            if attempt > 0:
                laps[name].seconds.append(perf_counter() - started)
            advance()
    return laps


def same_tokens(left: Sequence[Result], right: Sequence[Result]) -> bool:
    """Whether two runs gave the same tokens for every prompt."""
    return [r.token_ids for r in left] == [r.token_ids for r in right]
