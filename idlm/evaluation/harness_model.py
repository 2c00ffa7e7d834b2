"""What a model of lm-evaluation-harness needs to go on after a kill: `Journaled`.

The harness asks for all answers of a kind in one call. Each answer goes to the journal as soon as
it is there, and what the journal holds is not asked again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from tqdm import tqdm

from idlm.errors import InputError
from idlm.evaluation.journal import Journal, key, seed_of

SAMPLING = {"temperature", "top_k", "top_p", "min_p", "repetition_penalty"}
DEFAULT_MAX_TOKENS = 256
"""The harness's own, where a task names none."""


class Ask(NamedTuple):
    """A request of the harness: its arguments, and the seed of its noise."""

    arguments: tuple[Any, ...]
    seed: int


class Answer(NamedTuple):
    """The answer to request number `at`, and what else to record of it."""

    at: int
    value: Any
    more: dict[str, Any]


class Journaled:
    """Answers from a journal, and new ones into it.

    Attributes:
        journal: where answers are kept.
        advance: called after each answer.
        base_seed: of the noise of all requests.
    """

    journal: Journal
    advance: Callable[[], None]
    base_seed: int

    def start(
        self, journal: Journal, advance: Callable[[], None] = lambda: None, base_seed: int = 0
    ) -> None:
        """Begin a run: from here on answers go to `journal`."""
        self.journal, self.advance, self.base_seed = journal, advance, base_seed

    def answers(
        self,
        kind: str,
        requests: Sequence[Any],
        produce: Callable[[list[Ask]], Iterable[Answer]],
    ) -> list[Any]:
        """The answers to the harness's `requests`, in order."""
        names = list(_names(kind, [request.args for request in requests]))
        known = self.journal.answers
        missing = [at for at, name in enumerate(names) if name not in known]
        for _ in range(len(names) - len(missing)):
            self.advance()
        asks = [Ask(requests[at].args, seed_of(names[at], self.base_seed)) for at in missing]
        # of the harness's own command; `idlm eval` has switched it off and has bars of its own
        produced = tqdm(produce(asks) if asks else (), desc=kind, total=len(asks))
        for answer in produced:
            self.journal.put(names[missing[answer.at]], answer.value, **answer.more)
            self.advance()
        return [known[name]["value"] for name in names]


def _names(kind: str, arguments: Iterable[Any]) -> Iterator[str]:
    seen: Counter[str] = Counter()
    for one in arguments:
        first = key(kind, one, 0)
        yield key(kind, one, seen[first]) if seen[first] else first
        seen[first] += 1


class Generation(NamedTuple):
    """How the harness wants a text generated.

    Attributes:
        sampling: fields of `SamplingParams`; temperature 0 unless it samples.
        until: texts that end the answer, and are left out.
    """

    sampling: dict[str, Any]
    until: list[str]
    max_tokens: int

    @classmethod
    def of(cls, given: dict[str, Any]) -> Generation:
        """Read the harness's `gen_kwargs`.

        Raises:
            InputError: one of them is unknown.
        """
        rest = dict(given)
        until = rest.pop("until", None) or []
        limits = [
            rest.pop(name, None)
            for name in ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
        ]
        most = next((int(limit) for limit in limits if limit is not None), DEFAULT_MAX_TOKENS)
        samples = rest.pop("do_sample", None)
        unknown = rest.keys() - SAMPLING
        if unknown:
            raise InputError(
                f"generation option {sorted(unknown)[0]!r} is unknown; "
                f"use until, max_gen_toks, do_sample, {', '.join(sorted(SAMPLING))}"
            )
        temperature = 0.0 if samples is False else float(rest.get("temperature") or 0.0)
        sampling = {**rest, "temperature": temperature}
        if temperature == 0:  # filters do nothing then
            sampling = {k: v for k, v in sampling.items() if k not in ("top_k", "top_p", "min_p")}
        return cls(sampling, [until] if isinstance(until, str) else list(until), most)
