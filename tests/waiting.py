"""Waiting for what happens, however long a busy machine takes for it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

HANG_SECONDS = 600.0
"""Nothing in the tests takes so long, also on a machine that has four other things to do: what
does, hangs."""
STEP_SECONDS = 0.01


def wait_until(happened: Callable[[], object]) -> None:
    """Look again and again; for other threads and processes."""
    end = time.monotonic() + HANG_SECONDS
    while not happened():
        assert time.monotonic() < end, "this does not happen"
        time.sleep(STEP_SECONDS)


async def soon(happened: Callable[[], object]) -> None:
    """The same beside an event loop."""
    end = time.monotonic() + HANG_SECONDS
    while not happened():
        assert time.monotonic() < end, "this does not happen"
        await asyncio.sleep(STEP_SECONDS)
