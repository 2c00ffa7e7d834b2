"""The peer's client against a stand-in for llama.cpp's server: no program and no model are
needed."""

from __future__ import annotations

import importlib
import json
import math
import threading
import time
from argparse import Namespace
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.error import HTTPError

import pytest

import benchmarks.peers
from tests.waiting import HANG_SECONDS


@pytest.fixture
def llamacpp(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, imported with its folder on the path, as when it runs by itself."""
    monkeypatch.syspath_prepend(str(Path(benchmarks.peers.__file__).parent))
    return importlib.import_module("llamacpp")


class StandIn(BaseHTTPRequestHandler):
    """Repeats the prompt's first token; the first token 9 is an error."""

    asked: list[dict[str, Any]]
    running: list[int]
    together: threading.Barrier
    """A request is answered when so many run."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body)
        self.running[0] += 1
        self.running[1] = max(self.running)
        self.together.wait(HANG_SECONDS)
        time.sleep(0.05)
        self.running[0] -= 1
        token, number = body["prompt"][0], body["n_predict"]
        answer = {"tokens": [token] * number, "timings": {"predicted_ms": 10.0 * (number - 1)}}
        self.send_response(500 if token == 9 else 200)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *_: object) -> None:
        """Log nothing."""


@pytest.fixture
def address() -> Iterator[str]:
    StandIn.asked, StandIn.running, StandIn.together = [], [0, 0], threading.Barrier(1)
    server = ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def requests(*tokens: int) -> list[dict[str, Any]]:
    return [{"prompt_token_ids": [token, 1], "max_tokens": 3} for token in tokens]


def test_a_closed_loop_keeps_the_order_and_no_more_in_flight_than_asked(
    llamacpp: ModuleType, address: str
) -> None:
    StandIn.together = threading.Barrier(2)
    answers = llamacpp.closed_loop(address, requests(5, 6, 7, 8), 2)
    assert [answer.token_ids for answer in answers] == [[token] * 3 for token in (5, 6, 7, 8)]
    assert StandIn.running == [0, 2]


def test_requests_are_greedy_run_to_their_limit_and_live_off_no_cache(
    llamacpp: ModuleType, address: str
) -> None:
    llamacpp.ask(address, requests(5)[0])
    (asked,) = StandIn.asked
    assert asked["prompt"] == [5, 1] and asked["n_predict"] == 3
    assert asked["temperature"] == 0 and asked["ignore_eos"] and not asked["cache_prompt"]


def test_times_are_the_servers_own(llamacpp: ModuleType, address: str) -> None:
    report = llamacpp.ask(address, requests(5)[0]).report()
    assert report["tpot"] == pytest.approx(0.01)
    assert 0.03 <= report["ttft"] < HANG_SECONDS and math.isnan(report["worst_gap"])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_failed_request_is_not_passed_over(llamacpp: ModuleType, address: str) -> None:
    with pytest.raises(HTTPError):
        llamacpp.ask(address, requests(9)[0])
    with pytest.raises(RuntimeError, match="request failed"):
        llamacpp.closed_loop(address, requests(5, 9), 1)


def test_threads_and_slots_reach_the_server(llamacpp: ModuleType) -> None:
    command = llamacpp.arguments(Namespace(model="models/m-F32.gguf", threads=2, slots=8))
    said = dict(zip(command[::2], command[1::2], strict=False))
    assert (said["--threads"], said["--threads-batch"], said["--parallel"]) == ("2", "2", "8")
    assert int(said["--ctx-size"]) == 8 * llamacpp.CONTEXT
