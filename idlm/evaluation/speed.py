"""Wall-clock comparison of decoders that take turns, so that what else the machine does hits them
alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter

from idlm.engine.llm import Result

Run = Callable[[], list[Result]]


@dataclass
class Lap:
    """What one contestant did: its results (of the last round; they are the same each time) and its
    rounds' seconds."""

    results: list[Result] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def rates(self) -> list[float]:
        """Tokens per second of each round."""
        tokens = sum(len(result.token_ids) for result in self.results)
        return [tokens / seconds for seconds in self.seconds]

    @property
    def tokens_per_second(self) -> float:
        """The median of the rounds."""
        return median(self.rates)


def race(
    contestants: Mapping[str, Run], rounds: int, advance: Callable[[], None] = lambda: None
) -> dict[str, Lap]:
    """Run every contestant once to warm up, then `rounds` times in turn; `advance` is called after
    each run."""
    laps = {name: Lap() for name in contestants}
    for number in range(rounds + 1):
        for name, run in contestants.items():
            started = perf_counter()
            laps[name].results = run()
            if number > 0:
                laps[name].seconds.append(perf_counter() - started)
            advance()
    return laps


def same_tokens(left: Sequence[Result], right: Sequence[Result]) -> bool:
    """Whether two runs gave the same tokens for every prompt."""
    return [r.token_ids for r in left] == [r.token_ids for r in right]
