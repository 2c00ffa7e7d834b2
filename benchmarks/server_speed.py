"""The server's speed against the offline engine and vLLM's server: `make server-speed`.

    python -m benchmarks.server_speed [--concurrency 1 2 4 8 16 32 64] [--repeats 5]
                                      [--vllm PYTHON] [--out FILE]

The same greedy requests of `idlm.evaluation.workload` in a closed loop go to the engine in this
process, to `idlm serve` with drafts (isd) and without (ar), and to `vllm serve` if PYTHON's
environment has it. They take turns within each round; each round has new requests; the first one is
not counted. Each server has a process, and one thread for its engine. Run this on two cores or
more, as a user would: one for an engine, one for HTTP and the client.

    tokens_per_second   over a round: median and range
    ttft_ms, tpot_ms    to the first token, and per token after it, over all requests: p50 and p99
    over_offline        tokens per second over the engine's in the same round: median and range
    added_ttft_ms       p50 over the engine's, for the same kind of decoding
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
import uvloop

from benchmarks.harness.client import ask_all
from benchmarks.harness.process import ServerProcess, idlm_serve
from benchmarks.harness.results import RESULTS, percentile, report
from benchmarks.harness.workload import COMPLETIONS, body
from idlm.evaluation.closed_loop import bench_engines
from idlm.evaluation.workload import Request, workload
from idlm.models.idlm_model import Idlm
from idlm.models.loading import load
from idlm.models.sources import resolve

SLOTS = 64
LEAST_OVER_OFFLINE, MOST_ADDED_TTFT_MS = 0.9, 15.0
VLLM_SERVER = Path(__file__).parent / "peers" / "vllm_server.py"


@dataclass(frozen=True)
class Lap:
    """One round of one engine: seconds, tokens, and the times of each request in seconds."""

    seconds: float
    tokens: int
    ttft: list[float]
    tpot: list[float]

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds  # tokens per second


Measured = Callable[[Sequence[Request], int], Lap]
"""(requests, concurrency) -> a round of an engine."""


def offline(idlm: Idlm, mode: str) -> Measured:
    """The engine in this process; it makes text, as a server does."""
    (engine,) = bench_engines(idlm, [mode], 4, SLOTS)

    def lap(requests: Sequence[Request], concurrency: int) -> Lap:
        run = engine.run([replace(each, detokenize=True) for each in requests], concurrency)
        return Lap(
            run.seconds,
            run.tokens,
            [served.ttft for served in run.served],
            [served.tpot for served in run.served],
        )

    return lap


def over_http(server: ServerProcess, model: str) -> Measured:
    """A server with OpenAI's completions.

    Raises:
        RuntimeError: a request was not answered.
    """

    async def ask(requests: Sequence[Request], concurrency: int) -> Lap:
        bodies = [body(model, request) for request in requests]
        started = perf_counter()
        answers = await ask_all(server.port, COMPLETIONS, bodies, concurrency)
        seconds = perf_counter() - started
        for answer in answers:
            if not answer.finished or answer.error is not None:
                raise RuntimeError(f"status {answer.status}: {answer.error}")
        ttft = [answer.first - answer.asked for answer in answers]
        tpot = [(answer.last - answer.first) / max(1, answer.tokens - 1) for answer in answers]
        return Lap(seconds, sum(answer.tokens for answer in answers), ttft, tpot)

    def lap(requests: Sequence[Request], concurrency: int) -> Lap:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(ask(requests, concurrency))

    return lap


def engines(options: argparse.Namespace, idlm: Idlm, stack: ExitStack) -> dict[str, Measured]:
    """The engines by name; their processes end with `stack`."""
    threads = str(options.threads)
    measured = {"engine isd": offline(idlm, "planner"), "engine ar": offline(idlm, "ar")}
    for name, model in (("server isd", options.model), ("server ar", f"{options.model}:ar")):
        # two servers, so that each has its own prefix cache
        server = ServerProcess(idlm_serve(options.model, "--threads", threads))
        measured[name] = over_http(stack.enter_context(server), model)
    if options.vllm is not None:
        folder = str(resolve(options.model)[0])
        command = [
            *(str(options.vllm), str(VLLM_SERVER), "serve", folder),
            *("--served-model-name", "model", "--dtype", "float32"),
            *("--max-num-seqs", str(SLOTS), "--no-enable-prefix-caching"),
        ]
        try:
            measured["vllm"] = over_http(
                stack.enter_context(ServerProcess(command, "/health")), "model"
            )
        except RuntimeError as error:
            print(f"vLLM is left out: {error}", file=sys.stderr)
    return measured


def rows_at(concurrency: int, laps: dict[str, list[Lap]]) -> list[dict[str, Any]]:
    """A row for each engine, over all rounds at one concurrency."""
    rows = []
    for name, rounds in laps.items():
        rates = [lap.rate for lap in rounds]
        row: dict[str, Any] = {
            "name": name,
            "concurrency": concurrency,
            "tokens_per_second": _middle(rates),
        }
        ttft = [seconds for lap in rounds for seconds in lap.ttft]
        tpot = [seconds for lap in rounds for seconds in lap.tpot]
        row |= {"ttft_ms": _tail(ttft), "tpot_ms": _tail(tpot)}
        engine = laps.get(name.replace("server", "engine"))
        if name.startswith("server") and engine is not None:
            row["over_offline"] = _middle(
                [lap.rate / other.rate for lap, other in zip(rounds, engine, strict=True)]
            )
            alone = median(seconds for lap in engine for seconds in lap.ttft)
            row["added_ttft_ms"] = 1e3 * (median(ttft) - alone)
        rows.append(row)
        print(_line(row), file=sys.stderr)
    return rows


def _middle(values: Sequence[float]) -> dict[str, float]:
    return {"median": median(values), "min": min(values), "max": max(values)}


def _tail(seconds: Sequence[float]) -> dict[str, float]:
    return {"p50": 1e3 * median(seconds), "p99": 1e3 * percentile(seconds, 0.99)}


def _line(row: dict[str, Any]) -> str:
    ttft, tpot = row["ttft_ms"], row["tpot_ms"]
    over = (
        f"{row['over_offline']['median']:8.2f} {row['added_ttft_ms']:8.1f}"
        if "over_offline" in row
        else ""
    )
    return (
        f"{row['concurrency']:3} {row['name']:11} {row['tokens_per_second']['median']:8.0f} tok/s"
        f"  ttft {ttft['p50']:7.1f} {ttft['p99']:7.1f}"
        f"  tpot {tpot['p50']:6.2f} {tpot['p99']:6.2f} ms {over}"
    )


def bounds(rows: Sequence[dict[str, Any]]) -> dict[str, bool]:
    """Whether each target holds that was measured."""
    isd = {row["concurrency"]: row for row in rows if row["name"] == "server isd"}
    held = {}
    if 32 in isd:
        held[f"at 32, {LEAST_OVER_OFFLINE} of the engine's tokens/s"] = (
            isd[32]["over_offline"]["median"] >= LEAST_OVER_OFFLINE
        )
    if 1 in isd:
        held[f"at 1, p50 TTFT at most {MOST_ADDED_TTFT_MS:g} ms over the engine's"] = (
            isd[1]["added_ttft_ms"] <= MOST_ADDED_TTFT_MS
        )
    return held


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="nano")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument(
        "--requests",
        type=int,
        default=32,
        help="of a round; at least twice the concurrency are sent",
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--vllm", type=Path, help="the Python of an environment that has vLLM")
    parser.add_argument("--out", type=Path, default=RESULTS / "server_speed.json")
    return parser.parse_args()


def main() -> int:
    """Exit status 1 if a target is missed."""
    options = arguments()
    torch.set_num_threads(options.threads)
    idlm = load(options.model)
    draw, rows = workload(idlm), list[dict[str, Any]]()
    with ExitStack() as stack:
        measured = engines(options, idlm, stack)
        for concurrency in options.concurrency:
            laps: dict[str, list[Lap]] = {name: [] for name in measured}
            for seed in range(options.repeats + 1):
                requests = draw(max(options.requests, 2 * concurrency), seed)
                for name, engine in measured.items():
                    laps[name].append(engine(requests, concurrency))
            rows += rows_at(concurrency, {name: rounds[1:] for name, rounds in laps.items()})
    held = bounds(rows)
    settings = {"model": options.model, "repeats": options.repeats, "dtype": str(idlm.dtype)}
    report({"bounds": held, "rows": rows, **settings}, options.out)
    return 0 if all(held.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
