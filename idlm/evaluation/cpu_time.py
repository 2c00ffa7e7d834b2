"""Makes math_verify's time limits those of CPU time.

It gives each expression five seconds of wall time. On a busy machine right answers then count as
wrong, and an evaluation that is repeated has other figures. A limit of CPU time has neither fault.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from functools import wraps
from typing import Any


def timeout(timeout_seconds: float | None) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """math_verify's decorator of this name, counting CPU seconds of this process."""
    from math_verify.errors import TimeoutException

    def stop(*_: object) -> None:
        raise TimeoutException("the limit of CPU time")

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def limited(*arguments: Any, **named: Any) -> Any:
            before = signal.signal(signal.SIGPROF, stop)
            signal.setitimer(signal.ITIMER_PROF, timeout_seconds or 0)
            try:
                return function(*arguments, **named)
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
                signal.signal(signal.SIGPROF, before)

        return limited

    return decorate


def prepare() -> None:
    """Give math_verify the limits of this module, and let it read its grammar, which takes
    seconds."""
    from math_verify import grader, parser

    if parser.timeout is not timeout:
        parser.timeout = grader.timeout = timeout
        parser.parse("$\\frac{1}{2}$", parsing_timeout=60)
