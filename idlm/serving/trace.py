"""The trace of an answer: where each of its tokens came from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from idlm.serving.messages import Finished, TokenTrace
from idlm.serving.prompts import Prompts
from idlm.serving.responses import Trace, TraceEntry


def trace_of(
    prompts: Prompts, tokens: Sequence[int], trace: Sequence[TokenTrace], end: Finished | None = None
) -> Trace:
    """Entries of some tokens, with the tokens per forward once the sample has ended."""
    entries = []
    for token, one in zip(tokens, trace, strict=True):
        source: Any = one.source
        entries.append(TraceEntry(prompts.decode([token]), token, source, one.forward))
    if end is None:
        return Trace(entries)
    return Trace(entries, end.completion_tokens / max(1, end.forwards))
