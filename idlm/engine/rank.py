"""The process of a rank but the first: `python -m idlm.engine.rank SOCKET`.

SOCKET is the number of an inherited file descriptor. Rank 0 sends a `Start`, and then what the
rank's runner shall do. The process ends when the socket is closed.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from queue import SimpleQueue
from time import sleep
from typing import Any

from idlm.engine.build import plans_of, runner_for
from idlm.engine.ranks import FollowingRunner, Start, join, rank_device
from idlm.errors import InputError
from idlm.models.loading import load
from idlm.models.more_adapters import load_checked
from idlm.models.sources import first_line

SAME_SECONDS = 5.0
"""What is wrong with the input, rank 0 finds too, and says it and ends this process."""


def main(file_descriptor: int) -> int:
    """Load this rank's part of the model, and do as rank 0 does; returns the exit status."""
    for ignored in (signal.SIGINT, signal.SIGTERM):  # they reach the whole process group
        signal.signal(ignored, signal.SIG_IGN)
    link, inbox = Connection(file_descriptor), SimpleQueue[Any]()
    threading.Thread(target=_read, args=(link, inbox), daemon=True).start()
    try:
        start = inbox.get()
        join(start)
        _runner(start, inbox).follow()
    except Exception as error:  # rank 0 says it
        if isinstance(error, InputError):
            sleep(SAME_SECONDS)
        with suppress(OSError):
            link.send(f"{type(error).__name__}: {first_line(error)}")
    return 1


def _read(link: Connection[Any, Any], inbox: SimpleQueue[Any]) -> None:
    try:
        while True:
            inbox.put(link.recv())
    except (EOFError, OSError):
        os._exit(0)  # at once, whatever the main thread waits for: there is no rank 0


def _runner(start: Start, inbox: SimpleQueue[Any]) -> FollowingRunner:
    wanted, config = start.wanted, start.config
    idlm = load(
        wanted.model,
        dtype=wanted.dtype,
        device=rank_device(wanted, config, start.rank),
        max_model_len=config.max_model_len,
        ranks=config.tensor_parallel_size,
    )
    for folder in wanted.adapters:
        load_checked(idlm, folder)
    usual, lookups = plans_of(idlm, config)
    make = partial(FollowingRunner, inbox)
    runner, _ = runner_for(idlm, config, [*usual, *lookups], False, make)
    assert isinstance(runner, FollowingRunner)  # noqa: S101
    return runner


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
