"""`Tracer`: where the tokens of a response come from, and what the windows of its forwards held."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from idlm.engine.request import WindowRecord
from idlm.serving.responses import Trace, TracedToken, TracedWindow, TraceEntry
from idlm.serving.wire import Delta, Finished


class Tracer:
    """The traces of a request's samples.

    Args:
        text: of a token.
    """

    def __init__(self, samples: int, text: Callable[[int], str]) -> None:
        self._forwards, self._text = [0] * samples, text

    def of(self, index: int, *events: Delta | Finished) -> Trace:
        """The trace of the next `events` of a sample, with its TPF once it has finished."""
        trace = Trace([])
        for event in events:
            if isinstance(event, Finished):
                trace.tpf = event.completion_tokens / max(1, event.forwards)
                continue
            self._forwards[index] += bool(event.tokens)
            forward = self._forwards[index]
            for token, source in zip(event.tokens, event.sources or (), strict=True):
                named: Any = source
                trace.trace.append(TraceEntry(self._text(token), token, named, forward))
            if event.window is not None:
                before = [] if isinstance(trace.windows, msgspec.UnsetType) else trace.windows
                trace.windows = [*before, self._window(event.window, forward)]
        return trace

    def _window(self, record: WindowRecord, forward: int) -> TracedWindow:
        return TracedWindow(
            forward,
            record.position,
            record.plan,
            record.width,
            self._named(record.pending),
            [self._named(token) for token in record.drafts],
            record.accepted,
            record.outcomes,
            record.masks,
        )

    def _named(self, token: int) -> TracedToken:
        return TracedToken(self._text(token), token)
