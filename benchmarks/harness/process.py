"""`ServerProcess`: `idlm serve` (or another server) as users start it, seen from outside."""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import psutil
from prometheus_client.parser import text_string_to_metric_families

HANG_SECONDS = 600.0
"""A start, an answer or an end that takes longer than this hangs, even on a busy machine."""
IDLE = (
    *("idlm_samples_running", "idlm_samples_waiting", "idlm_kv_pages_live"),
    *("idlm_queue_samples", "idlm_queue_tokens"),
)
"""Gauges that are zero when no request is left."""


def free_port() -> int:
    """A port on which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def idlm_serve(*options: str) -> list[str]:
    """The command of this environment's `idlm serve`, without `--port`."""
    return [str(Path(sys.executable).with_name("idlm")), "serve", *options]


class ServerProcess:
    """A server process that is ready inside `with`; its log is a temporary file.

    Args:
        command: starts it; `--port` is added.
        ready: the path that answers 200 once the server takes requests.

    Raises:
        RuntimeError: it ended, or was not ready in time; the message holds the end of its log.
    """

    def __init__(
        self, command: Sequence[str], ready: str = "/ready", start_seconds: float = HANG_SECONDS
    ) -> None:
        self._command, self._ready, self._start_seconds = command, ready, start_seconds
        self._log = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115  # open while the server is
        self.port = free_port()

    def __enter__(self) -> ServerProcess:
        command = [*self._command, "--port", str(self.port)]
        self.process = subprocess.Popen(command, stdout=self._log, stderr=self._log)
        try:
            self.wait_ready(self._start_seconds)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self, seconds: float = 30.0) -> int:
        """End it and its child processes; returns the exit status."""
        family = self._family() if self.process.poll() is None else []
        self.process.terminate()
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()
        finally:
            for child in psutil.wait_procs(family, 5)[1]:
                child.kill()

    def kill(self) -> None:
        """kill -9 of it and its child processes, as when its machine is lost."""
        for process in (psutil.Process(self.process.pid), *self._family()):
            process.kill()
        self.process.wait()

    def wait_ready(self, seconds: float = HANG_SECONDS) -> float:
        """Wait until it takes requests; returns the seconds that took."""
        started = time.perf_counter()
        while self.get(self._ready)[0] != 200:
            if self.process.poll() is not None:
                raise RuntimeError(
                    f"the server ended with status {self.process.returncode}:\n{self.log_end()}"
                )
            if time.perf_counter() - started > seconds:
                raise RuntimeError(
                    f"the server was not ready within {seconds:g} s:\n{self.log_end()}"
                )
            time.sleep(0.1)
        return time.perf_counter() - started

    def get(self, path: str) -> tuple[int, str]:
        """Status and body of a GET; status 0 if no server listens."""
        try:
            with urllib.request.urlopen(
                f"http://127.0.0.1:{self.port}{path}", timeout=60
            ) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except (OSError, urllib.error.URLError):
            return 0, ""

    def metrics(self) -> dict[str, float]:
        """Values of the metrics without labels, by name."""
        families = text_string_to_metric_families(self.get("/metrics")[1])
        samples = [sample for family in families for sample in family.samples]
        return {sample.name: sample.value for sample in samples if not sample.labels}

    def wait_idle(self, seconds: float = HANG_SECONDS) -> tuple[float, dict[str, float]]:
        """Wait until no request is left; returns the seconds that took, and the gauges that are not
        zero."""
        started = time.perf_counter()
        while True:
            metrics = self.metrics()
            left = {name: metrics[name] for name in IDLE if metrics[name]}
            if not left or time.perf_counter() - started > seconds:
                return time.perf_counter() - started, left
            time.sleep(0.05)

    def engine(self) -> psutil.Process:
        return next(p for p in self._family() if "idlm.serving.worker" in p.cmdline())

    def _family(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def log_end(self, characters: int = 2000) -> str:
        """The last characters of its log."""
        self._log.seek(0)
        return self._log.read()[-characters:]
