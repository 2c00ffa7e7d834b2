"""`Quota`: how much may be with the engine at once."""

from __future__ import annotations

import math
from collections import deque
from time import monotonic

from idlm.errors import InputError
from idlm.serving.config import Limits

WINDOW = 30.0
"""Seconds of which the pace of ended samples is taken; what was longer ago says nothing of the load now."""
LONGEST_WAIT = 60


class Busy(Exception):
    """The queue is full; `retry_after` says in how many whole seconds (at least 1) it may have room."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"the server is busy; try again in {retry_after} s")
        self.retry_after = retry_after


class Quota:
    """Counts samples, and their tokens: those of the prompt and the most the output may have.

    Attributes:
        samples, tokens: with the engine now.
    """

    def __init__(self, limits: Limits) -> None:
        self.most_samples, self.most_tokens = limits.queue_requests, limits.queue_tokens
        self.samples = 0
        self.tokens = 0
        self._returned: deque[tuple[float, int]] = deque(maxlen=256)

    def check(self) -> None:
        """Refuse at once where no sample at all has room, before its prompt costs anything.

        Raises:
            Busy: so it is.
        """
        if self.samples >= self.most_samples:
            raise Busy(self._wait(1, 0))

    def take(self, samples: int, tokens: int) -> None:
        """Make room for a request's samples, or for none of them.

        Raises:
            Busy: there is not enough now. InputError: there never is.
        """
        if samples > self.most_samples or tokens > self.most_tokens:
            raise InputError(
                f"a request of {samples} samples and {tokens} tokens (prompts and max_tokens); this server takes "
                f"{self.most_samples} samples and {self.most_tokens} tokens at once: lower n or max_tokens"
            )
        more_samples = self.samples + samples - self.most_samples
        more_tokens = self.tokens + tokens - self.most_tokens
        if more_samples > 0 or more_tokens > 0:
            raise Busy(self._wait(more_samples, more_tokens))
        self.samples += samples
        self.tokens += tokens

    def give_back(self, tokens: int) -> None:
        """A sample of so many tokens has ended."""
        self.samples -= 1
        self.tokens -= tokens
        self._returned.append((monotonic(), tokens))

    def _wait(self, samples: int, tokens: int) -> int:
        """Seconds in which so many samples and tokens come back, at the pace of late; 1 where it is not known."""
        now = monotonic()
        while self._returned and now - self._returned[0][0] > WINDOW:
            self._returned.popleft()
        if not self._returned:
            return 1
        span = now - self._returned[0][0]
        returned = sum(one for _, one in self._returned)
        seconds = span * max(samples / len(self._returned), tokens / returned)
        return min(max(1, math.ceil(seconds)), LONGEST_WAIT)
