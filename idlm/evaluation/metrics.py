"""Totals over results under the names used everywhere: TPF, acceptance by depth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

from idlm.engine.llm import Result


class Summary(TypedDict):
    """Totals over results.

    Attributes:
        tpf: tokens per forward, prefills included.
        reached, accepted: drafts by depth (index k - 1) that were reached, and those accepted.
        acceptance: accepted / reached; None if no draft of that depth was reached.
    """

    tokens: int
    forwards: int
    tpf: float
    reached: list[int]
    accepted: list[int]
    acceptance: list[float | None]


def summary(results: Sequence[Result]) -> Summary:
    """The totals of results that were decoded with one stride."""
    tokens = sum(len(r.token_ids) for r in results)
    forwards = sum(r.forwards for r in results)
    reached = [sum(column) for column in zip(*(r.reached for r in results), strict=True)]
    accepted = [sum(column) for column in zip(*(r.accepted for r in results), strict=True)]
    return Summary(
        tokens=tokens,
        forwards=forwards,
        tpf=tokens / forwards,
        reached=reached,
        accepted=accepted,
        acceptance=[a / r if r else None for a, r in zip(accepted, reached, strict=True)],
    )


def tpf_decode(results: Sequence[Result]) -> float | None:
    """Tokens per complete window, or None if there is none.

    A window ends with the first token that is not an accepted draft. Prefills and windows cut short
    by the end of a request are left out.
    """
    ends = [
        [at for at, source in enumerate(result.sources) if source in ("corrected", "bonus")]
        for result in results
    ]
    windows = sum(map(len, ends))
    return sum(end[-1] for end in ends if end) / windows if windows else None
