"""The ranks of a run as processes: forked, as a launcher starts them, from a server that has
imported everything, since that takes longer than a tiny run."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from typing import Any

import torch

from tests.waiting import HANG_SECONDS

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["idlm.training.run", "tests.training.tiny", "peft"])


def start(ranks: int, work: Callable[..., None], *args: Any) -> list[ForkServerProcess]:
    """Start `work(*args)` on each of the ranks; with one rank there is no launcher."""
    port = free_port()
    processes = [
        FORKS.Process(target=_rank, args=(rank, ranks, port, work, args), daemon=True)
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    return processes


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def _rank(rank: int, ranks: int, port: int, work: Callable[..., None], args: tuple[Any]) -> None:
    if ranks > 1:
        here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "CUDA_VISIBLE_DEVICES": ""}
        os.environ.update({key: str(value) for key, value in (here | place).items()})
    torch.set_num_threads(1)
    work(*args)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def ended(processes: list[ForkServerProcess]) -> list[int | None]:
    """Wait for the ranks; their exit statuses. If one fails, the others are killed, as by a
    launcher."""
    waiting = set(processes)
    while waiting:
        done = multiprocessing.connection.wait([p.sentinel for p in waiting], HANG_SECONDS)
        assert done, "hangs"
        waiting -= {p for p in waiting if p.sentinel in done}
        if any(p.exitcode for p in processes):
            for process in waiting:
                process.kill()
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def run(ranks: int, work: Callable[..., None], *args: Any) -> None:
    """Run `work` on the ranks to its end."""
    assert ended(start(ranks, work, *args)) == [0] * ranks
