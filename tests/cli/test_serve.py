"""`idlm serve` as a process: it announces itself, finishes what runs at its end, and reports
mistakes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import httpx2 as httpx
import pytest
from typer.testing import CliRunner

from idlm.cli import app
from tests.waiting import HANG_SECONDS, wait_until

PROGRAM = [sys.executable, "-c", "from idlm.cli import app; app(prog_name='idlm')", "serve"]
QUICK = [
    "--branches",
    "all",
    "--dtype",
    "float64",
    "--threads",
    "1",
    "--max-num-seqs",
    "2",
    "--kv-memory",
    "32MiB",
]
BODY = {"model": "nano", "prompt": "1 + 1 =", "max_tokens": 60, "ignore_eos": True, "stream": True}
BAD: dict[str, tuple[list[str], str]] = {
    # case: the command line, what the message must name
    "no model": ([], "MODEL"),
    "no such model": (["no/where/at-all"], "no/where/at-all"),
    "stride 0": (["nano", "--stride", "0"], "stride=0"),
    "no port": (["nano", "--port", "70000"], "70000"),
    "no address": (["nano", "--host", "300.1.1.1", "--port", "0"], "300.1.1.1"),
    "an adapter without a name": (["nano", "--adapter", "runs/x"], "runs/x"),
    "two adapters of one name": (["nano", "--adapter", "a=x", "--adapter", "a=y"], "'a'"),
    "an adapter that is the model": (["nano", "--name", "a", "--adapter", "a=x"], "'a'"),
    "an empty name": (["nano", "--name", " "], "--name"),
    "an empty key": (["nano", "--api-key", ""], "API key"),
    "no origin": (["nano", "--allowed-origins", "example.org"], "example.org"),
    "no list of origins": (["nano", "--allowed-origins", '["*", 5]'], "5"),
    "no memory": (["nano", "--kv-memory", "much"], "much"),
    "no slots": (["nano", "--max-num-seqs", "0"], "--max-num-seqs 0"),
    "no threads": (["nano", "--threads", "0"], "--threads 0"),
    "no queue": (["nano", "--queue-requests", "0"], "--queue-requests 0"),
    "no tokens": (["nano", "--queue-tokens", "-1"], "--queue-tokens -1"),
    "no samples": (["nano", "--max-n", "0"], "--max-n 0"),
    "no time": (["nano", "--timeout", "nan"], "--timeout nan"),
    "endless drain": (["nano", "--drain-seconds", "inf"], "--drain-seconds inf"),
}


@pytest.mark.parametrize("case", BAD)
def test_mistakes_are_one_line(case: str) -> None:
    arguments, named = BAD[case]
    result = CliRunner().invoke(app, ["serve", *arguments])
    assert result.exit_code == 2, result.output
    assert (
        result.stderr.count("\n") == 1
        and result.stderr.startswith("error: ")
        and named in result.stderr
    )


def test_a_port_in_use_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = CliRunner().invoke(app, ["serve", "nano", "--port", port])
    assert result.exit_code == 2 and port in result.stderr and result.stderr.count("\n") == 1


@contextmanager
def running(*arguments: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process of a server, and its URL."""
    command = [*PROGRAM, "nano", "--port", "0", *QUICK, *arguments]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, stdout=pipe, stderr=pipe, text=True, env=os.environ | environment
    ) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith("idlm serves small at http://127.0.0.1:"), process.communicate()
            yield process, line.split()[-1]
        finally:
            process.kill()


def test_sigterm_lets_what_runs_finish() -> None:
    body = BODY | {"model": "small"}
    patient = "--drain-seconds", str(HANG_SECONDS)
    with running("--name", "small", "--log-prompts", *patient, IDLM_API_KEY="k") as (process, url):
        assert httpx.get(f"{url}/models", timeout=HANG_SECONDS).status_code == 401
        headers = {"Authorization": "Bearer k"}
        with httpx.stream(
            "POST", f"{url}/completions", json=body, headers=headers, timeout=HANG_SECONDS
        ) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            *chunks, done = [line.removeprefix("data: ") for line in lines if line]
            assert done == "[DONE]"
        rest, log = process.communicate(timeout=HANG_SECONDS)
        assert process.returncode == 0 and rest == ""
        records = [json.loads(line) for line in log.splitlines()]  # to the last: all is JSON
        (line,) = [line for line in records if line.get("path") == "/v1/completions"]
        assert line["prompts"] == ["1 + 1 ="] and line["status"] == 200
        assert line["outputs"][0].endswith(
            "".join(json.loads(chunk)["choices"][0]["text"] for chunk in chunks)
        )
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/models")


def test_the_drain_has_an_end() -> None:
    body = BODY | {"model": "small", "max_tokens": 400}
    with running("--name", "small", "--drain-seconds", "0.2") as (process, url):
        with httpx.stream(
            "POST", f"{url}/completions", json=body, timeout=HANG_SECONDS
        ) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGINT)
            last = [line for line in lines if line][-1]
        assert last.startswith('data: {"error":')
        process.communicate(timeout=HANG_SECONDS)
        assert process.returncode == 0


def test_a_second_signal_ends_at_once() -> None:
    """With work for longer than the test takes on any machine, and a drain that waits for all of
    it."""
    body = BODY | {"model": "small", "prompt": ["1 + 1 ="] * 8, "n": 8, "max_tokens": 400}
    with running("--name", "small", "--drain-seconds", "3600") as (process, url):
        with httpx.stream(
            "POST", f"{url}/completions", json=body, timeout=HANG_SECONDS
        ) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGINT)
            wait_until(lambda: refused(url))
            assert process.poll() is None
            process.send_signal(signal.SIGINT)
            rest = []
            with suppress(httpx.RemoteProtocolError, httpx.ReadError):
                rest += lines
            assert "data: [DONE]" not in rest
        process.communicate(timeout=HANG_SECONDS)
        assert process.returncode == 0


def refused(url: str) -> bool:
    """Whether connections are refused."""
    try:
        socket.create_connection(
            ("127.0.0.1", int(url.split(":")[2].split("/")[0])), timeout=HANG_SECONDS
        ).close()
    except ConnectionRefusedError:
        return True
    return False
