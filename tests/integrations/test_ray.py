"""Replicas under Ray Serve: a stream, clients that leave, a replica that is killed."""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from typing import Any

import psutil
import pytest

from benchmarks.harness.process import free_port
from idlm.errors import InputError
from tests.waiting import HANG_SECONDS

pytest.importorskip("ray", reason="needs the extra ray: pip install 'idlm[serve,ray]'")
PROMPT = "Tom has 12 apples and buys 31 more. How many has he now?"
CLIENTS, LONG = 24, 440


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    import ray
    from ray import serve

    from idlm.integrations.ray import Replica

    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    args = {"model": "nano", "engine": {"threads": 1, "branches": "all", "max_num_seqs": 1}}
    serve.run(Replica.options(num_replicas=2, max_ongoing_requests=64).bind(args))
    yield port
    serve.shutdown()
    ray.shutdown()


def post(port: int, **fields: Any) -> Any:
    body = {"model": "nano", "prompt": PROMPT, "max_tokens": 40, "seed": 5} | fields
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=HANG_SECONDS) as answer:
        return answer.read().decode()


def text(port: int, **fields: Any) -> str:
    return str(json.loads(post(port, **fields))["choices"][0]["text"])


def get(port: int, path: str) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=HANG_SECONDS) as answer:
        return str(answer.read().decode())


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + HANG_SECONDS
    while not true():
        assert time.monotonic() < end
        time.sleep(0.2)


def test_a_stream_is_what_ar_writes(port: int) -> None:
    events = [part[6:] for part in post(port, stream=True).split("\n\n") if part]
    assert events[-1] == "[DONE]" and len(events) > 5
    streamed = "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1])
    assert streamed == text(port) == text(port, model="nano:ar") != ""


def generated(port: int) -> float:
    """The most tokens of a replica, of several asked."""
    lines = [line for _ in range(16) for line in get(port, "/metrics").splitlines()]
    return max(float(line.split()[1]) for line in lines if line.startswith("idlm_generated_t"))


def test_clients_that_leave_end_their_samples(port: int) -> None:
    body = {"model": "nano", "prompt": PROMPT, "max_tokens": LONG, "ignore_eos": True}
    clients = []
    for _ in range(CLIENTS):
        client = HTTPConnection("127.0.0.1", port)
        headers = {"Content-Type": "application/json"}
        client.request("POST", "/v1/completions", json.dumps(body | {"stream": True}), headers)
        clients.append(client)
    until(lambda: any('"server_load":0' not in get(port, "/load") for _ in range(8)))
    for client in clients:
        client.close()
    until(lambda: all(get(port, "/load") == '{"server_load":0}' for _ in range(16)))
    time.sleep(1.5)  # the counters are up to a second old
    assert generated(port) < CLIENTS * LONG / 4, "they went on"


def test_another_replica_answers_for_one_that_is_killed(port: int) -> None:
    from ray import serve

    def running() -> int:
        status = serve.status().applications["default"].deployments["Replica"]
        return int(status.replica_states.get("RUNNING", 0))

    before = text(port)
    replicas = [p for p in psutil.process_iter() if "ServeReplica:default:Replica" in p.name()]
    replicas = replicas or [
        p for p in psutil.process_iter() if "ServeReplica:default:Replica" in " ".join(p.cmdline())
    ]
    replicas[0].kill()
    until(lambda: running() == 2)
    assert [text(port) for _ in range(8)] == [before] * 8


def test_what_is_wrong_is_said_before_a_replica_is_made() -> None:
    from idlm.integrations.ray import app

    with pytest.raises(InputError, match="there is no model; use model"):
        app({})
    with pytest.raises(InputError, match="'modle' is no argument; use model"):
        app({"modle": "nano"})
    with pytest.raises(InputError, match="EngineConfig"):
        app({"model": "nano", "engine": {"slots": 3}})
