"""A server's behaviour under faults: `make server-faults`.

    python -m benchmarks.server_faults [kill] [disconnect] [overload] [drain] [--model nano]
                                       [--small] [--out FILE]

    kill        the engine is killed with 32 streams, again and again: every client gets an error
                within 2 s, /ready recovers, and the next requests have the same outputs as before
    disconnect  clients leave at random points, streaming or not: slots, pages and queue come back
                to zero
    overload    four times the completions that the server can answer, where none may wait: accepted
                ones are as fast as with all slots busy, the rest get 429 within 5 ms (median), none
                hangs
    drain       SIGTERM with requests in flight: each is finished or gets an error

Requests go to completions, chat, responses and messages in turn.

Prints one JSON object with the figures and whether each part holds; exit status 1 if one does not.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path
from typing import Any

import uvloop

from benchmarks.harness.client import ask_all
from benchmarks.harness.faults import disconnect, drain, kill
from benchmarks.harness.overload import overload
from benchmarks.harness.process import ServerProcess, idlm_serve
from benchmarks.harness.results import RESULTS, report
from benchmarks.harness.workload import COMPLETIONS, bodies
from idlm.config import EngineConfig

PARTS = ("kill", "disconnect", "overload", "drain")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--model", default="nano")
    parser.add_argument(
        "--slots", type=int, default=EngineConfig.max_num_seqs, help="the engine's, in overload"
    )
    parser.add_argument(
        "--queue", type=int, help="samples running or waiting, in overload; else as many as slots"
    )
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="of overload, and of full load before it"
    )
    parser.add_argument(
        "--small", action="store_true", help="a few of everything, to see that it works"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "server_faults.json")
    return parser.parse_args()


async def run_part(part: str, options: argparse.Namespace) -> dict[str, Any]:
    """One part, with a server of its own."""
    small = options.small
    command = idlm_serve(options.model, "--threads", "1")
    if part == "overload":
        command += ["--max-num-seqs", str(options.slots)]
        command += ["--queue-requests", str(options.queue or options.slots)]
    if part == "drain":
        return {
            "in_time": await drain(command, 16, 30.0),
            "too_late": await drain(command, 16, 0.2),
        }
    with ServerProcess(command) as server:
        # warm up: the first steps are slow
        await ask_all(server.port, COMPLETIONS, bodies(options.model, 8), 8)
        if part == "kill":
            return await kill(server, options.model, 2 if small else 20, 32)
        if part == "disconnect":
            return await disconnect(server, options.model, 60 if small else 1000, 32)
        return await overload(
            server, options.model, options.slots, 2.0 if small else options.seconds
        )


def holds(report: Any) -> bool:
    """Whether every "holds" in a report is true."""
    if isinstance(report, dict):
        return bool(report.get("holds", True)) and all(map(holds, report.values()))
    return True


def main() -> int:
    """Exit status 1 if a part does not hold."""
    options = arguments()
    parts: dict[str, Any] = {}
    for part in options.parts:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            parts[part] = runner.run(run_part(part, options))
        print(f"{part}: {'holds' if holds(parts[part]) else 'DOES NOT HOLD'}", file=sys.stderr)
    report(parts | {"model": options.model}, None if options.small else options.out)
    return 0 if holds(parts) else 1


if __name__ == "__main__":
    sys.exit(main())
