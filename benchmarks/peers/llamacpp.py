"""llama.cpp's server over HTTP on this machine: a greedy closed loop of `concurrency` requests.

`make llamacpp` builds its environment.

    build/llamacpp/bin/python benchmarks/peers/llamacpp.py --model FILE-F32.gguf [--slots 8] ... \\
        < workload.jsonl

"native" is `llama-server` compiled for this machine's instruction set, in a process of its own;
"wheel" is the server of the binary package xllamacpp, which is compiled for AVX2 and runs in this
process. Each has a slot for every request in flight and no prompt cache, so that no round profits
from the one before. The KV cache is float16 whatever the weights are: that is the server's default,
and it was measured to be faster than float32. Responses come whole, so that tokens do not pay for
HTTP; times of tokens are the server's own, which do not include the worst gap. With `ignore_eos`
this server never gives an end token, whereas the other engines give it and go on. See protocol.py.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from functools import partial
from pathlib import Path
from typing import Any

import protocol

PROGRAM = Path(sys.executable).with_name("llama-server")
CONTEXT = 1024
"""Tokens of a slot."""
START_SECONDS = 120


class Answer:
    """The response to one request: its tokens and the server's own times."""

    def __init__(self, body: dict[str, Any], seconds: float) -> None:
        self.token_ids: list[int] = body["tokens"]
        decoding = body["timings"]["predicted_ms"] / 1e3  # from the first token to the last
        self.ttft = seconds - decoding
        self.tpot = decoding / max(1, len(self.token_ids) - 1)

    def report(self) -> dict[str, object]:
        return {
            "token_ids": self.token_ids,
            "ttft": self.ttft,
            "tpot": self.tpot,
            "worst_gap": math.nan,
        }


def fields(request: protocol.Request) -> dict[str, object]:
    """The body of a request: greedy, up to its limit, with the tokens in the response."""
    return {
        "prompt": request["prompt_token_ids"],
        "n_predict": request["max_tokens"],
        "temperature": 0.0,
        "samplers": ["temperature"],
        "ignore_eos": True,
        "cache_prompt": False,
        "return_tokens": True,
        "stream": False,
    }


def ask(address: str, request: protocol.Request) -> Answer:
    """Post one request and wait for the whole response."""
    started = time.perf_counter()
    body = json.dumps(fields(request)).encode()
    post = urllib.request.Request(
        f"{address}/completion", body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(post) as answer:
        return Answer(json.load(answer), time.perf_counter() - started)


def closed_loop(address: str, requests: list[protocol.Request], concurrency: int) -> list[Answer]:
    """Serve the requests from `concurrency` threads; answers in the order of the requests."""
    waiting, answers = iter(range(len(requests))), [None] * len(requests)
    taking = threading.Lock()

    def work() -> None:
        while (index := take()) is not None:
            answers[index] = ask(address, requests[index])

    def take() -> int | None:
        with taking:
            return next(waiting, None)

    threads = [threading.Thread(target=work) for _ in range(concurrency)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if None in answers:
        raise RuntimeError("a request failed; see the server's messages above")
    return answers


class Native:
    """`llama-server` from beside this environment's Python, in a process of its own."""

    def __init__(self, options: argparse.Namespace) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{port}"
        command = [str(PROGRAM), *arguments(options), "--port", str(port)]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=2)
        wait_until_ready(self.address, self.process)

    def cpu_seconds(self) -> float:
        """CPU time of the server so far."""
        after_name = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(after_name[11]) + int(after_name[12])) / os.sysconf("SC_CLK_TCK")

    def peak_memory_mb(self) -> float:
        """The server's high-water mark so far."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=30)


def arguments(options: argparse.Namespace) -> list[str]:
    """The command line of `llama-server`, without the port."""
    named = {
        "--model": options.model,
        "--host": "127.0.0.1",
        "--threads": options.threads,
        "--threads-batch": options.threads,
        "--parallel": options.slots,
        "--ctx-size": options.slots * CONTEXT,
        "--cache-ram": 0,
        "--fit": "off",
        "--log-verbosity": 1,
    }
    return [*(str(part) for pair in named.items() for part in pair), "--no-kv-unified", "--no-ui"]


def wait_until_ready(address: str, process: subprocess.Popen[bytes]) -> None:
    """Return once the server has loaded its model.

    Raises:
        RuntimeError: it ended, or took too long.
    """
    for _ in range(10 * START_SECONDS):
        if process.poll() is not None:
            break
        try:
            with urllib.request.urlopen(f"{address}/health"):
                return
        except OSError:  # it does not listen yet, or it is still loading the model
            time.sleep(0.1)
    raise RuntimeError("llama-server did not start; see its messages above")


def native(options: argparse.Namespace) -> protocol.Engine:
    """The compiled server as an engine."""
    server = Native(options)
    run = partial(closed_loop, server.address)
    return protocol.Engine(run, server.cpu_seconds, server.peak_memory_mb, server.close)


def wheel(options: argparse.Namespace) -> protocol.Engine:
    """The server of the binary package as an engine."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = options.model
    params.n_parallel, params.n_ctx = options.slots, options.slots * CONTEXT
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = options.threads
    params.kv_unified, params.cache_ram_mib, params.fit_params, params.verbosity = (
        False,
        0,
        False,
        1,
    )
    server = xllamacpp.Server(params)
    # the function keeps the server alive
    return protocol.Engine(
        lambda requests, concurrency: closed_loop(server.listening_address, requests, concurrency)
    )


def versions(mode: str) -> dict[str, str]:
    """The version of the package, or what the program reports."""
    if mode == "wheel":
        return protocol.installed("xllamacpp")
    output = subprocess.run([PROGRAM, "--version"], capture_output=True, text=True, check=True)
    return {
        "llama.cpp": (output.stdout + output.stderr).partition("version: ")[2].partition("\n")[0]
    }


if __name__ == "__main__":
    options = protocol.parse(__doc__, "native", "wheel")
    kind = Path(options.model).stem.rpartition("-")[2]
    load = {"native": native, "wheel": wheel}[options.mode]
    protocol.serve(
        "llama.cpp", f"{kind} {options.mode}", versions(options.mode), lambda: load(options)
    )
