"""`Clock`: an event loop whose clock a test can put forward.

A limit of minutes is then over at once, and never by chance on a busy machine.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextvars import Context
from dataclasses import dataclass, field
from typing import Any

import uvloop

ROUNDS = 10
"""Of the loop: from a timer to what it cancels, and on to what that ends."""


@dataclass(eq=False)
class Timer:
    """A callback with its due time; `handle` is the loop's."""

    due: float
    run: Callable[[], object]
    over: bool = False
    handle: asyncio.TimerHandle = field(init=False)

    @property
    def open(self) -> bool:
        return not self.over and not self.handle.cancelled()

    def __call__(self) -> None:
        if self.open:
            self.over = True
            self.run()


class Clock(uvloop.Loop):
    """uvloop's loop with a list of its timers."""

    def __init__(self) -> None:
        super().__init__()
        self._ahead = 0.0
        self._timers: list[Timer] = []

    def time(self) -> float:
        return super().time() + self._ahead

    def call_later(
        self,
        delay: float,
        callback: Callable[..., object],
        *args: Any,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        timer = Timer(self.time() + delay, lambda: callback(*args))
        timer.handle = super().call_later(delay, timer, context=context)
        self._timers = [*(earlier for earlier in self._timers if earlier.open), timer]
        return timer.handle

    def call_at(
        self,
        when: float,
        callback: Callable[..., object],
        *args: Any,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        return self.call_later(when - self.time(), callback, *args, context=context)

    def limits(self, seconds: float) -> int:
        """The number of timers that have more than `seconds` to go."""
        return sum(timer.open and timer.due > self.time() + seconds for timer in self._timers)

    async def forward(self, seconds: float) -> None:
        """Put the clock forward and run everything that is due."""
        self._ahead += seconds
        for timer in sorted(self._timers, key=lambda timer: timer.due):
            if timer.due <= self.time():
                self.call_soon(timer)
        for _ in range(ROUNDS):
            await asyncio.sleep(0)

    def forward_from_outside(self, seconds: float) -> None:
        """The same, from another thread."""
        asyncio.run_coroutine_threadsafe(self.forward(seconds), self).result()
