"""Runs generated code in a process that is locked up; `sandbox_child` says how.

No network, no other process, a read-only file system with a small folder in memory, and limits of
time, memory and size. Where the system does not allow that, nothing runs and the error says why.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from time import monotonic
from typing import IO

import psutil

from idlm.errors import InputError

CHILD = Path(__file__).with_name("sandbox_child.py")
PATIENCE = 30
SIGNALS = {
    "SIGSYS": "a system call that is not allowed (a process, a socket, a mount)",
    "SIGKILL": "the limit of CPU time",
    "SIGXCPU": "the limit of CPU time",
    "SIGSEGV": "a crash, as out of memory or stack",
}


@dataclass(frozen=True)
class Limits:
    """What a program may use.

    Attributes:
        seconds: of wall time; longer, up to `PATIENCE` times, for a program that still computes.
        cpu: seconds of CPU time.
        memory: bytes of address space.
        file: bytes of a file, and of the output.
        space: bytes of all files together.
    """

    seconds: float = 20.0
    cpu: int = 10
    memory: int = 1 << 30
    file: int = 16 << 20
    space: int = 64 << 20


USUAL = Limits()


@dataclass(frozen=True)
class Outcome:
    """How a program ended.

    Attributes:
        end: "finished" (its last line was run), "exit" (it left by itself before that), "error" (an
            exception), "stopped" (a limit, or a call that is not allowed).
        detail: the exit status, the exception, or what stopped it.
        output: what it wrote to stdout.
    """

    end: str
    detail: str
    output: str

    @property
    def finished(self) -> bool:
        """Whether all of the program was run, its tests included."""
        return self.end == "finished"


def check() -> None:
    """Check that programs can be locked up here.

    Raises:
        InputError: they cannot; the message says why.
    """
    run("pass")


def run(source: str, stdin: str = "", limits: Limits = USUAL) -> Outcome:
    """Run a Python program.

    Raises:
        InputError: it cannot be locked up here, so it was not run.
    """
    if sys.platform != "linux":
        raise _refused(f"it needs Linux, and this is {sys.platform}")
    nonce = secrets.token_hex(16)  # the program cannot claim that it reached its end
    job = {"source": source, "nonce": nonce, **asdict(limits)}
    with (
        tempfile.TemporaryDirectory(prefix="idlm-sandbox-") as folder,
        tempfile.TemporaryFile() as given,
        tempfile.TemporaryFile() as read,
        tempfile.TemporaryFile() as written,
        tempfile.TemporaryFile() as report,
    ):
        _fill(given, json.dumps(job).encode())
        _fill(read, stdin.encode("utf-8", "replace"))
        in_time = _wait(folder, (given, read, written, report), limits.seconds)
        report.seek(0)
        told = report.read().decode("utf-8", "replace")
        written.seek(0)
        output = written.read(limits.file).decode("utf-8", "replace")
    if not in_time:
        return Outcome("stopped", f"the limit of {limits.seconds:g} s", output)
    return _outcome(told, nonce, output)


def _fill(file: IO[bytes], content: bytes) -> None:
    file.write(content)
    file.flush()
    file.seek(0)


def _wait(folder: str, files: tuple[IO[bytes], ...], seconds: float) -> bool:
    """Run the child, and whether it ended in time."""
    given, read, written, report = files
    environment = {"PATH": "/usr/bin:/bin", "HOME": folder, "TMPDIR": folder}
    environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "LANG": "C.UTF-8"}
    words = [sys.executable, "-I", "-B", str(CHILD), str(given.fileno()), str(report.fileno())]
    child = subprocess.Popen(
        [*words, folder],
        stdin=read,
        stdout=written,
        stderr=subprocess.DEVNULL,
        pass_fds=(given.fileno(), report.fileno()),
        env=environment,
        cwd=folder,
        start_new_session=True,
    )
    started = monotonic()
    try:
        while monotonic() - started < PATIENCE * seconds:
            with suppress(subprocess.TimeoutExpired):
                child.wait(min(1.0, seconds))
                return True
            if monotonic() - started >= seconds and not _computes(child.pid):
                return False
    finally:  # also when we are interrupted
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    return False


def _computes(pid: int) -> bool:
    """Whether a process of the child's wants the CPU. On a busy machine that is no fault of its
    own, and the limit of CPU time ends it in any case."""
    with suppress(psutil.Error):
        return any(
            one.status() in (psutil.STATUS_RUNNING, psutil.STATUS_DISK_SLEEP)
            for one in psutil.Process(pid).children()
        )
    return False


def _outcome(told: str, nonce: str, output: str) -> Outcome:
    end, _, detail = told.partition("\n")
    if end == "refused":
        raise _refused(detail)
    if end == "finished":
        claimed = detail != nonce
        return Outcome("stopped" if claimed else "finished", "a false report" * claimed, output)
    if end in ("error", "exit"):
        return Outcome(end, detail.strip(), output)
    name = detail.partition("\n")[0] if end == "signal" else ""
    return Outcome("stopped", SIGNALS.get(name, name or "an end without a report"), output)


def _refused(reason: str) -> InputError:
    return InputError(
        f"generated code cannot be run safely here: {reason}; "
        "run it on Linux 5.12 or later with user namespaces allowed, or leave the suite out"
    )
