"""Generated code is locked up: what it must not do ends it, and never counts as finished."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from idlm.errors import InputError
from idlm.evaluation import sandbox
from idlm.evaluation.sandbox import Limits, run

LIMITS = Limits(seconds=60, cpu=1)
SYSTEM_CALL = "a system call that is not allowed"
FILL = "n = 0\nwhile True:\n    open(f'{n}', 'wb').write(bytes(1 << 22)); n += 1"
SWALLOW = "\nexcept BaseException:\n    pass"


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("import socket\ntry:\n    socket.socket()" + SWALLOW, SYSTEM_CALL),
        ("import os\ntry:\n    os.fork()" + SWALLOW, SYSTEM_CALL),
        ("import subprocess\ntry:\n    subprocess.run(['ls'])" + SWALLOW, SYSTEM_CALL),
        ("import os\nos.execv('/bin/true', ['true'])", SYSTEM_CALL),
        ("import ctypes\nctypes.CDLL(None).umount2(b'/proc', 0)", SYSTEM_CALL),
        (FILL, "No space left"),
        ("open('large', 'wb').write(bytes(1 << 25))", "File too large"),
        ("open('/tmp/elsewhere', 'w')", "Read-only file system"),
        ("while True:\n    print('x' * 1000)", "File too large"),
        ("while True:\n    pass", "the limit of CPU time"),
        ("x = bytearray(1 << 40)", "MemoryError"),
        ("import os\nos._exit(0)", "an end without a report"),
        ("raise SystemExit(0)", "0"),
        ("assert 1 == 2, 'not so'", "AssertionError: not so"),
        ("def broken(:", "SyntaxError"),
    ],
)  # fmt: skip
def test_what_does_not_finish(code: str, why: str) -> None:
    outcome = run(code, limits=LIMITS)
    assert not outcome.finished and why in outcome.detail


def test_what_takes_too_long() -> None:
    outcome = run("import time\ntime.sleep(1000)", limits=Limits(seconds=1))
    assert outcome.end == "stopped" and outcome.detail == "the limit of 1 s"


def test_a_program_cannot_report_its_own_end() -> None:
    claims = "import os\nfor at in range(3, 20):\n    try:\n        os.write(at, b'finished\\nyes')"
    outcome = run(claims + "\n    except OSError:\n        pass\nos._exit(0)")
    assert not outcome.finished


def test_what_finishes() -> None:
    code = (
        "import os, threading\nthread = threading.Thread(target=print, args=(input(),))\n"
        "thread.start(); thread.join()\nopen('f', 'w').write('x')\nassert os.listdir() == ['f']\n"
        "assert not os.path.exists('/proc/self') and set(os.environ) <= {'PATH', 'HOME', 'TMPDIR', "
        "'OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'LANG', 'LC_CTYPE'}"
    )
    outcome = run(code, "a line\n")
    assert outcome == sandbox.Outcome("finished", "", "a line\n")


def test_where_it_cannot_be_locked_up_nothing_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    child = tmp_path / "child.py"
    text = sandbox.CHILD.read_text()
    assert "libc.unshare(NEW_NAMESPACES)" in text
    child.write_text(text.replace("libc.unshare(NEW_NAMESPACES)", "libc.unshare(-1)"))
    monkeypatch.setattr(sandbox, "CHILD", child)
    with pytest.raises(InputError, match="cannot be run safely here: no namespaces"):
        run("open('/tmp/ran', 'w')")
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(InputError, match="it needs Linux"):
        run("pass")
